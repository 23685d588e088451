"""Score predictions against labels: Dice, surface Dice, HD95 and volume error of every case and class.

    python -m dropgen_fast.evaluate --predictions DIR --labels DIR --out DIR [--compare DIR]

`scoring.case` says what is a score and what is none, `scoring.surfaces` how surfaces are measured, `scoring.significance`
how intervals and tests are made, `scoring.comparison` what is paired. The mean foreground Dice is the mean over cases of a
case's mean over its scored classes, so that every case weighs the same however many classes it shows.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from dropgen_fast.cli import run
from dropgen_fast.data.cohort import class_names
from dropgen_fast.errors import InputError
from dropgen_fast.files import write_atomically
from dropgen_fast.presets import load_preset
from dropgen_fast.scoring.case import Score
from dropgen_fast.scoring.cohort import TOLERANCE_MM, evaluate
from dropgen_fast.scoring.comparison import Comparison, compare
from dropgen_fast.scoring.evaluation import Evaluation, mean_foreground_dice, read_scores, scores_csv, table
from dropgen_fast.scoring.significance import RESAMPLES

__all__ = ["PER_CASE", "EvaluateConfig", "Evaluation", "Score", "evaluate", "main", "mean_foreground_dice", "read_scores",
           "resolve_classes"]

PER_CASE = "per_case.csv"
SUMMARY = "summary.json"
COMPARISON = "comparison.json"
FEWEST_RESAMPLES = 100


@dataclass
class EvaluateConfig:
    """Score predictions against labels: Dice, surface Dice, HD95 and volume error per case and class."""

    predictions: Path
    """Folder of predicted label maps, <case>.nii.gz."""
    labels: Path
    """Folder of true label maps, <case>.nii.gz."""
    out: Path
    """Folder that gets per_case.csv, summary.json and, with --compare, comparison.json."""
    classes: tuple[str, ...] = ()
    """Class names in the order of their values, background first; or one dataset.json, preset or preset file. Without
    it: the dataset.json beside the labels folder, else the values found in the files."""
    tolerance_mm: tuple[float, ...] = (TOLERANCE_MM,)
    """Distance within which a surface counts as right in the surface Dice: one, or one per foreground class in the order of
    their values."""
    compare: Path | None = None
    """Folder of another run's scores on the same labels: tests whether this run differs, case by case."""
    resamples: int = RESAMPLES
    """Draws of the bootstrap for each 95 % interval."""
    seed: int = 0
    """Of the bootstrap."""
    workers: int = min(8, len(os.sched_getaffinity(0)))
    """Processes that score cases side by side; fewer where memory is short."""
    overwrite: bool = False
    """Replace an evaluation of other predictions or labels that --out holds."""


def resolve_classes(classes: Sequence[str], labels: Path) -> dict[int, str] | None:
    """The foreground classes, value to name; None when neither the user nor a dataset.json names any.

    Args:
        classes: what the user gave: nothing; one dataset.json, preset or preset file; or names, background first.
        labels: the labels folder; a dataset.json beside it is read when the user gave nothing.

    Raises:
        InputError: no such file or preset, or one that names no classes.
    """
    if not classes:
        beside = labels.resolve().parent / "dataset.json"
        return _classes_of_dataset(beside) if beside.is_file() else None
    if len(classes) > 1:
        if len(set(classes)) < len(classes):
            raise InputError(f"--classes must name every class once, got {' '.join(classes)}")
        return _foreground(classes)
    if classes[0].endswith(".json"):
        return _classes_of_dataset(Path(classes[0]))
    names = load_preset(classes[0]).classes
    if names is None:
        raise InputError(f"preset {classes[0]} names no classes; give their names, background first")
    return _foreground(names)


def _classes_of_dataset(path: Path) -> dict[int, str]:
    """Foreground classes of an nnU-Net dataset.json."""
    try:
        labels = json.loads(path.read_text())["labels"]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f'{path} is no dataset.json: wanted JSON with "labels": {{"background": 0, ...}}') from error
    return _foreground(class_names(labels, str(path)))


def _foreground(names: Sequence[str]) -> dict[int, str]:
    """Value to name, without the background that comes first."""
    return dict(enumerate(names[1:], start=1))


def _tolerances(config: EvaluateConfig, classes: Mapping[int, str] | None) -> float | dict[int, float]:
    """Of the surface Dice, for all classes or by value."""
    wanted = config.tolerance_mm
    if not wanted or not all(math.isfinite(t) and t >= 0 for t in wanted):
        raise InputError(f"--tolerance-mm must be distances of 0 mm or more, got {' '.join(map(str, wanted)) or 'nothing'}")
    if len(wanted) == 1:
        return wanted[0]
    if classes is None:
        raise InputError("several --tolerance-mm need to know the classes: name them with --classes, or give one tolerance")
    if len(wanted) != len(classes):
        raise InputError(f"--tolerance-mm must be one distance or one for each of the {len(classes)} foreground classes "
                         f"({', '.join(classes.values())}), got {len(wanted)}")
    return dict(zip(classes, wanted, strict=True))


def _other_scores(config: EvaluateConfig) -> list[Score] | None:
    """Those of the run to compare with, read before the work begins."""
    if config.compare is None:
        return None
    if config.compare.resolve() == config.out.resolve():
        raise InputError(f"--compare {config.compare} is --out itself; wanted the folder of another run's scores")
    return read_scores(config.compare / PER_CASE)


def _check_out(config: EvaluateConfig) -> None:
    """An evaluation of the same two folders may be made again; any other stays unless the user says otherwise."""
    if config.out.exists() and not config.out.is_dir():
        raise InputError(f"--out {config.out} is a file; wanted a folder")
    held = [name for name in (SUMMARY, PER_CASE) if (config.out / name).exists()]
    if not held or config.overwrite:
        return
    try:
        before = json.loads((config.out / SUMMARY).read_text())
        same = {key: before[key] for key in ("predictions", "labels")} == _inputs(config)
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise InputError(f"--out {config.out} holds another evaluation ({held[0]}); choose another folder, "
                         "or give --overwrite to replace it")


def _inputs(config: EvaluateConfig) -> dict[str, str]:
    return {"predictions": str(config.predictions.resolve()), "labels": str(config.labels.resolve())}


def _compared(config: EvaluateConfig, other: list[Score] | None) -> Comparison | None:
    """The scores as they were written, rounded like the other's, beside them."""
    if other is None:
        return None
    return compare(read_scores(config.out / PER_CASE), other, str(config.compare), config.resamples, config.seed)


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def _report(evaluation: Evaluation, config: EvaluateConfig) -> None:
    """What was not scored, and why."""
    for name in evaluation.without_label:
        print(f"no label for prediction {name}: not scored")
    for line in evaluation.rejected.values():
        print(f"dropgen-fast evaluate: not scored: {line}", file=sys.stderr)
    if evaluation.missing:
        print(f"dropgen-fast evaluate: {len(evaluation.missing)} of {len(evaluation.cases) + len(evaluation.missing)} "
              f"labels have no prediction in {config.predictions}: {', '.join(evaluation.missing)}", file=sys.stderr)


def main(argv: Sequence[str]) -> int:
    """The command; 0 when every label was scored, 1 when a prediction was missing or could not be compared."""
    config = tyro.cli(EvaluateConfig, args=list(argv), prog="dropgen-fast evaluate")
    for name, least in (("workers", 1), ("resamples", FEWEST_RESAMPLES), ("seed", 0)):
        if (given := getattr(config, name)) < least:
            raise InputError(f"--{name} must be at least {least}, got {given}")
    _check_out(config)
    other = _other_scores(config)
    classes = resolve_classes(config.classes, config.labels)
    tolerance_mm = _tolerances(config, classes)
    new = not config.out.exists()
    config.out.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made is told before the work, not after
    try:
        evaluation = evaluate(config.predictions, config.labels, classes, tolerance_mm=tolerance_mm, workers=config.workers)
    except InputError:
        if new:
            config.out.rmdir()
        raise
    summary = evaluation.summary(config.resamples, config.seed)
    (config.out / COMPARISON).unlink(missing_ok=True)  # of an earlier evaluation
    write_atomically(config.out / PER_CASE, scores_csv(evaluation.scores))
    _write_json(config.out / SUMMARY, {**_inputs(config), **summary})
    print(table(summary))
    _report(evaluation, config)
    if comparison := _compared(config, other):
        _write_json(config.out / COMPARISON, comparison.summary())
        _write_json(config.out / SUMMARY, {**_inputs(config), **summary, "comparison": comparison.headline()})
        print(f"\n{comparison.table()}")
    return 0 if evaluation.complete else 1


if __name__ == "__main__":
    sys.exit(run("evaluate", main, sys.argv[1:]))
