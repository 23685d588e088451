"""`StreamFusion`: the op `fuse_streams` as a module, with its settings held and its randomness tied to `training`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dropgen_fast.kernels.fuse_streams import ImageNorm, fuse_streams


class StreamFusion(nn.Module):
    """Normalize, interpolate, concatenate and drop the image and feature streams, in one pass.

    Drops in training mode only. Has no parameters. The settings are those of `fuse_streams`, where each is described.
    """

    def __init__(
        self,
        p: float | tuple[float, float] = 0.75,
        *,
        mode: str = "channel",
        image_norm: ImageNorm = "minmax",
        feature_norm: str = "instance",
        eps: float = 1e-5,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
        channel_multiple: int = 1,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.p = p
        self.mode = mode
        self.image_norm = image_norm
        self.feature_norm = feature_norm
        self.eps = eps
        self.dtype = dtype
        self.channels_last = memory_format == torch.channels_last_3d  # torch.save cannot pickle a memory_format
        self.channel_multiple = channel_multiple
        self.backend = backend

    def forward(self, image: Tensor, features: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """Image (N, Ci, D, H, W) and features (N, Cf, d, h, w) to the network's input (N, C, D, H, W)."""
        return fuse_streams(
            image, features, p=self.p, training=self.training, mode=self.mode, keep=keep, image_norm=self.image_norm,
            feature_norm=self.feature_norm, eps=self.eps, dtype=self.dtype,
            memory_format=torch.channels_last_3d if self.channels_last else torch.contiguous_format,
            channel_multiple=self.channel_multiple, backend=self.backend,
        )

    def extra_repr(self) -> str:
        """What was set."""
        return (f"p={self.p}, mode={self.mode}, image_norm={self.image_norm}, feature_norm={self.feature_norm}, "
                f"channel_multiple={self.channel_multiple}, backend={self.backend}")
