"""``python -m archscan`` is the console script."""

import sys

from archscan.cli import main

if __name__ == "__main__":
    sys.exit(main())
