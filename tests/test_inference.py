"""Whole volumes: windows, flips, features per window and per volume, memory."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import monai.inferers
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from dropgen_fast import inference
from dropgen_fast.data.augmentation import sided_classes
from dropgen_fast.device import free_bytes
from dropgen_fast.features import FrozenExtractor
from dropgen_fast.features import volume as volume_features
from dropgen_fast.features.volume import FeaturePlan, VolumeFeatures
from dropgen_fast.inference import class_probabilities, fits, volume_bytes
from dropgen_fast.model import DropGen, ModelConfig, build_model
from dropgen_fast.networks import UNet

# Probabilities are at most 1 and come out of sums of float32 numbers; what is compared differs in the order of these sums alone.
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
EXACT = {"rtol": 0, "atol": 0}


def volume(*size: int, channels: int = 1, seed: int = 0) -> npt.NDArray[np.float32]:
    """A prepared volume (D, H, W, C) that fills [0, 1]."""
    image = np.random.default_rng(seed).random((*size, channels), np.float32)
    filled: npt.NDArray[np.float32] = (image - image.min()) / (image.max() - image.min())
    return filled


def dropgen(extractor: FrozenExtractor | None = None, *, patch: tuple[int, int, int] = (8, 8, 8), **settings: Any) -> DropGen:
    """A small model with three classes whose probabilities are far from equal."""
    torch.manual_seed(0)
    config = ModelConfig(network_options=("base_channels=4", "downsamplings=1"), precision="fp32", **settings)
    model = build_model(config, image_channels=1, classes=3, patch=patch)
    if extractor is not None:
        model = DropGen(UNet(1 + extractor.channels, 3, base_channels=4, downsamplings=1), extractor, model.fusion)
    for weight in model.network.parameters():
        if weight.dim() == 5:
            nn.init.kaiming_normal_(weight)  # which keeps differences of the image alive, unlike torch's default
    return model.eval()


class Tokens(nn.Module):
    """A ViT's grid without its attention: each cube of `side` voxels becomes a token that knows of no other."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.embed = nn.Conv3d(1, 3, side, side)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.embed(x).sin()
        return tokens


def tokens(side: int, stride: int = 1) -> FrozenExtractor:
    torch.manual_seed(1)
    return FrozenExtractor(Tokens(side), name="tokens", channels=3, stride=stride, sha256="")


# ---- windows ---------------------------------------------------------------------------------------------------------


def test_sliding_window_is_the_network_where_one_window_covers_all() -> None:
    model = dropgen().train()
    image = volume(8, 8, 8)
    probabilities = class_probabilities(model, image, (8, 8, 8))
    assert model.training
    with torch.no_grad():
        wanted = model.eval()(torch.from_numpy(image).permute(3, 0, 1, 2)[None]).softmax(1)[0]
    torch.testing.assert_close(probabilities, wanted, **ROUNDING)
    small = class_probabilities(model, image[:5, :, :7], (8, 8, 8))
    assert small.shape == (3, 5, 8, 7)
    torch.testing.assert_close(small.sum(0), torch.ones(5, 8, 7))


def test_windows_per_batch_changes_nothing() -> None:
    model, image = dropgen(), volume(13, 10, 17)
    one = class_probabilities(model, image, (8, 8, 8))
    torch.testing.assert_close(class_probabilities(model, image, (8, 8, 8), windows_per_batch=5), one, **ROUNDING)


def test_the_model_goes_back_to_training_after_a_failure() -> None:
    model = dropgen().train()
    with pytest.raises(ValueError, match="overlap"):
        class_probabilities(model, volume(8, 8, 8), (8, 8, 8), overlap=1.5)
    assert model.training


@pytest.mark.parametrize("wrong", [{"features": "volumes"}, {"offload": True}])
def test_wrong_choices(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be one of"):
        class_probabilities(dropgen(), volume(8, 8, 8), (8, 8, 8), **wrong)


# ---- flips -----------------------------------------------------------------------------------------------------------


def flipped_mean(model: DropGen, image: npt.NDArray[np.float32], mirror: tuple[int, ...], **settings: Any) -> Tensor:
    """The definition: segment each flipped volume, flip back, average."""
    maps = []
    for k in range(len(mirror) + 1):
        for axes in itertools.combinations(mirror, k):
            seen = np.ascontiguousarray(np.flip(image, axes))
            maps.append(class_probabilities(model, seen, (8, 8, 8), **settings).flip([axis + 1 for axis in axes]))
    return torch.stack(maps).mean(0)


@pytest.mark.parametrize("mirror", [(0,), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("features", ["window", "volume"])
def test_mirroring_is_the_mean_over_the_flips(mirror: tuple[int, ...], features: str) -> None:
    """The windows of 12 voxels lie alike from both ends."""
    model, image = dropgen(extractor_stride=2), volume(12, 8, 12)
    found = class_probabilities(model, image, (8, 8, 8), mirror=mirror, features=features)
    assert (found - class_probabilities(model, image, (8, 8, 8), features=features)).abs().max() > 0.01
    torch.testing.assert_close(found, flipped_mean(model, image, mirror, features=features), **ROUNDING)


def test_sides() -> None:
    assert sided_classes(["background", "liver", "Right kidney", "LEFT_lung", "cleft", "right-ICA"]) == [
        "Right kidney", "LEFT_lung", "right-ICA"]


# ---- features of the whole volume ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("extractor", "patch", "size", "overlap"), [
    (tokens(1), (8, 8, 8), (13, 8, 10), 0.5),
    (tokens(1, stride=2), (8, 6, 8), (13, 9, 10), 0.3),
    (tokens(1, stride=3), (6, 6, 12), (13, 6, 14), 0.5),
    (tokens(4), (8, 8, 8), (13, 21, 5), 0.6),
    (tokens(2, stride=2), (8, 8, 8), (19, 8, 9), 0.0),
    (tokens(2), (8, 8, 8), (11, 8, 9), 0.99),
], ids=str)
def test_windows_are_cut_out_along_the_coarse_grid(
    monkeypatch: pytest.MonkeyPatch, extractor: FrozenExtractor, patch: tuple[int, int, int], size: tuple[int, int, int],
    overlap: float,
) -> None:
    """Features without context, cut out of the volume's, are those of the window, whatever the sizes, bit for bit."""
    model = dropgen(extractor, patch=patch)
    forward, windows = model.forward, []

    def compared(image: Tensor, keep: Tensor | None = None, *, features: Tensor | None = None) -> Tensor:
        assert features is not None
        torch.testing.assert_close(features, extractor(image), rtol=1e-5, atol=1e-6)  # one sum of side³ products per token
        windows.append(len(image))
        return forward(image, keep, features=features)

    monkeypatch.setattr(model, "forward", compared)
    found = class_probabilities(model, volume(*size), patch, overlap=overlap, features="volume", windows_per_batch=2)
    assert found.shape == (3, *size)
    torch.testing.assert_close(found.sum(0), torch.ones(size))
    assert sum(windows) > 1


def test_features_of_the_volume_are_those_of_the_one_window_that_covers_it() -> None:
    for model in (dropgen(), dropgen(extractor_stride=2)):
        for size in ((8, 8, 8), (5, 8, 7)):
            image = volume(*size)
            torch.testing.assert_close(class_probabilities(model, image, (8, 8, 8), features="volume"),
                                       class_probabilities(model, image, (8, 8, 8)), **ROUNDING)


def test_an_extractor_that_halves_gets_a_volume_that_can_be_halved() -> None:
    """A U-Net's features of the padded volume, cropped; the padding repeats the volume's faces."""
    torch.manual_seed(0)
    unet = FrozenExtractor(UNet(1, 4, base_channels=4, downsamplings=3), name="u", channels=4, sha256="")
    image = torch.rand(1, 1, 20, 17, 30)
    source = VolumeFeatures(unet, patch=(16, 16, 16), device=torch.device("cpu"), dtype=torch.float32)
    plan = source.plan(1, (20, 17, 30))
    assert plan == FeaturePlan((1, 1, 1), (20, 17, 30), (24, 24, 32), 4)
    found = source(image, plan)
    assert found is not None
    index = [torch.arange(m).clamp(max=n - 1) for n, m in zip(plan.size, plan.extractor_size, strict=True)]
    padded = image[:, :, index[0]][:, :, :, index[1]][:, :, :, :, index[2]]
    torch.testing.assert_close(found, unet(padded)[:, :, :20, :17, :30], **ROUNDING)


class OneSize(Tokens):
    """A ViT whose position embedding fits one size."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != (8, 8, 8):
            raise ValueError("8, 8, 8 only")
        return super().forward(x)


class Untold(Tokens):
    """Looks at values before it goes on."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * (2.0 if x.mean() > 0.5 else 1.0))


@pytest.mark.parametrize(("extractor", "free", "reason"), [
    (FrozenExtractor(OneSize(4), name="one", channels=3, sha256=""), 2**40, "does not take a volume of (12, 12, 16)"),
    (FrozenExtractor(Untold(4), name="untold", channels=3, sha256=""), 2**40, "cannot be known without running it"),
    (tokens(1, stride=3), 2**40, "does not divide the patch (8, 8, 8)"),
    (tokens(1), 1000, "would need about 0.0 GiB"),
], ids=["one size", "untold", "odd patch", "memory"])
def test_features_per_window_where_they_cannot_be_had_at_once(
    extractor: FrozenExtractor, free: int, reason: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(volume_features, "free_bytes", lambda device: free)
    model, image = dropgen(extractor), volume(9, 12, 13)
    with caplog.at_level(logging.WARNING):
        found = class_probabilities(model, image, (8, 8, 8), features="volume")
    assert [reason in record.getMessage() for record in caplog.records] == [True]
    torch.testing.assert_close(found, class_probabilities(model, image, (8, 8, 8)), **EXACT)


def test_without_an_extractor_there_are_no_features_to_speak_of(caplog: pytest.LogCaptureFixture) -> None:
    model, image = dropgen(method="erm"), volume(9, 12, 13)
    found = class_probabilities(model, image, (8, 8, 8), features="volume")
    torch.testing.assert_close(found, class_probabilities(model, image, (8, 8, 8)), **EXACT)
    assert not caplog.records


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_bytes_of_a_volume() -> None:
    """192 × 192 × 128 voxels, 16 classes, 1 channel: 16 probabilities, a weight and the image, 4 bytes each."""
    voxels = 192 * 192 * 128
    assert volume_bytes(voxels, classes=16, image_channels=1) == 18 * 4 * voxels
    assert volume_bytes(voxels, classes=16, image_channels=1, feature_channels=12) == 30 * 4 * voxels
    assert volume_bytes(voxels, classes=16, image_channels=1, mirrored=True) == 34 * 4 * voxels
    assert fits(50, 100)
    assert not fits(51, 100)


@pytest.mark.parametrize(("features", "mirrored", "copies"), [
    ("window", False, 3 + 1 + 1), ("window", True, 3 + 1 + 1),
    ("volume", False, 3 + 1 + 1 + 12), ("volume", True, 6 + 1 + 1 + 12),
])
def test_whether_a_volume_fits(monkeypatch: pytest.MonkeyPatch, features: Any, mirrored: bool, copies: int) -> None:
    """Three classes, one channel, twelve features; a side of 5 voxels is padded to the patch of 8."""
    needed = copies * 4 * 8 * 10 * 12
    for free, wanted in ((2 * needed, True), (2 * needed - 2, False)):
        monkeypatch.setattr(inference, "free_bytes", lambda device, free=free: free)
        assert inference._fits_on_gpu(dropgen(), torch.zeros(1, 1, 5, 10, 12), (8, 8, 8), features, mirrored) is wanted


def test_free_memory_of_this_machine() -> None:
    with open("/proc/meminfo") as file:
        total = int(file.readline().split()[1]) * 1024
    assert 2**20 < free_bytes(torch.device("cpu")) < total


class Hungry(nn.Module):
    """A network that runs out of memory with batches of more than `most`."""

    def __init__(self, network: nn.Module, most: int) -> None:
        super().__init__()
        self.network, self.most, self.batches = network, most, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.batches.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        scores: Tensor = self.network(x)
        return scores


def test_out_of_memory_is_tried_once_more_window_by_window(caplog: pytest.LogCaptureFixture) -> None:
    model, image = dropgen(), volume(12, 8, 8)
    wanted = class_probabilities(model, image, (8, 8, 8))
    model.network = hungry = Hungry(model.network, 1)
    torch.testing.assert_close(class_probabilities(model, image, (8, 8, 8), windows_per_batch=2), wanted, **EXACT)
    assert hungry.batches == [2, 1, 1]
    assert [record.getMessage() for record in caplog.records] == [
        "the GPU's memory does not suffice for 12 × 8 × 8 voxels; trying again from the CPU's, window by window"]
    with pytest.raises(torch.OutOfMemoryError):
        class_probabilities(model, image, (8, 8, 8), windows_per_batch=2, offload="never")
    hungry.most = 0
    hungry.batches.clear()
    with pytest.raises(torch.OutOfMemoryError):
        class_probabilities(model.train(), image, (8, 8, 8), windows_per_batch=2)
    assert hungry.batches == [2, 1]
    assert model.training


@pytest.mark.parametrize("features", ["window", "volume"])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.7])
def test_slabs_of_windows_are_added_up(features: Any, overlap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of an offloaded volume, with the CPU in the GPU's place: slab by slab gives what window by window does."""
    model, image = dropgen(extractor_stride=2), volume(26, 11, 14)
    settings = {"overlap": overlap, "features": features, "windows_per_batch": 3, "mirror": (1,)}
    wanted = class_probabilities(model, image, (8, 8, 8), **settings)
    slide, used = monai.inferers.sliding_window_inference, list[Any]()

    def in_slabs(*args: Any, **options: Any) -> Any:
        used.append(options["buffer_steps"])
        return slide(*args, **options | {"buffer_steps": 1})

    monkeypatch.setattr(monai.inferers, "sliding_window_inference", in_slabs)
    torch.testing.assert_close(class_probabilities(model, image, (8, 8, 8), **settings), wanted, **ROUNDING)
    assert set(used) == {None}  # on a CPU there is nothing to offload


@pytest.mark.gpu
@pytest.mark.parametrize("features", ["window", "volume"])
def test_offloaded_is_the_same(features: Any) -> None:
    """float32 on a GPU: TF32 is off by default for matrix products, not for convolutions, so it is turned off here."""
    model, image = dropgen(extractor_stride=2).cuda(), volume(26, 11, 14)
    settings = {"features": features, "windows_per_batch": 2, "mirror": (0, 2)}
    with torch.backends.cudnn.flags(allow_tf32=False):
        here = class_probabilities(model, image, (8, 8, 8), offload="never", **settings)
        away = class_probabilities(model, image, (8, 8, 8), offload="always", **settings)
        on_cpu = class_probabilities(model.cpu(), image, (8, 8, 8), **settings)
    assert (here.device.type, away.device.type) == ("cuda", "cpu")
    torch.testing.assert_close(here.cpu(), away, **ROUNDING)
    torch.testing.assert_close(away, on_cpu, **ROUNDING)


@pytest.mark.gpu
def test_an_offloaded_volume_takes_a_slab_of_memory() -> None:
    """8 windows of 8 voxels in a row: the probabilities on the GPU are those of one slab, not of the volume."""
    model, image = dropgen(method="erm", patch=(8, 64, 64)).cuda(), volume(512, 64, 64)
    peaks = {}
    for offload in ("never", "always"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        class_probabilities(model, image, (8, 64, 64), offload=offload)
        peaks[offload] = torch.cuda.max_memory_allocated()
    spared = volume_bytes(image.size, classes=3, image_channels=1)
    assert peaks["never"] - peaks["always"] > 0.9 * spared


@pytest.mark.gpu
def test_a_volume_that_does_not_fit_is_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    model, image = dropgen().cuda(), volume(26, 11, 14)
    assert class_probabilities(model, image, (8, 8, 8)).device.type == "cuda"
    monkeypatch.setattr(inference, "free_bytes", lambda device: 1000)
    assert class_probabilities(model, image, (8, 8, 8)).device.type == "cpu"


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_dice_per_class() -> None:
    prediction = torch.tensor([0, 1, 1, 2, 2, 2])
    label = torch.tensor([0, 1, 2, 2, 2, 0])
    dice = inference.dice_per_class(prediction, label, 5)
    assert dice[:3].tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3])
    assert dice[3:].isnan().all()  # in neither: no score, not a zero
