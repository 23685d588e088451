"""The command line: ``dropgen-fast <command>`` and ``python -m dropgen_fast.<command>`` are the same thing.

Every command is a module with ``main(argv) -> exit status``. What a user can put right (`InputError`) is printed as
one line and ends with status 2; anything else is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence

from dropgen_fast.errors import InputError

COMMANDS = {
    "prepare": "resample a cohort of NIfTI files into a store that training reads by region",
    "train": "train DropGen, or ERM to compare with, on a prepared store, on one or many GPUs",
    "predict": "segment NIfTI images with a trained run, in their original geometry",
    "evaluate": "score predictions against labels: Dice, HD95, surface Dice, volumes; intervals, and a test between two runs",
    "bench": "where the time of a training goes on this machine, beside what one would write instead, and what to change",
    "demo": "the whole of it on real MR data that ships with a dependency, with a report at the end",
}


def run(command: str, main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Call a command's `main`; an `InputError`, or a file or disk that refuses, is one line on standard error and status 2."""
    try:
        return main(argv)
    except InputError as error:
        print(f"dropgen-fast {command}: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"dropgen-fast {command}: error: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"dropgen-fast {command}: interrupted", file=sys.stderr)
        return 130


def main() -> int:
    """Entry point of the ``dropgen-fast`` console script."""
    argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
        print("usage: dropgen-fast COMMAND [OPTIONS]\n\n" + "\n".join(lines)
              + "\n\ndropgen-fast COMMAND --help lists a command's options.")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        print(f"dropgen-fast: error: no command {name!r}; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    sys.path.insert(0, os.getcwd())  # as `python -m` does, so that a network or extractor of the user's is found
    return run(name, importlib.import_module(f"dropgen_fast.{name}").main, rest)
