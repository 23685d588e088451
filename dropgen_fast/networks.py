"""Segmentation networks: the reference's U-Net, and any other by import path."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dropgen_fast.errors import InputError

NORMALIZATIONS: dict[str, Callable[[int, float], nn.Module]] = {
    "batch": lambda channels, eps: nn.BatchNorm3d(channels, eps=eps),
    "instance": lambda channels, eps: nn.InstanceNorm3d(channels, eps=eps),
}


class UNet(nn.Module):
    """The U-Net of the reference and of anatomix (arXiv 2604.02564, 2411.02372): (N, in, D, H, W) → (N, out, D, H, W).

    A convolution, then per level two convolutions and a pooling, two at the bottom, and per level upwards an upsampling, the
    concatenation with that level, and two convolutions; a plain convolution at the end. Convolutions are 3³ with reflect
    padding, each followed by normalization and ReLU, without bias under BatchNorm. Widths double per level.

    The layers are one sequence, so that the state dict has the published layout ``model.<index>.<name>``.

    Args:
        in_channels, out_channels: of the input and the output.
        base_channels: width of the uppermost level.
        downsamplings: levels below it.
        normalization: "batch" or "instance" (without affine).
        pooling: "max" or "average", 2³.
        upsampling: "nearest" or "trilinear".
        eps: of the normalization.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, base_channels: int = 20, downsamplings: int = 5,
        normalization: Literal["batch", "instance"] = "batch", pooling: Literal["max", "average"] = "max",
        upsampling: Literal["nearest", "trilinear"] = "nearest", eps: float = 1e-5,
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("base_channels", base_channels)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if downsamplings < 0:
            raise ValueError(f"downsamplings must be at least 0, got {downsamplings}")
        for name, choice, choices in (("normalization", normalization, tuple(NORMALIZATIONS)),
                                      ("pooling", pooling, ("max", "average")),
                                      ("upsampling", upsampling, ("nearest", "trilinear"))):
            if choice not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {choice!r}")
        self.downsamplings = downsamplings
        bias = normalization != "batch"
        layers: list[nn.Module] = []

        def convolution(channels: int, width: int) -> nn.Module:
            return nn.Conv3d(channels, width, 3, padding=1, padding_mode="reflect", bias=bias)

        def block(channels: int, width: int) -> None:
            layers.extend([convolution(channels, width), NORMALIZATIONS[normalization](width, eps), nn.ReLU(inplace=True)])

        widths = [base_channels * 2**level for level in range(downsamplings + 1)]
        block(in_channels, base_channels)
        pools = []
        for level, width in enumerate(widths):
            block(widths[max(level - 1, 0)], width)
            block(width, width)
            if level < downsamplings:
                pools.append(len(layers))
                layers.append(nn.MaxPool3d(2) if pooling == "max" else nn.AvgPool3d(2))
        ups = []
        for width in reversed(widths[:-1]):
            ups.append(len(layers))
            layers.append(nn.Upsample(scale_factor=2, mode=upsampling))
            block(2 * width + width, width)
            block(width, width)
        layers.append(convolution(base_channels, out_channels))
        self.model = nn.Sequential(*layers)
        self._pools, self._ups = frozenset(pools), frozenset(ups)

    @property
    def divisor(self) -> int:
        """What every axis of the input must be a multiple of."""
        return 2**self.downsamplings

    def check_size(self, size: Sequence[int]) -> None:
        """Raise ValueError for a size (D, H, W) that cannot be halved, or whose bottom cannot be padded by reflection."""
        least = 2 * self.divisor  # reflection needs two voxels
        if any(n % self.divisor or n < least for n in size):
            nearest = [max(n // self.divisor * self.divisor, least) for n in size]
            above = [max(-(-n // self.divisor) * self.divisor, least) for n in size]
            raise ValueError(f"a U-Net of {self.downsamplings} downsamplings takes sizes that are multiples of {self.divisor}, "
                             f"{least} at least; got {tuple(size)}, {tuple(nearest)} or {tuple(above)} would do")

    def forward(self, x: Tensor) -> Tensor:
        """Scores or features; raises ValueError for a size that `check_size` refuses."""
        self.check_size(x.shape[2:])
        skips: list[Tensor] = []
        for index, layer in enumerate(self.model):
            if index in self._pools:
                skips.append(x)
            x = layer(x)
            if index in self._ups:
                x = torch.cat((skips.pop(), x), 1)
        return x


def build_network(
    path: str, in_channels: int, out_channels: int, patch: tuple[int, int, int], options: Mapping[str, Any],
) -> nn.Module:
    """A network that maps (N, in_channels, *patch) to (N, out_channels, *patch).

    Args:
        path: "unet", or ``package.module:Name``, a class or function that returns a module.
        in_channels, out_channels: given to it as ``in_channels`` and ``out_channels`` (or ``num_classes``); where it asks
            for ``spatial_dims`` it is told 3, where it asks for ``img_size`` the patch.
        patch: (D, H, W); the network is tried on it, without arithmetic.
        options: further keyword arguments; they win over the ones above.

    Raises:
        InputError: nothing at that path, arguments that it refuses, or a patch that it cannot take.
    """
    build: Callable[..., Any] = UNet if path == "unet" else import_object(path, "network")
    try:
        accepted = inspect.signature(build).parameters
        supplied = {"in_channels": in_channels, "out_channels": out_channels, "num_classes": out_channels, "spatial_dims": 3,
                    "img_size": patch}
        if "out_channels" in accepted:
            del supplied["num_classes"]
        arguments = {name: value for name, value in supplied.items() if name in accepted} | dict(options)
        network = build(**arguments)
    except (TypeError, ValueError, KeyError, AssertionError, AttributeError, IndexError) as error:
        raise InputError(f"network {path} refuses its arguments {dict(options)}: {_one_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise InputError(f"network {path} must give a torch.nn.Module, got {type(network).__name__}")
    _try_patch(network, path, in_channels, out_channels, patch)
    return network


def import_object(path: str, what: str) -> Any:
    """What ``package.module:Name`` names; `what` it is for is said in the error."""
    module, colon, name = path.partition(":")
    if not colon or not module or not name:
        raise InputError(f"{what} must be a known name or package.module:Name, got {path!r}")
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise InputError(f"{what} {path}: cannot import {module} ({_one_line(error)})") from error
    except AttributeError as error:
        raise InputError(f"{what} {path}: {module} has no {name}") from error


def _try_patch(network: nn.Module, path: str, in_channels: int, out_channels: int, patch: tuple[int, int, int]) -> None:
    """Run a copy of the network on torch's meta device, which has shapes and no values."""
    wanted = (1, out_channels, *patch)
    try:
        if isinstance(network, UNet):
            network.check_size(patch)
        out = copy.deepcopy(network).to("meta").eval()(torch.empty(1, in_channels, *patch, device="meta"))
    except Exception as error:  # whatever a foreign network raises for a size that it cannot take
        raise InputError(f"network {path} cannot take a patch of {patch}: {_one_line(error)}") from error
    if not isinstance(out, Tensor) or tuple(out.shape) != wanted:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise InputError(f"network {path} must give scores of shape {wanted} for a patch of {patch}, got {got}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
