"""``python -m dropgen_fast.train``: train DropGen, or ERM to compare with, on a prepared store.

One process trains on one device; several, as ``torchrun`` starts them, train together (docs/distributed.md).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from dropgen_fast import checkpoint
from dropgen_fast.cli import run
from dropgen_fast.config import FREE, TrainConfig, choose_subjects, completed, plain
from dropgen_fast.data.augmentation import sided_classes
from dropgen_fast.data.pipeline import Batch, TrainingPipeline
from dropgen_fast.data.store import Store, StoredCase, slow_disk
from dropgen_fast.distributed import Agreement, Ranks, restarted
from dropgen_fast.errors import InputError
from dropgen_fast.features.cache import FeatureCache
from dropgen_fast.features.volume import CropFeatures, VolumeFeatures
from dropgen_fast.files import write_atomically
from dropgen_fast.inference import class_probabilities, dice_per_class, rescaled
from dropgen_fast.losses import build_loss
from dropgen_fast.model import build_model, check_extractor, extractor_identity
from dropgen_fast.record.folder import RunFolder
from dropgen_fast.record.monitor import Monitor
from dropgen_fast.record.panels import panel
from dropgen_fast.settings import preset_of, resolve
from dropgen_fast.step import Patches, TrainingStep

REQUEUE = 75
"""Exit status after SIGTERM and SIGUSR1 (EX_TEMPFAIL of sysexits.h): everything is saved, start the same command again."""
REQUEUE_MARK = "requeue"
"""Name of a file in the run's folder that says the same, for launchers that hide the exit status."""


class Trainer:
    """One training run: what is trained, on what, and where it stands."""

    def __init__(self, config: TrainConfig, ranks: Ranks | None = None) -> None:
        """Set the run up, or back up where its last checkpoint left it.

        Raises:
            InputError: a store, preset, patch, model, device or output folder that cannot serve, before anything is
                written where possible.
        """
        self.ranks = ranks if ranks is not None else Ranks.alone(config.device)
        self.store = Store.open(config.store)
        self.config = config = self._resolved(config)
        self.device = self.ranks.device
        self.folder = self._folder(config)
        torch.manual_seed(config.seed)
        self.model = build_model(config.model, image_channels=len(self.store.channels), classes=len(self.store.classes),
                                 patch=self.patch).to(self.device)
        loss = build_loss(config.loss, config.loss_options, len(self.store.classes))
        self.one_step = TrainingStep(self.model, loss.to(self.device), config, self.ranks)
        if self.ranks.rank:  # the weights are the same everywhere, the dropout is not
            torch.manual_seed((config.seed + self.ranks.rank) % 2**63)
        self.step, self.best_dice, self.data_seed = 0, -1.0, config.seed
        self.last = config.out / "last.pt"
        resume = (config.resume or restarted()) and self.ranks.from_first(self.last.exists())
        loader_state = self._restore() if resume else None
        self.cache = FeatureCache(config.feature_cache) if config.feature_cache is not None else None
        self.crops = self._crop_features() if config.feature_cache_training else None
        self.data = TrainingPipeline(
            self.store, patch=self.patch, batch_size=config.batch_size, seed=self.data_seed, augmentation=config.augmentation,
            chain=config.chain, foreground_fraction=config.foreground_fraction, num_threads=config.loader_threads,
            device=self.device.index or 0 if self.device.type == "cuda" else None, rank=self.ranks.rank,
            world_size=self.ranks.size, case_ids=self.subjects, align=self.crops.ratio if self.crops is not None else (1, 1, 1),
            restore=loader_state)
        self.monitor = Monitor(self.device)

    def fit(self) -> None:
        """Train to the last step, validating and saving on the way."""
        config = self.config
        self.model.train()
        if self.folder is not None:
            self.folder.start(self.step)
            (config.out / REQUEUE_MARK).unlink(missing_ok=True)
        agreement = Agreement(self.ranks)
        progress = tqdm(total=config.steps, initial=self.step, desc=config.model.method, unit="step",
                        disable=None if self.ranks.first else True)
        with (progress, stop_signals() as stop, contextlib.closing(self.monitor),
              contextlib.closing(self.folder) if self.folder else contextlib.nullcontext()):
            while self.step < config.steps:
                if wish := agreement(stop.number):
                    self._stop(wish)
                with self.monitor.waiting():
                    batches = [next(self.data) for _ in range(config.accumulate)]
                self.train_step(batches)
                self.step += 1
                self.monitor.step(patches=config.accumulate * config.batch_size * self.ranks.size)
                progress.update()
                if self._due(config.log_every):
                    self._log(progress)
                if self._due(config.validate_every):
                    self._validate_and_save(progress)
                elif self._due(config.save_every):
                    self._save(self.last)
            agreement.settle()
            if self.folder is not None:
                self.folder.finish()

    def train_step(self, batches: Sequence[Batch]) -> torch.Tensor:
        """One optimizer step on `accumulate` batches; the mean loss, still on its device."""
        moved: list[Patches] = []
        for batch in batches:
            image, label = (t.to(self.device, non_blocking=True) for t in (batch.image, batch.label))
            moved.append((image, label) if self.crops is None else (image, label, self.crops(batch.cases, batch.starts)))
        return self.one_step(moved, self.step)

    def validate(self) -> dict[str, float | None]:
        """Dice of each foreground class over the validation cases: mean over the cases that have a score, or None.

        On the prepared grid. `evaluate` scores the original grid, and averages over a case's classes before the cases. Each
        process takes its share of the cases; all get the same result.
        """
        classes = self.store.classes
        rows: dict[str, list[float]] = {}
        for number, case in enumerate(self.store.cases("val")[self.ranks.rank::self.ranks.size]):
            image, label = self.store.load(case)
            if label is None:
                raise InputError(f"validation case {case.id} of {self.store.path} has no label; give it one and prepare again")
            with self.one_step.averaged():
                found = class_probabilities(self.model, image, self.patch, windows_per_batch=self.config.batch_size,
                                            features="volume" if self.cache is not None else "window",
                                            cache=self.cache).argmax(0)
            truth = torch.from_numpy(label[..., 0]).to(self.device)
            rows[case.id] = dice_per_class(found, truth, len(classes)).tolist()[1:]
            if self.folder is not None and number < self.config.panels:
                self.folder.picture(self.step, case.id, self._panel(image, found.byte().cpu().numpy(), label[..., 0]))
        scored = {case: row for share in self.ranks.gather(rows) for case, row in share.items()}
        table = np.array([scored[case] for case in sorted(scored)])
        return {name: float(np.nanmean(dice)) if np.isfinite(dice).any() else None
                for name, dice in zip(classes[1:], table.T, strict=True)}

    def _resolved(self, config: TrainConfig) -> TrainConfig:
        """The settings with what the store and the preset decide."""
        for split, name in (("train", "training"), ("val", "validation")):
            if not self.store.cases(split):
                raise InputError(f"store {config.store} has no {name} cases; prepare it with some")
        config = completed(config, preset_of(config.preset, config.store)[0])
        assert config.patch is not None, "completed() gives one"
        self.patch = config.patch
        if self.ranks.first:
            if warning := slow_disk(self.store):
                _warn(warning)
            sided = sided_classes(self.store.classes)
            if sided and config.augmentation is not None and (config.augmentation.flipping or config.augmentation.turning):
                _warn(f"flips and turns are on, and {sided[0]!r} is a side: --augmentation.no-mirror keeps left and right apart")
        weights = config.model.extractor_weights
        model = dataclasses.replace(config.model, extractor_weights=weights.resolve() if weights is not None else None)
        if config.feature_cache is not None:
            config = dataclasses.replace(config, feature_cache=config.feature_cache.resolve())
        cases = [case.id for case in self.store.cases("train")]
        self.subjects = (choose_subjects(cases, config.num_subjects, config.seed, config.subject_pattern)
                         if config.num_subjects is not None else None)
        return dataclasses.replace(config, model=model)

    def _crop_features(self) -> CropFeatures:
        """The features of all training volumes; the first process fills the cache, the others read it.

        Raises:
            InputError: features that cannot be had, in all processes.
        """
        assert self.model.extractor is not None, "the settings were checked"
        source = VolumeFeatures(self.model.extractor, patch=self.patch, device=self.device, dtype=self.model.fusion.dtype,
                                cache=self.cache)

        def load(case: StoredCase) -> torch.Tensor:
            return rescaled(self.store.load(case)[0])

        volumes = {case.id: (case.shape, functools.partial(load, case)) for case in self.store.cases("train")
                   if self.subjects is None or case.id in self.subjects}

        def made() -> CropFeatures:
            return CropFeatures(source, volumes, channels=len(self.store.channels), device=self.device)

        crops, problem = None, ""
        if self.ranks.first:
            try:
                crops = made()
            except InputError as error:
                problem = str(error)
        if problem := self.ranks.from_first(problem):
            raise InputError(problem)
        return crops if crops is not None else made()

    def _folder(self, config: TrainConfig) -> RunFolder | None:
        """The run's folder, for the one process that writes."""
        if not self.ranks.first:
            return None
        settings = plain(config)
        del settings["resume"], settings["out"]
        return RunFolder(config.out, settings, resume=config.resume or restarted(), free=FREE, wandb=config.wandb)

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def _stop(self, number: int) -> None:
        """Save, and end as a scheduler understands it."""
        self._save(self.last)
        if self.ranks.first and number != signal.SIGINT:
            write_atomically(self.config.out / REQUEUE_MARK, f"stopped after {self.step} steps\n")
        raise Stopped(number, f"stopped after {self.step} steps, saved; --resume goes on from here")

    def _log(self, progress: Any) -> None:
        """Record what has been since the last time; stop where too many steps in a row had to be skipped."""
        counts = self.one_step.take()
        losses = self.ranks.gather(counts["loss"])
        loss = sum(losses) / len(losses) / counts["steps"] if counts["steps"] else None
        if counts["in_a_row"] >= self.config.max_skipped:
            raise self._diverged(f"no gradient was finite in the last {counts['in_a_row']:.0f} steps")
        values = self.monitor.take()
        if self.folder is None:
            return
        if loss is not None:
            progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self.folder.record(self.step, loss=loss, learning_rate=self.one_step.learning_rate(self.step - 1),
                           skipped_steps=int(counts["skipped"]), **values)

    def _validate_and_save(self, progress: Any) -> None:
        with self.monitor.exclude():
            scores = self.validate()
            scored = [s for s in scores.values() if s is not None]
            mean = sum(scored) / len(scored) if scored else None
            if self.folder is not None:
                self.folder.record(self.step, validation_dice=mean, per_class=scores)
                progress.write(f"step {self.step}: validation Dice {'-' if mean is None else f'{mean:.3f}'} ("
                               + ", ".join(f"{k} {'-' if v is None else f'{v:.3f}'}" for k, v in scores.items()) + ")")
            best = self.config.out / "best.pt"
            # Where no class has a score yet the first is the best that there is.
            if (mean is not None and mean > self.best_dice) or not self.ranks.from_first(best.exists()):
                self.best_dice = self.best_dice if mean is None else mean
                self._save(best)
            self._save(self.last)

    def _panel(self, image: npt.NDArray[np.float32], found: npt.NDArray[np.uint8], label: npt.NDArray[np.uint8]
               ) -> npt.NDArray[np.uint8]:
        """Image (D, H, W, C), features, label and prediction (D, H, W) of a patch about the foreground, as a picture."""
        region = _about(label > 0, self.patch)
        crop = torch.from_numpy(np.ascontiguousarray(image[region].transpose(3, 0, 1, 2)))[None].to(self.device)
        extractor, features = self.model.extractor, None
        if extractor is not None and crop.shape[2:] == self.patch:  # a smaller volume may not be what it takes
            features = extractor(crop)[0].float().cpu().numpy()
        return panel(image[region][..., 0], features, label[region], found[region], self.store.classes,
                     spacing_mm=self.store.spacing_mm)

    def _save(self, path: Path) -> None:
        """Write a checkpoint; weights that are not finite never take the place of good ones."""
        if not all(value.isfinite().all() for value in self.model.network.state_dict().values()):
            raise self._diverged("weights are not finite")
        with self.monitor.exclude():
            mine = {"rng": checkpoint.rng_state(self.device),
                    "data": torch.frombuffer(bytearray(self.data.state()), dtype=torch.uint8)}
            states = self.ranks.gather(mine)
            counts = self.ranks.gather(self.one_step.state()["counts"])
            if self.ranks.first:
                checkpoint.save(path, {**self._state(), "ranks": states, "counts": counts})

    def _diverged(self, what: str) -> InputError:
        held = f"{self.last.name} is from before it was seen" if self.last.exists() else "nothing was saved"
        return InputError(f"training has diverged: {what} after {self.step} steps, {held}; begin anew in another folder with a "
                          f"learning rate below {self.config.learning_rate:g}")

    def _state(self) -> dict[str, Any]:
        store = self.store
        return {
            "step": self.step,
            "best_dice": self.best_dice,
            "data_seed": self.data_seed,
            **self.one_step.state(),
            "model": plain(self.config.model),
            "task": {
                "classes": list(store.classes), "channels": list(store.channels),
                "spacing_mm": list(store.spacing_mm), "patch": list(self.patch),
                "intensity_window": list(store.intensity_window) if store.intensity_window else None,
            },
            "extractor": extractor_identity(self.model),
            "store": store.identity(),
        }

    def _restore(self) -> bytes | None:
        """Put everything but the data pipeline where the last checkpoint left it; the pipeline's state.

        With another number of processes than before the weights and the optimizer go on, and the data begin anew in another
        order (None).
        """
        state = checkpoint.load(self.last)
        if state["store"] != self.store.identity():
            raise InputError(f"store {self.config.store} is not the one that {self.last} was trained on; "
                             "resume with that one, or begin a new run")
        check_extractor(self.last, state["extractor"], self.model)
        ranks: list[dict[str, Any]] = state["ranks"]
        same = len(ranks) == self.ranks.size
        self.one_step.restore({**state, "counts": state["counts"][self.ranks.rank if same else 0]})
        self.step, self.best_dice, self.data_seed = state["step"], state["best_dice"], state["data_seed"]
        if not same:
            if self.ranks.first:
                _warn(f"{self.last} was written by {len(ranks)} processes, {self.ranks.size} go on with it: the order of the "
                      f"data and the dropout are new, and a step now has {self.ranks.size}/{len(ranks)} of the patches")
            self.data_seed = (self.data_seed + self.step) % 2**63
            torch.manual_seed((self.data_seed + self.ranks.rank) % 2**63)
            return None
        mine = ranks[self.ranks.rank]
        checkpoint.set_rng_state(mine["rng"], self.device)
        return bytes(mine["data"].numpy().tobytes())


def _about(mask: npt.NDArray[np.bool_], patch: Sequence[int]) -> tuple[slice, ...]:
    """The region of a patch's size, or the volume's where that is smaller, about the centre of a mask (D, H, W)."""
    found = np.argwhere(mask)
    centre = found.mean(0) if len(found) else np.array(mask.shape) / 2
    starts = [int(np.clip(c - n / 2, 0, max(size - n, 0))) for c, n, size in zip(centre, patch, mask.shape, strict=True)]
    return tuple(slice(a, min(a + n, size)) for a, n, size in zip(starts, patch, mask.shape, strict=True))


def _warn(text: str) -> None:
    print(f"dropgen-fast train: warning: {text}", file=sys.stderr)


class Stopped(Exception):
    """Training was asked to stop, and has saved."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal_number

    @property
    def status(self) -> int:
        """Exit status: what schedulers requeue on, or a shell's for an interrupted command."""
        return 128 + self.signal if self.signal == signal.SIGINT else REQUEUE


class StopSignals:
    """What has been asked for: the number of the first signal, 0 for none."""

    number = 0


@contextlib.contextmanager
def stop_signals(*, at_once: bool = False) -> Iterator[StopSignals]:
    """Note SIGTERM, SIGUSR1 and SIGINT instead of obeying them; with `at_once` raise `Stopped`.

    A second SIGINT is obeyed. A second SIGTERM is not: schedulers and launchers both send one, and SIGKILL when they mean it.
    """
    asked = StopSignals()

    def catch(number: int, _frame: Any) -> None:
        if at_once:
            raise Stopped(number, "stopped before the first step")
        if number == signal.SIGINT and asked.number:
            raise KeyboardInterrupt
        asked.number = asked.number or number

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, catch) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield asked
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


def main(argv: Sequence[str]) -> int:
    """The command ``train``."""
    resolved = resolve(argv)
    config = resolved.config
    if resolved.print_config:
        print(resolved.as_yaml(), end="")
        return 0
    ranks = Ranks()
    try:
        with stop_signals(at_once=True):
            ranks = Ranks.join(config.device)
            trainer = Trainer(config, ranks)
        trainer.fit()
    except Stopped as stop:
        if ranks.first:
            print(f"dropgen-fast train: {stop}", file=sys.stderr)
        return stop.status
    finally:
        ranks.leave()
    return 0


if __name__ == "__main__":
    sys.exit(run("train", main, sys.argv[1:]))
