"""`python -m deploy` is `steppe`."""

from deploy.cli import main

if __name__ == "__main__":
    main()
