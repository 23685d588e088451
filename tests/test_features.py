"""Frozen extractors: frozen whatever one does, MIND against its definition in loops, anatomix from a file."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from torch import Tensor, nn

from dropgen_fast import DropGen, StreamFusion, load_extractor
from dropgen_fast.errors import InputError
from dropgen_fast.features import FrozenExtractor
from dropgen_fast.features.mind import MIND
from dropgen_fast.kernels.mind_ssc import NEIGHBOURS, PAIRS
from dropgen_fast.networks import UNet


class Tiny(nn.Module):
    """An extractor whose BatchNorm would move if it could."""

    channels = 3

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv3d(1, 3, 3, padding=1), nn.BatchNorm3d(3), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


class Only128(nn.Module):
    """An extractor for cubes of 128 voxels and no others, as ViTs can be."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Conv3d(1, 5, 8, stride=8)
        self.position = nn.Parameter(torch.zeros(5, 16, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(x) + self.position


class Deaf(nn.Module):
    """An extractor that takes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no")


def nothing() -> None:
    """A factory that gives no module."""


@pytest.fixture
def extractor() -> FrozenExtractor:
    torch.manual_seed(0)
    return load_extractor(f"{__name__}:Tiny")


def held(extractor: FrozenExtractor) -> nn.Module:
    return extractor._held[0]


def bits(extractor: FrozenExtractor) -> dict[str, bytes]:
    return {k: v.numpy().tobytes() for k, v in held(extractor).state_dict().items()}


# ---- frozen ----------------------------------------------------------------------------------------------------------


def test_no_train_call_moves_it(extractor: FrozenExtractor) -> None:
    model = DropGen(nn.Conv3d(4, 2, 1), extractor, StreamFusion(0.0))
    image = torch.rand(2, 1, 6, 6, 6)
    before, features = bits(extractor), extractor(image)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.train()
    for module in (extractor, *held(extractor).modules(), *model.modules()):
        module.train()
        module.train(True)
    for _ in range(3):
        model(image).square().mean().backward()
        optimizer.step()
    model.eval()
    model.train()
    assert bits(extractor) == before
    assert not any(m.training for m in held(extractor).modules())
    assert torch.equal(extractor(image), features)


def test_its_weights_are_nobodys(extractor: FrozenExtractor) -> None:
    model = DropGen(nn.Conv3d(4, 2, 1), extractor)
    assert set(model.state_dict()) == {"network.weight", "network.bias"}
    assert {n for n, _ in model.named_parameters()} == {"network.weight", "network.bias"}
    assert not list(model.buffers())
    model.requires_grad_(True)
    extractor.requires_grad_(True)
    assert not any(p.requires_grad for p in held(extractor).parameters())
    image = torch.rand(1, 1, 4, 4, 4, requires_grad=True)
    assert not extractor(image).requires_grad
    model.load_state_dict(model.state_dict(), strict=True)


def test_it_moves_with_its_parent(extractor: FrozenExtractor) -> None:
    model = DropGen(nn.Conv3d(4, 2, 1), extractor).double()
    assert all(v.dtype == torch.float64 for v in held(extractor).state_dict().values() if v.is_floating_point())
    assert model.extractor(torch.rand(1, 1, 4, 4, 4).double()).dtype == torch.float64
    model.to("meta")
    assert next(held(extractor).parameters()).device.type == "meta"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_frozen_and_apart(extractor: FrozenExtractor, duplicate: object) -> None:
    other = duplicate(DropGen(nn.Conv3d(4, 2, 1), extractor)).extractor  # type: ignore[operator]
    image = torch.rand(1, 1, 4, 4, 4)
    assert torch.equal(other(image), extractor(image))
    for module in held(other).modules():
        module.train()
    assert not any(m.training for m in held(other).modules())
    with torch.no_grad():
        next(held(other).parameters()).add_(1)
    assert not torch.equal(other(image), extractor(image))


@pytest.mark.parametrize(("name", "stride"), [(f"{__name__}:Tiny", 1), (f"{__name__}:Tiny", 2), ("mind", 1)])
def test_under_compile(name: str, stride: int) -> None:
    extractor = load_extractor(name, stride=stride)
    model = DropGen(nn.Conv3d(1 + extractor.channels, 2, 1), extractor).eval()
    image = torch.rand(1, 1, 4, 5, 6)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(image), model(image))


def test_a_metatensor_is_an_image_too() -> None:
    image = torch.rand(1, 1, 8, 8, 8)
    features = load_extractor("mind")(MetaTensor(image))
    assert type(features) is torch.Tensor
    assert torch.equal(features, load_extractor("mind")(image))


def test_channels_go_through_one_by_one(extractor: FrozenExtractor) -> None:
    image = torch.rand(2, 3, 4, 5, 6)
    features = extractor(image)
    assert features.shape == (2, 9, 4, 5, 6)
    torch.testing.assert_close(features[:, 3:6], extractor(image[:, 1:2]))


@pytest.mark.parametrize("stride", [2, 3, 4])
@pytest.mark.parametrize("size", [(24, 24, 36), (23, 25, 26)])
def test_stride_lines_up_with_the_image(size: tuple[int, int, int], stride: int) -> None:
    """A ramp, downsampled and interpolated back, is the ramp, away from the clamped edges; for sizes of any kind."""
    extractor = FrozenExtractor(nn.Identity(), name="identity", channels=1, stride=stride, sha256="")
    for axis, n in enumerate(size):
        ramp = torch.arange(n, dtype=torch.float32).reshape([n if a == axis else 1 for a in range(3)]).expand(size)
        coarse = extractor(ramp[None, None])
        assert coarse.shape[2:] == tuple(-(-s // stride) for s in size)
        back = F.interpolate(coarse, size=size, mode="trilinear", align_corners=False)[0, 0]
        assert (back - ramp).narrow(axis, 2 * stride, n - 4 * stride).abs().max() < 1e-4


def test_stride_does_not_alias() -> None:
    """A pattern finer than the coarse grid averages out; a sample of two voxels in four would see it."""
    extractor = FrozenExtractor(nn.Identity(), name="identity", channels=1, stride=4, sha256="")
    wave = torch.tensor([0.0, 1.0, 1.0, 0.0]).repeat(4).reshape(1, 1, 16, 1, 1).expand(1, 1, 16, 8, 8)
    torch.testing.assert_close(extractor(wave), torch.full((1, 1, 4, 2, 2), 0.5))


def test_check_patch_knows_the_stride() -> None:
    extractor = FrozenExtractor(UNet(1, 2, base_channels=2, downsamplings=2), name="tiny", channels=2, stride=3, sha256="")
    for patch in ((24, 36, 24), (22, 23, 24)):  # a coarse grid of 8 voxels comes from 22 to 24
        extractor.check_patch(patch)
        assert extractor(torch.rand(1, 1, *patch)).shape[2:] == tuple(-(-n // 3) for n in patch)
    for patch in ((24, 21, 24), (12, 24, 24)):
        with pytest.raises(InputError, match=r"extractor tiny at stride 3: sizes must be multiples of 12, .*\(24, 24, 24\)"):
            extractor.check_patch(patch)
        with pytest.raises(ValueError, match="extractor tiny at stride 3"):
            extractor(torch.rand(1, 1, *patch))
    load_extractor("mind", stride=2).check_patch((5, 7, 9))


def test_wrong_rank_is_told(extractor: FrozenExtractor) -> None:
    with pytest.raises(ValueError, match=r"image must be \(N, Ci, D, H, W\)"):
        extractor(torch.zeros(1, 4, 4, 4))


@pytest.mark.parametrize(("name", "options", "message"), [
    ("dino", {}, "no extractor 'dino'; there are mind, anatomix, anatomix-dev, or"),
    ("mind", {"stride": 0}, "stride must be at least 1"),
    ("mind", {"weights": Path("w.pth")}, "takes no weights"),
    (f"{__name__}:nothing", {}, "must give a torch.nn.Module, got NoneType"),
    (f"{__name__}:Absent", {}, "has no Absent"),
    ("torch.nn:Conv3d", {}, "cannot be made: .*missing"),
    (f"{__name__}:Deaf", {}, "takes no cube of 64, 32, 96, 128 voxels .* attribute `channels`"),
    ("torch.nn:Flatten", {}, r"must give a tensor \(N, C, d, h, w\)"),
])
def test_extractors_that_cannot_be_had(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_extractor(name, **options)  # type: ignore[arg-type]


def test_channels_of_a_module_that_does_not_tell() -> None:
    assert load_extractor("torch.nn:Identity").channels == 1
    assert load_extractor(f"{__name__}:Only128").channels == 5


def test_identity_follows_the_weights(extractor: FrozenExtractor) -> None:
    torch.manual_seed(1)
    assert load_extractor(f"{__name__}:Tiny").identity() != extractor.identity()
    torch.manual_seed(0)
    assert load_extractor(f"{__name__}:Tiny").identity() == extractor.identity()


# ---- MIND ------------------------------------------------------------------------------------------------------------


def mind_in_loops(volume: Tensor, radius: int = 1, dilation: int = 1) -> Tensor:
    """The definition, voxel by voxel, in float64."""
    size = volume.shape
    clamp = [lambda i, n=n: min(max(i, 0), n - 1) for n in size]

    def at(index: tuple[int, ...], offset: tuple[int, ...]) -> float:
        return float(volume[tuple(c(i + dilation * o) for c, i, o in zip(clamp, index, offset, strict=True))])

    out = torch.zeros(len(PAIRS), *size, dtype=torch.float64)
    box = list(itertools.product(range(-radius, radius + 1), repeat=3))
    for k, (a, b) in enumerate(PAIRS):
        squared = torch.zeros(size, dtype=torch.float64)
        for index in itertools.product(*map(range, size)):
            squared[index] = (at(index, a) - at(index, b)) ** 2
        for index in itertools.product(*map(range, size)):
            near = [squared[tuple(c(i + o) for c, i, o in zip(clamp, index, offset, strict=True))] for offset in box]
            out[(k, *index)] = sum(near) / len(box)
    out -= out.amin(0)
    noise = out.mean(0)
    noise = noise.clamp(noise.mean() * 1e-3, noise.mean() * 1e3) + 1e-9
    return torch.exp(-out / noise)


def test_pairs_are_the_twelve_edges() -> None:
    assert len(set(NEIGHBOURS)) == 6
    assert len(set(map(frozenset, PAIRS))) == 12
    assert all(sum(abs(i - j) for i, j in zip(a, b, strict=True)) == 2 and sum(map(abs, a)) == 1 for a, b in PAIRS)


@pytest.mark.parametrize(("radius", "dilation"), [(1, 1), (1, 2), (0, 1), (2, 1)])
def test_mind_is_its_definition(radius: int, dilation: int) -> None:
    torch.manual_seed(0)
    volume = torch.rand(2, 1, 4, 5, 3)
    wanted = torch.stack([mind_in_loops(v[0].double(), radius, dilation) for v in volume])
    torch.testing.assert_close(MIND(radius, dilation)(volume).double(), wanted, rtol=1e-4, atol=1e-5)


def test_mind_holds_the_variance_in_quiet_regions() -> None:
    """Where noise is 10,000 times weaker than elsewhere the lower limit decides: without it, it would look like structure."""
    torch.manual_seed(0)
    volume = torch.rand(1, 1, 3, 12, 3)
    volume[:, :, :, :7] *= 0.01
    features = MIND()(volume)
    torch.testing.assert_close(features[0].double(), mind_in_loops(volume[0, 0].double()), rtol=1e-4, atol=1e-5)
    beside = MIND()(torch.cat([volume, 100 * torch.rand_like(volume)]))
    torch.testing.assert_close(beside[:1], features)  # the limit is the sample's own, whatever lies beside it in the batch
    exponents = -features.log().mean(1)  # the mean of (SSD - min) / v over the channels: 1, unless v was held
    assert exponents[:, :, :4].max() < 0.99
    torch.testing.assert_close(exponents[:, :, 9:], torch.ones_like(exponents[:, :, 9:]), rtol=1e-4, atol=1e-4)


def test_mind_does_not_see_contrast() -> None:
    torch.manual_seed(0)
    mind = load_extractor("mind")
    assert mind.channels == 12
    image = torch.rand(1, 1, 12, 12, 12)
    features = mind(image)
    for other in (image * 0.4 + 0.3, 1 - image):
        torch.testing.assert_close(mind(other), features, rtol=1e-3, atol=1e-3)
    assert (mind(image.square()) - features).abs().max() > 0.05  # not everything is the same to it


def test_mind_is_float32_under_autocast() -> None:
    image = torch.rand(1, 1, 6, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(load_extractor("mind")(image), load_extractor("mind")(image))
        assert load_extractor("mind")(image).dtype == torch.float32


def test_mind_of_a_constant_volume_is_finite() -> None:
    assert torch.equal(load_extractor("mind")(torch.full((1, 1, 4, 4, 4), 0.5)), torch.ones(1, 12, 4, 4, 4))
