"""The cases of the scaling benchmark: a base, and points that differ from it on one axis."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dropgen_fast.bench.measure import Spread
from dropgen_fast.bench.scaling import cluster
from dropgen_fast.bench.step import StepConfig
from dropgen_fast.errors import InputError
from dropgen_fast.networks import UNet, keyword_options, one_line

Axis = Literal["patch", "batch", "channels", "classes", "processes"]
AXES: tuple[Axis, ...] = ("patch", "batch", "channels", "classes", "processes")


class Lift(nn.Module):
    """An extractor of next to no work: each feature is the image times a number of its own; (N, 1, D, H, W) → (N, C, D, H, W)."""

    scales: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("scales", torch.linspace(0.5, 1.5, channels).reshape(1, -1, 1, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Features of an image."""
        return image * self.scales


def __getattr__(name: str) -> Callable[[], Lift]:
    """``lift_<channels>``, the factory of that extractor, as `load_extractor` looks it up."""
    if name.startswith("lift_") and name[5:].isdigit():
        return functools.partial(Lift, int(name[5:]))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True)
class Base:
    """The case that every axis starts from."""

    patch: int
    """Edge of the cube, voxels."""
    batch: int
    channels: int
    """Of the features; 0 is ERM, the image alone."""
    classes: int
    network_options: tuple[str, ...]
    precision: str
    compile: bool

    def at(self, axis: Axis, value: int) -> Case:
        """The case with another value on one axis ("processes" changes nothing within a process)."""
        changed: dict[str, Any] = {axis: value} if axis != "processes" else {}
        return Case(axis, value, dataclasses.replace(self, **changed))

    @property
    def method(self) -> str:
        """As train's."""
        return "dropgen" if self.channels else "erm"

    def step(self) -> StepConfig:
        """As `training_step` wants it."""
        return StepConfig(patch=(self.patch,) * 3, batch=self.batch, classes=self.classes,
                          extractor=f"{__name__}:lift_{self.channels}", network_options=self.network_options,
                          precision=self.precision, compile=self.compile)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the network's input."""
        return (self.batch, 1 + self.channels, *[self.patch] * 3)

    def network(self) -> UNet:
        """The network alone."""
        options: dict[str, Any] = keyword_options(self.network_options, "network_options")
        return UNet(1 + self.channels, self.classes, **options)

    def layers(self) -> list[cluster.Layer]:
        """The network's, for such batches."""
        with torch.device("meta"):
            return cluster.layers(self.network(), self.shape)

    def operations(self) -> float:
        """Of the convolutions of a step."""
        return cluster.operations(self.layers())


@dataclass(frozen=True)
class Case:
    """A point of an axis."""

    axis: Axis
    value: int
    base: Base

    @property
    def size(self) -> int:
        """What the exponent refers to: voxels of a patch, channels of the network's input, else the value."""
        return {"patch": self.value**3, "channels": 1 + self.value}.get(self.axis, self.value)


@dataclass(frozen=True)
class Limits:
    """What a point may take."""

    memory_bytes: int
    step_s: float


@dataclass(frozen=True)
class Point:
    """A case with what was measured of it; where it did not fit, `problem` says why."""

    case: Case
    ms: Sequence[float] = ()
    """Of a step, round by round."""
    peak_bytes: int | None = None
    """Of building the model and two steps, beyond what the process had before; batches are not counted."""
    problem: str = ""
    tried_s: float = 0.0
    """Of the one step that was tried; 0 where there was none."""
    more: Mapping[str, tuple[Spread, str]] = field(default_factory=dict)
    """Further values of the axis "processes": name → spread, unit."""


def check(cases: Sequence[Case]) -> None:
    """Build the network of each case without memory; raises `InputError` for one that cannot be, or cannot take its patch."""
    for case in cases:
        try:
            case.base.layers()
        except (InputError, TypeError, ValueError) as error:
            raise InputError(f"{case.axis} {case.value}: {one_line(error)}") from error
