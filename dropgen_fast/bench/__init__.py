"""``python -m dropgen_fast.bench``: how fast this machine runs what this package is made of, as rows that can be kept."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """The command; what it needs is imported when it runs, so that naming the package stays cheap."""
    from dropgen_fast.bench.run import main as run_bench

    return run_bench(argv)
