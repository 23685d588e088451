"""The command ``predict``: folders of cases, several checkpoints, probabilities, failures, going on."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
import torch
from nifti_factory import blobs, make_affine, write_cohort, write_nifti

from dropgen_fast import checkpoint, predict
from dropgen_fast.cli import run
from dropgen_fast.config import plain
from dropgen_fast.data.geometry import Grid, GridMap
from dropgen_fast.errors import InputError
from dropgen_fast.model import ModelConfig, build_model, extractor_identity

PATCH = (16, 16, 16)
TASK: dict[str, Any] = {"classes": ["background", "tissue 1", "tissue 2"], "channels": ["MR"], "spacing_mm": [1.25, 1.25, 1.25],
                        "patch": list(PATCH), "intensity_window": None}
STEP = 1 / 65535


def command(*arguments: object) -> int:
    """Run the command as the command line does."""
    return run("predict", predict.main, [str(a) for a in (*arguments, "--device", "cpu")])


def write_run(folder: Path, *, seed: int = 0, name: str = "best", ema_seed: int | None = None,
              options: dict[str, Any] | None = None, **task: Any) -> Path:
    """A run whose network was never trained, but is as sure of itself as one that was."""
    folder.mkdir(exist_ok=True)
    settings = {**TASK, **task}
    config = ModelConfig(network_options=("base_channels=4", "downsamplings=2"), precision="fp32", **(options or {}))

    def weights(of: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(of)
        model = build_model(config, image_channels=len(settings["channels"]), classes=len(settings["classes"]),
                            patch=tuple(settings["patch"]))
        for weight in model.network.parameters():
            if weight.dim() == 5:
                torch.nn.init.kaiming_normal_(weight)  # which keeps differences of the image alive, unlike torch's default
        identities.append(extractor_identity(model))
        return model.network.state_dict()

    identities: list[Any] = []
    checkpoint.save(folder / f"{name}.pt", {
        "step": 10, "network": weights(seed), "ema": None if ema_seed is None else weights(ema_seed), "model": plain(config),
        "task": settings, "extractor": identities[0]})
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "dropgen")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two anisotropic images stored as LPI, so that prediction goes through reorientation and resampling and back."""
    return write_cohort(tmp_path_factory.mktemp("cohort"), {"test": 2}, shape=(26, 20, 18), spacing_mm=(1, 1.25, 1.5),
                        axcodes="LPI", angles_rad=(0.1, 0.05, 0.2)) / "imagesTs"


@pytest.fixture
def my_images(images: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(images, tmp_path / "images")


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Sizes of the volumes that were segmented."""
    sizes: list[tuple[int, ...]] = []
    segment = predict.class_probabilities

    def counted(model: Any, image: npt.NDArray[np.float32], *args: Any, **settings: Any) -> torch.Tensor:
        sizes.append(image.shape)
        return segment(model, image, *args, **settings)

    monkeypatch.setattr(predict, "class_probabilities", counted)
    return sizes


def labels(out: Path, case: str = "test_0") -> npt.NDArray[np.uint8]:
    found: npt.NDArray[np.uint8] = np.asarray(nib.load(out / f"{case}.nii.gz").dataobj)
    return found


def probabilities(out: Path, case: str = "test_0") -> npt.NDArray[np.float64]:
    found: npt.NDArray[np.float64] = nib.load(out / "probabilities" / f"{case}.nii.gz").get_fdata()
    return found


def maps(out: Path) -> set[str]:
    return {path.name.removesuffix(".nii.gz") for path in out.glob("*.nii.gz")}


# ---- cases that fail, folders of others -----------------------------------------------------------------------------


def test_it_goes_on_after_a_bad_case(trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = (images / "test_0_0000.nii.gz").read_bytes()
    mixed = tmp_path / "images"
    mixed.mkdir()
    for name, content in (("good_0000", good), ("cut_0000", good[:200]), ("two_0000", good), ("two_0001", good),
                          ("gap_0001", good)):
        (mixed / f"{name}.nii.gz").write_bytes(content)
    assert command("--run", trained, "--images", mixed, "--out", tmp_path / "out") == 1
    message = capsys.readouterr()
    assert "1 of 4 cases predicted" in message.out
    assert "cut_0000.nii.gz" in message.err
    assert "trained on 1 channels" in message.err
    assert "without a gap" in message.err
    assert maps(tmp_path / "out") == {"good"}


def test_a_foreign_folder_is_refused(trained: Path, images: Path, my_images: Path, tmp_path: Path,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    assert command("--run", trained, "--images", images, "--out", out) == 2
    assert "holds files that are no predictions of ours" in capsys.readouterr().err
    assert command("--run", trained, "--images", images, "--out", out / "thesis.txt") == 2
    assert "is a file; name a folder" in capsys.readouterr().err
    (out / "thesis.txt").unlink()
    assert command("--run", trained, "--images", images, "--out", out, "--save-probabilities") == 0
    (my_images / "test_0_0000.nii.gz").rename(my_images / "other_0000.nii.gz")
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    assert command("--run", trained, "--images", my_images, "--out", out) == 2
    assert "predictions of another run" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == before
    # Replaced, none of the old maps stays beside the new ones.
    assert command("--run", trained, "--images", my_images, "--out", out, "--overwrite") == 0
    assert maps(out) == {"other", "test_1"}
    assert not list((out / "probabilities").iterdir())


def test_a_case_that_fails_keeps_no_older_map(trained: Path, my_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--run", trained, "--images", my_images, "--out", tmp_path / "out"]
    assert command(*arguments) == 0
    os.utime(my_images / "test_0_0000.nii.gz", (1, 1))
    monkeypatch.setattr(predict, "class_probabilities", raises(RuntimeError("out of\nmemory")))
    assert command(*arguments) == 1
    told = capsys.readouterr()
    assert "test_0: out of memory" in told.err
    assert "1 of 2 cases predicted" in told.out
    assert maps(tmp_path / "out") == {"test_1"}


def raises(error: BaseException) -> Callable[..., Any]:
    def function(*args: Any, **settings: Any) -> Any:
        raise error
    return function


def test_a_case_that_cannot_be_written_does_not_stop_the_others(
    trained: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    write = predict.save_like

    def full_disk(original: Path, values: Any, path: Path) -> None:
        if path.name == "test_0.nii.gz":
            raise InputError(f"{path} cannot be written: No space left on device")
        write(original, values, path)

    monkeypatch.setattr(predict, "save_like", full_disk)
    assert command("--run", trained, "--images", images, "--out", tmp_path, "--save-probabilities") == 1
    assert "left out test_0:" in capsys.readouterr().err
    assert maps(tmp_path) == maps(tmp_path / "probabilities") == {"test_1"}


def test_scores_that_are_not_finite_are_no_prediction(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder = write_run(tmp_path / "run")
    state = checkpoint.load(run_folder / "best.pt")
    next(iter(state["network"].values()))[0] = float("nan")
    checkpoint.save(run_folder / "best.pt", {k: v for k, v in state.items() if k != "version"})
    assert command("--run", run_folder, "--images", images, "--out", tmp_path / "out") == 1
    assert "are not finite; the run has diverged" in capsys.readouterr().err
    assert not maps(tmp_path / "out")


# ---- going on ---------------------------------------------------------------------------------------------------------


def test_it_goes_on_where_it_was_stopped(trained: Path, my_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        computed: list[tuple[int, ...]], capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(my_images / "test_1_0000.nii.gz", my_images / "test_2_0000.nii.gz")
    arguments = ["--run", trained, "--images", my_images, "--out", tmp_path / "out"]
    with monkeypatch.context() as patched:
        segment = predict.class_probabilities

        def stopped(*args: Any, **settings: Any) -> torch.Tensor:
            if len(computed) == 1:
                raise KeyboardInterrupt
            return segment(*args, **settings)

        patched.setattr(predict, "class_probabilities", stopped)
        assert command(*arguments) == 130
    assert maps(tmp_path / "out") == {"test_0"}
    first = (tmp_path / "out" / "test_0.nii.gz").stat().st_mtime_ns
    assert command(*arguments) == 0
    assert maps(tmp_path / "out") == {"test_0", "test_1", "test_2"}
    assert len(computed) == 3
    assert (tmp_path / "out" / "test_0.nii.gz").stat().st_mtime_ns == first
    assert "3 of 3 cases predicted" in (told := capsys.readouterr().out)
    assert "1 of them before" in told


def test_what_is_done_again(trained: Path, my_images: Path, tmp_path: Path, computed: list[tuple[int, ...]]) -> None:
    """Cases without a map, with a changed image, without probabilities where those are wanted; all with --overwrite."""
    out = tmp_path / "out"

    def newly_computed(*more: object) -> int:
        computed.clear()
        assert command("--run", trained, "--images", my_images, "--out", out, *more) == 0
        return len(computed)

    assert newly_computed() == 2
    assert newly_computed() == 0
    assert newly_computed("--windows-per-batch", 2, "--offload", "never") == 0  # no other predictions
    (out / "test_0.nii.gz").unlink()
    assert newly_computed() == 1
    shutil.copy(my_images / "test_0_0000.nii.gz", my_images / "new_0000.nii.gz")
    assert newly_computed() == 1
    write_nifti(my_images / "test_0_0000.nii.gz", blobs((20, 20, 20), seed=9)[0], make_affine())
    assert newly_computed() == 1
    assert labels(out).shape == (20, 20, 20)
    assert newly_computed("--save-probabilities") == 3
    assert newly_computed() == 0
    assert newly_computed("--overwrite") == 3


@pytest.mark.parametrize("other", [["--mirror", 1], ["--overlap", 0.25], ["--features", "volume"], ["--checkpoint", "last"]])
def test_predictions_of_two_settings_are_not_mixed(trained: Path, images: Path, tmp_path: Path, other: list[object],
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    run_folder = shutil.copytree(trained, tmp_path / "run")
    write_run(run_folder, name="last", seed=1)
    arguments = ["--run", run_folder, "--images", images / "test_0_0000.nii.gz", "--out", tmp_path / "out"]
    assert command(*arguments) == 0
    assert command(*arguments, *other) == 2
    assert "holds the predictions of another run" in capsys.readouterr().err


def test_a_run_that_was_trained_on_is_another_run(images: Path, tmp_path: Path) -> None:
    """Same name, same step, other weights."""
    arguments = ["--run", write_run(tmp_path / "run"), "--images", images, "--out", tmp_path / "out"]
    assert command(*arguments) == 0
    write_run(tmp_path / "run", seed=1)
    assert command(*arguments) == 2


def test_images_that_are_gone(trained: Path, my_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--run", trained, "--images", my_images, "--out", tmp_path / "out"]
    assert command(*arguments) == 0
    (my_images / "test_0_0000.nii.gz").unlink()
    assert command(*arguments) == 2
    assert "of images that are gone" in capsys.readouterr().err
    assert maps(tmp_path / "out") == {"test_0", "test_1"}


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"cases": ["test_0"]}'])
def test_a_damaged_manifest_is_another_run_s(trained: Path, images: Path, tmp_path: Path, damage: str) -> None:
    arguments = ["--run", trained, "--images", images / "test_0_0000.nii.gz", "--out", tmp_path]
    (tmp_path / "predictions.json").write_text(damage)
    assert command(*arguments) == 2
    assert command(*arguments, "--overwrite") == 0


def test_one_image(trained: Path, images: Path, tmp_path: Path) -> None:
    assert command("--run", trained, "--images", images / "test_1_0000.nii.gz", "--out", tmp_path / "one") == 0
    assert command("--run", trained, "--images", images, "--out", tmp_path / "all") == 0
    assert maps(tmp_path / "one") == {"test_1"}
    np.testing.assert_array_equal(labels(tmp_path / "one", "test_1"), labels(tmp_path / "all", "test_1"))


# ---- while one is computed -------------------------------------------------------------------------------------------


def test_the_next_case_is_read_and_the_last_one_written_meanwhile(
    trained: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first is not computed before the second is read, nor written before the second is computed."""
    read, computed = threading.Event(), threading.Event()
    prepare, segment, write = predict.prepare_image, predict.class_probabilities, predict.save_like

    def reading(paths: Sequence[Path], *args: Any) -> Any:
        prepared = prepare(paths, *args)
        if paths[0].name.startswith("test_1"):
            read.set()
        return prepared

    def computing(*args: Any, **settings: Any) -> torch.Tensor:
        assert read.wait(30)
        found = segment(*args, **settings)
        if started:
            computed.set()
        started.append(True)
        return found

    def writing(*args: Any) -> None:
        assert computed.wait(30)
        write(*args)

    started: list[bool] = []
    monkeypatch.setattr(predict, "prepare_image", reading)
    monkeypatch.setattr(predict, "class_probabilities", computing)
    monkeypatch.setattr(predict, "save_like", writing)
    assert command("--run", trained, "--images", images, "--out", tmp_path) == 0
    assert maps(tmp_path) == {"test_0", "test_1"}


# ---- several checkpoints ---------------------------------------------------------------------------------------------


def test_an_ensemble_is_the_mean_of_its_members(images: Path, tmp_path: Path) -> None:
    """Two runs, of two methods and two patches, and a file: one third each."""
    a = write_run(tmp_path / "a")
    b = write_run(tmp_path / "b", seed=1, patch=[16, 24, 16], options={"method": "erm"})
    c = write_run(tmp_path / "c", seed=2, name="anything", options={"extractor_stride": 2}) / "anything.pt"
    image = ["--images", images / "test_0_0000.nii.gz", "--save-probabilities"]
    assert command("--run", a, b, "--checkpoint", "best", c, *image, "--out", tmp_path / "all") == 0
    for name, member in (("a", ["--run", a]), ("b", ["--run", b]), ("c", ["--checkpoint", c])):
        assert command(*member, *image, "--out", tmp_path / f"out_{name}") == 0
    members = [probabilities(tmp_path / f"out_{name}") for name in "abc"]
    assert np.abs(members[0] - members[1]).max() > 0.1
    # Each file is within half a step of its probabilities, one and a half where a tie was broken; and float32 has its own.
    np.testing.assert_allclose(probabilities(tmp_path / "all"), np.mean(members, axis=0), rtol=0, atol=3 * STEP + 1e-6)


def test_best_and_last_of_a_run(images: Path, tmp_path: Path, computed: list[tuple[int, ...]]) -> None:
    run_folder = write_run(write_run(tmp_path / "run"), name="last", seed=1)
    assert command("--run", run_folder, "--checkpoint", "best", "last", "--images", images / "test_0_0000.nii.gz",
                   "--out", tmp_path / "out") == 0
    assert len(computed) == 2
    settings = json.loads((tmp_path / "out" / "predictions.json").read_text())["settings"]
    assert [Path(model["checkpoint"]).name for model in settings["models"]] == ["best.pt", "last.pt"]


@pytest.mark.parametrize(("key", "value"), [
    ("classes", ["background", "tissue 2", "tissue 1"]), ("channels", ["CT"]), ("spacing_mm", [1, 1, 1]),
    ("intensity_window", [0, 1000]),
])
def test_members_of_other_tasks(trained: Path, images: Path, tmp_path: Path, key: str, value: Any,
                                capsys: pytest.CaptureFixture[str]) -> None:
    other = write_run(tmp_path / "other", **{key: value})
    assert command("--run", trained, other, "--images", images, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"{key} of {other}/best.pt is {value}, of {trained}/best.pt {TASK[key]}" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_averaged_weights_are_used_where_there_are_some(images: Path, tmp_path: Path) -> None:
    arguments = ["--images", images / "test_0_0000.nii.gz", "--save-probabilities"]
    both = write_run(tmp_path / "both", seed=0, ema_seed=1)
    for name, folder in (("both", both), ("0", write_run(tmp_path / "0")), ("1", write_run(tmp_path / "1", seed=1))):
        assert command("--run", folder, *arguments, "--out", tmp_path / f"out_{name}") == 0
    np.testing.assert_array_equal(probabilities(tmp_path / "out_both"), probabilities(tmp_path / "out_1"))
    assert np.abs(probabilities(tmp_path / "out_both") - probabilities(tmp_path / "out_0")).max() > 0.1


# ---- probabilities ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["--mirror", 0, 1, 2, "--features", "volume", "--windows-per-batch", 2]])
def test_probabilities_lie_where_the_labels_do(trained: Path, images: Path, tmp_path: Path, more: list[object]) -> None:
    assert command("--run", trained, "--images", images, "--out", tmp_path, "--save-probabilities", *more) == 0
    for case in ("test_0", "test_1"):
        image, file = nib.load(images / f"{case}_0000.nii.gz"), nib.load(tmp_path / "probabilities" / f"{case}.nii.gz")
        assert file.shape == (*image.shape, 3)
        assert file.get_data_dtype() == np.uint16
        np.testing.assert_array_equal(file.affine, image.affine)
        assert (file.header["sform_code"], file.header["qform_code"]) == (image.header["sform_code"], image.header["qform_code"])
        assert file.header.get_zooms()[:3] == image.header.get_zooms()
        found = labels(tmp_path, case)
        assert len(np.unique(found)) > 1
        np.testing.assert_array_equal(np.argmax(file.dataobj, -1), found)
        # Half a step of rounding per class, and one step where a tie was broken.
        np.testing.assert_allclose(probabilities(tmp_path, case).sum(-1), 1, rtol=0, atol=2.5 * STEP + 1e-6)


def test_ties_that_rounding_makes_are_broken() -> None:
    """Probabilities that differ by less than a step keep their argmax, and no value moves by more than a step and a half."""
    grid = Grid((2, 3, 4), np.eye(4))
    rng = np.random.default_rng(0)
    values = np.full((3, 2, 3, 4), 1 / 3, np.float32) + 1e-6 * rng.random((3, 2, 3, 4), np.float32)
    values[:, 0, 0, 0] = 0.2, 0.4, 0.4  # equal before, too: the lower class
    values[:, 1, 0, 0] = 0, 1e-7, 1
    grid_map = GridMap.to_spacing(grid, (1, 1, 1))
    found = predict.quantized(grid_map, values, grid_map.classes_back(values))
    assert len({tuple(v) for v in np.rint(values * 65535).reshape(3, -1).T}) < 4  # the rounding made ties
    np.testing.assert_array_equal(found.argmax(-1), values.argmax(0))
    np.testing.assert_array_equal(np.sort(found, -1)[..., -1] > np.sort(found, -1)[..., -2], True)
    assert np.abs(found / 65535 - np.moveaxis(values, 0, -1)).max() < 1.5001 * STEP


# ---- wrong input, one clear line each ---------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [lambda b: b[:5000], lambda b: b"", lambda b: b"not a checkpoint at all"])
def test_damaged_checkpoint(trained: Path, tmp_path: Path, damage: Callable[[bytes], bytes], images: Path,
                            capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "best.pt").write_bytes(damage((trained / "best.pt").read_bytes()))
    assert command("--run", tmp_path, "--images", images, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "best.pt is damaged or not a checkpoint" in error
    assert error.count("\n") == 1
    assert command("--run", tmp_path / "none", "--images", images, "--out", tmp_path / "out") == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(("extra", "message"), [
    (["--overlap", 1], "overlap must be in [0, 1), got 1.0"),
    (["--windows-per-batch", 0], "windows_per_batch must be at least 1"),
    (["--mirror", 3], "mirror must be different axes of 0, 1 and 2, got (3,)"),
    (["--mirror", 1, 1], "mirror must be different axes of 0, 1 and 2, got (1, 1)"),
    (["--checkpoint", "worst"], "checkpoint must be best, last or .pt files, got 'worst'"),
    (["--checkpoint", "a.pt"], "is of no use beside .pt files alone"),
])
def test_wrong_settings(trained: Path, images: Path, tmp_path: Path, extra: list[object], message: str,
                        capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--run", trained, "--images", images, "--out", tmp_path / "out", *extra) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_no_run(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--images", images, "--out", tmp_path / "out") == 2
    assert "checkpoint best is a run's: name its folder with --run" in capsys.readouterr().err


def test_mirroring_of_sides_is_warned_of(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sided = write_run(tmp_path / "run", classes=["background", "left lung", "right lung"])
    arguments = ["--run", sided, "--images", images / "test_0_0000.nii.gz"]
    assert command(*arguments, "--out", tmp_path / "a") == 0
    assert "warning" not in capsys.readouterr().err
    assert command(*arguments, "--out", tmp_path / "b", "--mirror", 1) == 0
    assert "warning: --mirror is on, and 'left lung' is a side" in capsys.readouterr().err


def test_settings_that_do_not_decide_predictions_are_the_only_ones_left_out_of_the_manifest(
    trained: Path, images: Path, tmp_path: Path,
) -> None:
    """A setting that is added must be thought about here."""
    assert command("--run", trained, "--images", images, "--out", tmp_path) == 0
    settings = json.loads((tmp_path / "predictions.json").read_text())["settings"]
    held = {"models": ("run", "checkpoint", "extractor_weights")}  # by their content
    named = {name for key in settings for name in held.get(key, (key,))}
    assert {f.name for f in dataclasses.fields(predict.PredictConfig)} - named == {
        "out", "windows_per_batch", "offload", "device", "overwrite", "save_probabilities", "feature_cache"}
