"""`python -m qzo`, the same as `qzo`."""

import sys

from qzo.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
