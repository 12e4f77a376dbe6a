"""`python -m clustersim.app`."""

from clustersim.app import main

main()
