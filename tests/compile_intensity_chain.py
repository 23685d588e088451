"""Compile intensity_chain's Triton kernels: ``compile_intensity_chain.py 80 90 100``; see compile_kernels.py."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch
from compile_kernels import Launch, empty, record, report

import dropgen_fast.kernels.intensity_chain.triton as kernels
from dropgen_fast.kernels.intensity_chain import IntensityParameters

ON: dict[str, Any] = {
    "noise_std": 0.1, "rician_std": 0.1, "bias": 0.1, "gamma": 2.0, "brightness": 1.1, "contrast": 1.1, "rescale": True}
"""A value of each stage that is not neutral. Which stages a launch does is in its data: it is compiled for all of them."""


def launches_of(
    size: tuple[int, ...] = (128, 128, 128), *, n: int = 2, channels: int = 1, dtype: torch.dtype = torch.float32,
    stages: tuple[str, ...] = tuple(ON), stream: int = 0,
) -> dict[str, list[Launch]]:
    """Launches of the chain with some stages, and of a stream of the noise alone."""
    neutral = IntensityParameters.neutral(n, channels)
    parameters = dataclasses.replace(neutral, **{name: torch.full_like(getattr(neutral, name), ON[name]) for name in stages})
    shape = (n, channels, *size)
    out = empty(shape, torch.float32)
    return {
        "chain": record(lambda: kernels.intensity_chain(empty(shape, dtype), parameters, out), kernels),
        "noise": record(lambda: kernels.standard_normal(empty((n,), torch.int64), stream, out), kernels)}


HOT: dict[str, dict[str, Any]] = {"all": {}}
GENERAL: dict[str, dict[str, Any]] = {
    "float16": {"dtype": torch.float16}, "int16": {"dtype": torch.int16},
    "rescale": {"stages": ("rescale",)}, "contrast": {"stages": ("contrast",)}, "gamma": {"stages": ("gamma",)},
    "noise": {"stages": ("noise_std", "rician_std", "bias", "brightness")}, "neutral": {"stages": ()},
    "by 4": {"size": (3, 5, 12)}, "by 4 together": {"size": (4, 8, 10)}, "odd": {"size": (33, 41, 65), "channels": 3},
    "many channels": {"channels": 16},
    # A number that is 1 is a constant.
    "flat z": {"size": (1, 40, 48)}, "flat y": {"size": (40, 1, 48)}, "flat x": {"size": (40, 48, 1)},
    "one voxel": {"size": (1, 1, 1), "n": 1}, "one voxel of several": {"size": (1, 1, 1), "channels": 3},
    "stream 1": {"stream": 1}, "stream 2": {"stream": 2}, "odd stream 1": {"size": (33, 41, 65), "stream": 1},
}

if __name__ == "__main__":
    report(launches_of, HOT, GENERAL, [int(word) for word in sys.argv[1:]])
