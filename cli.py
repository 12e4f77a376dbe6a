"""The door of a checkout: `python cli.py plan ...` is `clustersim plan ...`."""

from clustersim.app import main

if __name__ == "__main__":
    main()
