"""prepare → train → resume → predict → evaluate on tiny data, through the very commands that a user types."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
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
from dropgen_fast.data.augmentation import AugmentationConfig
from dropgen_fast.errors import InputError
from dropgen_fast.model import FusionConfig, ModelConfig, build_model, check_extractor, network_options
from dropgen_fast.run import RunFolder

RECIPE = ["--patch", "16", "16", "16", "--batch-size", "2", "--network-options", "base_channels=4", "downsamplings=2",
          "--learning-rate", "3e-3", "--validate-every", "10", "--log-every", "1", "--device", "cpu"]


def command(module: Any, arguments: Sequence[object]) -> int:
    """Run a command as the command line does."""
    return run(module.__name__.rpartition(".")[2], module.main, [str(a) for a in arguments])


def configuration(store: Path, out: Path, *arguments: object) -> train.TrainConfig:
    """What the command line would make of these arguments."""
    return train.parse(["--store", str(store), "--out", str(out), *RECIPE, *map(str, arguments)])


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
    assert rows[-2]["learning_rate"] == pytest.approx(0, abs=1e-12)
    assert set(rows[-1]["per_class"]) == {"tissue 1", "tissue 2"}
    settings = yaml.safe_load((trained / "config.yaml").read_text())
    assert settings["model"]["fusion"] == {"mode": "channel", "p": [0.5], "p_start": [0.0], "p_ramp_steps": 0,
                                           "at_least_one": False}
    assert settings["patch"] == [16, 16, 16]
    state = checkpoint.load(trained / "last.pt")
    assert state["task"] == {"classes": ["background", "tissue 1", "tissue 2"], "channels": ["channel 0"],
                             "spacing_mm": [1.25, 1.25, 1.25], "patch": [16, 16, 16], "intensity_window": None}
    assert state["extractor"]["name"] == "mind"


@pytest.fixture(scope="module", params=["erm", "dropgen"])
def learned(request: pytest.FixtureRequest, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each method that is long enough to have learned."""
    out = tmp_path_factory.mktemp("learned") / request.param
    assert command(train, ["--store", store, "--out", out, "--method", request.param, "--fusion.p", 0.25, *RECIPE, "--steps", 200,
                           "--augmentation.affine-probability", 0, "--augmentation.gamma-probability", 0,
                           "--validate-every", 200]) == 0
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


def test_predict_goes_on_after_a_bad_case(
    trained: Path, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    good = cohort / "imagesTs/test_0_0000.nii.gz"
    (images / "good_0000.nii.gz").write_bytes(good.read_bytes())
    (images / "cut_0000.nii.gz").write_bytes(good.read_bytes()[:200])
    (images / "two_0000.nii.gz").write_bytes(good.read_bytes())
    (images / "two_0001.nii.gz").write_bytes(good.read_bytes())
    (images / "gap_0001.nii.gz").write_bytes(good.read_bytes())
    out = tmp_path / "out"
    assert command(predict, ["--run", trained, "--images", images, "--out", out]) == 1
    message = capsys.readouterr()
    assert "1 of 4 cases predicted" in message.out
    assert "cut_0000.nii.gz" in message.err
    assert "trained on 1 channels" in message.err
    assert "without a gap" in message.err
    assert {p.name for p in out.glob("*.nii.gz")} == {"good.nii.gz"}


def test_predict_refuses_a_foreign_folder(
    trained: Path, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert command(predict, ["--run", trained, "--images", cohort / "imagesTs", "--out", tmp_path]) == 2
    assert "holds files that are no predictions of ours" in capsys.readouterr().err
    (tmp_path / "thesis.txt").unlink()
    assert command(predict, ["--run", trained, "--images", cohort / "imagesTs", "--out", tmp_path]) == 0
    assert command(predict, ["--run", trained, "--images", cohort / "imagesVal", "--out", tmp_path]) == 2
    assert "predictions of another run" in capsys.readouterr().err
    # Replaced, none of the old maps stays beside the new ones.
    assert command(predict, ["--run", trained, "--images", cohort / "imagesVal", "--out", tmp_path, "--overwrite"]) == 0
    assert {p.name for p in tmp_path.glob("*.nii.gz")} == {"val_0.nii.gz", "val_1.nii.gz"}


def test_a_case_that_fails_keeps_no_older_map(trained: Path, cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--run", trained, "--images", cohort / "imagesTs", "--out", tmp_path / "out"]
    assert command(predict, arguments) == 0
    segment = predict.class_probabilities

    def fails_once(*args: Any, **kwargs: Any) -> torch.Tensor:
        monkeypatch.setattr(predict, "class_probabilities", segment)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(predict, "class_probabilities", fails_once)
    assert command(predict, arguments) == 1
    assert "test_0: out of memory" in capsys.readouterr().err
    assert {p.name for p in (tmp_path / "out").glob("*.nii.gz")} == {"test_1.nii.gz"}


# ---- wrong input, one clear line each ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("extra", "message"), [
    (["--patch", "18", "16", "16"], r"unet cannot take a patch of \(18, 16, 16\).*\(16, 16, 16\) or \(20, 16, 16\) would do"),
    (["--fusion.p", "1.0"], "p must be in [0, 1), got 1.0"),
    (["--fusion.mode", "stream", "--fusion.p", "0.7", "0.7"], "sum is at most 1"),
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


def test_no_patch_at_all(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(train, ["--store", store, "--out", tmp_path / "run", "--device", "cpu"]) == 2
    assert "no patch: give --patch" in capsys.readouterr().err


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


@pytest.mark.parametrize("damage", [lambda b: b[:5000], lambda b: b"", lambda b: b"not a checkpoint at all"])
def test_damaged_checkpoint(trained: Path, tmp_path: Path, damage: Callable[[bytes], bytes], cohort: Path,
                            capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "best.pt").write_bytes(damage((trained / "best.pt").read_bytes()))
    assert command(predict, ["--run", tmp_path, "--images", cohort / "imagesTs", "--out", tmp_path / "out"]) == 2
    error = capsys.readouterr().err
    assert "best.pt is damaged or not a checkpoint" in error
    assert error.count("\n") == 1
    assert command(predict, ["--run", tmp_path / "none", "--images", cohort / "imagesTs", "--out", tmp_path / "out"]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_checkpoint_of_another_version(tmp_path: Path) -> None:
    torch.save({"version": 99}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="version 99, this program reads version 1"):
        checkpoint.load(tmp_path / "x.pt")


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


# ---- parts -----------------------------------------------------------------------------------------------------------


def test_erm_is_the_image_alone() -> None:
    model = build_model(ModelConfig(method="erm", network_options=("base_channels=4", "downsamplings=1"), precision="fp32"),
                        image_channels=2, classes=3, patch=(8, 8, 8)).train()
    image = torch.rand(2, 2, 8, 8, 8)
    assert torch.equal(model.fused(image), image)
    assert model(image).shape == (2, 3, 8, 8, 8)


def test_dropgen_drops_in_training_only() -> None:
    torch.manual_seed(0)
    config = ModelConfig(network_options=("base_channels=4", "downsamplings=1"), fusion=FusionConfig(mode="stream", p=(1.0, 0.0)))
    model = build_model(config, image_channels=1, classes=3, patch=(8, 8, 8))
    image = torch.rand(2, 1, 8, 8, 8)
    assert not model.train().fused(image)[:, 0].any()
    fused = model.eval().fused(image)
    assert fused.dtype == torch.bfloat16
    assert fused.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(fused[:, :1].float(), image, rtol=2**-8, atol=0)
    features = fused[:, 1:].float()
    assert features.mean((2, 3, 4)).abs().max() < 0.01
    torch.testing.assert_close(features.std((2, 3, 4), correction=0), torch.ones(2, 12), rtol=0.02, atol=0.02)


def test_stride_gives_coarse_features_that_the_fusion_interpolates() -> None:
    config = ModelConfig(network_options=("base_channels=4", "downsamplings=1"), extractor_stride=2)
    model = build_model(config, image_channels=1, classes=3, patch=(8, 8, 8))
    assert model.extractor is not None
    assert model.extractor(torch.rand(1, 1, 8, 8, 8)).shape == (1, 12, 4, 4, 4)
    assert model(torch.rand(1, 1, 8, 8, 8)).shape == (1, 3, 8, 8, 8)


def test_dice_per_class() -> None:
    prediction = torch.tensor([0, 1, 1, 2, 2, 2])
    label = torch.tensor([0, 1, 2, 2, 2, 0])
    dice = inference.dice_per_class(prediction, label, 5)
    assert dice[:3].tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3])
    assert dice[3:].isnan().all()  # in neither: no score, not a zero


def test_sliding_window_is_the_network_where_one_window_covers_all() -> None:
    model = build_model(ModelConfig(network_options=("base_channels=4", "downsamplings=1"), precision="fp32"),
                        image_channels=1, classes=3, patch=(8, 8, 8)).train()
    image = np.random.default_rng(0).random((8, 8, 8, 1), np.float32)
    image = (image - image.min()) / (image.max() - image.min())
    probabilities = inference.class_probabilities(model, image, (8, 8, 8))
    assert model.training
    with torch.no_grad():
        wanted = model.eval()(torch.from_numpy(image).permute(3, 0, 1, 2)[None]).softmax(1)[0]
    torch.testing.assert_close(probabilities, wanted, rtol=1e-4, atol=1e-5)
    small = inference.class_probabilities(model, image[:5, :, :7], (8, 8, 8))
    assert small.shape == (3, 5, 8, 7)
    torch.testing.assert_close(small.sum(0), torch.ones(5, 8, 7))


def test_augmentation_comes_from_command_line_then_preset_then_recipe(store: Path, tmp_path: Path) -> None:
    def augmentation(*arguments: object) -> AugmentationConfig:
        found = configuration(store, tmp_path / "r", *arguments).augmentation
        assert found is not None
        return found

    assert augmentation("--preset", "brats") == augmentation() == AugmentationConfig()
    assert augmentation("--preset", "amos") == AugmentationConfig(mirror=False)
    assert augmentation("--preset", "amos", "--augmentation.mirror").mirror is True
    nnunet = augmentation("--preset", "amos", "--recipe", "nnunet", "--patch", "16", "64", "64", "--augmentation.gamma", 0.9, 1.1)
    assert nnunet == dataclasses.replace(AugmentationConfig.nnunet((16, 64, 64)), mirror=False, gamma=(0.9, 1.1))
    config = dataclasses.replace(configuration(store, tmp_path / "s", "--preset", "amos"), augmentation=None)
    assert train.Trainer(config).config.augmentation == AugmentationConfig(mirror=False)


def test_network_options_are_yaml() -> None:
    wanted = {"a": 1, "b": [1, 2], "c": "x", "d": 0.5, "e": 1e-5}
    assert network_options(("a=1", "b=[1, 2]", "c=x", "d=0.5", "e=1e-5")) == wanted


def test_run_folder_takes_out_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "r", {"a": 1}, resume=False)
    folder.start(0)
    for step in (1, 2, 3):
        folder.record(step, loss=float(step))
    folder.close()
    again = RunFolder(tmp_path / "r", {"a": 1}, resume=True)
    again.start(2)
    again.close()
    assert losses(tmp_path / "r") == [1.0, 2.0]

