"""Processes that train together, as torchrun starts them: beside one with the doubled batch; stopped, failed, resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nifti_factory import write_cohort
from torch import Tensor

from dropgen_fast import checkpoint, prepare, train
from dropgen_fast.data.pipeline import TrainingPipeline
from dropgen_fast.distributed import Ranks
from dropgen_fast.errors import InputError
from dropgen_fast.settings import parse

pytestmark = pytest.mark.usefixtures("one_thread")  # as torchrun gives each process
STEPS, SAMPLES = 8, 2
RECIPE = ["--patch", "16", "16", "16", "--steps", str(STEPS), "--network-options", "base_channels=4", "downsamplings=2",
          "normalization=instance", "--precision", "fp32", "--fusion.p", "0.5", "--learning-rate", "3e-4", "--log-every", "1",
          "--validate-every", "4", "--device", "cpu", "--loader-threads", "1"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    cohort = write_cohort(folder / "nifti", {"train": 4, "val": 3}, shape=(20, 20, 18))
    assert prepare.main(["--source", str(cohort), "--store", str(folder / "store"), "--workers", "1"]) == 0
    return folder / "store"


def launcher(store: Path, out: Path, *arguments: str, restarts: int = 0, processes: int = 2) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--max-restarts",
            str(restarts), "-m", "dropgen_fast.train", "--store", str(store), "--out", str(out), "--batch-size", str(SAMPLES),
            *RECIPE, *arguments]


def rows(out: Path, key: str) -> list[Any]:
    if not (out / "metrics.jsonl").exists():
        return []
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in found if key in row]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def pair(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes."""
    out = tmp_path_factory.mktemp("runs") / "pair"
    done = subprocess.run(launcher(store, out), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def one_process(store: Path, out: Path, perturbation: int = 0) -> np.ndarray:
    """Losses of one process that gets the batches and the dropout of both; voxels changed by 1e-7 where `perturbation` > 0."""
    arguments = ["--store", str(store), "--out", str(out), "--batch-size", str(2 * SAMPLES), *RECIPE]
    trainer = train.Trainer(parse(arguments))
    config = trainer.config
    shares = [TrainingPipeline(trainer.store, patch=trainer.patch, batch_size=SAMPLES, seed=config.seed, num_threads=1,
                               augmentation=config.augmentation, foreground_fraction=0.0, rank=rank, world_size=2)
              for rank in range(2)]
    states = [torch.get_rng_state(), torch.manual_seed(config.seed + 1).get_state()]
    fused, noise = trainer.model.fused, torch.Generator().manual_seed(perturbation)

    def fused_by_halves(image: Tensor, *, features: Tensor) -> Tensor:
        parts = []
        for rank, (half, of_half) in enumerate(zip(image.split(SAMPLES), features.split(SAMPLES), strict=True)):
            torch.set_rng_state(states[rank])
            parts.append(fused(half, features=of_half))
            states[rank] = torch.get_rng_state()
        return torch.cat(parts)

    trainer.model.fused = fused_by_halves  # type: ignore[method-assign]
    trainer.model.train()
    losses = []
    for number in range(STEPS):
        batches = [next(share) for share in shares]
        image = torch.cat([b.image for b in batches])
        if perturbation:
            image = image * (1 + 1e-7 * torch.randn(image.shape, generator=noise))
        losses.append(float(trainer.one_step([(image, torch.cat([b.label for b in batches]))], number)))
    return np.array(losses)


def test_two_processes_are_one_with_the_doubled_batch(pair: Path, store: Path, tmp_path: Path) -> None:
    """The losses agree as far as rounding lets two trainings agree.

    Sums over the batch are taken in another order, and AdamW lets rounding grow: how much is found by training with images that
    are changed by 1e-7. Without BatchNorm, which would see half as many samples.
    """
    alone = one_process(store, tmp_path / "alone")
    apart = np.max([np.abs(one_process(store, tmp_path / f"changed_{seed}", seed) / alone - 1) for seed in (1, 2)], 0)
    tolerance = 10 * np.maximum.accumulate(apart) + 1e-6
    assert tolerance.max() < 1e-2
    together = np.array(rows(pair, "loss"))
    assert len(together) == STEPS
    assert (np.abs(together / alone - 1) <= tolerance).all(), (together, alone, tolerance)
    assert len(set(np.round(alone, 3))) > STEPS // 2  # the losses do change


def test_sharded_validation_is_the_validation(pair: Path, store: Path, tmp_path: Path) -> None:
    shutil.copytree(pair, tmp_path / "run")
    arguments = ["--store", str(store), "--out", str(tmp_path / "run"), "--batch-size", str(SAMPLES), *RECIPE, "--resume"]
    trainer = train.Trainer(parse(arguments))
    trainer.folder = None  # nothing is recorded
    scores = trainer.validate()
    assert scores == rows(pair, "per_class")[-1]
    assert set(scores) == {"tissue 1", "tissue 2"}


def test_one_process_goes_on_with_the_run_of_two(
    pair: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(pair, tmp_path / "run")
    state = checkpoint.load(tmp_path / "run/last.pt")
    checkpoint.save(tmp_path / "run/last.pt", {**{k: v for k, v in state.items() if k != "version"}, "step": STEPS - 2})
    arguments = ["--store", str(store), "--out", str(tmp_path / "run"), "--batch-size", str(SAMPLES), *RECIPE, "--resume"]
    assert train.main(arguments) == 0
    warning = capsys.readouterr().err
    assert "was written by 2 processes, 1 go on with it" in warning
    assert len(rows(tmp_path / "run", "loss")) == STEPS
    assert len(checkpoint.load(tmp_path / "run/last.pt")["ranks"]) == 1


def test_asked_to_stop_all_stop_at_the_same_step(pair: Path, store: Path, tmp_path: Path) -> None:
    """The scheduler's signal to the launcher: saved by all, marked for the next start, and gone on with bit for bit."""
    out = tmp_path / "run"
    process = subprocess.Popen(launcher(store, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(rows(out, "loss")) >= 2, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    stopped = checkpoint.load(out / "last.pt")["step"]
    assert (out / train.REQUEUE_MARK).exists(), errors
    assert f"stopped after {stopped} steps" in errors
    done = subprocess.run(launcher(store, out, "--resume"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (out / train.REQUEUE_MARK).exists()
    assert rows(out, "loss") == rows(pair, "loss")


def test_a_process_that_fails_is_started_again(pair: Path, store: Path, tmp_path: Path) -> None:
    """torchrun --max-restarts: the whole group begins anew from the last checkpoint, and ends as if nothing had been."""
    out = tmp_path / "run"
    command = launcher(store, out, "--save-every", "1", restarts=1)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (out / "last.pt").exists(), process)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    victims = [pid for pid in workers if b"dropgen_fast.train" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(victims) == 2
    os.kill(int(victims[1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert rows(out, "loss") == rows(pair, "loss")


def test_an_incomplete_environment_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match=r"RANK.*not set: start them with torchrun"):
        Ranks.join("cpu")
