"""Rows beside earlier ones of the same name, with a verdict on noise."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dropgen_fast.bench.report import Row
from dropgen_fast.errors import InputError

LESS_IS_BETTER = ("ms", "bytes", "GiB")
"""Units of which less is better. Of all others more is, but of `LESS_TOO`."""
LESS_TOO = ("_over_", "amplification")
"""Parts of names of ratios of which less is better."""
SAME = ("device", "threads")
"""What must be equal for two rows to be compared at all."""
MUST_HAVE = ("name", "value", "low", "high", "unit")


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSON-lines file.

    Raises:
        InputError: no such file, or a line that is no row.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--compare {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or any(key not in row for key in MUST_HAVE):
            raise InputError(f"--compare {path}, line {number}: not a row of the bench")
        rows.append(row)
    return rows


def comparable(now: Sequence[Row], before: Iterable[Row]) -> dict[str, tuple[Row, Row | None]]:
    """By name each row of now, and the latest earlier one of the same device, threads and case, None where there is none."""
    def key(row: Mapping[str, Any]) -> str:
        return json.dumps([row["name"], *(row.get(name) for name in SAME), _case(row)], sort_keys=True)

    latest = {key(row): row for row in before}
    return {row["name"]: (row, latest.get(key(row))) for row in now}


def verdict(now: Row, before: Row) -> str:
    """"within the noise" where the quartiles overlap, else "better" or "worse"."""
    if now["low"] <= before["high"] and before["low"] <= now["high"]:
        return "within the noise"
    less = now["unit"] in LESS_IS_BETTER or any(part in now["name"] for part in LESS_TOO)
    return "better" if (now["value"] < before["value"]) == less else "worse"


def screen(now: Sequence[Row], before: Iterable[Row]) -> str:
    """A line for each row that both have; how many could not be compared."""
    pairs = comparable(now, before)
    lines = [f"{'':<56}{'before':>12}{'now':>12}{'now ÷ before':>14}"]
    for name, (row, old) in pairs.items():
        if old is None:
            continue
        share = f"{row['value'] / old['value']:.2f}" if old["value"] else "-"
        lines.append(f"{name:<56}{old['value']:>12.4g}{row['value']:>12.4g}{share:>14}  {verdict(row, old)}")
    missing = sum(old is None for _, old in pairs.values())
    if missing == len(pairs):
        return "nothing to compare: no earlier row of this device, number of threads and case"
    if missing:
        lines.append(f"{missing} rows have no earlier one of this device, number of threads and case")
    return "\n".join(lines)


def _case(row: Mapping[str, Any]) -> Any:
    return row.get("case", row.get("cases"))
