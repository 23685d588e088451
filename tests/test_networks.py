"""The U-Net family against its arithmetic written out by hand, and networks by import path."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropgen_fast.errors import InputError
from dropgen_fast.networks import UNet, build_network, check_patch


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


def test_check_patch_says_what_does_not_fit_and_touches_nothing(caplog: pytest.LogCaptureFixture) -> None:
    from monai.networks.nets import UNet as MonaiUNet

    ours = UNet(2, 2, base_channels=2, downsamplings=2)
    foreign = MonaiUNet(3, 2, 2, channels=[4, 8, 16], strides=[2, 2], norm="BATCH")
    for network in (ours, foreign):
        before = {name: value.clone() for name, value in network.state_dict().items()}
        check_patch(network, (16, 16, 16))
        with pytest.raises(InputError, match=r"cannot take a patch of \(16, 18, 16\)"):
            check_patch(network, (16, 18, 16))
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
        assert all(type(value) is Tensor for value in network.state_dict().values())
        assert network.training
    assert not caplog.records  # torch logs a page for what the error says in a line
    check_patch(foreign, [16, 16, 16], in_channels=2)
    with pytest.raises(InputError, match="cannot take a patch"):
        check_patch(foreign, (16, 16, 16), in_channels=3)
    with pytest.raises(InputError, match="how many channels Identity takes"):
        check_patch(nn.Identity(), (16, 16, 16))


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


@pytest.mark.parametrize(("path", "options"), [
    ("unet", {"base_channels": 4, "downsamplings": 2}),
    ("monai.networks.nets:SegResNet", {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]}),
    ("monai.networks.nets:UNet", {"channels": [4, 8], "strides": [2]}),
    ("monai.networks.nets:DynUNet", {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2],
                                          "filters": [4, 8, 8]}),
    (f"{__name__}:Sized", {}),
    (f"{__name__}:OtherWords", {}),
    (f"{__name__}:Looks", {}),
])
def test_networks_by_path(path: str, options: dict[str, Any]) -> None:
    network = build_network(path, 13, 4, (16, 32, 16), options)
    check_patch(network, (16, 32, 16))
    assert all(type(p) is nn.Parameter for _, p in network.named_parameters(remove_duplicate=False))  # the real ones still
    out = network(torch.rand(1, 13, 16, 32, 16))
    assert out.shape == (1, 4, 16, 32, 16)
    out.sum().backward()  # it is on the CPU, with gradients
    assert any(p.grad is not None and p.grad.any() for p in network.parameters())


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
    ("torch.nn:Identity", {}, r"must give scores of shape \(2, 4, 16, 16, 16\).*got \(2, 13, 16, 16, 16\)"),
    ("monai.networks.nets:DynUNet", {"kernel_size": [3] * 4, "strides": [1, 2, 2, 2], "upsample_kernel_size": [2] * 3,
                                     "deep_supervision": True}, "deep supervision and other extra outputs must be off"),
    ("monai.networks.nets:UNet", {"channels": [4, 8, 16, 32, 64, 128], "strides": [2, 2, 2, 2, 2]}, "cannot take a patch"),
])
def test_networks_that_cannot_be_had(path: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_network(path, 13, 4, (16, 16, 16), options)
