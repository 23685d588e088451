"""Loading and augmentation, side by side with what one would use instead, on the same volumes, cores and recipe.

    python benchmarks/bench_loading.py --json benchmarks/results/<device>.jsonl
    pytest benchmarks/bench_loading.py --benchmark-only      the ways of the suite "loading" one by one, not in turns

Parts (``--only``):
  paper      patches per second and CPU time a patch of the paper's recipe: ours with the fused intensity chain and with DALI's,
             MONAI with workers and without, batchaug, and the training step that consumes the patches
  nnunet     the same of nnU-Net's recipe: ours and nnU-Net's own loader
  operators  each augmentation alone: our pipeline with it minus our pipeline without, beside MONAI's transform
  chains     the intensity chain and the affine of a batch that lies ready: ours, DALI's operators, MONAI, batchaug

The volumes are smooth noise, made in a temporary folder in seconds, unless ``--store`` names a prepared store. They fit the page
cache: reading from a disk is not measured (`bytes_read.py` counts what a crop reads). What is compared runs in turns, each way in
processes of its own that are held to the same cores (`dropgen_fast/bench/loading/processes.py`), set up as its users do
(`ways.py` there), and first shown to augment. Ways that cannot be run are named with the reason.

On a GPU (``--device cuda``) batches end on it, and an operator's cost is what it adds to the wall time of a patch: nothing, where
reading takes longer.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import tyro

from dropgen_fast.bench import machine
from dropgen_fast.bench.loading import chains, suite, table, ways
from dropgen_fast.bench.loading.processes import PERCENTILES, Opener, Place, opened, take_turns
from dropgen_fast.bench.loading.recipes import OPERATORS, only
from dropgen_fast.bench.loading.volumes import EDGES, describe, make_store
from dropgen_fast.cli import run
from dropgen_fast.data.augmentation import AugmentationConfig
from dropgen_fast.device import choose_device
from dropgen_fast.errors import InputError

Part = Literal["paper", "nnunet", "operators", "chains"]
PARTS: tuple[Part, ...] = ("paper", "nnunet", "operators", "chains")
SECONDS, QUICK_SECONDS = 40.0, 0.1
ROUNDS, QUICK_ROUNDS = 7, 2
PATCH, QUICK_PATCH = (128, 128, 128), (32, 32, 32)
"""The demo's network halves a patch three times, the paper's five times."""
ALWAYS_SHARE = 0.2
"""Of those seconds, for a way that does the same to every patch."""


@dataclass(frozen=True)
class LoadingConfig:
    """Measure loading and augmentation on this machine, beside MONAI, nnU-Net and batchaug, and keep it as rows."""

    store: Path | None = None
    """Prepared store to load from; by default one of smooth noise is made and removed again."""
    patch: tuple[int, int, int] | None = None
    """Voxels of a patch; default 128 128 128, with --quick 32 32 32."""
    batch_size: int = 2
    """Patches per batch."""
    threads: int | None = None
    """Cores that each way is held to, with as many threads or worker processes; default all that this process may use."""
    device: str = "cpu"
    """auto, cpu, cuda or cuda:<n>."""
    only: tuple[Part, ...] = PARTS
    """Parts to measure."""
    operators: tuple[str, ...] = ()
    """Augmentations that the part operators measures; default all."""
    cases: int = 4
    """Volumes that are made."""
    seconds: float | None = None
    """Of the turns of each way together; opening and warming up come on top. Default 40, with --quick 0.1: what
    is drawn differs from patch to patch, and so does its cost."""
    rounds: int | None = None
    """Turns of each way; default 7, with --quick 2."""
    seed: int = 0
    """Of the volumes and of every draw that can be seeded."""
    json: Path | None = None
    """File to which a row, a JSON object, is appended for each value."""
    quick: bool = False
    """A smoke test: small patches and volumes, few rounds, unless said otherwise; numbers that mean little."""


def check(config: LoadingConfig) -> None:
    """Tell before anything is made what could not work; raises `InputError`."""
    for name in ("batch_size", "threads", "cases", "rounds"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    available = len(os.sched_getaffinity(0))
    if config.threads is not None and config.threads > available:
        raise InputError(f"--threads must be at most the {available} cores that this process may use, got {config.threads}")
    if config.patch is not None and min(config.patch) < 8:
        raise InputError(f"--patch must be three numbers of at least 8, got {config.patch}")
    if config.seconds is not None and not config.seconds > 0:
        raise InputError(f"--seconds must be above 0, got {config.seconds}")
    if unknown := [name for name in config.operators if name not in OPERATORS]:
        raise InputError(f"--operators must be some of {', '.join(OPERATORS)}, got {unknown[0]!r}")
    if config.operators and "operators" not in config.only:
        raise InputError("--operators needs the part operators in --only")
    if config.json is not None and (config.json.is_dir() or not config.json.parent.is_dir()):
        raise InputError(f"--json must be a file in a folder that is there, got {config.json}")


class Bench:
    """One run: a place, rounds and seconds, and the facts that every row carries."""

    def __init__(self, config: LoadingConfig, place: Place, facts: dict[str, Any]) -> None:
        self.config, self.place, self.facts = config, place, facts
        self.rounds = config.rounds or (QUICK_ROUNDS if config.quick else ROUNDS)
        self.seconds = config.seconds or (QUICK_SECONDS if config.quick else SECONDS)
        self.rows: list[table.Row] = []
        self.screen: list[str] = [table.header(facts)]

    def part(self, name: str) -> None:
        """Measure one of PARTS."""
        parts: dict[str, Callable[[], None]] = {"paper": self.paper, "nnunet": self.nnunet, "operators": self.operators,
                                                "chains": self.chains}
        parts[name]()

    def paper(self) -> None:
        """The paper's recipe."""
        cores, recipe = self.place.threads, AugmentationConfig()
        gpu = self.place.gpu is not None
        network = () if gpu else ways.DEMO_NETWORK
        self._group("loading.paper", "the paper's recipe", self.seconds, {
            "ours": ("ours", partial(ways.ours, augmentation=recipe)),
            "ours_dali": ("ours with DALI's intensity chain", partial(ways.ours, augmentation=recipe, chain="dali")),
            "monai": (f"MONAI, {_workers(cores)}", partial(ways.monai, workers=cores)),
            "monai_alone": (f"MONAI, no workers{', on the GPU' if gpu else ''}", partial(ways.monai, workers=0)),
            "batchaug": ("batchaug on MONAI's crops", ways.batchaug),
            "step": (f"(training step, {'reference' if gpu else 'demo'} network)",
                     partial(ways.training_step, network_options=network))})

    def nnunet(self) -> None:
        """nnU-Net's recipe."""
        recipe = AugmentationConfig.nnunet(self.place.patch)
        self._group("loading.nnunet", "nnU-Net's recipe", self.seconds, {
            "ours": ("ours", partial(ways.ours, augmentation=recipe, foreground_fraction=ways.NNUNET_FOREGROUND)),
            "nnunet": (f"nnU-Net, {_workers(self.place.threads)}", ways.nnunet)})

    def chains(self) -> None:
        """Augmentation alone."""
        labels = {"ours": "ours", "dali": "DALI's operators", "monai": "MONAI's transforms", "batchaug": "batchaug"}
        self._group("chain.intensity", "the intensity chain alone", ALWAYS_SHARE * self.seconds, {
            way: (label, partial(chains.intensity, way=way)) for way, label in labels.items()})
        self._group("chain.affine", "the affine alone, image and label", ALWAYS_SHARE * self.seconds, {
            way: (label, partial(chains.affine, way=way)) for way, label in labels.items() if way != "dali"})

    def operators(self) -> None:
        """Each augmentation: on the CPU on one core and by CPU time, which is then what it costs whoever else is at work."""
        gpu = self.place.gpu is not None
        place, what = (self.place, "ms") if gpu else (dataclasses.replace(self.place, cores=self.place.cores[:1]), "cpu_ms")
        measured = [self._operator(name, place, what) for name in self.config.operators or OPERATORS]
        self.rows += table.operator_rows(measured, {**self.facts, "threads": place.threads})
        title = "one augmentation alone, " + ("time on the GPU" if gpu else "CPU time on one core")
        self.screen.append(table.operator_table(measured, title))

    def _operator(self, name: str, place: Place, what: str) -> table.Operator:
        openers: dict[str, Opener] = {
            "off": partial(ways.ours, augmentation=AugmentationConfig.none()), "on": partial(ways.ours, augmentation=only(name)),
            "monai": partial(ways.monai_operator, name=name)}
        with opened(openers, place, partial(_say, f"operator {name}")) as (feeds, missing):
            for way in ("off", "on"):
                if way in missing:
                    raise RuntimeError(f"our pipeline with {name} {way}: {missing[way]}")
            turns = take_turns(feeds, self.rounds, ALWAYS_SHARE * self.seconds)
        ms = {way: [getattr(turn, what) for turn in of] for way, of in turns.items()}
        added = [on - off for on, off in zip(ms["on"], ms["off"], strict=True)]
        return table.Operator(name, what, added, ms["off"], ms.get("monai", []), missing)

    def _group(self, name: str, title: str, seconds: float, labelled: dict[str, tuple[str, Opener]]) -> None:
        openers = {way: opener for way, (_, opener) in labelled.items()}
        with opened(openers, self.place, partial(_say, name)) as (feeds, missing):
            if "ours" in missing:
                raise RuntimeError(f"ours could not be run: {missing['ours']}")
            turns = take_turns(feeds, self.rounds, seconds)
        group = table.Group(name, title, {way: label for way, (label, _) in labelled.items()}, turns, missing)
        self.rows += table.group_rows(group, self.facts)
        self.screen.append(table.group_table(group))


def bench(config: LoadingConfig) -> Bench:
    """Measure, print, write; raises `InputError` for an option, a store or a device that does not fit."""
    check(config)
    device = choose_device(config.device)
    patch = config.patch or (QUICK_PATCH if config.quick else PATCH)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="bench_loading_") as folder:
        scratch = Path(folder)
        cores = tuple(sorted(os.sched_getaffinity(0)))[:config.threads]
        store = config.store.absolute() if config.store else make_store(
            scratch / "volumes", patch, cases=config.cases, seed=config.seed, workers=len(cores),
            edges=(0, 0) if config.quick else EDGES)
        place = Place(store, scratch, patch, config.batch_size, cores, str(device), config.seed)
        measured = Bench(config, place, _facts(device, place))
        for part in PARTS:
            if part in config.only:
                measured.part(part)
    print("\n\n".join([*measured.screen, table.NOTES]))
    if config.json is not None:
        with config.json.open("a") as file:
            file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in measured.rows)
        print(f"{len(measured.rows)} rows appended to {config.json}")
    print(f"{time.perf_counter() - begun:.0f} s")
    return measured


def _facts(device: torch.device, place: Place) -> dict[str, Any]:
    """What every row carries."""
    return {
        **machine.describe(device), "threads": place.threads, "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "dali": machine.dali_version(), "nnunetv2": machine.version("nnunetv2"),
        "batchgeneratorsv2": machine.version("batchgeneratorsv2"), "batchaug": machine.version("batchaug"),
        "patch": list(place.patch), "batch_size": place.batch_size, "volumes": describe(place.store),
        "percentiles": list(PERCENTILES)}


def _workers(count: int) -> str:
    return "1 worker" if count == 1 else f"{count} workers"


def _say(where: str, what: str) -> None:
    print(f"{where}: {what}", file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> int:
    """The command."""
    bench(tyro.cli(LoadingConfig, args=list(argv), prog="bench_loading.py"))
    return 0


@pytest.mark.parametrize("way", ["ours", "monai"])
def bench_loading(benchmark: Any, tmp_path: Path, way: str) -> None:
    """As many batches of the paper's recipe as finish together; a way that loads ahead does so in between, too."""
    config = suite.resolved(suite.LoadingConfig())
    assert config.patch is not None
    store = make_store(tmp_path / "volumes", config.patch, cases=suite.CASES, seed=0, workers=1, edges=suite.edges(config.patch))
    place = Place(store, tmp_path, config.patch, config.batch_size, tuple(sorted(os.sched_getaffinity(0))))
    with opened({way: suite.openers(config, place)[way]}, place, print) as (feeds, missing):
        if way in missing:
            pytest.skip(missing[way])
        feed = feeds[way]
        benchmark.group = "loading"
        benchmark.extra_info["patches"] = feed.burst * config.batch_size
        benchmark.pedantic(feed.turn, args=(feed.burst,), rounds=10)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that processes and volumes go, too, when a scheduler ends it
    sys.exit(run("bench_loading", main, sys.argv[1:]))
