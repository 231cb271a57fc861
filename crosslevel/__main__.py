"""``python -m crosslevel``: the command, where its script is not on the path."""

from crosslevel.cli import main

if __name__ == "__main__":
    main()
