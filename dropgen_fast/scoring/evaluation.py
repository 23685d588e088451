"""The scores of a cohort: means with intervals, as JSON and as a table, and the file of single scores."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dropgen_fast.errors import InputError
from dropgen_fast.scoring.case import Score
from dropgen_fast.scoring.significance import CONFIDENCE, MIN_CASES, RESAMPLES, mean_interval

COLUMNS = ("case", "class", "class_name", "dice", "surface_dice", "hd95_mm", "volume_error_ml", "relative_volume_error",
           "label_voxels", "predicted_voxels", "tolerance_mm")
AVERAGED = ("dice", "surface_dice", "hd95_mm")
"""Measures that have a mean over the classes of a case."""
SIGNED = ("volume_error_ml", "relative_volume_error")
"""Measures whose mean says whether too much or too little is predicted, and the mean of whose size says how far off it is."""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found; the scores are ordered by case and then by class."""

    scores: tuple[Score, ...]
    classes: Mapping[int, str]
    """Foreground classes: value to name."""
    missing: tuple[str, ...] = ()
    """Cases that have a label and no prediction."""
    rejected: Mapping[str, str] = field(default_factory=dict)
    """Cases that could not be scored, each with one line that says why."""
    without_label: tuple[str, ...] = ()
    """Predictions that no label belongs to."""

    @property
    def cases(self) -> tuple[str, ...]:
        """The cases that were scored."""
        return tuple(dict.fromkeys(s.case for s in self.scores))

    @property
    def complete(self) -> bool:
        """Every label was scored."""
        return not self.missing and not self.rejected

    @property
    def mean_foreground_dice(self) -> float | None:
        """Mean over cases of the mean over a case's scored classes; None when nothing has a score."""
        return mean_foreground_dice(self.scores)

    def summary(self, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
        """Everything but the single scores, as written to summary.json; null where there is no number.

        Args:
            resamples: of the bootstrap, for each interval.
            seed: of the bootstrap.
        """
        def describe(values: list[float]) -> dict[str, Any]:
            return _describe(values, resamples, seed)

        def of_class(value: int) -> dict[str, Any]:
            mine = [s for s in self.scores if s.value == value]
            described: dict[str, Any] = {"value": value}
            for measure in (*AVERAGED, *SIGNED):
                values = [v for s in mine if (v := getattr(s, measure)) is not None]
                described[measure] = describe(values)
                if measure in SIGNED:
                    described[measure]["mean_absolute"] = statistics.fmean(map(abs, values)) if values else None
            described["hd95_undefined"] = sum(s.hd95_undefined for s in mine)
            described["tolerance_mm"] = next((s.tolerance_mm for s in mine if s.tolerance_mm is not None), None)
            return described

        return {"mean_foreground_dice": self.mean_foreground_dice,
                "cases": len(self.cases),
                "missing_predictions": list(self.missing),
                "rejected": dict(self.rejected),
                "predictions_without_label": list(self.without_label),
                "interval": {"confidence": CONFIDENCE, "method": "BCa bootstrap of the mean over cases",
                             "resamples": resamples, "seed": seed, "fewest_cases": MIN_CASES},
                "mean_over_classes": {m: describe(list(case_means(self.scores, m).values())) for m in AVERAGED},
                "per_class": {name: of_class(value) for value, name in self.classes.items()}}


def case_means(scores: Sequence[Score], measure: str) -> dict[str, float]:
    """For each case, the mean over its classes that have a value of one measure (a field of `Score`); others are left out."""
    per_case: dict[str, list[float]] = {}
    for score in scores:
        if (value := getattr(score, measure)) is not None:
            per_case.setdefault(score.case, []).append(value)
    return {case: statistics.fmean(values) for case, values in per_case.items()}


def mean_foreground_dice(scores: Sequence[Score]) -> float | None:
    """Mean over cases of the mean over a case's scored classes; None when nothing has a score."""
    means = case_means(scores, "dice")
    return statistics.fmean(means.values()) if means else None


def table(summary: Mapping[str, Any]) -> str:
    """A summary for a terminal: a row per class, a row for the mean over a case's classes, and what the brackets are."""
    rows = [("class", "cases", "Dice", "surface Dice", "HD95 mm", "no HD95", "volume error ml", "relative %")]
    for name, row in summary["per_class"].items():
        relative = row["relative_volume_error"]["mean"]
        rows.append((name, str(row["dice"]["count"]), with_interval(row["dice"], 4), with_interval(row["surface_dice"], 4),
                     with_interval(row["hd95_mm"], 2), str(row["hd95_undefined"]),
                     with_interval(row["volume_error_ml"], 2, signed=True),
                     "-" if relative is None else f"{100 * relative:+.1f}"))
    overall = summary["mean_over_classes"]
    rows.append(("mean over classes", str(overall["dice"]["count"]), with_interval(overall["dice"], 4),
                 with_interval(overall["surface_dice"], 4), with_interval(overall["hd95_mm"], 2), "", "", ""))
    interval = summary["interval"]
    tolerances = sorted({row["tolerance_mm"] for row in summary["per_class"].values() if row["tolerance_mm"] is not None})
    cases = f"{summary['cases']} case{'' if summary['cases'] == 1 else 's'}"
    notes = [f"means over {cases}; surface Dice at {', '.join(f'{t:g}' for t in tolerances) or '-'} mm",
             f"[{interval['confidence']:.0%} interval, {interval['method']}, {interval['resamples']} resamples]"
             if summary["cases"] >= MIN_CASES else f"no intervals: fewer than {MIN_CASES} cases"]
    return "\n".join([aligned(rows), *notes])


def with_interval(described: Mapping[str, Any], digits: int, *, signed: bool = False, mean: str = "mean") -> str:
    """A mean and its interval, such as "0.8312 [0.7901, 0.8544]"; "-" where there is no mean."""
    def text(value: float) -> str:
        return f"{value:{'+' if signed else ''}.{digits}f}"

    if described[mean] is None:
        return "-"
    interval = described["interval"]
    return text(described[mean]) + ("" if interval is None else f" [{text(interval[0])}, {text(interval[1])}]")


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows under a header as columns of text: the first flush left, the others flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
             for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def scores_csv(scores: Sequence[Score]) -> str:
    """The content of per_case.csv: a row per case and class, an empty cell where there is no score."""
    def text(value: float | None) -> str:
        return "" if value is None else f"{value:.6f}"

    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(COLUMNS)
    for s in scores:
        rows.writerow((s.case, s.value, s.class_name, text(s.dice), text(s.surface_dice), text(s.hd95_mm),
                       text(s.volume_error_ml), text(s.relative_volume_error), s.label_voxels, s.predicted_voxels,
                       "" if s.tolerance_mm is None else repr(s.tolerance_mm)))
    return file.getvalue()


def read_scores(path: Path) -> list[Score]:
    """The scores of a per_case.csv.

    Raises:
        InputError: no such file, or not one of ours.
    """
    def number(text: str) -> float | None:
        return float(text) if text else None

    try:
        with path.open(newline="") as file:
            return [Score(row["case"], int(row["class"]), row["class_name"], number(row["dice"]), number(row["hd95_mm"]),
                          int(row["label_voxels"]), int(row["predicted_voxels"]), number(row["surface_dice"]),
                          number(row["tolerance_mm"]), number(row["volume_error_ml"])) for row in csv.DictReader(file)]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{path} is no table of this version of evaluate: columns {', '.join(COLUMNS)} wanted; "
                         "run evaluate again") from error


def _describe(values: list[float], resamples: int, seed: int) -> dict[str, Any]:
    """Mean and its interval, median, standard deviation (of the sample, n - 1) and count; None where there are too few values."""
    interval = mean_interval(values, resamples, seed)
    return {"mean": statistics.fmean(values) if values else None,
            "interval": None if interval is None else list(interval),
            "median": statistics.median(values) if values else None,
            "std": statistics.stdev(values) if len(values) > 1 else None,
            "count": len(values)}
