"""Two runs scored on the same labels, case by case: which is better, by how much, and is it chance?

A difference is this run minus the other. Pairs are made of cases that both have scored:

* *mean over classes*: a case's mean over the classes that both runs name. Dice and surface Dice take every class that has a
  value in the run, as the summaries do: where only one run invents a class that the label lacks, its 0 pulls that run down.
  HD95 takes the classes that have a value in both: a run must not gain by missing what is hard.
* *a class*: the cases in which both runs have a value; `only_here` and `only_there` count the others.

The p values of the classes of one measure are corrected for their number (Holm); the one over classes stands on its own.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dropgen_fast.errors import InputError
from dropgen_fast.scoring.case import Score
from dropgen_fast.scoring.evaluation import AVERAGED, aligned, case_means, with_interval
from dropgen_fast.scoring.significance import CONFIDENCE, MIN_CASES, RESAMPLES, holm, mean_interval, signed_rank_p

DIGITS = {"dice": 4, "surface_dice": 4, "hd95_mm": 2}
TITLES = {"dice": "Dice", "surface_dice": "surface Dice", "hd95_mm": "HD95 mm"}
DECIMALS = 9
"""Of a difference: scores have 6 in their file, and what a difference has beyond 9 is rounding, which would break ties."""

Key = tuple[str, int]
"""Case, and class by its value."""


@dataclass(frozen=True)
class Comparison:
    """What `compare` found, ready for comparison.json."""

    other: str
    """The folder of the run compared with."""
    cases: int
    """Cases in both runs."""
    cases_only_here: tuple[str, ...]
    cases_only_there: tuple[str, ...]
    classes_only_here: tuple[str, ...]
    classes_only_there: tuple[str, ...]
    resamples: int
    seed: int
    measures: Mapping[str, Mapping[str, Any]]
    """By measure: "mean_over_classes", and "per_class" by name."""

    def summary(self) -> dict[str, Any]:
        """As written to comparison.json; null where there is no number."""
        return {"compared_with": self.other, "difference": "this run minus the other", "cases": self.cases,
                "cases_only_here": list(self.cases_only_here), "cases_only_there": list(self.cases_only_there),
                "classes_only_here": list(self.classes_only_here), "classes_only_there": list(self.classes_only_there),
                "interval": {"confidence": CONFIDENCE, "method": "BCa bootstrap of the mean difference over cases",
                             "resamples": self.resamples, "seed": self.seed},
                "test": "Wilcoxon signed-rank, two-sided; p_holm is corrected over the classes of a measure",
                "fewest_pairs": MIN_CASES, **self.measures}

    def headline(self) -> dict[str, Any]:
        """The part that summary.json repeats: the differences of the means over classes."""
        return {"compared_with": self.other, "cases": self.cases,
                **{measure: {key: of["mean_over_classes"][key] for key in ("mean_difference", "interval", "p")}
                   for measure, of in self.measures.items()}}

    def table(self) -> str:
        """For a terminal: differences with their intervals and p values, and what was left out of them."""
        rows = [("difference", *(cell for measure in AVERAGED for cell in (TITLES[measure], "p")))]
        names = list(self.measures["dice"]["per_class"])
        for title, find, p in (*((name, lambda of, name=name: of["per_class"][name], "p_holm") for name in names),
                               ("mean over classes", lambda of: of["mean_over_classes"], "p")):
            cells = []
            for measure in AVERAGED:
                row = find(self.measures[measure])
                cells += [with_interval(row, DIGITS[measure], signed=True, mean="mean_difference"),
                          "-" if row[p] is None else f"{row[p]:.2g}"]
            rows.append((title, *cells))
        lines = [f"this run minus {self.other}, {self.cases} cases in both", aligned(rows),
                 f"[{CONFIDENCE:.0%} interval of the mean difference]; p of Wilcoxon's signed-rank test, of classes with "
                 f"Holm's correction; HD95: less is better; - under {MIN_CASES} pairs"]
        for what, where in (("case", "cases"), ("class", "classes")):
            for place, title in (("here", "this run"), ("there", "the other")):
                if names_only := getattr(self, f"{where}_only_{place}"):
                    lines.append(f"{what if len(names_only) == 1 else where} only in {title}: {', '.join(names_only)}")
        return "\n".join(lines)


def compare(here: Sequence[Score], there: Sequence[Score], other: str, resamples: int = RESAMPLES, seed: int = 0) -> Comparison:
    """Pair the scores of two runs and test the differences.

    Args:
        here: scores of this run, as read from its file: both rounded alike.
        there: scores of the other run.
        other: its folder, for messages.
        resamples: of the bootstrap, for each interval.
        seed: of the bootstrap.

    Raises:
        InputError: the runs were not scored alike (other labels, class names or tolerances), or share too few cases.
    """
    mine, its = ({(s.case, s.value): s for s in scores} for scores in (here, there))
    names, its_names = ({s.value: s.class_name for s in scores} for scores in (here, there))
    _check_scored_alike(mine, its, other)
    classes = {value: name for value, name in names.items() if value in its_names}
    cases, its_cases = (list(dict.fromkeys(s.case for s in scores)) for scores in (here, there))
    shared = [case for case in cases if case in set(its_cases)]
    means = {measure: _case_pairs(measure, mine, its, shared, classes) for measure in AVERAGED}
    if len(means["dice"]) < MIN_CASES:
        raise InputError(f"a comparison needs at least {MIN_CASES} cases that have a Dice in both runs, this run and {other} "
                         f"share {len(means['dice'])}")

    def describe(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
        return _describe(pairs, resamples, seed)

    measures: dict[str, dict[str, Any]] = {}
    for measure in AVERAGED:
        per_class = {}
        for value, name in classes.items():
            pairs, only_here, only_there = _class_pairs(measure, mine, its, shared, value)
            per_class[name] = {"value": value, **describe(pairs), "p_holm": None, "only_here": only_here,
                               "only_there": only_there}
        tested = [row for row in per_class.values() if row["p"] is not None]
        for row, corrected in zip(tested, holm([row["p"] for row in tested]), strict=True):
            row["p_holm"] = corrected
        measures[measure] = {"mean_over_classes": describe(means[measure]), "per_class": per_class}
    return Comparison(other, len(shared), tuple(c for c in cases if c not in shared),
                      tuple(c for c in its_cases if c not in shared),
                      tuple(n for v, n in names.items() if v not in classes),
                      tuple(n for v, n in its_names.items() if v not in classes), resamples, seed, measures)


def _check_scored_alike(mine: Mapping[Key, Score], its: Mapping[Key, Score], other: str) -> None:
    for key in (key for key in mine if key in its):
        a, b = mine[key], its[key]
        where = f"case {a.case}, class {a.value}"
        if a.class_name != b.class_name:
            raise InputError(f"class {a.value} is {a.class_name!r} in this run and {b.class_name!r} in {other}: score both with "
                             "the same --classes")
        if a.label_voxels != b.label_voxels:
            raise InputError(f"{where} has {a.label_voxels} voxels in the label of this run and {b.label_voxels} in that of "
                             f"{other}: only runs scored on the same labels can be compared")
        if None not in (a.tolerance_mm, b.tolerance_mm) and a.tolerance_mm != b.tolerance_mm:
            raise InputError(f"{where} was scored with --tolerance-mm {a.tolerance_mm:g} in this run and {b.tolerance_mm:g} in "
                             f"{other}: score both alike")


def _case_pairs(measure: str, mine: Mapping[Key, Score], its: Mapping[Key, Score], cases: Sequence[str],
                classes: Mapping[int, str]) -> list[tuple[float, float]]:
    """Means over the classes of each case, here and there, of the cases that have both."""
    keys = [(case, value) for case in cases for value in classes if (case, value) in mine and (case, value) in its]
    if measure == "hd95_mm":
        keys = [key for key in keys if mine[key].hd95_mm is not None and its[key].hd95_mm is not None]
    a, b = (case_means([scores[key] for key in keys], measure) for scores in (mine, its))
    return [(a[case], b[case]) for case in cases if case in a and case in b]


def _class_pairs(measure: str, mine: Mapping[Key, Score], its: Mapping[Key, Score], cases: Sequence[str],
                 value: int) -> tuple[list[tuple[float, float]], int, int]:
    """Values of one class, here and there, of the cases that have both; and how many have one here only, there only."""
    found = [tuple(getattr(scores[case, value], measure) if (case, value) in scores else None for scores in (mine, its))
             for case in cases]
    return ([(a, b) for a, b in found if a is not None and b is not None],
            sum(a is not None and b is None for a, b in found), sum(a is None and b is not None for a, b in found))


def _describe(pairs: Sequence[tuple[float, float]], resamples: int, seed: int) -> dict[str, Any]:
    differences = [round(a - b, DECIMALS) for a, b in pairs]
    interval = mean_interval(differences, resamples, seed)
    return {"pairs": len(pairs),
            "mean_here": statistics.fmean(a for a, _ in pairs) if pairs else None,
            "mean_there": statistics.fmean(b for _, b in pairs) if pairs else None,
            "mean_difference": statistics.fmean(differences) if pairs else None,
            "interval": None if interval is None else list(interval),
            "higher": sum(d > 0 for d in differences), "lower": sum(d < 0 for d in differences),
            "p": signed_rank_p(differences)}
