"""The U-Net family against its arithmetic written out by hand, networks by import path, activation checkpointing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dropgen_fast.errors import InputError
from dropgen_fast.losses import build_loss
from dropgen_fast.networks import UNet, build_network, heads, keyword_options


class OtherWords(nn.Module):
    """A network that calls its channels by other names."""

    def __init__(self, input_channels: int, num_classes: int) -> None:
        super().__init__()
        self.layer = nn.Conv3d(input_channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class Sized(nn.Module):
    """A network that must be told the patch, as transformers are, and the number of axes."""

    def __init__(self, in_chans: int, n_classes: int, img_size: tuple[int, ...], spatial_dims: int) -> None:
        super().__init__()
        assert spatial_dims == len(img_size) == 3
        self.layer = nn.Conv3d(in_chans, n_classes, 1)
        self.position = nn.Parameter(torch.zeros(img_size))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) + self.position
        return out


class Looks(OtherWords):
    """A network whose way depends on the values, so that shapes alone do not tell whether it works."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.mean().item() > 0 else -x)


class Listing(OtherWords):
    """A network that lists its predictions in evaluation too, as nnU-Net's do."""

    def forward(self, x: Tensor) -> Any:
        scores = super().forward(x)
        return [scores, F.avg_pool3d(scores, 2)]


class Extra(OtherWords):
    """A network that gives scores and something else."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x.mean()


class CoarseFirst(OtherWords):
    """A network that gives its predictions in the wrong order."""

    def forward(self, x: Tensor) -> Any:
        scores = super().forward(x)
        return [F.avg_pool3d(scores, 2), scores]


class Named(OtherWords):
    """A network that gives a dictionary."""

    def forward(self, x: Tensor) -> Any:
        return {"out": super().forward(x)}


class Spare(OtherWords):
    """A network with parameters that it does not use, one that it uses in evaluation only, and one that is frozen."""

    def __init__(self, input_channels: int, num_classes: int) -> None:
        super().__init__(input_channels, num_classes)
        self.unused = nn.Conv3d(1, 1, 1)
        self.later = nn.Parameter(torch.ones(()))
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x) * self.scale
        return out if self.training else out * self.later


def namespace(in_channels: int, out_channels: int) -> SimpleNamespace:
    """A factory that makes no module."""
    return SimpleNamespace(channels=(in_channels, out_channels))


def randomized(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights, and running statistics that are not 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5 if value.dim() == 1
                        else torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5)
    return network.eval()


def by_hand(state: dict[str, Tensor], x: Tensor, downsamplings: int, eps: float) -> Tensor:
    """The published forward, from the state dict alone: layers are numbered in the order in which they run."""
    index = 0

    def convolution(x: Tensor) -> Tensor:
        nonlocal index
        x = F.conv3d(F.pad(x, (1,) * 6, mode="reflect"), state[f"model.{index}.weight"])
        index += 1
        return x

    def block(x: Tensor) -> Tensor:
        nonlocal index
        x = convolution(x)
        mean, variance, gain, shift = (state[f"model.{index}.{name}"][:, None, None, None]
                                       for name in ("running_mean", "running_var", "weight", "bias"))
        index += 2  # the normalization and the ReLU
        return ((x - mean) / (variance + eps).sqrt() * gain + shift).clamp(min=0)

    skips = []
    x = block(x)
    for _ in range(downsamplings):
        x = block(block(x))
        skips.append(x)
        x = x.unflatten(4, (-1, 2)).amax(5).unflatten(3, (-1, 2)).amax(4).unflatten(2, (-1, 2)).amax(3)
        index += 1
    x = block(block(x))
    for skip in reversed(skips):
        for axis in (2, 3, 4):
            x = x.repeat_interleave(2, axis)
        index += 1
        x = block(block(torch.cat([skip, x], 1)))
    return convolution(x)


@pytest.mark.parametrize(("downsamplings", "eps"), [(3, 1e-5), (1, 1e-2)])
def test_unet_is_the_published_arithmetic(downsamplings: int, eps: float) -> None:
    network = randomized(UNet(2, 5, base_channels=4, downsamplings=downsamplings, eps=eps)).double()
    x = torch.rand(2, 2, 16, 32, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(network(x), by_hand(network.state_dict(), x, downsamplings, eps), rtol=1e-10, atol=1e-10)


def test_anatomix_layout() -> None:
    """Keys, shapes and size of the published file: 4 downsamplings, 16 channels, layers numbered 0 to 63."""
    state = UNet(1, 16, base_channels=16, downsamplings=4).state_dict()
    convolutions = [key for key, value in state.items() if value.dim() == 5]
    assert len(convolutions) == 20
    assert convolutions[0] == "model.0.weight"
    assert convolutions[-1] == "model.65.weight"
    assert not any(key.removesuffix("weight") + "bias" in state for key in convolutions)
    assert sum(v.numel() for k, v in state.items() if k.endswith(("weight", "bias"))) == 5_899_344


def test_unet_takes_channels_last_and_keeps_it() -> None:
    network = randomized(UNet(1, 2, base_channels=4, downsamplings=2)).to(memory_format=torch.channels_last_3d)
    x = torch.rand(1, 1, 8, 12, 16)
    with torch.no_grad():
        out = network(x.contiguous(memory_format=torch.channels_last_3d))
        torch.testing.assert_close(out, network.to(memory_format=torch.contiguous_format)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("size", "would_do"), [
    ((48, 50, 48), r"\(48, 48, 48\) or \(48, 56, 48\) would do"), ((8, 16, 16), r"got \(8, 16, 16\), \(16, 16, 16\) would do"),
])
def test_sizes_that_cannot_be_halved(size: tuple[int, int, int], would_do: str) -> None:
    with pytest.raises(ValueError, match=f"multiples of 8, .*{would_do}"):
        UNet(1, 2, base_channels=2, downsamplings=3)(torch.zeros(1, 1, *size))
    with pytest.raises(InputError, match=f"unet cannot take a patch.*{would_do}"):
        build_network("unet", 1, 2, size, {"base_channels": 2, "downsamplings": 3})


def test_instance_norm_average_pooling_trilinear() -> None:
    """The other member of the family: bias, no affine, the given eps; statistics of the sample in training and evaluation."""
    network = UNet(1, 2, base_channels=2, downsamplings=1, normalization="instance", pooling="average",
                   upsampling="trilinear", eps=0.01).double()
    state = network.state_dict()
    assert {key for key in state if key.startswith("model.0.")} == {"model.0.weight", "model.0.bias"}
    assert "model.1.weight" not in state

    def block(x: Tensor, index: int) -> Tensor:
        x = F.conv3d(F.pad(x, (1,) * 6, mode="reflect"), state[f"model.{index}.weight"], state[f"model.{index}.bias"])
        variance, mean = torch.var_mean(x, (2, 3, 4), correction=0, keepdim=True)
        return ((x - mean) / (variance + 0.01).sqrt()).clamp(min=0)

    x = torch.rand(1, 1, 4, 6, 4, dtype=torch.float64)
    skip = block(block(block(x, 0), 3), 6)
    low = skip.unflatten(4, (-1, 2)).mean(5).unflatten(3, (-1, 2)).mean(4).unflatten(2, (-1, 2)).mean(3)
    low = F.interpolate(block(block(low, 10), 13), scale_factor=2, mode="trilinear", align_corners=False)
    last = block(block(torch.cat([skip, low], 1), 17), 20)
    wanted = F.conv3d(F.pad(last, (1,) * 6, mode="reflect"), state["model.23.weight"], state["model.23.bias"])
    with torch.no_grad():
        for mode in (True, False):
            torch.testing.assert_close(network.train(mode)(x), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("change", [{"base_channels": 0}, {"downsamplings": -1}, {"normalization": "group"}, {"pooling": "Max"}])
def test_unet_refuses_what_it_is_not(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        UNet(1, 2, **change)


MONAI = "monai.networks.nets:"
SWIN = {"feature_size": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "norm_name": "batch"}


@pytest.mark.parametrize(("path", "options"), [
    (MONAI + "UNet", {"channels": [4, 8], "strides": [2]}),
    (MONAI + "DynUNet", {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [4, 8, 8]}),
    (f"{__name__}:Sized", {}),
    (f"{__name__}:OtherWords", {}),
    (f"{__name__}:Looks", {}),
])
def test_networks_by_path(path: str, options: dict[str, Any]) -> None:
    network = build_network(path, 13, 4, (16, 32, 16), options)
    assert all(type(p) is nn.Parameter for _, p in network.named_parameters(remove_duplicate=False))  # the real ones still
    assert network.training
    out = network(torch.rand(1, 13, 16, 32, 16))
    assert out.shape == (1, 4, 16, 32, 16)
    out.sum().backward()  # it is on the CPU, with gradients
    assert any(p.grad is not None and p.grad.any() for p in network.parameters())


@pytest.mark.parametrize(("path", "options", "predictions"), [
    ("unet", {"base_channels": 4, "downsamplings": 2}, 1),
    (MONAI + "DynUNet", {"filters": [4, 8, 8, 8]}, 1),
    (MONAI + "DynUNet", {"filters": [4, 8, 8, 8], "deep_supervision": True, "deep_supr_num": 2}, 3),
    (MONAI + "SegResNet", {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]}, 1),
    (MONAI + "SegResNetDS", {"init_filters": 8, "blocks_down": [1, 1, 1], "dsdepth": 2}, 2),
    (MONAI + "SwinUNETR", SWIN, 1),
])
def test_a_network_learns_one_batch(path: str, options: dict[str, Any], predictions: int) -> None:
    """From a batch whose label is the first channel's sign, within a few steps; every parameter has a part in it."""
    torch.manual_seed(0)
    network = build_network(path, 5, 2, (32, 32, 32), options)
    assert {m.in_channels for m in network.modules() if isinstance(m, nn.Conv3d)} & {5}
    image = F.interpolate(torch.randn(2, 5, 4, 4, 4), size=32, mode="trilinear")
    label = (image[:, :1] > 0).to(torch.uint8)
    loss = build_loss("dice_ce", (), 2)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    losses = []
    for _ in range(4):
        output = network(image)
        assert len(heads(output)) == predictions
        optimizer.zero_grad()
        value = loss(output, label)
        value.backward()
        assert all(p.requires_grad and p.grad is not None for p in network.parameters())
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        assert network.eval()(image).shape == (2, 2, 32, 32, 32)


def test_levels_follow_the_patch_where_the_user_names_none() -> None:
    """nnU-Net's rule: an axis is halved while 4 voxels are left; and no further than it is even."""
    network = build_network(MONAI + "DynUNet", 1, 2, (64, 32, 36), {"filters": [2] * 5})
    assert network.strides == [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 1], [2, 1, 1]]  # 64 → 4, 32 → 4, 36 → 9
    assert network.kernel_size == [3] * 5
    assert network.upsample_kernel_size == network.strides[1:]
    own = build_network(MONAI + "DynUNet", 1, 2, (64, 32, 36), {"strides": [1, 2, [2, 2, 1]], "filters": [2] * 3})
    assert own.strides == [1, 2, [2, 2, 1]]
    assert own.upsample_kernel_size == [2, [2, 2, 1]]
    with pytest.raises(InputError, match=r"refuses its arguments.*no less than 3"):
        build_network(MONAI + "DynUNet", 1, 2, (8, 8, 8))
    with pytest.raises(InputError, match="refuses its arguments"):
        build_network(MONAI + "DynUNet", 1, 2, (16, 16, 16), {"strides": 2})


def test_predictions_in_evaluation_may_be_a_list() -> None:
    network = build_network(f"{__name__}:Listing", 3, 2, (8, 8, 8)).eval()
    assert [tuple(head.shape) for head in heads(network(torch.rand(1, 3, 8, 8, 8)))] == [(1, 2, 8, 8, 8), (1, 2, 4, 4, 4)]


@pytest.mark.parametrize("output", [None, [], {"out": torch.zeros(1)}, [torch.zeros(1), None]])
def test_what_is_no_prediction(output: object) -> None:
    with pytest.raises(TypeError, match="a tensor or a list of them"):
        heads(output)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_parameters_that_no_prediction_needs_are_frozen(one_process: None) -> None:
    """DistributedDataParallel refuses the second step of a network that leaves gradients out."""
    torch.manual_seed(0)
    network = build_network(f"{__name__}:Spare", 3, 2, (4, 4, 4))
    assert {name for name, p in network.named_parameters() if p.requires_grad} == {"layer.weight", "layer.bias"}
    parallel = DistributedDataParallel(network)
    for _ in range(3):
        parallel(torch.rand(2, 3, 4, 4, 4)).sum().backward()


def test_a_single_voxel_cannot_be_normalized() -> None:
    """Two samples are enough for BatchNorm; InstanceNorm needs two voxels."""
    options = {"channels": [4, 8, 16], "strides": [2, 2], "norm": "BATCH"}
    build_network(MONAI + "UNet", 1, 2, (4, 4, 4), options)
    with pytest.raises(InputError, match=r"batch of 1 × \(4, 4, 4\): a single voxel.*larger batch_size or patch"):
        build_network(MONAI + "UNet", 1, 2, (4, 4, 4), options, batch_size=1)
    build_network(MONAI + "UNet", 1, 2, (8, 4, 4), options, batch_size=1)
    with pytest.raises(InputError, match=r"batch of 2 × \(4, 4, 4\): a single voxel.*larger patch, or"):
        build_network(MONAI + "UNet", 1, 2, (4, 4, 4), options | {"norm": "INSTANCE"})


@pytest.mark.parametrize(("path", "options", "message"), [
    ("resnet", {}, "known name or package.module:Name, got 'resnet'"),
    ("no.such.module:Net", {}, "cannot import no.such.module"),
    ("monai.networks.nets:NoNet", {}, "has no NoNet"),
    ("monai.networks.nets:SegResNet", {"depth": 3}, "refuses its arguments.*depth"),
    ("unet", {"base_channels": 4, "levels": 3}, "refuses its arguments.*levels"),
    ("unet", {"in_channels": 12}, "in_channels is 13"),
    ("builtins:dict", {}, "no signature"),
    ("torch.nn:ReLU", {}, "has no argument in_channels, in_chans"),
    (f"{__name__}:namespace", {}, "must give a torch.nn.Module, got SimpleNamespace"),
    ("torch.nn:Identity", {}, r"must give scores of shape \(2, 4, 16, 16, 16\).*got \(2, 13, 16, 16, 16\) in training"),
    (f"{__name__}:Extra", {}, r"or a list.*got \(2, 4, 16, 16, 16\), \(\) in training"),
    (f"{__name__}:CoarseFirst", {}, r"begins with them.*got \(2, 4, 8, 8, 8\), \(2, 4, 16, 16, 16\)"),
    (f"{__name__}:Named", {}, "got dict in training"),
    ("monai.networks.nets:UNet", {"channels": [4, 8, 16, 32, 64, 128], "strides": [2, 2, 2, 2, 2]}, "a single voxel is left"),
    ("monai.networks.nets:DynUNet", {"strides": [1, 2, 3]}, r"cannot take a patch of \(16, 16, 16\): .*[Ss]ize"),
])
def test_networks_that_cannot_be_had(
    path: str, options: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(InputError, match=message) as error:
        build_network(path, 13, 4, (16, 16, 16), options)
    assert "\n" not in str(error.value)
    assert not caplog.records  # torch logs a page for what the error says in a line


def test_options_are_yaml() -> None:
    wanted = {"a": 1, "b": [1, 2], "c": "x", "d": 0.5, "e": 1e-5, "f": True, "g": None}
    assert keyword_options(("a=1", "b=[1, 2]", "c=x", "d=0.5", "e=1e-5", "f=true", "g=null"), "network_options") == wanted
    for bad, message in (("base_channels", "loss_options are name=value, got 'base_channels'"), ("a b=1", "name=value"),
                         ("a=[1", "loss_options: 'a=\\[1' is not readable")):
        with pytest.raises(InputError, match=message):
            keyword_options((bad,), "loss_options")


# ---- activation checkpointing ------------------------------------------------------------------------------------------

CHECKPOINTED = [
    ("unet", {"base_channels": 4, "downsamplings": 2}),
    # Dropout, so that the random numbers must be the same the second time.
    (MONAI + "DynUNet", {"filters": [4, 8, 8], "strides": [1, 2, 2], "norm_name": "batch", "dropout": 0.3,
                         "deep_supervision": True}),
    (MONAI + "SegResNetDS", {"init_filters": 4, "blocks_down": [1, 1, 1], "dsdepth": 2, "norm": ["group", {"num_groups": 2}]}),
    (MONAI + "SwinUNETR", SWIN | {"drop_rate": 0.1}),
]


def one_step(network: nn.Module, patch: tuple[int, ...]) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss, gradients, and bytes of the tensors that are kept for the gradient without being the network's own."""
    torch.manual_seed(1)
    image, label = torch.rand(2, 3, *patch), torch.randint(0, 2, (2, 1, *patch), dtype=torch.uint8)
    own = {value.untyped_storage().data_ptr() for value in (*network.parameters(), *network.buffers(), image)}
    kept: dict[int, Tensor] = {}

    def keep(value: Tensor) -> Tensor:
        kept[value.untyped_storage().data_ptr()] = value  # as long as it is held, no other has its address
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        output = network(image)
    held = sum(value.untyped_storage().nbytes() for address, value in kept.items() if address not in own)
    loss = build_loss("dice_ce", (), 2)(output, label)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in network.named_parameters() if p.grad is not None}, held


@pytest.mark.parametrize(("path", "options"), CHECKPOINTED)
def test_checkpointing_changes_no_bit_and_keeps_less(path: str, options: dict[str, Any]) -> None:
    """Losses, gradients and running statistics in float32 on the CPU, over two steps: the same sums in the same order."""
    patch = (32, 32, 32) if "Swin" in path else (16, 8, 16)
    networks = []
    for recompute in (False, True):
        torch.manual_seed(0)
        networks.append(build_network(path, 3, 2, patch, options, activation_checkpointing=recompute))
    plain, recomputing = networks
    assert list(plain.state_dict()) == list(recomputing.state_dict())
    assert any(isinstance(m, nn.BatchNorm3d) for m in plain.modules()) == ("SegResNet" not in path)
    assert [type(m) for m in plain.modules()] == [type(m) for m in recomputing.modules()]
    for _ in range(2):
        loss, gradients, held = one_step(plain, patch)
        again, gradients_again, held_again = one_step(recomputing, patch)
        assert torch.equal(loss, again)
        assert gradients.keys() == gradients_again.keys() != set()
        assert all(torch.equal(value, gradients_again[name]) for name, value in gradients.items())
        for (name, value), other in zip(plain.state_dict().items(), recomputing.state_dict().values(), strict=True):
            assert torch.equal(value, other), name
        assert held_again < 0.6 * held  # at least the inner half of each block of two convolutions is not kept
    x = torch.rand(1, 3, *patch)
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), recomputing.eval()(x))


@pytest.mark.parametrize(("path", "options"), CHECKPOINTED[:2])
def test_a_copy_of_a_checkpointed_network_is_its_own(path: str, options: dict[str, Any]) -> None:
    """The averaged weights are such a copy: its scores follow its own weights, and gradients go to the network that ran."""
    network = build_network(path, 3, 2, (16, 8, 16), options, activation_checkpointing=True)
    twin = copy.deepcopy(network).eval()
    x = torch.rand(2, 3, 16, 8, 16)
    with torch.no_grad():
        before = twin(x)
        for p in network.parameters():
            p.mul_(2)
        assert torch.equal(twin(x), before)
    one_step(twin.train(), (16, 8, 16))
    assert all(p.grad is not None for p in twin.parameters())
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize(("path", "options"), [CHECKPOINTED[0], (MONAI + "DynUNet", CHECKPOINTED[1][1] | {"dropout": None})])
def test_checkpointing_survives_the_compiler(path: str, options: dict[str, Any]) -> None:
    """In one graph, with fewer activations kept, and running statistics updated once.

    The decomposed operations are the eager ones with sums in another order: a sum of the 4096 voxels of a batch has an error of
    some 2^-23 · sqrt(4096) = 8e-6 of its terms' size.
    """
    networks = []
    for recompute in (False, True):
        torch.manual_seed(0)
        networks.append(build_network(path, 3, 2, (16, 8, 16), options, activation_checkpointing=recompute))
    network, recomputing = networks
    loss, gradients, held = one_step(network, (16, 8, 16))
    torch._dynamo.reset()
    recomputing.compile(backend="aot_eager_decomp_partition", fullgraph=True, dynamic=False)
    again, gradients_again, held_again = one_step(recomputing, (16, 8, 16))
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-5)
    for name, value in gradients.items():
        torch.testing.assert_close(gradients_again[name], value, rtol=1e-4, atol=1e-5)
    for value, other in zip(network.buffers(), recomputing.buffers(), strict=True):
        torch.testing.assert_close(other, value, rtol=1e-5, atol=1e-5)
    assert held_again < 0.6 * held
    torch._dynamo.reset()


def test_nothing_to_compute_again() -> None:
    with pytest.raises(InputError, match=r"OtherWords has no block of two convolutions.*leave activation_checkpointing out"):
        build_network(f"{__name__}:OtherWords", 3, 2, (8, 8, 8), activation_checkpointing=True)
