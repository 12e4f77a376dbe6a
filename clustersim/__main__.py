"""`python -m clustersim`."""

from clustersim.app import main

if __name__ == "__main__":
    main()
