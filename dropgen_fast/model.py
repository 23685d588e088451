"""`DropGen`: a frozen extractor, the fusion of the two streams, and any segmentation network behind them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor, nn

from dropgen_fast.errors import InputError
from dropgen_fast.features import FrozenExtractor, load_extractor
from dropgen_fast.fusion import StreamFusion
from dropgen_fast.kernels.fuse_streams import Rate, RateSchedule
from dropgen_fast.networks import build_network


class DropGen(nn.Module):
    """What the paper trains (arXiv 2604.02564): ``network(fusion(image, extractor(image)))``.

    Args:
        network: (N, C, D, H, W) → (N, classes, D, H, W), any architecture. C = image channels + feature channels,
            rounded up to the fusion's `channel_multiple`.
        extractor: the frozen foundation model; None makes this ERM, the same recipe with the image alone. It sees each
            image channel as given, so give images in [0, 1].
        fusion: how the streams are joined. The default takes the image as it is, since the extractor needs it in
            [0, 1] already, and normalizes the features.

    Only the network has parameters and a state: the extractor is identified by `extractor.identity()`.
    """

    def __init__(
        self, network: nn.Module, extractor: FrozenExtractor | None = None, fusion: StreamFusion | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.extractor = extractor
        self.fusion = fusion if fusion is not None else StreamFusion(image_norm="none")

    def fused(self, image: Tensor, keep: Tensor | None = None, *, features: Tensor | None = None) -> Tensor:
        """The network's input: image (N, Ci, D, H, W) in [0, 1] → (N, C, D, H, W). No gradient flows through it.

        `features` (N, Cf, d, h, w), where they are at hand, take the place of the extractor's.
        """
        with torch.no_grad():
            if features is None and self.extractor is not None:
                features = self.extractor(image)
            fused: Tensor = self.fusion(image, features, keep)
        return fused

    def forward(self, image: Tensor, keep: Tensor | None = None, *, features: Tensor | None = None) -> Tensor:
        """Class scores (N, classes, D, H, W) of an image (N, Ci, D, H, W) in [0, 1]; `keep` fixes the draw.

        A fusion that gives bfloat16 runs the network under bfloat16 autocast, whose weights stay float32.
        """
        half = self.fusion.dtype == torch.bfloat16
        with torch.autocast(image.device.type, torch.bfloat16) if half else contextlib.nullcontext():
            scores: Tensor = self.network(self.fused(image, keep, features=features))
        return scores


@dataclass(frozen=True)
class FusionConfig:
    """How channels are dropped; see `fuse_streams`."""

    mode: Literal["channel", "stream"] = "channel"
    """channel: the paper's, every channel on its own. stream: a sample's whole image, or the whole of its features."""
    p: tuple[float, ...] = (0.75,)
    """Drop rate; two numbers are the rate of the image and that of the features."""
    p_start: tuple[float, ...] = (0.0,)
    """Drop rate at the first step where p-ramp-steps is given; one number or two, as p."""
    p_ramp_steps: int = 0
    """Training steps over which the drop rate goes from p-start to p along a line; 0: p from the first step on."""
    at_least_one: bool = False
    """Of a sample whose channels would all be dropped, keep one."""

    def __post_init__(self) -> None:
        for name, p in (("p", self.p), ("p_start", self.p_start)):
            if len(p) not in (1, 2):
                raise InputError(f"fusion.{name} must be one drop rate or two (image, features), got {p}")
        if self.p_ramp_steps < 0:
            raise InputError(f"fusion.p_ramp_steps must be at least 0, got {self.p_ramp_steps}")
        if self.p_ramp_steps == 0 and any(self.p_start):
            raise InputError(f"fusion.p_start {self.p_start} needs fusion.p_ramp_steps, the steps that it takes to fusion.p")

    def rates(self) -> Rate | RateSchedule:
        """The p of `StreamFusion`; raises ValueError where it is out of range."""
        start, p = (v[0] if len(v) == 1 else (v[0], v[1]) for v in (self.p_start, self.p))
        return RateSchedule([(0, start), (self.p_ramp_steps, p)], self.mode) if self.p_ramp_steps else p


@dataclass(frozen=True)
class ModelConfig:
    """Which model: the method, the extractor, the fusion and the network."""

    method: Literal["dropgen", "erm"] = "dropgen"
    """dropgen: image and features. erm: the same recipe with the image alone, to compare with."""
    extractor: str = "mind"
    """mind (embedded, needs no weights), anatomix, or package.module:factory."""
    extractor_weights: Path | None = None
    """Weights of the extractor as a local file; by default they come from the Hugging Face Hub."""
    extractor_stride: int = 1
    """Run the extractor on the patch downsampled by this factor; the fusion interpolates."""
    fusion: FusionConfig = field(default_factory=FusionConfig)
    """How channels are dropped."""
    network: str = "unet"
    """unet (the paper's), or package.module:Name of any network."""
    network_options: tuple[str, ...] = ()
    """Keyword arguments of the network as name=value, for example base_channels=8 downsamplings=3."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of the network: bfloat16 autocast or float32."""


def build_model(config: ModelConfig, *, image_channels: int, classes: int, patch: tuple[int, int, int]) -> DropGen:
    """The model that a configuration describes, on the CPU, with fresh weights drawn from torch's generator.

    Raises:
        InputError: an extractor or network that cannot be had, or a patch that the network cannot take.
    """
    extractor = None
    if config.method == "dropgen":
        extractor = load_extractor(config.extractor, stride=config.extractor_stride, weights=config.extractor_weights)
        extractor.check_patch(patch)
    try:
        fusion = StreamFusion(
            config.fusion.rates() if config.method == "dropgen" else 0.0, mode=config.fusion.mode,
            at_least_one=config.fusion.at_least_one, image_norm="none", memory_format=torch.channels_last_3d,
            dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32)
    except ValueError as error:
        raise InputError(f"fusion: {error}") from error
    feature_channels = extractor.channels * image_channels if extractor is not None else 0
    network = build_network(config.network, image_channels + feature_channels, classes, patch,
                            network_options(config.network_options))
    network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # torch's stubs lack this form
    return DropGen(network, extractor, fusion)


def extractor_identity(model: DropGen) -> dict[str, Any] | None:
    """What must agree for features to mean the same: the extractor's name, stride and hash; None for ERM."""
    return dict(model.extractor.identity()) if model.extractor is not None else None


def check_extractor(checkpoint: Path, trained_with: dict[str, Any] | None, model: DropGen) -> None:
    """A network must see the features that it was trained on; raises InputError, naming the checkpoint, where it would not."""
    if trained_with != extractor_identity(model):
        raise InputError(f"{checkpoint} was trained with extractor {trained_with}, got {extractor_identity(model)}; "
                         "give the same extractor and weights")


EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
"""1e-5 and the like, which YAML 1.1 takes for a string."""


def network_options(options: tuple[str, ...]) -> Mapping[str, Any]:
    """``("base_channels=8", "strides=[1, 2]")`` as keyword arguments; values are read as YAML."""
    result = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"network_options are name=value, got {option!r}")
        try:
            result[name] = float(value) if EXPONENT.fullmatch(value) else yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"network_options: {option!r} is not readable: {' '.join(str(error).split())}") from error
    return result
