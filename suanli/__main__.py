"""`python -m suanli` is the command."""

from suanli.cli import main

if __name__ == "__main__":
    main()
