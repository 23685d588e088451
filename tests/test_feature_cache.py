"""Features that are kept: the same bits, computed once, told apart by all that decides them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nifti_factory import write_cohort
from torch import nn

from dropgen_fast import checkpoint, predict, prepare, train
from dropgen_fast.cli import run
from dropgen_fast.data.prepare import minmax
from dropgen_fast.features.cache import FeatureCache
from dropgen_fast.features.volume import pad
from dropgen_fast.inference import class_probabilities
from dropgen_fast.model import DropGen, ModelConfig, build_model
from dropgen_fast.settings import parse

PATCH = (8, 8, 8)


class Counted(nn.Module):
    """Features whose computations are counted."""

    channels = 2
    calls = 0

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(N, 1, D, H, W) → (N, 2, D, H, W)."""
        if not isinstance(image, torch._subclasses.FakeTensor):
            Counted.calls += 1
        return torch.cat((image * self.gain, image.square()), 1)


def doubled() -> nn.Module:
    return Counted(2.0)


def model(extractor: str = "Counted", **settings: Any) -> DropGen:
    torch.manual_seed(0)
    options = ("base_channels=4", "downsamplings=1")
    config = ModelConfig(extractor=f"{__name__}:{extractor}", network_options=options, **settings)
    return build_model(config, image_channels=1, classes=3, patch=PATCH)


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((12, 10, 9, 1), np.float32)


def found(of: DropGen, cache: FeatureCache | None, seed: int = 0, **settings: Any) -> torch.Tensor:
    Counted.calls = 0
    return class_probabilities(of, image(seed), PATCH, features="volume", cache=cache, **settings)


def test_what_is_kept_is_what_is_computed(tmp_path: Path) -> None:
    cache, net = FeatureCache(tmp_path / "features"), model()
    plain = found(net, None)
    assert Counted.calls == 1
    assert torch.equal(found(net, cache), plain)
    assert Counted.calls == 1
    assert torch.equal(found(net, FeatureCache(tmp_path / "features")), plain)  # by another process, say
    assert Counted.calls == 0
    assert torch.equal(found(net, cache, mirror=(0, 1)), found(net, None, mirror=(0, 1)))
    found(net, cache, mirror=(0, 1))
    assert Counted.calls == 0  # each of the four flips is kept
    assert len(list((tmp_path / "features").iterdir())) == 4


def test_all_that_decides_features_tells_them_apart(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    found(model(), cache)
    for other, seed in ((model(), 1), (model("doubled"), 0), (model(extractor_stride=2), 0), (model(precision="fp32"), 0)):
        plain = found(other, None, seed)
        assert torch.equal(found(other, cache, seed), plain)
        assert Counted.calls == 1
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"no features"])
def test_a_damaged_file_is_computed_again(tmp_path: Path, damage: Any) -> None:
    cache, net = FeatureCache(tmp_path), model()
    plain = found(net, cache)
    kept, = tmp_path.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(damage(whole))
    assert torch.equal(found(net, cache), plain)
    assert Counted.calls == 1
    assert len(kept.read_bytes()) == len(whole)


def test_a_disk_that_refuses_is_told_once_and_costs_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    cache, net = FeatureCache(tmp_path / "file"), model()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(found(net, cache), found(net, None))
        found(net, cache)
    assert [record.message for record in caplog.records if "features are not kept" in record.message] == [
        record.message for record in caplog.records][:1]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("cohort"), {"train": 2, "val": 2, "test": 1}, shape=(18, 16, 17))


def test_validation_extracts_each_volume_once(cohort: Path, tmp_path: Path) -> None:
    assert prepare.main(["--source", str(cohort), "--store", str(tmp_path / "store"), "--workers", "1"]) == 0
    recipe = ["--store", str(tmp_path / "store"), "--patch", "16", "16", "16", "--extractor", f"{__name__}:Counted",
              "--device", "cpu", "--network-options", "base_channels=2", "downsamplings=2", "--batch-size", "1", "--panels", "0",
              "--steps", "2", "--validate-every", "1"]
    scores = []
    for cache in ([], ["--feature-cache", str(tmp_path / "features")]):
        trainer = train.Trainer(parse([*recipe, *cache, "--out", str(tmp_path / f"run{len(cache)}")]))
        trainer.validate()
        Counted.calls = 0
        scores.append(trainer.validate())
        assert Counted.calls == (0 if cache else 2 * 4)  # two volumes, four windows each
    assert len(list((tmp_path / "features").iterdir())) == 2
    assert scores[0] == pytest.approx(scores[1], abs=0.05)  # these features look at one voxel, but windows begin elsewhere


def training(store: Path, out: Path, *more: str) -> list[str]:
    """Options of a run of few steps without augmentation on patches of 8³."""
    return ["--store", str(store), "--out", str(out), "--patch", "8", "8", "8", "--extractor", f"{__name__}:Counted", "--recipe",
            "off", "--device", "cpu", "--network-options", "base_channels=2", "downsamplings=1", "--batch-size", "2",
            "--panels", "0", "--precision", "fp32", "--validate-every", "100", "--log-every", "1", *more]


@pytest.fixture(scope="module")
def few(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cohort's store; volumes of 18 × 16 × 17 voxels."""
    store = tmp_path_factory.mktemp("few") / "store"
    assert prepare.main(["--source", str(cohort), "--store", str(store), "--workers", "1"]) == 0
    return store


@pytest.mark.parametrize("stride", [1, 2])
def test_features_of_training_patches_are_cut_out_of_volumes(few: Path, tmp_path: Path, stride: int) -> None:
    """These features look at one voxel, and the grid of stride 2 is the volume's: a patch has those of its own place."""
    options = ["--extractor-stride", str(stride), "--feature-cache", str(tmp_path / "features"), "--feature-cache-training"]
    trainer = train.Trainer(parse(training(few, tmp_path / "run", *options)))
    assert trainer.crops is not None
    assert trainer.model.extractor is not None
    volumes = {case.id: torch.from_numpy(minmax(trainer.store.load(case)[0])).permute(3, 0, 1, 2)
               for case in trainer.store.cases("train")}
    Counted.calls = 0
    seen = set()
    for _ in range(8):
        batch = next(trainer.data)
        found = trainer.crops(batch.cases, batch.starts)
        assert Counted.calls == 0
        for case, start, features in zip(batch.cases, batch.starts, found, strict=True):
            size = [-(-n // stride) * stride for n in volumes[case].shape[1:]]
            padded, inside = pad(volumes[case][None], (size[0], size[1], size[2]))
            where = [slice(s + i.start, s + i.start + 8) for s, i in zip(start, inside, strict=True)]
            torch.testing.assert_close(features, trainer.model.extractor(padded[(slice(None), slice(None), *where)])[0])
            seen.add(start)
        Counted.calls = 0
    assert len(seen) > 4


def test_a_run_whose_extractor_never_runs_in_a_step(few: Path, tmp_path: Path) -> None:
    cached = ["--feature-cache", str(tmp_path / "features"), "--feature-cache-training", "--num-subjects", "1"]
    Counted.calls = 0
    trainer = train.Trainer(parse(training(few, tmp_path / "whole", *cached, "--steps", "4")))
    assert Counted.calls == 1  # one subject
    assert trainer.crops is not None
    batch, given = next(trainer.data), []
    fused = trainer.model.fused
    trainer.model.fused = lambda image, *, features: given.append(features) or fused(image, features=features)  # type: ignore
    trainer.train_step([batch])
    assert torch.equal(given[0], trainer.crops(batch.cases, batch.starts))
    assert Counted.calls == 1
    del trainer
    # From the folder they are the same, and so is a run that was stopped: its draws and its weights go on.
    assert train.main(training(few, tmp_path / "run", *cached, "--steps", "4")) == 0
    assert Counted.calls == 1 + 2  # and the two volumes for validation
    half = training(few, tmp_path / "halves", *cached, "--steps", "4", "--save-every", "2")
    stopped = train.Trainer(parse(half))
    stopped._log = lambda progress: stopped.step == 3 and pytest.fail("stop here")  # type: ignore
    with pytest.raises(pytest.fail.Exception):
        stopped.fit()
    assert train.main([*half, "--resume"]) == 0
    whole, resumed = (checkpoint.load(tmp_path / run / "last.pt")["network"] for run in ("run", "halves"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.parametrize(("options", "message"), [
    (["--feature-cache-training"], "feature_cache_training needs a folder: give --feature-cache"),
    (["--feature-cache", "F", "--feature-cache-training", "--method", "erm"], "method erm has none: leave it out"),
    (["--feature-cache", "F", "--feature-cache-training", "--recipe", "nnunet"],
     "feature_cache_training needs patches as they are, and mirror_probability is 0.5: give --recipe off"),
    (["--feature-cache", "F", "--feature-cache-training", "--extractor-stride", "3"],
     "the features of training case train_0 cannot be computed at once: the extractor's grid of (3, 3, 3) does not divide"),
])
def test_training_that_cannot_be_cached(few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str],
                                        message: str) -> None:
    assert run("train", train.main, training(few, tmp_path / "run", "--steps", "1", *options)) == 2
    told = capsys.readouterr().err.strip()
    assert message in told
    assert "\n" not in told


def test_models_with_one_extractor_share_its_features(cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = {"classes": ["background", "a", "b"], "channels": ["c"], "spacing_mm": [1.0, 1.0, 1.0], "patch": list(PATCH),
            "intensity_window": None}
    for seed in range(2):
        net = model()
        plain = {"method": "dropgen", "extractor": f"{__name__}:Counted", "extractor_weights": None,
                 "network_options": ["base_channels=4", "downsamplings=1"], "fusion": {"p": [0.75]}}
        checkpoint.save(tmp_path / f"{seed}.pt", {"step": 1, "task": task, "model": plain, "ema": None,
                                                   "extractor": net.extractor.identity(), "network": net.network.state_dict()})
    command = ["--checkpoint", str(tmp_path / "0.pt"), str(tmp_path / "1.pt"), "--images", str(cohort / "imagesTs"),
               "--device", "cpu"]
    Counted.calls = 0
    more = ["--features", "volume", "--feature-cache", str(tmp_path / "features"), "--out", str(tmp_path / "out")]
    assert predict.main([*command, *more]) == 0
    assert Counted.calls == 1
    settings = json.loads((tmp_path / "out/predictions.json").read_text())["settings"]
    assert "feature_cache" not in settings  # it decides nothing
    assert run("predict", predict.main, [*command, "--feature-cache", str(tmp_path), "--out", str(tmp_path / "no")]) == 2
    assert "it needs --features volume" in capsys.readouterr().err
