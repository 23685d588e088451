"""What is dropped: drawn once, with torch's generator, and handed to every backend as a tensor."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MODES = ("channel", "stream")
Rate = float | tuple[float, float]
"""A drop rate, or one of the image and one of the features."""


def draw_scale(
    batch: int, image_channels: int, feature_channels: int, rates: tuple[float, float] | Tensor, *, mode: str = "channel",
    training: bool = True, keep: Tensor | None = None, at_least_one: bool = False, device: torch.device | str | None = None,
) -> Tensor:
    """Draw what is dropped: (N, Ci + Cf) float32, 0 for a dropped channel, else what a survivor is multiplied by.

    Args:
        batch, image_channels, feature_channels: N, Ci, Cf.
        rates: drop rate of the image and of the features, as `check_rates` gives them: two floats, or a float32 tensor on
            `device`, () or (2,).
        mode, training, keep, at_least_one: as in `fuse_streams`.
        device: of the result; the draw uses torch's generator of that device.

    A channel is kept where u ≥ p, u uniform in [0, 1). One rate for all channels takes three small kernels (draw, compare,
    scale), which is what `F.dropout3d` takes.
    """
    sizes = (image_channels, feature_channels)
    shape = (batch, image_channels + feature_channels)
    if not training or (isinstance(rates, tuple) and keep is None and rates[0] == 0 and rates[1] == 0):
        return torch.ones(shape, dtype=torch.float32, device=device)
    if mode == "stream":
        if keep is not None:
            return keep.to(torch.float32)
        return _draw_streams(batch, sizes, rates, at_least_one, device)
    limits = _limits(sizes, rates, device)
    # In place: 0 and 1 in float32 without a kernel to cast them.
    if keep is not None:
        kept = keep.to(torch.float32)
    else:
        u = torch.rand(shape, dtype=torch.float32, device=device)
        # Where all are dropped, u / p are independent and uniform, so that their largest is any channel with equal chance.
        # Where some are kept theirs is the largest, 1 or more, and setting it again changes nothing.
        largest = (u / limits).argmax(1, keepdim=True) if at_least_one else None
        kept = u.ge_(limits)
        if largest is not None:
            kept = kept.scatter_(1, largest, 1.0)
    return kept.div_(1 - limits) if isinstance(limits, Tensor) else kept.mul_(1 / (1 - limits))


def _limits(sizes: tuple[int, int], rates: tuple[float, float] | Tensor, device: torch.device | str | None) -> float | Tensor:
    """The drop rate that all channels share, or that of each channel: () or (Ci + Cf,)."""
    if isinstance(rates, Tensor):
        if rates.dim() == 0:
            return rates
        return torch.cat([rate.expand(size) for rate, size in zip(rates.split(1), sizes, strict=True)])
    if sizes[1] == 0 or rates[0] == rates[1]:
        return rates[0]
    limits = torch.full((sum(sizes),), rates[1], dtype=torch.float32, device=device)
    limits[:sizes[0]] = rates[0]
    return limits


def _draw_streams(
    batch: int, sizes: tuple[int, int], rates: tuple[float, float] | Tensor, at_least_one: bool,
    device: torch.device | str | None,
) -> Tensor:
    """One number per sample decides: the image is dropped below p_image, the features from there on for p_features."""
    if at_least_one and sizes[1] == 0:  # the image is the only stream
        return torch.ones(batch, sizes[0], dtype=torch.float32, device=device)
    p_image: float | Tensor
    either: float | Tensor
    if isinstance(rates, tuple):
        p_image, either = rates[0], rates[0] + rates[1]
    elif rates.dim() == 0:
        p_image = either = rates
    else:
        p_image, either = rates[0], rates.sum()
    u = torch.rand(batch, 1, dtype=torch.float32, device=device)
    kept = (u >= p_image, (u < p_image) | (u >= either))
    return torch.cat([k.expand(batch, size) for k, size in zip(kept, sizes, strict=True)], 1).to(torch.float32)


def check_rates(p: Rate | Tensor, mode: str, device: torch.device | None = None) -> tuple[float, float] | Tensor:
    """(rate of the image, rate of the features), or the tensor of rates as it came; raises ValueError where p does not fit."""
    if isinstance(p, Tensor):
        _check_rate_tensor(p, mode, device)
        return p
    return _check_pair(p, mode)


def _check_pair(p: Rate, mode: str) -> tuple[float, float]:
    rates = _pair(p, mode)
    if len(rates) != 2 or not all(isinstance(rate, (int, float)) and not isinstance(rate, bool) for rate in rates):
        raise ValueError(f"p must be one rate or (rate of the image, rate of the features), or a tensor of them, got {p!r}")
    _check_range(rates, mode, p)
    return float(rates[0]), float(rates[1])


def _pair(p: Any, mode: str) -> tuple[float, float]:
    """A single rate is both streams' where channels are dropped, and the image's where streams are."""
    if isinstance(p, (tuple, list)):
        return tuple(p)
    return (p, 0.0) if mode == "stream" else (p, p)


def _check_rate_tensor(p: Tensor, mode: str, device: torch.device | None) -> None:
    if tuple(p.shape) not in ((), (2,)) or p.dtype != torch.float32 or (device is not None and p.device != device):
        raise ValueError(f"p as a tensor must be () or (2,) float32 on {device if device is not None else p.device}, "
                         f"got {tuple(p.shape)} {p.dtype} on {p.device}")
    if p.requires_grad:
        raise ValueError("p must not require a gradient: a draw has none; give p.detach()")
    if p.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere, to look at it would wait for the device
        values = p.tolist()
        _check_range(_pair(values, mode), mode, values)


def _check_range(rates: tuple[float, float], mode: str, p: object) -> None:
    if mode == "stream":
        # The sum may be past 1 by the rounding of its terms, as a schedule's between two knots.
        if not all(0 <= rate <= 1 for rate in rates) or rates[0] + rates[1] > 1 + 1e-6:
            raise ValueError(f"p must be rates in [0, 1] whose sum is at most 1 in stream mode, got {p!r}")
    elif not all(0 <= rate < 1 for rate in rates):
        raise ValueError(f"p must be in [0, 1), got {p!r}")


@dataclass(frozen=True)
class RateSchedule:
    """Drop rates over the steps of a training: linear between knots, constant before the first and after the last.

        RateSchedule([(0, 0.0), (10_000, 0.75)])(2_500) == (0.1875, 0.1875)

    Args:
        knots: (step, p) with steps whole, not negative and increasing, p a rate or (rate of the image, rate of the features).
        mode: of the draw, "channel" or "stream": what a single rate means and what range is allowed.

    Raises:
        ValueError: knots that are none, out of order or out of range, or an unknown mode.
    """

    knots: Sequence[tuple[int, Rate]]
    mode: str = "channel"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        try:
            steps, rates = zip(*self.knots, strict=True)
        except (TypeError, ValueError):
            raise ValueError(f"knots must be (step, p) pairs, at least one, got {self.knots!r}") from None
        if not all(isinstance(step, int) and not isinstance(step, bool) and step >= 0 for step in steps):
            raise ValueError(f"knots must have whole steps of at least 0, got {list(steps)}")
        if any(after <= before for before, after in itertools.pairwise(steps)):
            raise ValueError(f"knots must have increasing steps, got {list(steps)}")
        for rate in rates:
            _check_pair(rate, self.mode)
        object.__setattr__(self, "knots", tuple(zip(steps, rates, strict=True)))

    def __call__(self, step: int) -> tuple[float, float]:
        """(rate of the image, rate of the features) at a step."""
        steps = [knot[0] for knot in self.knots]
        rates = [_pair(knot[1], self.mode) for knot in self.knots]
        after = bisect.bisect_right(steps, step)
        if after == 0 or after == len(steps):
            return rates[max(after - 1, 0)]
        share = (step - steps[after - 1]) / (steps[after] - steps[after - 1])
        (image, features), (last_image, last_features) = rates[after - 1:after + 1]
        return image + (last_image - image) * share, features + (last_features - features) * share
