"""Segmentation networks: the reference's U-Net, and any other by import path."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)

from dropgen_fast.errors import InputError

NORMALIZATIONS: dict[str, Callable[[int, float], nn.Module]] = {
    "batch": lambda channels, eps: nn.BatchNorm3d(channels, eps=eps),
    "instance": lambda channels, eps: nn.InstanceNorm3d(channels, eps=eps),
}
# How the networks of this field call them, the most common first.
IN_CHANNELS = ("in_channels", "in_chans", "input_channels", "n_channels", "input_nc")
OUT_CHANNELS = ("out_channels", "num_classes", "n_classes", "out_chans", "output_channels", "output_nc")
TRIED_BATCH = 2  # BatchNorm needs more than one value per channel, and the bottom of a network may be one voxel


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
        problem = size_problem(size, self.divisor)
        if problem is not None:
            raise ValueError(f"a U-Net of {self.downsamplings} downsamplings: {problem}")

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


def size_problem(size: Sequence[int], divisor: int) -> str | None:
    """What is wrong with a size for a U-Net of that divisor, and the nearest sizes that would do; None where nothing is."""
    least = 2 * divisor  # the bottom needs two voxels to be padded by reflection
    if not any(n % divisor or n < least for n in size):
        return None
    below = tuple(max(n // divisor * divisor, least) for n in size)
    above = tuple(max(-(-n // divisor) * divisor, least) for n in size)
    would_do = f"{below} or {above}" if below != above else f"{below}"
    return f"sizes must be multiples of {divisor}, {least} at least; got {tuple(size)}, {would_do} would do"


def build_network(
    path: str, in_channels: int, out_channels: int, patch: Sequence[int], options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A network that maps (N, in_channels, *patch) to (N, out_channels, *patch).

    Args:
        path: "unet", or ``package.module:Name``, a class or function that returns a module.
        in_channels, out_channels: given to it under the first of `IN_CHANNELS` and of `OUT_CHANNELS` that it has.
        patch: (D, H, W); the network is tried on it, without arithmetic.
        options: further keyword arguments. Where the network asks for ``spatial_dims`` it is told 3, where it must be
            told ``img_size`` the patch, unless an option says otherwise.

    Raises:
        InputError: nothing at that path, arguments that it refuses, a patch that it cannot take, or another output.
    """
    build: Callable[..., Any] = UNet if path == "unet" else import_object(path, "network")
    arguments = _arguments(build, path, in_channels, out_channels, patch, options or {})
    try:
        network = build(**arguments)
    except Exception as error:  # whatever a foreign class raises for arguments that it refuses
        raise InputError(f"network {path} refuses its arguments {arguments}: {_one_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise InputError(f"network {path} must give a torch.nn.Module, got {type(network).__name__}")
    out = _try_patch(network, path, in_channels, patch)
    wanted = (TRIED_BATCH, out_channels, *patch)
    if out is not None and not (isinstance(out, Tensor) and tuple(out.shape) == wanted):
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise InputError(f"network {path} must give scores of shape {wanted} for {TRIED_BATCH} patches, got {got} (deep "
                         "supervision and other extra outputs must be off)")
    return network


def check_patch(network: nn.Module, patch: Sequence[int], in_channels: int | None = None) -> None:
    """Find out before training whether a network takes patches of this size; nothing is computed.

    Args:
        network: any.
        patch: (D, H, W).
        in_channels: of the network; None: its attribute of that name, else those of its first 3D convolution.

    Raises:
        InputError: it does not.
    """
    if in_channels is None:
        first = next((m.in_channels for m in network.modules() if isinstance(m, nn.Conv3d)), None)
        in_channels = getattr(network, "in_channels", first)
    if not isinstance(in_channels, int):
        raise InputError(f"cannot tell how many channels {type(network).__name__} takes: give in_channels")
    _try_patch(network, type(network).__name__, in_channels, patch)


def _arguments(
    build: Callable[..., Any], path: str, in_channels: int, out_channels: int, patch: Sequence[int], options: Mapping[str, Any],
) -> dict[str, Any]:
    """Keyword arguments for `build`: the options, and what this engine knows, under the names that `build` has for it."""
    try:
        accepted = inspect.signature(build).parameters
    except ValueError as error:
        raise InputError(f"network {path} has no signature that can be read: wrap it in a function") from error
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    arguments = dict(options)
    for spellings, value in ((IN_CHANNELS, in_channels), (OUT_CHANNELS, out_channels)):
        name = next((s for s in spellings if s in accepted), spellings[0] if anything else None)
        if name is None:
            raise InputError(f"network {path} has no argument {', '.join(spellings)}: wrap it in a function that has")
        if arguments.setdefault(name, value) != value:
            raise InputError(f"network {path}: {name} is {value} by the data, got {arguments[name]!r}: leave it out")
    if "spatial_dims" in accepted:
        arguments.setdefault("spatial_dims", 3)
    if "img_size" in accepted and accepted["img_size"].default is inspect.Parameter.empty:
        arguments.setdefault("img_size", tuple(patch))
    return arguments


def import_object(path: str, what: str) -> Any:
    """What ``package.module:Name`` names; `what` it is for is said in the error."""
    module, colon, name = path.partition(":")
    if not colon or not module or not name:
        raise InputError(f"{what} must be a known name or package.module:Name, got {path!r}")
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError as error:
        raise InputError(f"{what} {path}: {module} has no {name}") from error
    except Exception as error:  # a user's own module may fail in any way while it is imported
        raise InputError(f"{what} {path}: cannot import {module} ({_one_line(error)})") from error


def _try_patch(network: nn.Module, path: str, in_channels: int, patch: Sequence[int]) -> object:
    """What the network gives for a batch of patches, shapes only; None where its forward depends on values.

    Raises:
        InputError: it fails.
    """
    try:
        return fake_forward(network, (TRIED_BATCH, in_channels, *patch))
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException):
        return None  # only a real run would tell
    except Exception as error:  # whatever a foreign network raises for a size that it cannot take
        raise InputError(f"network {path} cannot take a patch of {tuple(patch)}: {_one_line(error)}") from error


def fake_forward(module: nn.Module, shape: Sequence[int]) -> object:
    """What a module gives for a float32 input of that shape, as torch's fake tensors: shapes without memory or arithmetic.

    A copy runs, in the mode that the module is in, since some networks give more in training. The copy has fake tensors from
    the beginning. (`torch.func.functional_call`, which swaps tensors and puts them back, does not put all of them back in a
    network that holds a module under two names, as MONAI's DynUNet does.)
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    own = [*module.parameters(), *module.buffers()]
    duplicate = copy.deepcopy(module, {id(value): mode.from_tensor(value) for value in own})
    with mode, torch.no_grad(), _silence("torch._subclasses.fake_tensor"):
        return duplicate(torch.empty(tuple(shape), device=own[0].device if own else torch.device("cpu")))


@contextlib.contextmanager
def _silence(logger: str) -> Iterator[None]:
    """Keep a logger quiet: torch logs a page of traceback for each failure, which the one line of an `InputError` replaces."""
    log = logging.getLogger(logger)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
