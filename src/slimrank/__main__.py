"""``python -m slimrank`` is the command line."""

from slimrank.cli import main

if __name__ == "__main__":
    main()
