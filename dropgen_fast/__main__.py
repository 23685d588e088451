"""``python -m dropgen_fast`` is the ``dropgen-fast`` console script."""

import sys

from dropgen_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
