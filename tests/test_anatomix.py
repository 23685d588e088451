"""anatomix and anatomix-dev: the published networks, from their weights' layout to their arithmetic; files that are not right."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dropgen_fast import DropGen, StreamFusion, load_extractor
from dropgen_fast.config import TrainConfig
from dropgen_fast.distributed import Ranks
from dropgen_fast.errors import InputError
from dropgen_fast.features import FrozenExtractor, anatomix, folded
from dropgen_fast.features.folded import FoldedUNet
from dropgen_fast.losses import build_loss
from dropgen_fast.networks import UNet
from dropgen_fast.step import GRAPH_WARM_UP, TrainingStep

DEV = {"normalization": "instance", "eps": 1e-2, "pooling": "average", "upsampling": "trilinear"}

# ---- the published networks, in formulas -------------------------------------------------------------------------------


class Published:
    """The network that a state dict of the published layout belongs to, layer by layer: no module, no folding.

    One sequence of layers is counted through: convolution, normalization, ReLU; after two such triples a pooling; below, an
    upsampling, concatenation behind what the way down left at that level, and two triples; at the end a convolution alone.
    """

    def __init__(self, state: dict[str, Tensor], *, downs: int, dev: bool) -> None:
        self.state, self.downs, self.dev = state, downs, dev
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.index = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.index, skips = 0, []
        x = self.triple(x)
        for _ in range(self.downs):
            x = self.triple(self.triple(x))
            skips.append(x)
            x = self.cells(x)
            self.index += 1
        x = self.triple(self.triple(x))
        for skip in reversed(skips):
            up = F.interpolate(x, scale_factor=2, mode="trilinear") if self.dev else x.repeat_interleave(2, 2).repeat_interleave(
                2, 3).repeat_interleave(2, 4)
            self.index += 1
            x = self.triple(self.triple(torch.cat((skip, up), 1)))
        return self.convolution(x)

    def cells(self, x: Tensor) -> Tensor:
        """Mean or largest of each cell of 2³."""
        n, c, d, h, w = x.shape
        x = x.reshape(n, c, d // 2, 2, h // 2, 2, w // 2, 2)
        return x.mean((3, 5, 7)) if self.dev else x.amax((3, 5, 7))

    def triple(self, x: Tensor) -> Tensor:
        x = self.normalization(self.convolution(x))
        self.index += 1
        return torch.where(x > 0, x, 0)

    def convolution(self, x: Tensor) -> Tensor:
        weight = self.take("weight")
        bias = self.take("bias") if self.dev else None
        self.index += 1
        for axis in (2, 3, 4):  # the voxel beside the edge stands again beyond it
            x = torch.cat((x.narrow(axis, 1, 1), x, x.narrow(axis, x.shape[axis] - 2, 1)), axis)
        return F.conv3d(x, weight, bias)

    def normalization(self, x: Tensor) -> Tensor:
        def spread(value: Tensor) -> Tensor:
            return value[:, None, None, None]

        if self.dev:
            centred = x - x.mean((2, 3, 4), keepdim=True)
            x = centred / (centred.square().mean((2, 3, 4), keepdim=True) + 1e-2).sqrt()
        else:
            mean, variance = self.take("running_mean"), self.take("running_var")
            x = (x - spread(mean)) / spread((variance + 1e-5).sqrt()) * spread(self.take("weight")) + spread(self.take("bias"))
            self.take("num_batches_tracked")
        self.index += 1
        return x

    def take(self, name: str) -> Tensor:
        key = f"model.{self.index}.{name}"
        self.shapes[key] = tuple(self.state[key].shape)
        return self.state[key]


def randomize(network: UNet, seed: int = 0) -> UNet:
    """Random weights, and random statistics of a range that trained BatchNorms have."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            fan_in = module.weight[0].numel()
            module.weight.data.normal_(std=math.sqrt(2 / fan_in), generator=generator)
            if module.bias is not None:
                module.bias.data.normal_(generator=generator)
        if isinstance(module, nn.BatchNorm3d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.2, 3, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(generator=generator)
    return network.eval().requires_grad_(False)


def double(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.double() for key, value in state.items()}


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def small(**settings: Any) -> UNet:
    return randomize(UNet(1, **{"out_channels": 5, "base_channels": 6, "downsamplings": 2, **settings}))


def rounding(network: UNet, dtype: torch.dtype) -> float:
    """How far a result may be off, as a share of it: every sum of K products adds √K roundings, at random, layer upon layer."""
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv3d)]
    return torch.finfo(dtype).eps * sum(math.sqrt(module.weight[0].numel()) for module in convolutions)


@pytest.fixture(scope="module")
def whole() -> tuple[UNet, Tensor, Tensor]:
    """anatomix with random weights, an image, and its features in float64."""
    network, image = randomize(anatomix.build()), torch.rand(2, 1, 32, 48, 32, generator=torch.Generator().manual_seed(0))
    return network, image, Published(double(network.state_dict()), downs=4, dev=False)(image.double())


@pytest.mark.parametrize(("name", "keys", "million"), [("anatomix", 115, 5.9), ("anatomix-dev", 48, 94)])
def test_the_published_layout(name: str, keys: int, million: float) -> None:
    """The published anatomix.pth has 115 entries; anatomix-dev has a bias at each of its convolutions, and none of norms."""
    with torch.device("meta"):
        network = anatomix.build(name)
    state = network.state_dict()
    published = Published(state, downs=network.downsamplings, dev=name.endswith("dev"))
    assert published(torch.empty(1, 1, 64, 64, 64, device="meta")).shape == (1, anatomix.channels(name), 64, 64, 64)
    assert published.shapes == {key: tuple(value.shape) for key, value in state.items()}
    assert len(state) == keys
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e6 == pytest.approx(million, rel=0.02)


@pytest.mark.parametrize("dev", [False, True])
@pytest.mark.parametrize("form", [lambda network: network, FoldedUNet], ids=["plain", "folded"])
def test_arithmetic_in_float64(form: Callable[[UNet], nn.Module], dev: bool) -> None:
    """The architecture itself: in float64 nothing is left of rounding."""
    network = small(**DEV) if dev else small()
    image = torch.rand(2, 1, 16, 24, 8, dtype=torch.float64)
    wanted = Published(double(network.state_dict()), downs=2, dev=dev)(image)
    with torch.no_grad():
        error = form(network.double())(image) - wanted
    assert rms(error) <= rounding(network, torch.float64) * rms(wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("margins", ["all", "none", "large"])
def test_anatomix_to_rounding(
    monkeypatch: pytest.MonkeyPatch, whole: tuple[UNet, Tensor, Tensor], dtype: torch.dtype, margins: str,
) -> None:
    """The whole network, both ways of a layer, and what is chosen by size: as near to float64 as the plain module is.

    Folding rounds every weight a second time, and the sums are taken in another order: twice the plain module's error at most.
    """
    monkeypatch.setattr(folded, "LEAST_MARGIN_VOXELS", {"all": 0, "none": 2**62, "large": folded.LEAST_MARGIN_VOXELS}[margins])
    network, image, wanted = whole
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        plain, ours = network(image), FoldedUNet(network)(image)
    assert ours.dtype == plain.dtype == dtype
    assert ours.is_contiguous(memory_format=torch.channels_last_3d)
    assert rms(ours - wanted) <= rounding(network, dtype) * rms(wanted)
    assert rms(ours - wanted) <= 2 * rms(plain - wanted)


@pytest.mark.parametrize("settings", [
    DEV, {"normalization": "instance"}, {"upsampling": "trilinear"}, {"pooling": "average"}, {"downsamplings": 0},
    {"normalization": "instance", "downsamplings": 3, "pooling": "average"},
], ids=str)
@pytest.mark.parametrize("least_margin_voxels", [0, 2**62])
def test_every_kind_of_unet(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], least_margin_voxels: int) -> None:
    monkeypatch.setattr(folded, "LEAST_MARGIN_VOXELS", least_margin_voxels)
    network, image = small(**settings), torch.rand(2, 1, 16, 32, 24)
    with torch.no_grad():
        wanted = copy.deepcopy(network).double()(image.double())
        plain, ours = rms(network(image) - wanted), rms(FoldedUNet(network)(image) - wanted)
    assert ours <= rounding(network, torch.float32) * rms(wanted)
    assert ours <= 2 * plain  # as above


def test_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, in float64 and under torch.compile: torch's public functions give the same."""
    network, image = small(), torch.rand(2, 1, 24, 32, 24)
    fused = FoldedUNet(network)(image)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    calls = []
    monkeypatch.setattr(F, "conv3d", lambda *a, conv3d=F.conv3d, **k: calls.append(1) or conv3d(*a, **k))
    torch.testing.assert_close(FoldedUNet(network)(image), fused, rtol=1e-4, atol=1e-4 * rms(fused))
    assert calls


def test_it_refuses_what_the_unet_refuses() -> None:
    for size in ((18, 16, 16), (16, 4, 16)):
        for module in (small(), FoldedUNet(small())):
            with pytest.raises(ValueError, match="a U-Net of 2 downsamplings: sizes must be multiples of 4, 8 at least"):
                module(torch.rand(1, 1, *size))


def test_it_changes_nothing_that_it_is_given() -> None:
    network, image = small(), torch.rand(1, 1, 32, 32, 32)
    state = copy.deepcopy(network.state_dict())
    module, before = FoldedUNet(network), image.clone()
    first = module(image)
    kept = first.clone()
    assert torch.equal(module(image), first)  # and no result is written over by the next
    assert torch.equal(first, kept)
    assert torch.equal(image, before)
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_it_is_an_extractor_like_any_other() -> None:
    """Moves, copies, fake tensors, torch.compile without a break."""
    extractor = FrozenExtractor(FoldedUNet(small()), name="small", channels=5, sha256="")
    image = torch.rand(1, 2, 24, 24, 24)
    features = extractor(image)
    assert features.shape == (1, 10, 24, 24, 24)
    assert torch.equal(copy.deepcopy(extractor)(image), features)
    assert copy.deepcopy(extractor).double()(image.double()).dtype == torch.float64
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert extractor(torch.empty(1, 1, 40, 24, 24)).shape == (1, 5, 40, 24, 24)
    with pytest.raises(InputError, match="multiples of 4"):
        extractor.check_patch((22, 24, 24))
    model = DropGen(nn.Conv3d(12, 2, 1), extractor, StreamFusion(0.0, image_norm="none")).eval()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(image), model(image),
                               rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(anatomix.ARCHITECTURES))
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    network, image = randomize(anatomix.build(name)), torch.rand(2, 1, 64, 64, 96)
    with torch.no_grad():
        wanted = copy.deepcopy(network).double().cuda()(image.double().cuda())
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            ours = FoldedUNet(network).cuda()(image.cuda())
    assert ours.dtype == dtype
    assert rms(ours - wanted) <= rounding(network, dtype) * rms(wanted)


@pytest.mark.gpu
def test_in_a_graph_of_the_training_step() -> None:
    """Extractor and fusion are captured with the step: the losses are those of the step without a graph."""
    losses = []
    for graph in (False, True):
        torch.manual_seed(0)
        torch.cuda.manual_seed(0)
        extractor = FrozenExtractor(FoldedUNet(randomize(anatomix.build())), name="anatomix", channels=16, sha256="")
        network = UNet(17, 3, base_channels=4, downsamplings=2).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        fusion = StreamFusion(0.5, image_norm="none", dtype=torch.bfloat16, memory_format=torch.channels_last_3d)
        model = DropGen(network, extractor, fusion).cuda().train()
        config = TrainConfig(store=Path("store"), out=Path("out"), steps=20, compile=False, cuda_graph=graph)
        step = TrainingStep(model, build_loss("dice_ce", (), 3).to("cuda"), config, Ranks(device=torch.device("cuda:0")))
        generator = torch.Generator("cuda").manual_seed(1)
        losses.append([])
        for number in range(GRAPH_WARM_UP + 5):
            image = torch.rand(2, 1, 32, 32, 32, device="cuda", generator=generator)
            label = (image * 3).clamp(max=2).to(torch.uint8)
            losses[-1].append(float(step([(image, label)], number)))
    assert losses[1] == pytest.approx(losses[0], rel=5e-2)  # bfloat16, and the draws of a replay come from torch's same generator


# ---- files --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the published layout and random weights."""
    path = tmp_path_factory.mktemp("weights") / "anatomix.pth"
    torch.save(randomize(anatomix.build()).state_dict(), path)
    return path


def test_anatomix_from_a_file(weights: Path) -> None:
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    extractor = load_extractor("anatomix", weights=weights, sha256=digest.upper())
    assert extractor.identity() == {"name": "anatomix", "stride": 1, "sha256": digest}
    image = torch.rand(1, 1, 32, 32, 32)
    wanted = Published(double(torch.load(weights, weights_only=True)), downs=4, dev=False)(image.double())
    assert rms(extractor(image) - wanted) <= rounding(anatomix.build(), torch.float32) * rms(wanted)
    with pytest.raises(ValueError, match="multiples of 16"):
        extractor(torch.rand(1, 1, 30, 32, 32))


def test_anatomix_dev_from_a_file(monkeypatch: pytest.MonkeyPatch, weights: Path, tmp_path: Path) -> None:
    """At an eighth of its width: the file of the whole has 376 MB."""
    with pytest.raises(InputError, match=r"anatomix.pth are not those of anatomix-dev: .*model.0.bias"):
        load_extractor("anatomix-dev", weights=weights)
    monkeypatch.setitem(anatomix.ARCHITECTURES["anatomix-dev"], "base_channels", 4)
    network = randomize(anatomix.build("anatomix-dev"))
    path, image = tmp_path / "anatomix-dev.pth", torch.rand(1, 1, 64, 64, 64)
    torch.save(network.state_dict(), path)
    extractor = load_extractor("anatomix-dev", weights=path)
    assert (extractor.channels, extractor.identity()["name"]) == (32, "anatomix-dev")
    wanted = Published(double(network.state_dict()), downs=5, dev=True)(image.double())
    assert rms(extractor(image) - wanted) <= rounding(network, torch.float32) * rms(wanted)
    with pytest.raises(ValueError, match="multiples of 32"):
        extractor(torch.rand(1, 1, 48, 64, 64))


@pytest.mark.parametrize("form", ["safetensors", "compiled"])
def test_other_forms_of_the_file(weights: Path, tmp_path: Path, form: str) -> None:
    from safetensors.torch import save_file

    state = torch.load(weights, weights_only=True)
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        torch.save({f"_orig_mod.{k}": v for k, v in state.items()}, path)
    image = torch.rand(1, 1, 32, 32, 32)
    assert torch.equal(load_extractor("anatomix", weights=path)(image), load_extractor("anatomix", weights=weights)(image))


def test_damaged_weights(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone.pth do not exist"):
        load_extractor("anatomix", weights=tmp_path / "gone.pth")
    with pytest.raises(InputError, match=r"SHA-256 .* asked for is 00"):
        load_extractor("anatomix", weights=weights, sha256="00")
    cut = tmp_path / "cut.pth"
    cut.write_bytes(weights.read_bytes()[:10000])
    for suffix in (".pth", ".safetensors"):
        with pytest.raises(InputError, match=r"cut.* damaged or no weights file"):
            load_extractor("anatomix", weights=cut.rename(cut.with_suffix(suffix)))
        cut = cut.with_suffix(suffix)
    other = tmp_path / "other.pth"
    torch.save(UNet(1, 16, base_channels=8, downsamplings=4).state_dict(), other)
    with pytest.raises(InputError, match=r"other.pth are not those of anatomix"):
        load_extractor("anatomix", weights=other)
    state = torch.load(weights, weights_only=True)
    state["model.4.running_var"][3] = float("nan")
    torch.save(state, other)
    with pytest.raises(InputError, match=r"other.pth hold values that are not finite"):
        load_extractor("anatomix", weights=other)
    torch.save({"model": {"a": 1}}, other)
    with pytest.raises(InputError, match="must hold a plain state dict"):
        load_extractor("anatomix", weights=other)


def test_weights_from_the_hub(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real loading code with the Hub's answers replaced: the file is held against the hash that the Hub gives."""
    import huggingface_hub

    class Metadata:
        etag = hashlib.sha256(weights.read_bytes()).hexdigest()

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, name, revision: str(weights))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: Metadata)
    assert load_extractor("anatomix").identity()["sha256"] == Metadata.etag
    Metadata.etag = "0" * 64
    with pytest.raises(InputError, match="the Hub's is 000"):
        anatomix.load()
    Metadata.etag = "0" * 40
    with pytest.raises(InputError, match=r"publishes no SHA-256 .*--extractor-weights"):
        anatomix.load()


@pytest.mark.parametrize(("name", "revision"), [("anatomix", None), ("anatomix-dev", "a" * 40)])
def test_the_hub_is_asked_for_the_file_and_the_revision(
    monkeypatch: pytest.MonkeyPatch, weights: Path, name: str, revision: str | None,
) -> None:
    import huggingface_hub

    asked = []

    class Metadata:
        etag = hashlib.sha256(weights.read_bytes()).hexdigest()

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: asked.append(url) or Metadata)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, revision: asked.append((*a, revision)) or str(weights))
    monkeypatch.setitem(anatomix.ARCHITECTURES, name, anatomix.ARCHITECTURES["anatomix"])
    load_extractor(name, revision=revision)
    assert asked == [f"https://huggingface.co/neeldey/anatomix/resolve/{revision or 'main'}/{name}.pth",
                     ("neeldey/anatomix", f"{name}.pth", revision)]
    with pytest.raises(InputError, match=r"the file .* or the Hub's revision v1: give one"):
        load_extractor(name, weights=weights, revision="v1")
    with pytest.raises(InputError, match="'mind' takes no weights; they are for anatomix and anatomix-dev"):
        load_extractor("mind", revision="v1")


def test_a_cached_file_serves_without_the_hub(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache as the Hub's client lays it out: a link to a file that is called by the hash; damage is seen there too."""
    import huggingface_hub.constants

    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    repository = tmp_path / "models--neeldey--anatomix"
    blob, snapshot = repository / "blobs" / digest, repository / "snapshots" / ("a" * 40)
    for folder in (blob.parent, snapshot, repository / "refs"):
        folder.mkdir(parents=True)
    blob.write_bytes(weights.read_bytes())
    (snapshot / "anatomix.pth").symlink_to(blob)
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert load_extractor("anatomix").identity()["sha256"] == digest
    blob.write_bytes(weights.read_bytes() + b"0")
    with pytest.raises(InputError, match="the Hub's is"):
        load_extractor("anatomix")


def test_no_hub_names_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"cannot be reached.*download anatomix.pth.*--extractor-weights"):
        load_extractor("anatomix")
