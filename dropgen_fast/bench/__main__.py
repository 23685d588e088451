"""``python -m dropgen_fast.bench``."""

import sys

from dropgen_fast.bench import main
from dropgen_fast.cli import run

if __name__ == "__main__":
    sys.exit(run("bench", main, sys.argv[1:]))
