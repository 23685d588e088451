"""The suite "loading": patches a second out of a prepared store, beside what else would load and augment them, and bytes read.

Compared are our pipeline and, for the paper's recipe and for none, MONAI's CacheDataset with worker processes; for nnU-Net's
recipe, nnU-Net's own loader. `ways.py` says how each is set up, `processes.py` how they take turns. The volumes fit the page
cache: the rates are those of reading from memory, decoding and augmenting, not of a disk.

`read_amplification` is what reading costs the disk: the bytes that the kernel reads from a cold `volume.npy` for a crop of the
patch's size at a random place, its read-ahead and the rest of every touched brick and page included, over the bytes of the crop
(image and label as they are stored), for each of some crops. `reads.py` says how they are counted; `foreground.npy`, at most
98 KB, is not. It depends on the disk's read-ahead, which is told beside it, and on the volume: more than a file has is not
read. Where it cannot be counted, on a tmpfs or where the kernel does not tell, the row is missing and the screen says why.
"""

from __future__ import annotations

import dataclasses
import io
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from dropgen_fast.bench import machine
from dropgen_fast.bench.loading import ways
from dropgen_fast.bench.loading.processes import Opener, Place, Turn, opened, take_turns
from dropgen_fast.bench.loading.recipes import PAPER
from dropgen_fast.bench.loading.volumes import describe, make_store
from dropgen_fast.bench.measure import Spread
from dropgen_fast.data.augmentation import AugmentationConfig
from dropgen_fast.data.store import Store
from dropgen_fast.errors import InputError
from dropgen_fast.files import read_ahead_kib
from dropgen_fast.prepare import ended_by_sigterm

PATCH = (128, 128, 128)
SECONDS, QUICK_SECONDS = 20.0, 1.0
"""What the turns are given where nobody says: with the default patch, and for a smoke test of 32³ voxels."""
ROUNDS = 7
CASES, EDGES = 2, (1.75, 2.25)
"""Volumes that are made, and their edges in patches: with Linux' usual read-ahead no file ends before a crop's reading does."""
CROPS = 12
"""Whose bytes are counted."""
OURS = "ours"


@dataclass(frozen=True)
class LoadingConfig:
    """What is loaded."""

    patch: tuple[int, int, int] | None = None
    """Voxels; default 128³."""
    batch_size: int = 2
    """Patches."""
    recipe: str = "dropgen"
    """Of augmentation, as train's: dropgen (the paper's) or off, beside MONAI; nnunet, beside nnU-Net's loader."""
    store: Path | None = None
    """Prepared store to load from; by default one of smooth noise is made in the folder for temporary files and removed again."""


@dataclass(frozen=True)
class LoadingResult:
    """Turns of each way that could be run, the reasons for the others, and bytes read over bytes of the crop for each crop."""

    config: LoadingConfig
    threads: int
    volumes: str
    turns: Mapping[str, Sequence[Turn]]
    missing: Mapping[str, str]
    amplification: Sequence[float]
    uncounted: str
    """Why `amplification` is empty."""
    read_ahead_kib: int | None

    @property
    def rounds(self) -> int:
        """Turns of each way."""
        return len(self.turns[OURS])


def resolved(config: LoadingConfig) -> LoadingConfig:
    """The configuration with its patch; raises `InputError` for an option that does not fit."""
    config = dataclasses.replace(config, patch=config.patch or PATCH)
    assert config.patch is not None
    if min(config.patch) < 8:
        raise InputError(f"--loading.patch must be three numbers of at least 8, got {config.patch}")
    if config.batch_size < 1:
        raise InputError(f"--loading.batch-size must be at least 1, got {config.batch_size}")
    try:
        AugmentationConfig.named(config.recipe)
    except InputError as error:
        raise InputError(f"--loading.{error}") from error
    return config


def run(config: LoadingConfig, device: torch.device, seconds: float, progress: Callable[[str], None] = lambda text: None, *,
        rounds: int | None = None, threads: int | None = None) -> LoadingResult:
    """Measure for about `seconds`, all turns of all ways together; making a store and opening the ways come on top.

    Args:
        config: what is loaded.
        device: where batches end.
        seconds: of the turns; each is at least a batch of every worker.
        progress: is told what is done next.
        rounds: turns of each way; default 7.
        threads: cores that each way is held to, with as many threads or worker processes; default all of this process.

    Raises:
        InputError: an option that does not fit, a store that is none or has no training cases, DALI that is not installed.
    """
    config = resolved(config)
    assert config.patch is not None
    cores = tuple(sorted(os.sched_getaffinity(0)))
    if threads is not None and threads > len(cores):
        raise InputError(f"--threads must be at most the {len(cores)} cores that this process may use, got {threads}")
    cores = cores[:threads]
    with ended_by_sigterm(), tempfile.TemporaryDirectory(prefix="bench_loading_") as folder:
        if config.store is None:
            progress("making volumes")
            store = make_store(Path(folder) / "volumes", config.patch, cases=CASES, seed=0, workers=1, edges=edges(config.patch))
        else:
            store = config.store.absolute()
        volumes = describe(store)
        place = Place(store, Path(folder), config.patch, config.batch_size, cores, str(device))
        with opened(openers(config, place), place, progress) as (feeds, missing):
            if OURS in missing:
                raise RuntimeError(f"ours could not be run: {missing[OURS]}")
            progress("taking turns")
            turns = take_turns(feeds, rounds or ROUNDS, seconds / len(feeds))
        progress("counting bytes")  # once nobody has the files open any more
        amplification, uncounted = _amplification(store, config.patch)
        return LoadingResult(config, place.threads, volumes, turns, missing, amplification, uncounted, read_ahead_kib(store))


def screen(result: LoadingResult) -> str:
    """The result for a terminal."""
    d, h, w = result.config.patch or PATCH
    lines = [f"loading: batches of {result.config.batch_size} patches of {d} × {h} × {w}, recipe {result.config.recipe}, "
             f"{result.threads} cores, {result.rounds} rounds; {result.volumes}",
             f"{'':<18}{'patches/s':>10}{'quartiles':>20}{'CPU ms a patch':>16}{'quartiles':>20}"]
    for way, turns in result.turns.items():
        rate, cpu = Spread.of(turn.patches_s for turn in turns), Spread.of(turn.cpu_ms for turn in turns)
        lines.append(f"{way:<18}{rate.median:>10.1f}{f'{rate.low:.1f} – {rate.high:.1f}':>20}"
                     f"{cpu.median:>16.1f}{f'{cpu.low:.1f} – {cpu.high:.1f}':>20}")
    for way, spread in _ratios(result).items():
        text = {"claim": f"{spread.median:.2f}", "one": "no difference", "unclear": "unclear"}[spread.verdict()]
        lines.append(f"{f'x_{way}':<34}{text:>14}  ({spread.low:.2f} – {spread.high:.2f})")
    if result.amplification:
        spread = Spread.of(result.amplification)
        ahead = "unknown" if result.read_ahead_kib is None else f"{result.read_ahead_kib} KiB"
        lines.append(f"{'read_amplification':<34}{spread.median:>14.2f}  ({spread.low:.2f} – {spread.high:.2f}), "
                     f"{len(result.amplification)} crops, read-ahead of the disk {ahead}")
    else:
        lines.append(f"read_amplification could not be counted: {result.uncounted}")
    return "\n".join([*lines, *(f"{way} could not be run: {why}" for way, why in result.missing.items())])


def values(result: LoadingResult) -> dict[str, tuple[Spread, str]]:
    """Name of each row to its value and unit; what could not be had is not there.

    `loading.patches_per_s` and `loading.cpu_ms_per_patch` are ours, with a way's name at the end they are its;
    `loading.x_<way>` is our patches a second over its, taken within each round.
    """
    rows: dict[str, tuple[Spread, str]] = {}
    for way, turns in result.turns.items():
        end = "" if way == OURS else f".{way}"
        rows[f"loading.patches_per_s{end}"] = Spread.of(turn.patches_s for turn in turns), "1/s"
        rows[f"loading.cpu_ms_per_patch{end}"] = Spread.of(turn.cpu_ms for turn in turns), "ms"
    rows |= {f"loading.x_{way}": (spread, "ratio") for way, spread in _ratios(result).items()}
    if result.amplification:
        rows["loading.read_amplification"] = Spread.of(result.amplification), "ratio"
    return rows


def picture(result: LoadingResult) -> bytes:
    """The rates as bars, a PNG."""
    figure = Figure(figsize=(7, 0.6 * len(result.turns) + 1.2), layout="constrained")
    axes = figure.subplots()
    names = list(result.turns)[::-1]
    rates = [Spread.of(turn.patches_s for turn in result.turns[name]) for name in names]
    axes.barh(names, [r.median for r in rates], color=["#0072B2" if name == OURS else "#D55E00" for name in names],
              xerr=[[r.median - r.low for r in rates], [r.high - r.median for r in rates]], capsize=3)
    axes.set_xlabel(f"patches a second on {result.threads} cores, median and quartiles")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    png = io.BytesIO()
    figure.savefig(png, dpi=120)
    return png.getvalue()


def fields(result: LoadingResult) -> dict[str, Any]:
    """What rows say of the case."""
    config = result.config
    return {"patch": config.patch, "batch_size": config.batch_size, "recipe": config.recipe, "volumes": result.volumes,
            "crops": len(result.amplification), "read_ahead_kib": result.read_ahead_kib, "dali": machine.dali_version()}


def edges(patch: tuple[int, int, int]) -> tuple[int, int]:
    """Voxels of the shortest and the longest edge of the volumes that are made."""
    return int(EDGES[0] * max(patch)), int(EDGES[1] * max(patch))


def openers(config: LoadingConfig, place: Place) -> dict[str, Opener]:
    """Ours and what it is compared with."""
    recipe = AugmentationConfig.named(config.recipe, place.patch)
    if config.recipe == "nnunet":
        return {OURS: partial(ways.ours, augmentation=recipe, foreground_fraction=ways.NNUNET_FOREGROUND), "nnunet": ways.nnunet}
    names = PAPER if config.recipe == "dropgen" else ()
    return {OURS: partial(ways.ours, augmentation=recipe), "monai": partial(ways.monai, workers=place.threads, names=names)}


def _ratios(result: LoadingResult) -> dict[str, Spread]:
    """Our patches a second over those of each other way, within each round."""
    ours = result.turns[OURS]
    return {way: Spread.of(our.patches_s / their.patches_s for our, their in zip(ours, turns, strict=True))
            for way, turns in result.turns.items() if way != OURS}


def _amplification(store: Path, patch: tuple[int, int, int]) -> tuple[list[float], str]:
    """Bytes read over bytes of the crop for each of CROPS crops of random training cases, or none and the reason."""
    from dropgen_fast.bench.loading import reads  # which imports DALI: here it is known to be there

    cases = Store.open(store).cases("train")
    rng = np.random.default_rng(0)
    counted: list[float] = []
    try:
        for number in range(CROPS + 1):
            case = cases[rng.integers(len(cases))]
            crop = [min(n, size) for n, size in zip(patch, case.shape, strict=True)]
            (read,) = reads.measure(case.volume, reads.random_starts(case.shape, crop, 1, rng), crop, case.layout)
            if number:  # the first fetches DALI's own code, too
                counted.append(read.ratio)
    except (reads.Uncountable, OSError) as error:
        return [], " ".join(str(error).split())
    return counted, ""
