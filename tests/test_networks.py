"""The U-Net family against its arithmetic written out by hand, and networks by import path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dropgen_fast.errors import InputError
from dropgen_fast.networks import UNet, build_network


def randomized(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights, and running statistics that are not 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5 if value.dim() == 1
                        else torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5)
    return network.eval()


def by_hand(state: dict[str, Tensor], x: Tensor, downsamplings: int) -> Tensor:
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
        return ((x - mean) / (variance + 1e-5).sqrt() * gain + shift).clamp(min=0)

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


@pytest.mark.parametrize("downsamplings", [1, 3])
def test_unet_is_the_published_arithmetic(downsamplings: int) -> None:
    network = randomized(UNet(2, 5, base_channels=4, downsamplings=downsamplings)).double()
    x = torch.rand(2, 2, 16, 32, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(network(x), by_hand(network.state_dict(), x, downsamplings), rtol=1e-10, atol=1e-10)


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


@pytest.mark.parametrize(("size", "would_do"), [((48, 50, 48), r"\(48, 48, 48\) or \(48, 56, 48\)"), ((8, 16, 16), r"\(16, 16, 16\)")])
def test_sizes_that_cannot_be_halved(size: tuple[int, int, int], would_do: str) -> None:
    with pytest.raises(ValueError, match=f"multiples of 8, 16 at least; got .*{would_do}"):
        UNet(1, 2, base_channels=2, downsamplings=3)(torch.zeros(1, 1, *size))
    with pytest.raises(InputError, match=f"unet cannot take a patch.*{would_do}"):
        build_network("unet", 1, 2, size, {"base_channels": 2, "downsamplings": 3})


@pytest.mark.parametrize("change", [{"base_channels": 0}, {"downsamplings": -1}, {"normalization": "group"}, {"pooling": "Max"}])
def test_unet_refuses_what_it_is_not(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        UNet(1, 2, **change)


@pytest.mark.parametrize(("path", "options"), [
    ("unet", {"base_channels": 4, "downsamplings": 2}),
    ("monai.networks.nets:SegResNet", {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]}),
    ("monai.networks.nets:UNet", {"channels": [4, 8], "strides": [2]}),
    ("monai.networks.nets:DynUNet", {"kernel_size": [3, 3], "strides": [1, 2], "upsample_kernel_size": [2], "filters": [4, 8]}),
])
def test_networks_by_path(path: str, options: dict[str, Any]) -> None:
    network = build_network(path, 13, 4, (16, 24, 16), options)
    out = network(torch.rand(1, 13, 16, 24, 16))
    assert out.shape == (1, 4, 16, 24, 16)
    out.sum().backward()  # it is on the CPU, with gradients
    assert any(p.grad is not None and p.grad.any() for p in network.parameters())


@pytest.mark.parametrize(("path", "options", "message"), [
    ("resnet", {}, "known name or package.module:Name, got 'resnet'"),
    ("no.such.module:Net", {}, "cannot import no.such.module"),
    ("monai.networks.nets:NoNet", {}, "has no NoNet"),
    ("monai.networks.nets:SegResNet", {"depth": 3}, "refuses its arguments.*depth"),
    ("unet", {"base_channels": 4, "levels": 3}, "refuses its arguments.*levels"),
    ("builtins:dict", {}, "must give a torch.nn.Module"),
    ("torch.nn:Identity", {}, r"must give scores of shape \(1, 4, 16, 16, 16\).*got \(1, 13, 16, 16, 16\)"),
    ("monai.networks.nets:UNet", {"channels": [4, 8, 16, 32, 64, 128], "strides": [2, 2, 2, 2, 2]}, "cannot take a patch"),
])
def test_networks_that_cannot_be_had(path: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_network(path, 13, 4, (16, 16, 16), options)
