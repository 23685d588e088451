"""``python -m dropgen_fast.train``: train DropGen, or ERM to compare with, on a prepared store."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.losses import DiceCELoss
from tqdm import tqdm

from dropgen_fast import checkpoint
from dropgen_fast.cli import run
from dropgen_fast.config import FREE, TrainConfig, parse
from dropgen_fast.data.pipeline import Batch, TrainingPipeline
from dropgen_fast.data.store import Store, slow_disk
from dropgen_fast.errors import InputError
from dropgen_fast.inference import choose_device, class_probabilities, dice_per_class
from dropgen_fast.model import build_model, check_extractor, extractor_identity
from dropgen_fast.presets import load_preset
from dropgen_fast.run import RunFolder, plain


class Trainer:
    """One training run: what is trained, on what, and where it stands."""

    def __init__(self, config: TrainConfig) -> None:
        """Set the run up, or back up where its last checkpoint left it.

        Raises:
            InputError: a store, preset, patch, model, device or output folder that cannot serve, before anything is
                written where possible.
        """
        self.store = Store.open(config.store)
        for split, name in (("train", "training"), ("val", "validation")):
            if not self.store.cases(split):
                raise InputError(f"store {config.store} has no {name} cases; prepare it with some")
        if warning := slow_disk(self.store):
            print(f"dropgen-fast train: warning: {warning}", file=sys.stderr)
        preset = load_preset(config.preset or self.store.preset)
        patch = config.patch or preset.patch
        if patch is None:
            raise InputError("no patch: give --patch D H W, or a preset that has one")
        augmentation = config.augmentation or preset.augmentation_config(patch, config.recipe)
        sided = [name for name in self.store.classes if re.search(r"(?<![a-z])(left|right)(?![a-z])", name, re.IGNORECASE)]
        if sided and (augmentation.flipping or augmentation.turning):
            print(f"dropgen-fast train: warning: flips and turns are on, and {sided[0]!r} is a side: "
                  "--augmentation.no-mirror keeps left and right apart", file=sys.stderr)
        weights = config.model.extractor_weights
        model = dataclasses.replace(config.model, extractor_weights=weights.resolve() if weights is not None else None)
        self.config = config = dataclasses.replace(config, patch=patch, augmentation=augmentation, model=model)
        self.patch: tuple[int, int, int] = patch
        self.device = choose_device(config.device)
        torch.manual_seed(config.seed)
        self.model = build_model(config.model, image_channels=len(self.store.channels), classes=len(self.store.classes),
                                 patch=patch).to(self.device)
        self.loss = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), config.learning_rate, weight_decay=config.weight_decay,
                                           fused=self.device.type == "cuda")
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.step, self.best_dice = 0, -1.0
        settings = plain(config)
        del settings["resume"], settings["out"]
        self.folder = RunFolder(config.out, settings, resume=config.resume, free=FREE)
        loader_state = self._restore() if config.resume and self.folder.last.exists() else None
        self.data = TrainingPipeline(
            self.store, patch=patch, batch_size=config.batch_size, seed=config.seed, augmentation=augmentation,
            chain=config.chain, foreground_fraction=config.foreground_fraction, num_threads=config.loader_threads,
            device=self.device.index or 0 if self.device.type == "cuda" else None, restore=loader_state)

    def fit(self) -> None:
        """Train to the last step, validating and saving on the way."""
        self.model.train()
        self.folder.start(self.step)
        since, last_logged = time.perf_counter(), self.step
        progress = tqdm(total=self.config.steps, initial=self.step, desc=self.config.model.method, disable=None, unit="step")
        with progress, stop_signals() as stopped, contextlib.closing(self.folder):
            while self.step < self.config.steps:
                if stopped:
                    self._save(self.folder.last)
                    raise Stopped(stopped[0], f"stopped after {self.step} steps, saved; --resume goes on from here")
                loss = self.train_step(next(self.data))
                self.step += 1
                progress.update()
                if self.step % self.config.log_every == 0 or self.step == self.config.steps:
                    seconds = (time.perf_counter() - since) / (self.step - last_logged)
                    self._log(float(loss), seconds, progress)
                    since, last_logged = time.perf_counter(), self.step
                if self.step % self.config.validate_every == 0 or self.step == self.config.steps:
                    self._validate_and_save(progress)
                    since, last_logged = time.perf_counter(), self.step

    def train_step(self, batch: Batch) -> torch.Tensor:
        """One optimizer step; the loss, still on its device."""
        self.model.fusion.set_step(self.step)
        image = batch.image.to(self.device, non_blocking=True)
        label = batch.label.to(self.device, non_blocking=True)
        loss: torch.Tensor = self.loss(self.model(image).float(), label)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()

    def validate(self) -> dict[str, float | None]:
        """Dice of each foreground class over the validation cases: mean over the cases that have a score, or None.

        On the prepared grid. `evaluate` scores the original grid, and averages over a case's classes before the cases.
        """
        classes = self.store.classes
        rows = []
        for case in self.store.cases("val"):
            image, label = self.store.load(case)
            if label is None:
                raise InputError(f"validation case {case.id} of {self.store.path} has no label; give it one and prepare again")
            probabilities = class_probabilities(self.model, image, self.patch, windows_per_batch=self.config.batch_size)
            truth = torch.from_numpy(label[..., 0]).to(self.device)
            rows.append(dice_per_class(probabilities.argmax(0), truth, len(classes)))
        table = torch.stack(rows).double().cpu()[:, 1:]
        means = table.nanmean(0)
        return {name: None if mean.isnan() else float(mean) for name, mean in zip(classes[1:], means, strict=True)}

    def _log(self, loss: float, seconds: float, progress: Any) -> None:
        if not math.isfinite(loss):
            raise self._diverged(f"the loss is {loss}")
        progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self.folder.record(self.step, loss=loss, learning_rate=self.schedule.get_last_lr()[0], seconds_per_step=seconds)

    def _validate_and_save(self, progress: Any) -> None:
        scores = self.validate()
        scored = [s for s in scores.values() if s is not None]
        mean = sum(scored) / len(scored) if scored else None
        self.folder.record(self.step, validation_dice=mean, per_class=scores)
        progress.write(f"step {self.step}: validation Dice {'-' if mean is None else f'{mean:.3f}'} ("
                       + ", ".join(f"{k} {'-' if v is None else f'{v:.3f}'}" for k, v in scores.items()) + ")")
        if mean is not None and mean > self.best_dice:
            self.best_dice = mean
            self._save(self.folder.best)
        elif not self.folder.best.exists():  # no class has a score yet: the first is the best that there is
            self._save(self.folder.best)
        self._save(self.folder.last)

    def _save(self, path: Path) -> None:
        """Write a checkpoint; weights that are not finite never take the place of good ones."""
        if not all(value.isfinite().all() for value in self.model.network.state_dict().values()):
            raise self._diverged("weights are not finite")
        checkpoint.save(path, self._state())

    def _diverged(self, what: str) -> InputError:
        held = "last.pt is from before it was seen" if self.folder.last.exists() else "nothing was saved"
        return InputError(f"training has diverged: {what} after {self.step} steps, {held}; begin anew in another folder with a "
                          f"learning rate below {self.config.learning_rate:g}")

    def _rate(self, step: int) -> float:
        """Linear warm-up, then a cosine from 1 to 0."""
        warmup = self.config.warmup_steps
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (self.config.steps - warmup)))

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "best_dice": self.best_dice,
            "network": self.model.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "rng": checkpoint.rng_state(),
            "data": torch.frombuffer(bytearray(self.data.state()), dtype=torch.uint8),
            "model": plain(self.config.model),
            "task": {
                "classes": list(self.store.classes), "channels": list(self.store.channels),
                "spacing_mm": list(self.store.spacing_mm), "patch": list(self.patch),
                "intensity_window": list(self.store.intensity_window) if self.store.intensity_window else None,
            },
            "extractor": extractor_identity(self.model),
            "store": self.store.identity(),
        }

    def _restore(self) -> bytes:
        """Put everything but the data pipeline where the last checkpoint left it; the pipeline's state."""
        state = checkpoint.load(self.folder.last)
        if state["store"] != self.store.identity():
            raise InputError(f"store {self.config.store} is not the one that {self.folder.last} was trained on; "
                             "resume with that one, or begin a new run")
        check_extractor(self.folder.last, state["extractor"], self.model)
        self.model.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        checkpoint.set_rng_state(state["rng"])
        self.step, self.best_dice = state["step"], state["best_dice"]
        return bytes(state["data"].numpy().tobytes())


class Stopped(Exception):
    """Training was asked to stop, and has saved."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal_number


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that gets the number of a SIGTERM or SIGINT instead of its being obeyed at once; a second one is obeyed."""
    caught: list[int] = []
    before: dict[int, Any] = {}

    def catch(number: int, _frame: Any) -> None:
        caught.append(number)
        for which, handler in before.items():
            signal.signal(which, handler)

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, catch) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


def main(argv: Sequence[str]) -> int:
    """The command ``train``."""
    config = parse(argv)
    try:
        Trainer(config).fit()
    except Stopped as stop:
        print(f"dropgen-fast train: {stop}", file=sys.stderr)
        return 128 + stop.signal
    return 0


if __name__ == "__main__":
    sys.exit(run("train", main, sys.argv[1:]))
