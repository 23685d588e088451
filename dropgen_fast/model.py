"""`DropGen`: a frozen extractor, the fusion of the two streams, and any segmentation network behind them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dropgen_fast.errors import InputError
from dropgen_fast.features import FrozenExtractor, load_extractor
from dropgen_fast.fusion import StreamFusion
from dropgen_fast.kernels.fuse_streams import Rate, RateSchedule
from dropgen_fast.networks import build_network, heads, keyword_options

Method = Literal["dropgen", "erm", "features", "no-dropout", "stream-dropout"]
MODES = {"dropgen": "channel", "stream-dropout": "stream"}
"""What `fuse_streams` drops under the methods that drop something."""


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
            fused: Tensor = self.fusion(image, features if features is not None else self.features(image), keep)
        return fused

    def features(self, image: Tensor) -> Tensor | None:
        """The extractor's features (N, Cf, d, h, w) of an image (N, Ci, D, H, W) in [0, 1]; None without an extractor."""
        return self.extractor(image) if self.extractor is not None else None

    def forward(self, image: Tensor, keep: Tensor | None = None, *, features: Tensor | None = None) -> Any:
        """Class scores (N, classes, D, H, W) of an image (N, Ci, D, H, W) in [0, 1]; `keep` fixes the draw.

        In training mode what the network gives, which with deep supervision is several predictions (see `networks.heads`); in
        evaluation mode the finest of them.

        A fusion that gives bfloat16 runs the network under bfloat16 autocast, whose weights stay float32.
        """
        half = self.fusion.dtype == torch.bfloat16
        with torch.autocast(image.device.type, torch.bfloat16) if half else contextlib.nullcontext():
            scores: Any = self.network(self.fused(image, keep, features=features))
        return scores if self.training else heads(scores)[0]


@dataclass(frozen=True)
class FusionConfig:
    """How channels are dropped; see `fuse_streams`. Only the methods dropgen and stream-dropout drop any."""

    p: tuple[float, ...] = (0.75,)
    """Drop rate of the methods that drop; the others take no notice of it, so that the method can be changed alone. Two numbers
    are the rate of the image and that of the features; one is that of both (dropgen) or of the image (stream-dropout)."""
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

    def rates(self, mode: str) -> Rate | RateSchedule:
        """The p of `StreamFusion` in a mode, "channel" or "stream"; raises ValueError where it is out of range."""
        start, p = (v[0] if len(v) == 1 else (v[0], v[1]) for v in (self.p_start, self.p))
        return RateSchedule([(0, start), (self.p_ramp_steps, p)], mode) if self.p_ramp_steps else p


@dataclass(frozen=True)
class ModelConfig:
    """Which model: the method, the extractor, the fusion and the network."""

    method: Method = "dropgen"
    """dropgen: image and features, each channel dropped on its own (the paper's). erm: the same recipe with the image alone, to
    compare with. Ablations: features (alone; the image's channels are zeros), no-dropout (image and features, nothing dropped),
    stream-dropout (of a sample the whole image or the whole of its features is dropped)."""
    extractor: str = "mind"
    """mind (embedded, needs no weights), anatomix, anatomix-dev, or package.module:factory."""
    extractor_weights: Path | None = None
    """Weights of the extractor as a local file; by default they come from the Hugging Face Hub."""
    extractor_sha256: str | None = None
    """What the SHA-256 of that file must be; by default, for a file from the Hub, what the Hub says."""
    extractor_revision: str | None = None
    """Commit, tag or branch of the Hub's repository; by default its newest."""
    extractor_stride: int = 1
    """Run the extractor on the patch downsampled by this factor; the fusion interpolates."""
    fusion: FusionConfig = field(default_factory=FusionConfig)
    """How channels are dropped."""
    network: str = "unet"
    """unet (the paper's), or package.module:Name of any network."""
    network_options: tuple[str, ...] = ()
    """Keyword arguments of the network as name=value, for example base_channels=8 downsamplings=3."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more time, the same numbers."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of the network: bfloat16 autocast or float32."""

    @classmethod
    def from_plain(cls, saved: dict[str, Any], extractor_weights: Path | None = None) -> ModelConfig:
        """The configuration that a checkpoint holds as plain values; `extractor_weights`, where given, take the place of its own
        and of the Hub's revision.

        Raises:
            InputError: settings that this version does not have.
        """
        def typed(values: dict[str, Any]) -> dict[str, Any]:
            return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

        try:
            weights = extractor_weights or (Path(saved["extractor_weights"]) if saved["extractor_weights"] else None)
            revision = None if extractor_weights else saved.get("extractor_revision")
            return cls(**{**typed(saved), "fusion": FusionConfig(**typed(saved["fusion"])), "extractor_weights": weights,
                          "extractor_revision": revision})
        except (KeyError, TypeError) as error:
            raise InputError(f"the model's settings are another version's ({error}): use that version, or train again") from error


def build_model(
    config: ModelConfig, *, image_channels: int, classes: int, patch: tuple[int, int, int], batch_size: int = 2,
    extractor: FrozenExtractor | None = None,
) -> DropGen:
    """The model that a configuration describes, on the CPU, with fresh weights drawn from torch's generator.

    Args:
        config: method, extractor, fusion and network.
        image_channels, classes: of the data; the background is a class.
        patch: (D, H, W) in voxels.
        batch_size: patches at once in training, which the network is tried on.
        extractor: takes the place of the one that the configuration names, where the method has one.

    Raises:
        InputError: an extractor or network that cannot be had, or a patch or batch that the network cannot take.
    """
    if config.method == "erm":
        extractor = None
    elif extractor is None:
        extractor = load_extractor(config.extractor, stride=config.extractor_stride, weights=config.extractor_weights,
                                   sha256=config.extractor_sha256, revision=config.extractor_revision)
    if extractor is not None:
        extractor.check_patch(patch)
    mode = MODES.get(config.method)
    try:
        fusion = StreamFusion(
            config.fusion.rates(mode) if mode is not None else 0.0, mode=mode or "channel",
            at_least_one=config.fusion.at_least_one, use_image=config.method != "features", image_norm="none",
            memory_format=torch.channels_last_3d, dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32)
    except ValueError as error:
        raise InputError(f"fusion: {error}") from error
    feature_channels = extractor.channels * image_channels if extractor is not None else 0
    network = build_network(config.network, image_channels + feature_channels, classes, patch,
                            keyword_options(config.network_options, "network_options"), batch_size=batch_size,
                            activation_checkpointing=config.activation_checkpointing)
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
