"""Segmentation networks: the reference's U-Net, and any other by import path; activation checkpointing for both."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import inspect
import logging
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import yaml
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils.checkpoint import checkpoint

from dropgen_fast.errors import InputError

NORMALIZATIONS: dict[str, Callable[[int, float], nn.Module]] = {
    "batch": lambda channels, eps: nn.BatchNorm3d(channels, eps=eps),
    "instance": lambda channels, eps: nn.InstanceNorm3d(channels, eps=eps),
}
# How the networks of this field call them, the most common first.
IN_CHANNELS = ("in_channels", "in_chans", "input_channels", "n_channels", "input_nc")
OUT_CHANNELS = ("out_channels", "num_classes", "n_classes", "out_chans", "output_channels", "output_nc")
LEVELS = ("strides", "kernel_size", "upsample_kernel_size")  # what MONAI's DynUNet must be told of its levels
LEAST_BOTTOM = 4  # voxels of an axis at the bottom of a network that is made for a patch
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)
EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")  # 1e-5 and the like, which YAML 1.1 takes for a string


class UNet(nn.Module):
    """The U-Net of the reference and of anatomix (arXiv 2604.02564, 2411.02372): (N, in, D, H, W) → (N, out, D, H, W).

    A convolution, then per level two convolutions and a pooling, two at the bottom, and per level upwards an upsampling, the
    concatenation with that level, and two convolutions; a plain convolution at the end. Convolutions are 3³ with reflect
    padding, each followed by normalization and ReLU, without bias under BatchNorm. Widths double per level.

    The layers are one sequence, so that the state dict has the published layout ``model.<index>.<name>``.

    With the attribute `activation_checkpointing`, training keeps what enters and what leaves each level, and computes what
    lies within it again for the gradient (see `recomputed`).

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
        self.activation_checkpointing = False
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
        # A pooling begins a level on the way down, an upsampling one on the way up.
        starts = [0, *pools, *ups]
        self._levels = list(zip(starts, [*starts[1:], len(layers)], strict=True))

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
        recompute = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        skips: list[Tensor] = []
        for number, (start, stop) in enumerate(self._levels):
            skip = skips.pop() if number > self.downsamplings else None
            if recompute:
                # Nothing in a level is random. (A generator's state cannot be read while a CUDA graph is captured.)
                x = recomputed(self, self._level, x, skip, start, stop, keep_random_state=False)
            else:
                x = self._level(x, skip, start, stop)
            if number < self.downsamplings:
                skips.append(x)
        return x

    def _level(self, x: Tensor, skip: Tensor | None, start: int, stop: int) -> Tensor:
        """Layers `start` to `stop`; what the way down left at this level joins after the first, an upsampling."""
        for index in range(start, stop):
            x = self.model[index](x)
            if skip is not None and index == start:
                x = torch.cat((skip, x), 1)
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
    path: str, in_channels: int, out_channels: int, patch: Sequence[int], options: Mapping[str, Any] | None = None, *,
    batch_size: int = 2, activation_checkpointing: bool = False,
) -> nn.Module:
    """A network that maps (N, in_channels, *patch) to (N, out_channels, *patch).

    It may give several predictions, as `heads` reads them: deep supervision. It is tried on the patch in training and in
    evaluation, without arithmetic. Parameters that no prediction in training depends on are frozen, since
    DistributedDataParallel would wait for their gradients.

    Args:
        path: "unet", or ``package.module:Name``, a class or function that returns a module.
        in_channels, out_channels: given to it under the first of `IN_CHANNELS` and of `OUT_CHANNELS` that it has.
        patch: (D, H, W).
        options: further keyword arguments. Where the network asks for ``spatial_dims`` it is told 3, where it must be
            told ``img_size`` the patch, and where it has the arguments `LEVELS`, as MONAI's DynUNet, 3³ kernels and the
            strides that nnU-Net would choose, unless an option says otherwise.
        batch_size: patches that go through the network at once in training: at the bottom of a network that may be too few
            voxels to normalize.
        activation_checkpointing: compute activations again in the backward pass instead of keeping them; see
            `checkpoint_activations`.

    Raises:
        InputError: nothing at that path, arguments that it refuses, a patch or a batch that it cannot take, or another output.
    """
    build: Callable[..., Any] = UNet if path == "unet" else import_object(path, "network")
    arguments = _arguments(build, path, in_channels, out_channels, patch, options or {})
    try:
        network = build(**arguments)
    except Exception as error:  # whatever a foreign class raises for arguments that it refuses
        raise InputError(f"network {path} refuses its arguments {arguments}: {one_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise InputError(f"network {path} must give a torch.nn.Module, got {type(network).__name__}")
    for training in (True, False):
        _try_patch(network, path, (batch_size, in_channels, *patch), out_channels, training)
    if activation_checkpointing:
        checkpoint_activations(network, path)
    return network


def heads(output: object) -> list[Tensor]:
    """The predictions in what a network gives, the finest first; with deep supervision there are several.

    One tensor (N, C, D, H, W); several stacked (N, heads, C, D, H, W), as MONAI's DynUNet gives in training; or a list or tuple
    (N, C, D, H, W), (N, C, d, h, w), …, as nnU-Net's networks and MONAI's SegResNetDS give.

    Raises:
        TypeError: anything else.
    """
    if isinstance(output, Tensor):
        return list(output.unbind(1)) if output.dim() == 6 else [output]
    if isinstance(output, (list, tuple)) and output and all(isinstance(head, Tensor) for head in output):
        return list(output)
    raise TypeError(f"a network's output must be a tensor or a list of them, got {type(output).__name__}")


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
    if all(name in accepted for name in LEVELS):
        strides = arguments.setdefault("strides", _strides(patch))
        if isinstance(strides, (list, tuple)):  # anything else is for the network to refuse
            arguments = {"kernel_size": [3] * len(strides), "upsample_kernel_size": list(strides[1:])} | arguments
    return arguments


def _strides(patch: Sequence[int]) -> list[list[int]]:
    """Of each level of a U-Net for a patch whose spacings are equal: every axis is halved while `LEAST_BOTTOM` voxels are left.

    nnU-Net's rule (Isensee et al. 2021, doi 10.1038/s41592-020-01008-z), but that an axis is halved no further than it is even,
    where nnU-Net enlarges the patch.
    """
    strides, size = [[1] * len(patch)], list(patch)
    while any(halved := [n % 2 == 0 and n >= 2 * LEAST_BOTTOM for n in size]):
        strides.append([2 if half else 1 for half in halved])
        size = [n // stride for n, stride in zip(size, strides[-1], strict=True)]
    return strides


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
        raise InputError(f"{what} {path}: cannot import {module} ({one_line(error)})") from error


def keyword_options(options: Sequence[str], what: str) -> dict[str, Any]:
    """``("base_channels=8", "strides=[1, 2]")`` as keyword arguments; values are read as YAML.

    Raises:
        InputError: one that is not name=value, or whose value cannot be read; `what` is the setting's name.
    """
    result = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"{what} are name=value, got {option!r}")
        try:
            result[name] = float(value) if EXPONENT.fullmatch(value) else yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"{what}: {option!r} is not readable: {one_line(error)}") from error
    return result


def _try_patch(network: nn.Module, path: str, shape: Sequence[int], classes: int, training: bool) -> None:
    """Find out whether the network gives scores for such an input, shapes only; where its forward depends on values, nothing.

    In training, freeze the parameters that no prediction depends on.

    Raises:
        InputError: it fails, or gives something else.
    """
    batch, _, *patch = shape
    fake, duplicate = _fake_copy(network)
    try:
        with torch.set_grad_enabled(training):
            out = _run_fake(fake, duplicate.train(training), shape)
    except NEEDS_VALUES:
        return  # only a real run would tell
    except Exception as error:  # whatever a foreign network raises for a size that it cannot take
        raise InputError(_refused(path, batch, patch, one_line(error))) from error
    shapes = _shapes(out)
    sized = [len(s) == 5 and s[:2] == (batch, classes) and all(n <= m for n, m in zip(s[2:], patch, strict=True)) for s in shapes]
    if not (sized and all(sized) and shapes[0] == (batch, classes, *patch)):
        got = f"{', '.join(map(str, shapes)) or type(out).__name__} in {'training' if training else 'evaluation'}"
        raise InputError(f"network {path} must give scores of shape {(batch, classes, *patch)} for {batch} patches, or a list "
                         f"that begins with them and goes on with coarser ones, got {got}")
    if training and any(head.requires_grad for head in heads(out)):
        with fake, contextlib.suppress(*NEEDS_VALUES), _silence("torch._subclasses.fake_tensor"):
            torch.stack([head.sum() for head in heads(out)]).sum().backward()
            for parameter, tried in zip(network.parameters(), duplicate.parameters(), strict=True):
                parameter.requires_grad_(tried.grad is not None)


def _refused(path: str, batch: int, patch: Sequence[int], problem: str) -> str:
    """What to tell of a network that fails on a batch of patches."""
    if not problem.startswith("Expected more than 1"):  # torch's words for BatchNorm and InstanceNorm in training
        return f"network {path} cannot take a patch of {tuple(patch)}: {problem}"
    larger = "patch" if "spatial" in problem else "batch_size or patch"
    return (f"network {path} cannot be trained on a batch of {batch} × {tuple(patch)}: a single voxel is left at its bottom, "
            f"which cannot be normalized; give a larger {larger}, or fewer levels")


def _shapes(output: object) -> list[tuple[int, ...]]:
    """Shape of each prediction; none where the output is of another kind."""
    try:
        return [tuple(head.shape) for head in heads(output)]
    except TypeError:
        return []


def fake_forward(module: nn.Module, shape: Sequence[int]) -> object:
    """What a module gives for a float32 input of that shape, as torch's fake tensors: shapes without memory or arithmetic.

    A copy runs, in the mode that the module is in, since some networks give more in training.
    """
    fake, duplicate = _fake_copy(module)
    with torch.no_grad():
        return _run_fake(fake, duplicate, shape)


def _fake_copy(module: nn.Module) -> tuple[FakeTensorMode, nn.Module]:
    """A copy that has fake tensors from the beginning, and their mode.

    `torch.func.functional_call`, which swaps tensors and puts them back, does not put all of them back in a network that holds
    a module under two names, as MONAI's DynUNet does.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    own = [*module.parameters(), *module.buffers()]
    return mode, copy.deepcopy(module, {id(value): mode.from_tensor(value) for value in own})


def _run_fake(fake: FakeTensorMode, module: nn.Module, shape: Sequence[int]) -> object:
    """What a module of fake tensors gives for an input of that shape, where its parameters are."""
    own = next(module.parameters(), None)
    with fake, _silence("torch._subclasses.fake_tensor"):
        return module(torch.empty(tuple(shape), device=own.device if own is not None else torch.device("cpu")))


def checkpoint_activations(network: nn.Module, name: str) -> None:
    """Let training keep fewer activations and compute the others again for the gradient, which stays what it was.

    The U-Net keeps those between its levels. In another network each of the smallest modules that hold two convolutions or linear
    layers keeps only what enters and leaves it. Modules, their names and the state dict stay as they are.

    Raises:
        InputError: a network without such modules.
    """
    if isinstance(network, UNet):
        network.activation_checkpointing = True
        return
    blocks = _blocks(network)
    if not blocks:
        raise InputError(f"network {name} has no block of two convolutions or linear layers to compute again: leave "
                         "activation_checkpointing out")
    for block in blocks:
        # A bound method, so that a copy of the network runs its own modules.
        block.forward = types.MethodType(_recomputed_forward, block)


def _blocks(network: nn.Module) -> list[nn.Module]:
    """The smallest modules below the network that are called and hold two of `LAYERS` or more, each once."""
    def holds(module: nn.Module) -> bool:
        return sum(isinstance(part, LAYERS) for part in module.modules()) >= 2

    candidates = [m for m in network.modules()
                  if m is not network and not isinstance(m, (nn.ModuleList, nn.ModuleDict, torch.jit.ScriptModule)) and holds(m)]
    known = set(candidates)
    return [m for m in candidates if not any(part in known for part in m.modules() if part is not m)]


def _recomputed_forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Takes the place of a block's `forward`."""
    forward = functools.partial(type(block).forward, block)
    if not (block.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    return recomputed(block, forward, *args, **kwargs)


def recomputed(
    module: nn.Module, function: Callable[..., Any], *args: Any, keep_random_state: bool = True, **kwargs: Any,
) -> Any:
    """``function(*args, **kwargs)``, which runs parts of `module`, keeping no activations: it runs again in the backward pass.

    The second time changes no state: it has the random numbers of the first (unless it needs none), and copies of the
    module's buffers, so that BatchNorm's running statistics are updated once.
    """
    def contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        return contextlib.nullcontext(), _copied_buffers(module)

    if torch.compiler.is_compiling():  # it makes one graph of both times, in which a buffer is written once; it takes no contexts
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=keep_random_state, **kwargs)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=keep_random_state, context_fn=contexts, **kwargs)


@contextlib.contextmanager
def _copied_buffers(module: nn.Module) -> Iterator[None]:
    """Within it the module and its parts have copies of their buffers. (To write them back would tell autograd of a change.)"""
    before = [(part, name, value) for part in module.modules() for name, value in part._buffers.items() if value is not None]
    for part, name, value in before:
        part._buffers[name] = value.clone()
    try:
        yield
    finally:
        for part, name, value in before:
            part._buffers[name] = value


@contextlib.contextmanager
def _silence(logger: str) -> Iterator[None]:
    """Keep a logger quiet: torch logs a page of traceback for each failure, which the one line of an `InputError` replaces."""
    log = logging.getLogger(logger)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def one_line(error: BaseException) -> str:
    """An error's message as one line, or its kind where it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__
