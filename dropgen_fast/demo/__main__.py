"""``python -m dropgen_fast.demo``."""

import sys

from dropgen_fast.cli import run
from dropgen_fast.demo import main

if __name__ == "__main__":
    sys.exit(run("demo", main, sys.argv[1:]))
