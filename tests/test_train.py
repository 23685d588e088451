"""prepare → train → resume → predict → evaluate on tiny data, through the very commands that a user types."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from nifti_factory import write_cohort
from torch import nn

from dropgen_fast import checkpoint, evaluate, inference, predict, prepare, train
from dropgen_fast.cli import run
from dropgen_fast.config import TrainConfig
from dropgen_fast.errors import InputError
from dropgen_fast.model import ModelConfig, build_model, check_extractor
from dropgen_fast.settings import parse

RECIPE = ["--patch", "16", "16", "16", "--batch-size", "2", "--network-options", "base_channels=4", "downsamplings=2",
          "--learning-rate", "3e-3", "--validate-every", "10", "--log-every", "1", "--device", "cpu"]


def command(module: Any, arguments: Sequence[object]) -> int:
    """Run a command as the command line does."""
    return run(module.__name__.rpartition(".")[2], module.main, [str(a) for a in arguments])


def configuration(store: Path, out: Path, *arguments: object) -> TrainConfig:
    """What the command line would make of these arguments."""
    return parse(["--store", str(store), "--out", str(out), *RECIPE, *map(str, arguments)])


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Anisotropic, stored as LPI, so that training and prediction go through reorientation and resampling."""
    return write_cohort(tmp_path_factory.mktemp("cohort"), {"train": 3, "val": 2, "test": 2}, shape=(26, 20, 18),
                        spacing_mm=(1, 1.25, 1.5), axcodes="LPI")


@pytest.fixture(scope="module")
def store(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prepared") / "store"
    assert command(prepare, ["--source", cohort, "--store", path, "--spacing-mm", 1.25, 1.25, 1.25, "--workers", 1]) == 0
    return path


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def trained(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "dropgen"
    assert command(train, ["--store", store, "--out", out, "--steps", 20, "--fusion.p", 0.5, *RECIPE]) == 0
    return out


def test_a_run_leaves_all_that_it_should(trained: Path) -> None:
    assert {"config.yaml", "metrics.jsonl", "best.pt", "last.pt"} <= {p.name for p in trained.iterdir()}
    assert list(trained.glob("events.*"))
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 21))
    assert [row["step"] for row in rows if "validation_dice" in row] == [10, 20]
    assert rows[-2]["learning_rate"] == pytest.approx(3e-3 * 0.5 * (1 + math.cos(math.pi * 19 / 20)))  # of the last step
    assert set(rows[-1]["per_class"]) == {"tissue 1", "tissue 2"}
    settings = yaml.safe_load((trained / "config.yaml").read_text())
    assert settings["model"]["fusion"] == {"p": [0.5], "p_start": [0.0], "p_ramp_steps": 0, "at_least_one": False}
    assert settings["patch"] == [16, 16, 16]
    state = checkpoint.load(trained / "last.pt")
    assert state["task"] == {"classes": ["background", "tissue 1", "tissue 2"], "channels": ["channel 0"],
                             "spacing_mm": [1.25, 1.25, 1.25], "patch": [16, 16, 16], "intensity_window": None}
    assert state["extractor"]["name"] == "mind"


@pytest.fixture(scope="module", params=["erm", "dropgen"])
def learned(request: pytest.FixtureRequest, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each method that is long enough to have learned."""
    out = tmp_path_factory.mktemp("learned") / request.param
    assert command(train, ["--store", store, "--out", out, "--method", request.param, "--fusion.p", 0.25, *RECIPE, "--steps", 400,
                           "--augmentation.affine-probability", 0, "--augmentation.gamma-probability", 0,
                           "--validate-every", 400]) == 0
    return out


def test_training_learns(learned: Path) -> None:
    """The cohort's labels are level sets of its images, with noise: some steps must bring the loss well down.

    A step's loss scatters by up to a fifth of itself (a batch is two patches whose image may be dropped), the mean of 40 by 3 %.
    """
    found = losses(learned)
    assert np.mean(found[-40:]) < 0.9 * np.mean(found[:5])


def test_divergence_keeps_the_good_checkpoint(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert command(train, ["--store", store, "--out", out, "--steps", 20, *RECIPE, "--learning-rate", "1e30",
                           "--validate-every", 20, "--save-every", 1, "--max-skipped", 3]) == 2
    error = capsys.readouterr().err
    assert re.search("training has diverged: (no gradient was finite in the last 3 steps|weights are not finite)", error)
    assert "begin anew in another folder with a learning rate below 1e+30" in error
    for path in out.glob("*.pt"):
        assert all(v.isfinite().all() for v in checkpoint.load(path)["network"].values())


def test_a_disk_that_refuses_is_one_line(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert command(train, ["--store", store, "--out", tmp_path / "file" / "run", "--steps", 1, *RECIPE]) == 2
    error = capsys.readouterr().err
    assert "file/run" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("network", "options", "loss"), [
    ("monai.networks.nets:DynUNet", ["filters=[4, 8, 8]", "strides=[1, 2, 2]", "deep_supervision=true"],
     "monai.losses:DiceFocalLoss"),
    ("monai.networks.nets:SegResNet", ["init_filters=8", "blocks_down=[1, 1]", "blocks_up=[1]"], "monai.losses:TverskyLoss"),
    ("monai.networks.nets:SwinUNETR", ["feature_size=12"], "dice_ce"),
])
def test_any_network_with_any_loss_by_path(store: Path, tmp_path: Path, network: str, options: list[str], loss: str) -> None:
    """Through the command: the first layer's channels, the classes and the heads are taken care of."""
    out = tmp_path / "run"
    assert command(train, ["--store", store, "--out", out, *RECIPE, "--patch", 64, 32, 32, "--network", network,
                           "--network-options", *options, "--loss", loss, "--steps", 2, "--validate-every", 2,
                           "--batch-size", 1]) == 0
    assert all(math.isfinite(value) for value in losses(out))
    assert checkpoint.load(out / "last.pt")["model"]["network"] == network


def normalizing_extractor() -> nn.Module:
    """Features that change if its BatchNorm ever leaves evaluation mode."""
    return nn.Sequential(nn.Conv3d(1, 3, 3, padding=1), nn.BatchNorm3d(3))


def test_extractor_is_the_same_after_training_and_validation(store: Path, tmp_path: Path) -> None:
    trainer = train.Trainer(configuration(store, tmp_path / "run", "--steps", 4, "--validate-every", 2,
                                          "--extractor", f"{__name__}:normalizing_extractor"))
    image = torch.rand(1, 1, 8, 8, 8)
    before = trainer.model.extractor(image)
    trainer.fit()
    assert torch.equal(trainer.model.extractor(image), before)
    assert trainer.model.network.training  # and the network went back to training after its validation
    assert not any(key.startswith("extractor") for key in trainer.model.state_dict())


def test_predict_and_evaluate(learned: Path, cohort: Path, tmp_path: Path) -> None:
    out = tmp_path / "predictions"
    assert command(predict, ["--run", learned, "--images", cohort / "imagesTs", "--out", out]) == 0
    for i in range(2):
        image, label = nib.load(cohort / f"imagesTs/test_{i}_0000.nii.gz"), nib.load(out / f"test_{i}.nii.gz")
        assert label.shape == image.shape
        np.testing.assert_array_equal(label.affine, image.affine)
        assert set(np.unique(label.dataobj)) <= {0, 1, 2}
        assert len(np.unique(label.dataobj)) > 1
    assert command(predict, ["--run", learned, "--images", cohort / "imagesTs", "--out", out]) == 0  # the same again is fine
    assert command(evaluate, ["--predictions", out, "--labels", cohort / "labelsTs", "--out", tmp_path / "scores"]) == 0
    with (tmp_path / "scores/per_case.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["case"], row["class"]) for row in rows} == {(f"test_{i}", str(k)) for i in range(2) for k in (1, 2)}
    # Against the score that the validation code would give the same label maps.
    for row in rows:
        maps = [torch.from_numpy(np.asarray(nib.load(folder / f"{row['case']}.nii.gz").dataobj).astype(np.int64))
                for folder in (out, cohort / "labelsTs")]
        assert float(row["dice"]) == pytest.approx(float(inference.dice_per_class(*maps, 3)[int(row["class"])]), abs=1e-5)


# ---- wrong input, one clear line each ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("extra", "message"), [
    (["--patch", "18", "16", "16"], r"unet cannot take a patch of \(18, 16, 16\).*\(16, 16, 16\) or \(20, 16, 16\) would do"),
    (["--fusion.p", "1.0"], "p must be in [0, 1), got 1.0"),
    (["--method", "stream-dropout", "--fusion.p", "0.7", "0.7"], "sum is at most 1"),
    (["--fusion.p", "0.1", "0.2", "0.3"], "fusion.p must be one drop rate or two"),
    (["--fusion.p-start", "0.1", "--fusion.p-ramp-steps", "-1"], "fusion.p_ramp_steps must be at least 0, got -1"),
    (["--fusion.p-start", "0.1"], "fusion.p_start (0.1,) needs fusion.p_ramp_steps"),
    (["--fusion.p-start", "1.5", "--fusion.p-ramp-steps", "1"], "p must be in [0, 1), got 1.5"),
    (["--fusion.p-ramp-steps", "1000000"], "fusion.p_ramp_steps must be at most steps ="),
    (["--extractor", "dino"], "dino"),
    (["--network", "nothing"], "nothing"),
    (["--network-options", "base_channels"], "network_options are name=value"),
    (["--network-options", "wings=2"], "wings"),
    (["--preset", "heart"], "no preset 'heart'; there are amos, brats"),
    (["--steps", "0"], "steps must be at least 1"),
    (["--learning-rate", "0"], "learning_rate must be positive"),
    (["--warmup-steps", "20"], "warmup_steps must be at least 0 and less than steps = 20"),
    (["--seed", str(2**70)], "seed must be a whole number"),
    (["--weight-decay", "nan"], "weight_decay must not be negative"),
    (["--device", "tpu"], "device must be auto, cpu, cuda"),
    (["--foreground-fraction", "2"], "foreground_fraction must be in [0, 1]"),
])
def test_wrong_settings(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], message: str) -> None:
    out = tmp_path / "run"
    assert command(train, ["--store", store, "--out", out, "--steps", 20, *RECIPE, *extra]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dropgen-fast train: error: ")
    assert error.count("\n") == 1
    assert message in error or re.search(message, error)
    assert not out.exists()  # nothing is begun


def test_empty_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_cohort(tmp_path / "source", {"train": 2})
    assert command(prepare, ["--source", source, "--store", tmp_path / "store", "--spacing-mm", 1, 1, 1, "--workers", 1]) == 0
    assert command(train, ["--store", tmp_path / "store", "--out", tmp_path / "run", *RECIPE]) == 2
    assert "has no validation cases" in capsys.readouterr().err


def test_out_folder_of_something_else(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert command(train, ["--store", store, "--out", tmp_path, *RECIPE]) == 2
    assert "holds files that are no run" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_no_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(train, ["--store", tmp_path / "none", "--out", tmp_path / "run", *RECIPE]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "none") in error
    assert error.count("\n") == 1


def test_checkpoint_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.pt"
    checkpoint.save(path, {"step": 1})
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match=r"x.pt cannot be written: No space left"):
        checkpoint.save(path, {"step": 2})
    assert checkpoint.load(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_extractor_mismatch_is_refused(trained: Path) -> None:
    state = checkpoint.load(trained / "last.pt")
    model = build_model(ModelConfig(extractor_stride=2, network_options=("base_channels=4", "downsamplings=2")),
                        image_channels=1, classes=3, patch=(16, 16, 16))
    with pytest.raises(InputError, match="was trained with extractor"):
        check_extractor(trained / "last.pt", state["extractor"], model)
