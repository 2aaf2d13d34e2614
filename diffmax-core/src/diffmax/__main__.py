"""`python -m diffmax`."""

import sys

from diffmax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
