"""`dropgen-fast prepare`: check and resample a cohort of NIfTI files into a store that training reads by region."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from dropgen_fast.cli import run
from dropgen_fast.data.bricks import BRICK
from dropgen_fast.data.cohort import Cohort, read_cohort, split_off_validation
from dropgen_fast.data.prepare import Report, Settings, cohort_spacing_mm, prepare_cohort
from dropgen_fast.data.store import others, read_index
from dropgen_fast.errors import InputError
from dropgen_fast.presets import Preset, load_preset, preset_names


@dataclass(frozen=True)
class PrepareConfig:
    """Settings of `prepare`; what is not given comes from the preset, then from the cohort."""

    source: Path
    """nnU-Net style folder (imagesTr, labelsTr, …, dataset.json) or CSV file (image, label, split)."""
    store: Path
    """Folder of the prepared store; new, empty, or a store to bring up to date."""
    preset: str | None = None
    """Name of a preset, or a YAML file with one."""
    spacing_mm: tuple[float, float, float] | None = None
    """Voxel spacing in mm along right-left, posterior-anterior, inferior-superior; else the preset's, else the cohort's median.

    Across slices over 3 times as thick as voxels are wide, and under a third as many, the 10th percentile, as nnU-Net does.
    """
    intensity_window: tuple[float, float] | None = None
    """Clip intensities to (low, high), for CT in Hounsfield units; else the preset's or none."""
    classes: tuple[str, ...] | None = None
    """Class names in the order of their label values, background first; else dataset.json's or the preset's."""
    dtype: Literal["float32", "float16", "int16"] = "float32"
    """Number type of the stored images; float16 and int16 halve their size, with steps of at most 1/2048 and 1/32767."""
    brick: tuple[int, int, int] = BRICK
    """Voxels, along each axis, of the blocks that a volume is stored in: what training reads at the least."""
    val_fraction: float | None = None
    """Share of the training cases to set aside for validation where there is no val split."""
    seed: int = 0
    """Decides which cases `val_fraction` sets aside."""
    workers: int = min(8, len(os.sched_getaffinity(0)))
    """Processes that prepare cases side by side."""
    scheduler: str | None = None
    """Prepare on the workers of this Dask scheduler instead, tcp://host:8786; all must see source and store at the same paths."""
    strict: bool = False
    """Stop at the first case that cannot be used."""
    prune: bool = False
    """Remove case folders of older sources or settings; not while a training still reads them."""


def main(argv: Sequence[str]) -> int:
    """Prepare a cohort; 0 if every case is in the store, 1 if some were left out (each listed with the reason)."""
    config = tyro.cli(PrepareConfig, args=list(argv), prog="dropgen-fast prepare", description=__doc__)
    with ended_by_sigterm():
        report = prepare(config)
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for entry in report.left_out:
        print(f"left out: case {entry.id}: {entry.reason}", file=sys.stderr)
    print(_summary(config, report))
    return 1 if report.left_out else 0


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """A SIGTERM ends the block as Ctrl-C does: what was begun is cleaned up, workers end, and the exit status is 143."""
    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def prepare(config: PrepareConfig) -> Report:
    """What the command does, without printing.

    Raises:
        InputError: whatever concerns the cohort, the settings or the store as a whole; `strict`: the first case at fault.
    """
    if config.workers < 1:
        raise InputError(f"workers must be at least 1, got {config.workers}")
    preset = load_preset(config.preset)
    cohort = read_cohort(config.source)
    if config.val_fraction is not None:
        cohort = split_off_validation(cohort, config.val_fraction, config.seed)
    classes, warnings = _classes(config, preset, cohort)
    spacing_mm = config.spacing_mm or preset.spacing_mm
    if spacing_mm is None:
        spacing_mm = cohort_spacing_mm(cohort)
        warnings += _moved_median(config.store, spacing_mm)
    settings = Settings(spacing_mm, config.intensity_window or preset.intensity_window, config.dtype, config.brick)
    # A preset of the user's own is found again from any folder.
    named = config.preset if config.preset is None or config.preset in preset_names() else str(Path(config.preset).resolve())
    report = prepare_cohort(cohort, config.store, settings, classes=classes, preset=named, workers=config.workers,
                            scheduler=config.scheduler, strict=config.strict, prune=config.prune)
    report.warnings[:0] = warnings
    return report


def _moved_median(store: Path, spacing_mm: tuple[float, float, float]) -> list[str]:
    """A warning where cases that were added or taken away have moved the cohort's spacing from that of the store."""
    try:
        before = read_index(store).spacing_mm
    except InputError:  # there is none, or one that is damaged or of another version: all is prepared anew without a question
        return []
    if before == spacing_mm:
        return []
    was, now = (" ".join(f"{s:g}" for s in spacing) for spacing in (before, spacing_mm))
    return [f"the cohort's median spacing is {now} mm, that of the store was {was} mm: every case is prepared anew; "
            f"--spacing-mm {was} keeps the store's"]


def _classes(config: PrepareConfig, preset: Preset, cohort: Cohort) -> tuple[tuple[str, ...] | None, list[str]]:
    """The class names to use, and warnings where two sources of them differ in name only."""
    if config.classes is not None and len(config.classes) < 2:
        raise InputError(f"classes must be at least two names, background first, got {config.classes}")
    if config.classes is not None and len(set(config.classes)) < len(config.classes):
        raise InputError(f"classes must each have a name of their own, got {config.classes}")
    named = [(where, names) for where, names in (("--classes", config.classes), ("dataset.json", cohort.classes),
                                                 (f"preset {config.preset}", preset.classes)) if names is not None]
    warnings = []
    for where, names in named[1:]:
        first_where, first = named[0]
        if len(names) != len(first):
            raise InputError(f"{first_where} has {len(first)} classes ({', '.join(first)}), {where} has {len(names)} "
                             f"({', '.join(names)}): they must agree")
        differing = [(v, a, b) for v, (a, b) in enumerate(zip(first, names, strict=True)) if a.casefold() != b.casefold()]
        if differing:
            value, a, b = differing[0]
            warnings.append(f"class {value} is {a!r} in {first_where} and {b!r} in {where}: check that label values mean the "
                            f"same; {first_where} is used")
    return (named[0][1] if named else None), warnings


def _summary(config: PrepareConfig, report: Report) -> str:
    counts = {split: sum(p.case.split == split for p in report.prepared) for split in ("train", "val", "test")}
    new = sum(not p.reused for p in report.prepared)
    lines = [f"{config.store}: {len(report.prepared)} cases ({', '.join(f'{n} {s}' for s, n in counts.items())}), {new} of them "
             f"prepared now, {len(report.prepared) - new} unchanged; {len(report.left_out)} left out",
             f"classes: {', '.join(f'{v} {name}' for v, name in enumerate(report.classes))}"]
    if unused := others(config.store.absolute(), read_index(config.store.absolute())):
        lines.append(f"{len(unused)} case folders of older sources or settings are no longer used; --prune removes them")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run("prepare", main, sys.argv[1:]))
