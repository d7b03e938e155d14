"""`python -m recurrentgemma`: the command, where its script is not on the path."""

import sys

from recurrentgemma.cli import main

if __name__ == "__main__":
    sys.exit(main())
