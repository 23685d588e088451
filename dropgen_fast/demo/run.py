"""The demonstration's main job: make a cohort, then run the commands that a user would run, then show what came out.

Everything lies under one folder, with a `demo.json` that says with which settings it was begun and which stages are
done: the same command goes on where it was stopped, another one is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from dropgen_fast.demo.cohort import SPACING_MM, CohortConfig, write_cohort
from dropgen_fast.demo.report import write_report
from dropgen_fast.demo.results import METHODS, collect, environment, load_scores, sentence, table, variant_name
from dropgen_fast.errors import InputError
from dropgen_fast.files import write_atomically

STATE = "demo.json"
FOLDERS = ("cohort", "store", *METHODS)
FILES = (STATE, "results.json", "report.html", "report.png")

STEPS, QUICK_STEPS = 1200, 60
PATCH = 48
QUICK_COHORT = {"training": 4, "validation": 1, "test": 2}
VALIDATIONS = 8
LOGGED_LOSSES = 50
AUGMENTATION = ("--augmentation.low-resolution-probability", "0.1", "--augmentation.low-resolution-zoom", "0.5", "1",
                "--augmentation.gibbs-probability", "0.1", "--augmentation.gamma", "0.7", "1.5",
                "--augmentation.sharpen-probability", "0.1", "--augmentation.affine-probability", "0.1")
"""Milder than the paper's, for both methods alike: a thousand steps at 3 mm are too few to learn its source under more."""


@dataclass(frozen=True)
class DemoConfig:
    """Train ERM and DropGen on T1 heads, test both on T1 and on contrasts never seen in training, and show the result."""

    out: Path = Path("demo")
    """Folder for everything; holding an unfinished run of the same settings, it is gone on with."""
    steps: int | None = None
    """Training steps of each method; default 1200, or 60 with --quick."""
    seed: int = 0
    """Of the training and of what a scanner adds to each image: contrast, bias, noise."""
    anatomy_seed: int = 0
    """Of the heads' shapes, so that another --seed is tried on the same heads."""
    mode: Literal["stream", "channel"] = "stream"
    """DropGen's dropout: stream drops a sample's whole image or features, channel (the paper's) each channel on its own."""
    p: tuple[float, ...] = (0.75, 0.0)
    """Its drop rate; two numbers are the rate of the image and that of the features."""
    learning_rate: float = 3e-3
    """Of both methods."""
    device: str | None = None
    """cpu, cuda or cuda:<n>; by default what train and predict choose."""
    quick: bool = False
    """A smoke test of three minutes at most: few subjects, few steps, numbers that mean nothing."""
    overwrite: bool = False
    """Remove an earlier demo from --out first."""

    @property
    def training_steps(self) -> int:
        """Steps of each method."""
        return self.steps or (QUICK_STEPS if self.quick else STEPS)

    @property
    def cohort(self) -> CohortConfig:
        """The cohort to make."""
        return CohortConfig(seed=self.seed, anatomy_seed=self.anatomy_seed, **(QUICK_COHORT if self.quick else {}))

    def settings(self) -> dict[str, Any]:
        """What must be the same for a run to be gone on with."""
        plain = dataclasses.asdict(self)
        del plain["out"], plain["overwrite"]
        settings: dict[str, Any] = json.loads(json.dumps(plain | {"steps": self.training_steps}))  # as demo.json gives it back
        return settings


@dataclass(frozen=True)
class Stage:
    """One command of the demo."""

    name: str
    arguments: tuple[str, ...]
    """After ``python -m``."""
    if_begun: tuple[str, ...] = ()
    """Added where an earlier attempt was stopped in the middle."""


def check(config: DemoConfig) -> None:
    """Tell before anything is made what could not work; train says the rest.

    Raises:
        InputError: a number out of its range. Not raised by the dataclass itself: tyro would make a box of it.
    """
    if config.steps is not None and config.steps < 1:
        raise InputError(f"--steps must be at least 1, got {config.steps}")
    if config.seed < 0 or config.anatomy_seed < 0:
        raise InputError(f"--seed and --anatomy-seed must not be negative, got {config.seed} and {config.anatomy_seed}")
    if not 1 <= len(config.p) <= 2 or not all(0 <= rate < 1 for rate in config.p):
        raise InputError(f"--p must be one or two drop rates, each at least 0 and below 1, got {config.p}")
    if not config.learning_rate > 0:
        raise InputError(f"--learning-rate must be above 0, got {config.learning_rate}")


class StageError(RuntimeError):
    """A command of the demo failed; it has said why itself."""


def stages(config: DemoConfig) -> list[Stage]:
    """The commands after the cohort is there, in order; both methods get the same but for the method."""
    out, steps = config.out, config.training_steps
    device = () if config.device is None else ("--device", config.device)
    recipe = ("--patch", *[str(PATCH)] * 3, "--batch-size", "2", "--steps", str(steps),
              "--learning-rate", f"{config.learning_rate:g}", "--warmup-steps", str(steps // 10), "--seed", str(config.seed),
              "--network-options", "base_channels=8", "downsamplings=3", *AUGMENTATION,
              "--validate-every", str(max(1, steps // VALIDATIONS)), "--log-every", str(max(1, steps // LOGGED_LOSSES)), *device)
    methods = {"erm": ("--method", "erm"),
               "dropgen": ("--method", "stream-dropout" if config.mode == "stream" else "dropgen", "--extractor", "mind",
                           "--fusion.p", *(f"{rate:g}" for rate in config.p))}
    result = [Stage("prepare", ("dropgen_fast.prepare", "--source", str(out / "cohort"), "--store", str(out / "store"),
                                "--spacing-mm", *[f"{SPACING_MM:g}"] * 3))]
    for method, options in methods.items():
        result.append(Stage(f"train {method}", ("dropgen_fast.train", "--store", str(out / "store"), "--out", str(out / method),
                                                *options, *recipe), ("--resume",)))
    for method in methods:
        predictions = str(out / method / "predictions")
        result += [
            Stage(f"predict {method}", ("dropgen_fast.predict", "--run", str(out / method), "--images",
                                        str(out / "cohort" / "imagesTs"), "--out", predictions, *device)),
            Stage(f"evaluate {method}", ("dropgen_fast.evaluate", "--predictions", predictions, "--labels",
                                         str(out / "cohort" / "labelsTs"), "--out", str(out / method / "evaluation"))),
        ]
    return result


class Progress:
    """`demo.json`: the settings, which stages are done, and the seconds that each has taken so far."""

    def __init__(self, config: DemoConfig) -> None:
        """Take the folder: a new one, an empty one, or one with a demo of the same settings.

        Raises:
            InputError: the folder holds something else; nothing in it was touched.
        """
        self.path = config.out / STATE
        if config.out.exists() and not config.out.is_dir():
            raise InputError(f"--out {config.out} is a file; name a folder")
        fresh: dict[str, Any] = {"settings": config.settings(), "done": [], "begun": [], "seconds": {}}
        state = self._read()
        if state is None and config.out.exists() and any(config.out.iterdir()):
            raise InputError(f"--out {config.out} holds files that are no demo; give an empty or a new folder")
        if state is not None and config.overwrite:
            _remove(config.out)
            state = None
        if state is not None and state["settings"] != fresh["settings"]:
            before, now = state["settings"], fresh["settings"]
            changes = ", ".join(f"{k} was {before.get(k)}, is now {now.get(k)}" for k in sorted({*before, *now})
                                if before.get(k) != now.get(k))
            raise InputError(f"--out {config.out} holds another demo ({changes}); give another folder, "
                             "or --overwrite to replace it")
        self.state: dict[str, Any] = state or fresh
        config.out.mkdir(parents=True, exist_ok=True)
        self._save()

    @property
    def seconds(self) -> dict[str, float]:
        """By stage."""
        return dict(self.state["seconds"])

    def run(self, name: str, work: Callable[[bool], None]) -> None:
        """Do a stage unless it is done; `work` is told whether an earlier attempt began it."""
        if name in self.state["done"]:
            print(f"{name}: done before", flush=True)
            return
        begun = name in self.state["begun"]
        if not begun:
            self.state["begun"].append(name)
            self._save()
        since = time.perf_counter()
        try:
            work(begun)
            self.state["done"].append(name)
        finally:
            seconds = time.perf_counter() - since
            self.state["seconds"][name] = round(self.state["seconds"].get(name, 0.0) + seconds, 2)
            self._save()
        print(f"{name}: {seconds:.1f} s", flush=True)

    def _read(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        try:
            state: dict[str, Any] = json.loads(self.path.read_text())
            return {key: state[key] for key in ("settings", "done", "begun", "seconds")}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path} is damaged; give another folder") from error

    def _save(self) -> None:
        write_atomically(self.path, json.dumps(self.state, indent=2) + "\n")


def _remove(out: Path) -> None:
    """Remove what a demo has written, and nothing else."""
    for name in FOLDERS:
        shutil.rmtree(out / name, ignore_errors=True)
    for name in FILES:
        with contextlib.suppress(FileNotFoundError):
            (out / name).unlink()


def run_command(arguments: Sequence[str]) -> None:
    """Run ``python -m`` with these arguments, its output going where ours goes.

    Raises:
        StageError: it ended with another status than 0.
    """
    print(f"\n$ {shlex.join(['python', '-m', *arguments])}", flush=True)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}  # into a pipe or a file, too, lines come as they are written
    status = subprocess.run([sys.executable, "-m", *arguments], env=environment).returncode
    if status:
        raise StageError(f"{arguments[0]} ended with status {status}, see its message above; once that is put right, "
                         "the same command goes on from here")


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Do all that is not done yet, and write results.json, report.html and report.png; the results.

    Raises:
        InputError: a setting or a folder that cannot serve, or no template.
        StageError: a command failed.
    """
    check(config)
    progress = Progress(config)

    def cohort(_: bool) -> None:
        print(f"\nmaking {config.out / 'cohort'}: T1 for training, T1 and other contrasts for testing", flush=True)
        print(f"{write_cohort(config.out / 'cohort', config.cohort)} images", flush=True)

    def command(stage: Stage) -> Callable[[bool], None]:
        return lambda begun: run_command([*stage.arguments, *(stage.if_begun if begun else ())])

    progress.run("cohort", cohort)
    for stage in stages(config):
        progress.run(stage.name, command(stage))
    results = {
        **collect(load_scores(config.out)),
        "minutes": round(sum(progress.seconds.values()) / 60, 2),
        "variant": variant_name(config.mode, config.p),
        "seed": config.seed,
        "steps": config.training_steps,
        "quick": config.quick,
        "settings": config.settings(),
        "subjects": {key: getattr(config.cohort, key) for key in ("training", "validation", "test")},
        "seconds_per_stage": progress.seconds,
        "commands": [shlex.join(["python", "-m", *stage.arguments]) for stage in stages(config)],
        "versions": environment(),
    }
    write_atomically(config.out / "results.json", json.dumps(results, indent=2) + "\n")
    write_report(config.out, results)
    return results


def main(argv: Sequence[str]) -> int:
    """The command; 1 when one of its commands failed."""
    config = tyro.cli(DemoConfig, args=list(argv), prog="dropgen-fast demo")
    try:
        results = run_demo(config)
    except StageError as error:
        print(f"dropgen-fast demo: {error}", file=sys.stderr)
        return 1
    print(f"\n{table(results)}\n\n{sentence(results)}")
    print(f"DropGen here: {results['variant']}. {results['steps']} steps each, seed {results['seed']}, "
          f"{results['minutes']:.1f} minutes.")
    if config.quick:
        print("--quick shows that everything runs; after so few steps the numbers say nothing about either method.")
    print(f"report: {config.out / 'report.html'}")
    return 0
