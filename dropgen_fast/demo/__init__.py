"""``python -m dropgen_fast.demo``: the whole of it on real MR data that ships with a dependency, with a report."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """The command; what it needs is imported when it runs, so that naming the package stays cheap."""
    from dropgen_fast.demo.run import main as run_demo

    return run_demo(argv)
