"""Scores every case of two folders, side by side in processes where there is enough to do."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from dropgen_fast.data.parallel import in_processes, one_by_one
from dropgen_fast.errors import InputError
from dropgen_fast.scoring.case import Score, nameless, score_case
from dropgen_fast.scoring.evaluation import Evaluation

SUFFIXES = (".nii.gz", ".nii")
TOLERANCE_MM = 2.0
"""Of the surface Dice, as in the ABCs challenge (MICCAI 2020). Nikolov et al. take one per organ, from how far experts differ."""
WORTH_S = 30.0
"""Seconds of work ahead from which on processes are worth starting: each spends 3 to 4 on imports before it helps."""


def evaluate(predictions: Path, labels: Path, classes: Mapping[int, str] | None = None, *,
             tolerance_mm: float | Mapping[int, float] = TOLERANCE_MM, workers: int = 1) -> Evaluation:
    """Score every label map of one folder against the prediction of the same name in another.

    Args:
        predictions: folder of predicted label maps, <case>.nii.gz (or .nii).
        labels: folder of true label maps, named alike.
        classes: foreground classes, value to name; None takes the values found in the files.
        tolerance_mm: of the surface Dice, for all classes or by value.
        workers: processes to score in, where there is enough to do.

    A case without a prediction, or whose two files cannot be compared (unreadable, not 3D, other shape or geometry,
    values that are no class), or whose process died, is named in the result and left out; the others are scored.

    Raises:
        InputError: a folder that is not there or empty, or no case at all that could be scored.
    """
    label_files, prediction_files = _volumes(labels), _volumes(predictions)
    if not label_files:
        raise InputError(f"{labels} holds no label map; wanted <case>.nii.gz files")
    missing = tuple(case for case in label_files if case not in prediction_files)
    pairs = [_Pair(case, prediction_files[case], label) for case, label in label_files.items() if case in prediction_files]
    if not pairs:
        raise InputError(f"{predictions} holds no prediction for any of the {len(label_files)} labels in {labels}, "
                         f"for instance {next(iter(label_files))}; files are paired by name")
    results = {}
    for result in tqdm(_results(_Scoring(classes, tolerance_mm), pairs, workers), total=len(pairs), desc="evaluate", unit="case",
                       disable=None):
        results[result.case] = result
    ordered = [results[pair.case] for pair in pairs]
    found = {result.case: result.scores for result in ordered if result.scores is not None}
    rejected = {result.case: result.reason for result in ordered if result.scores is None}
    if not found:
        raise InputError(next(iter(rejected.values())))
    if classes is None:
        classes = {value: nameless(value) for value in sorted({v for scores in found.values() for v in scores})}
    if not classes:
        raise InputError(f"neither {labels} nor {predictions} holds any class but background: there is nothing to score")
    scores = tuple(by_value.get(value, Score(case, value, name, None, None, 0, 0))
                   for case, by_value in found.items() for value, name in classes.items())
    return Evaluation(scores, classes, missing, rejected, tuple(c for c in prediction_files if c not in label_files))


@dataclass(frozen=True)
class _Pair:
    case: str
    prediction: Path
    label: Path


@dataclass(frozen=True)
class _Result:
    """What became of a case: its scores by value, or None and the reason."""

    case: str
    scores: dict[int, Score] | None
    reason: str = ""


@dataclass(frozen=True)
class _Scoring:
    """Scores one case after the other; picklable."""

    classes: Mapping[int, str] | None
    tolerance_mm: float | Mapping[int, float]

    def __call__(self, pair: _Pair) -> _Result:
        """The case's scores, or why there are none."""
        try:
            return _Result(pair.case, score_case(pair.case, pair.prediction, pair.label, self.classes, self.tolerance_mm))
        except InputError as error:
            return _Result(pair.case, None, str(error))
        except MemoryError:
            return _Result(pair.case, None, f"{pair.prediction} does not fit in memory with its label: use fewer --workers")


def _results(scoring: _Scoring, pairs: Sequence[_Pair], workers: int) -> Generator[_Result, None, None]:
    """The result of every pair: in this process, or in several once the first shows that it is worth it."""
    begin = time.monotonic()
    yield scoring(pairs[0])
    rest = pairs[1:]
    if workers == 1 or (time.monotonic() - begin) * len(rest) < WORTH_S:
        yield from one_by_one(scoring, rest)
        return
    waiting = {pair.case: pair for pair in rest}
    with contextlib.suppress(InputError):  # a process was killed and took its pool along; `scoring` lets none out
        for result in in_processes(scoring, rest, workers):
            del waiting[result.case]
            yield result
    for pair in waiting.values():  # one at a time: the guilty one is found, the others are scored
        try:
            yield from in_processes(scoring, [pair], 1)
        except InputError:
            yield _Result(pair.case, None, f"{pair.prediction}: its process ended abruptly, most likely for want of memory")


def _volumes(folder: Path) -> dict[str, Path]:
    """Case name to file, in the order of names."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; wanted a folder of <case>.nii.gz files")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        suffix = next((s for s in SUFFIXES if path.name.endswith(s)), None)
        if suffix is None or path.name.startswith("."):
            continue
        case = path.name.removesuffix(suffix)
        if case in files:
            raise InputError(f"{files[case]} and {path} are the same case twice; keep one of them")
        files[case] = path
    return files
