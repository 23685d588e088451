"""Exact resume: a run that was stopped, or killed at any moment, ends with the same bits as one that was not."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nifti_factory import write_cohort

from dropgen_fast import checkpoint, prepare, train
from dropgen_fast.cli import run
from dropgen_fast.errors import InputError
from dropgen_fast.record.folder import RunFolder
from dropgen_fast.settings import parse

STEPS = 20
RECIPE = ["--patch", "16", "16", "16", "--batch-size", "2", "--network-options", "base_channels=4", "downsamplings=2",
          "--learning-rate", "3e-3", "--validate-every", "10", "--log-every", "1", "--device", "cpu", "--steps", str(STEPS),
          "--fusion.p", "0.5", "--ema-decay", "0.9", "--accumulate", "2"]
KILLED_WHILE_WRITING = """
import os, signal, sys
import torch
from dropgen_fast import train
written, save = 0, torch.save
def cut(state, file):
    global written
    written += 1
    if written < {nth}:
        return save(state, file)
    import io
    whole = io.BytesIO()
    save(state, whole)
    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = cut
train.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    cohort = write_cohort(folder / "nifti", {"train": 3, "val": 2}, shape=(20, 20, 18))
    assert prepare.main(["--source", str(cohort), "--store", str(folder / "store"), "--workers", "1"]) == 0
    return folder / "store"


def arguments(store: Path, out: Path, *more: str) -> list[str]:
    return ["--store", str(store), "--out", str(out), *RECIPE, *more]


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody stops."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main(arguments(store, out)) == 0
    return out


def rows(out: Path, *keys: str) -> list[list[Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [[row[key] for key in keys] for row in found if all(key in row for key in keys)]


def check_same(out: Path, whole: Path) -> None:
    """Losses, validations, weights, averages, optimizer and generators: bit for bit."""
    logged = ("step", "loss", "learning_rate", "skipped_steps")
    assert rows(out, *logged) == rows(whole, *logged)
    assert len(rows(out, "step", "loss")) == STEPS
    assert rows(out, "step", "validation_dice", "per_class") == rows(whole, "step", "validation_dice", "per_class")
    for name in ("last.pt", "best.pt"):
        a, b = (checkpoint.load(folder / name) for folder in (out, whole))
        for part in ("network", "ema"):
            assert a[part].keys() == b[part].keys()
            assert all(torch.equal(a[part][k], v) for k, v in b[part].items())
        for k, state in b["optimizer"]["state"].items():
            assert all(torch.equal(a["optimizer"]["state"][k][name], v) for name, v in state.items())
        assert torch.equal(a["ranks"][0]["rng"]["cpu"], b["ranks"][0]["rng"]["cpu"])
        assert (a["step"], a["best_dice"], a["counts"]) == (b["step"], b["best_dice"], b["counts"])


def start(store: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "dropgen_fast.train", *arguments(store, out, *more, "--resume")],
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_killed_at_random_steps(whole: Path, store: Path, tmp_path: Path) -> None:
    """A real process, a checkpoint after every step, killed without warning again and again until it has ended by itself."""
    out, moment, kills = tmp_path / "killed", random.Random(0), 0
    while True:
        process = start(store, out, "--save-every", "1")
        before = (out / "last.pt").stat().st_mtime_ns if (out / "last.pt").exists() else 0
        if kills < 2:
            while process.poll() is None and not ((out / "last.pt").exists() and (out / "last.pt").stat().st_mtime_ns > before):
                time.sleep(0.005)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moment.uniform(0, 0.4))
            process.kill()
            kills += 1
        _, errors = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors
        assert checkpoint.load(out / "last.pt")["step"] >= 1
    check_same(out, whole)


@pytest.mark.parametrize("nth", [2, 3])
def test_killed_while_a_checkpoint_is_written(whole: Path, store: Path, tmp_path: Path, nth: int) -> None:
    """Half of a file is on the disk under its temporary name: of last.pt (2) before step 10, of best.pt (3) at step 10."""
    out = tmp_path / "cut"
    command = [sys.executable, "-c", KILLED_WHILE_WRITING.format(nth=nth), *arguments(store, out, "--save-every", "4")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert checkpoint.load(out / "last.pt")["step"] == 4 * (nth - 1)
    assert train.main(arguments(store, out, "--save-every", "4", "--resume")) == 0
    check_same(out, whole)
    assert not list(out.glob(".*.pt*"))  # what the kill left behind was cleared away


def test_stopped_and_resumed_is_the_same_run(whole: Path, store: Path, tmp_path: Path) -> None:
    """Cut after step 10's checkpoint, with later steps already in the record."""
    out = tmp_path / "cut"
    trainer = train.Trainer(parse(arguments(store, out)))
    step = trainer.train_step

    def killed(batches: Any) -> torch.Tensor:
        if trainer.step == 14:
            raise KeyboardInterrupt
        return step(batches)

    trainer.train_step = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 14, "lo')  # a line that was being written
    assert run("train", train.main, arguments(store, out)) == 2  # without --resume the run is not touched
    assert train.main(arguments(store, out, "--resume")) == 0
    check_same(out, whole)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_asked_to_stop_it_saves(whole: Path, store: Path, tmp_path: Path, number: signal.Signals, status: int) -> None:
    """Stopped between validations: the step that it had reached is saved, and the resumed run is the uninterrupted one."""
    out = tmp_path / "stopped"
    trainer = train.Trainer(parse(arguments(store, out)))
    step = trainer.train_step

    def signalled(batches: Any) -> torch.Tensor:
        if trainer.step == 6:
            os.kill(os.getpid(), number)
            if number != signal.SIGINT:
                os.kill(os.getpid(), number)  # launchers and schedulers both send it
        return step(batches)

    trainer.train_step = signalled  # type: ignore[method-assign]
    with pytest.raises(train.Stopped, match="stopped after 7 steps, saved") as caught:
        trainer.fit()
    assert caught.value.status == status
    assert (out / train.REQUEUE_MARK).exists() == (status == train.REQUEUE)
    assert checkpoint.load(out / "last.pt")["step"] == 7
    assert train.main(arguments(store, out, "--resume")) == 0
    assert not (out / train.REQUEUE_MARK).exists()
    check_same(out, whole)


def test_the_exit_status_of_a_stopped_process(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(store, out, "--save-every", "1")
    while not (out / "last.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == train.REQUEUE, errors
    assert "saved; --resume goes on from here" in errors


def test_a_second_interrupt_is_obeyed() -> None:
    with train.stop_signals() as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_schedule_of_drop_rates_goes_on_where_it_was(store: Path, tmp_path: Path) -> None:
    """The rate comes from the step, so a resumed run has the rates, and so the losses, of one that was not stopped."""
    ramp = ["--steps", "6", "--fusion.p-start", "0.1", "--fusion.p", "0.5", "0.9", "--fusion.p-ramp-steps", "4",
            "--validate-every", "3", "--fusion.at-least-one"]

    def train_up_to(last: int, out: Path) -> list[list[float]]:
        trainer = train.Trainer(parse(arguments(store, out, *ramp, "--resume")))
        step, rates = trainer.train_step, []

        def recorded(batches: Any) -> torch.Tensor:
            if trainer.step == last:
                raise KeyboardInterrupt
            loss = step(batches)
            rates.append(trainer.model.fusion.rates.tolist())
            return loss

        trainer.train_step = recorded  # type: ignore[method-assign]
        with contextlib.suppress(KeyboardInterrupt):
            trainer.fit()
        return rates

    all_at_once = train_up_to(6, tmp_path / "whole")
    wanted = [(0.1, 0.1), (0.2, 0.3), (0.3, 0.5), (0.4, 0.7), (0.5, 0.9), (0.5, 0.9)]
    np.testing.assert_allclose(all_at_once, wanted, rtol=1e-6)
    assert train_up_to(5, tmp_path / "cut") == all_at_once[:5]
    assert train_up_to(6, tmp_path / "cut") == all_at_once[3:]
    assert rows(tmp_path / "cut", "loss") == rows(tmp_path / "whole", "loss")


def test_two_trainings_do_not_share_a_folder(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "run", {"a": 1}, resume=True)
    first.start(0)
    with pytest.raises(InputError, match="another process is training into it"):
        RunFolder(tmp_path / "run", {"a": 1}, resume=True).start(0)
    first.close()
    RunFolder(tmp_path / "run", {"a": 1}, resume=True).start(0)


def test_a_moved_store_is_the_same_store(whole: Path, store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "moved")
    shutil.copytree(whole, tmp_path / "run")
    free = ("--loader-threads", "1", "--log-every", "2")
    assert train.main(arguments(tmp_path / "moved", tmp_path / "run", "--resume", *free)) == 0


def test_resume_refuses_other_settings(whole: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (whole / "last.pt").read_bytes()
    assert run("train", train.main, arguments(store, whole, "--steps", "30", "--fusion.p", "0.25", "--resume")) == 2
    message = capsys.readouterr().err
    assert "cannot be resumed with other settings" in message
    assert "steps was 20 and is now 30" in message
    assert "model.fusion.p was [0.5] and is now [0.25]" in message
    assert message.count("\n") == 1
    assert (whole / "last.pt").read_bytes() == before


def test_a_checkpoint_of_another_version_is_refused(whole: Path, tmp_path: Path) -> None:
    torch.save({"version": 1, "step": 3}, tmp_path / "old.pt")
    with pytest.raises(InputError, match="has version 1, this program reads version 2"):
        checkpoint.load(tmp_path / "old.pt")
    assert torch.load(whole / "last.pt", weights_only=True)["version"] == 2
