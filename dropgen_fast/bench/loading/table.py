"""What was measured: as rows that are kept, and as tables for the screen.

A row is one JSON object: `name`, `value`, `unit`, `low` and `high` (the percentiles 20 and 80 over the rounds; `value` is the
median), the device and the software, and what was loaded. Names: `loading.<recipe>.<what>.<way>` for loading and augmentation,
`operator.<name>.<what>.<way>` for one augmentation alone, `chain.<name>.<what>.<way>` for augmentation of a batch that lies
ready. `patches_s` is of the wall clock, `ms` is that of a patch, `cpu_ms` the CPU time of a patch. `x` is how many times as
fast as the way ours was, and `cpu_x` how many times less CPU time it took, both taken within each round; for the way "step",
the training step, `x` is how many times as fast as training consumes patches they are made. `claim` is false where the
percentiles include 1 or are wider than the distance from 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dropgen_fast.bench.loading.processes import Turn, spread
from dropgen_fast.bench.measure import Spread

Row = dict[str, Any]
OURS = "ours"
VERSIONS = ("torch", "dali", "monai", "nnunetv2", "batchgeneratorsv2", "batchaug")


@dataclass(frozen=True)
class Group:
    """Ways that took turns, "ours" among them unless it is missing: `name` is the beginning of its rows' names."""

    name: str
    title: str
    labels: Mapping[str, str]
    """What the screen calls each way."""
    turns: Mapping[str, Sequence[Turn]]
    missing: Mapping[str, str]
    """Ways that could not be run, and why."""

    def ratios(self, way: str, what: str) -> Spread | None:
        """Of a way's `what`, less of which is better, to that of ours, within each round; None without ours or the way."""
        if OURS not in self.turns or way not in self.turns or way == OURS:
            return None
        pairs = zip(self.turns[way], self.turns[OURS], strict=True)
        return spread([getattr(theirs, what) / getattr(ours, what) for theirs, ours in pairs])


@dataclass(frozen=True)
class Operator:
    """One augmentation alone, milliseconds a patch in each round: ours with it minus ours without, and MONAI's transform.

    `what` they are: `ms` of the wall clock, or `cpu_ms`.
    """

    name: str
    what: str
    ms: Sequence[float]
    off_ms: Sequence[float]
    monai_ms: Sequence[float] = ()
    missing: Mapping[str, str] = field(default_factory=dict)

    @property
    def ratio(self) -> Spread | None:
        """MONAI's time over ours; None without MONAI's, or where ours, a difference, is lost in the scatter."""
        if not self.monai_ms or min(self.ms) <= 0:
            return None
        return spread([theirs / ours for theirs, ours in zip(self.monai_ms, self.ms, strict=True)])


# ---- rows -----------------------------------------------------------------------------------------------------------


def group_rows(group: Group, facts: Mapping[str, Any]) -> list[Row]:
    """Every row of a group."""
    rows = []
    for way, turns in group.turns.items():
        about = {**facts, "way": way, "rounds": len(turns), "patches": sum(turn.patches for turn in turns)}
        for what, unit in (("patches_s", "1/s"), ("ms", "ms"), ("cpu_ms", "ms")):
            rows.append(_row(f"{group.name}.{what}.{way}", spread([getattr(turn, what) for turn in turns]), unit, about))
        for what, of in (("x", "ms"), ("cpu_x", "cpu_ms")):
            ratio = group.ratios(way, of)
            if ratio is not None:
                rows.append(_row(f"{group.name}.{what}.{way}", ratio, "ratio", about))
    return rows


def operator_rows(operators: Sequence[Operator], facts: Mapping[str, Any]) -> list[Row]:
    """Every row of the operators."""
    rows = []
    for operator in operators:
        about = {**facts, "rounds": len(operator.ms)}
        name = f"operator.{operator.name}"
        rows.append(_row(f"{name}.{operator.what}.ours", spread(list(operator.ms)), "ms", about))
        rows.append(_row(f"{name}.{operator.what}.off", spread(list(operator.off_ms)), "ms", about))
        if operator.monai_ms:
            rows.append(_row(f"{name}.{operator.what}.monai", spread(list(operator.monai_ms)), "ms", about))
        if operator.ratio is not None:
            rows.append(_row(f"{name}.{'cpu_x' if operator.what == 'cpu_ms' else 'x'}.monai", operator.ratio, "ratio", about))
    return rows


def _row(name: str, value: Spread, unit: str, about: Mapping[str, Any]) -> Row:
    row = {"name": name, "value": value.median, "unit": unit, "low": value.low, "high": value.high, **about}
    if unit == "ratio":
        row["claim"] = value.verdict() == "claim"
    return row


# ---- screen ---------------------------------------------------------------------------------------------------------


def header(facts: Mapping[str, Any]) -> str:
    """What was measured on what."""
    versions = ", ".join(f"{name} {facts[name]}" for name in VERSIONS if facts[name])
    cores = "1 core" if facts["threads"] == 1 else f"{facts['threads']} cores"
    commit = (facts["commit"] or "unknown")[:12] + ("-dirty" if str(facts["commit"]).endswith("-dirty") else "")
    patch = "×".join(map(str, facts["patch"]))
    return (f"device   {facts['device']}, {cores}, load {facts['load_average']} at the start\n"
            f"with     dropgen_fast {facts['dropgen_fast']}, {versions}, commit {commit}\n"
            f"batches  {facts['batch_size']} patches of {patch} from {facts['volumes']}")


def group_table(group: Group) -> str:
    """The ways of a group."""
    lines = [_line(group.title, "patches/s", "CPU ms a patch", "× time", "× CPU time")]
    for way, label in group.labels.items():
        if way not in group.turns:
            continue
        values = [_range(spread([getattr(turn, what) for turn in group.turns[way]])) for what in ("patches_s", "cpu_ms")]
        lines.append(_line("  " + label, *values, *(_ratio(group.ratios(way, what)) for what in ("ms", "cpu_ms"))))
    return "\n".join([*lines, *(f"  {group.labels[way]}: left out, {why}" for way, why in group.missing.items())])


def operator_table(operators: Sequence[Operator], title: str) -> str:
    """The operators, the dearest of ours first."""
    lines = [_line(title, "ours, ms a patch", "MONAI, ms a patch", "× MONAI", "")]
    for operator in sorted(operators, key=lambda o: -spread(list(o.ms)).median):
        monai = _range(spread(list(operator.monai_ms))) if operator.monai_ms else "-"
        lines.append(_line("  " + operator.name, _range(spread(list(operator.ms))), monai, _ratio(operator.ratio), ""))
    off = [ms for operator in operators for ms in operator.off_ms]
    lines.append(_line("  (none: read, crop, min-max)", _range(spread(off)), "", "", ""))
    return "\n".join([*lines, *(f"  {o.name}: MONAI's left out, {why}" for o in operators for why in o.missing.values())])


NOTES = ("Median (percentiles 20 and 80) over the rounds. ×: that way's time a patch over ours, taken within each round; of the "
         "training step: how many times as fast as it consumes patches ours makes them, each with the cores to itself.\n"
         "≈ 1: the percentiles include 1. unclear: they are wider than the distance from 1, so nothing is claimed.")


def _line(*cells: str) -> str:
    first, *others = cells
    return " ".join([f"{first:<46}", *(f"{cell:>20}" for cell in others)]).rstrip()


def number(value: float) -> str:
    """Three digits that matter."""
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 0.1 else 4
    return f"{value:.{digits}f}"


def _range(value: Spread) -> str:
    return f"{number(value.median)} ({number(value.low)}-{number(value.high)})"


def _ratio(value: Spread | None) -> str:
    if value is None:
        return "-"
    verdict = value.verdict()
    if verdict == "claim":
        return _range(value)
    return f"{'≈ 1' if verdict == 'one' else 'unclear'} ({number(value.low)}-{number(value.high)})"
