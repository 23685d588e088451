"""`StreamFusion`: the op `fuse_streams` as a module, with its settings held and its randomness tied to `training`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dropgen_fast.kernels.fuse_streams import ImageNorm, Rate, RateSchedule, check_rates, fuse_streams


class StreamFusion(nn.Module):
    """Normalize, interpolate, concatenate and drop the image and feature streams, in one pass.

    Drops in training mode only. Has no parameters and no state. The settings are those of `fuse_streams`, where each is
    described, but for:

    Args:
        p: a rate or a pair, constant; or a `RateSchedule`, whose rates the training's steps set (`set_step`). Then the rates
            live in a tensor on the module's device, so that a compiled module is not compiled anew and a captured graph
            replays with the rates of its step. A schedule of one knot is a p that `set_rates` may change.
        use_image: False fills the image's channels with zeros, in evaluation too, so that the features alone are seen by a
            network that is otherwise the same; p must be 0. The image itself is not read.
    """

    rate_bits: Tensor | None

    def __init__(
        self,
        p: Rate | RateSchedule = 0.75,
        *,
        mode: str = "channel",
        at_least_one: bool = False,
        use_image: bool = True,
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
        self.at_least_one = at_least_one
        self.use_image = use_image
        self.image_norm = image_norm
        self.feature_norm = feature_norm
        self.eps = eps
        self.dtype = dtype
        self.channels_last = memory_format == torch.channels_last_3d  # torch.save cannot pickle a memory_format
        self.channel_multiple = channel_multiple
        self.backend = backend
        # The bits of two float32: they follow the module to a device, and .half() and the like leave integers as they are.
        bits = torch.zeros(2, dtype=torch.int32) if isinstance(p, RateSchedule) else None
        self.register_buffer("rate_bits", bits, persistent=False)
        if not isinstance(p, RateSchedule):
            check_rates(p, mode)
        elif p.mode != mode:
            raise ValueError(f"p must be a schedule for mode {mode!r}, got one for {p.mode!r}")
        if not use_image and (isinstance(p, RateSchedule) or check_rates(p, mode) != (0.0, 0.0)):
            raise ValueError(f"p must be 0 where use_image is False, got {p!r}")
        self.set_step(0)

    @property
    def rates(self) -> Tensor | None:
        """(2,) float32, the drop rates of the image and of the features as they stand; None where p is constant."""
        return self.rate_bits.view(torch.float32) if self.rate_bits is not None else None

    def set_rates(self, p: Rate) -> None:
        """Set the drop rates, in place: compiled modules and captured graphs go on with them.

        Raises:
            ValueError: rates that do not fit the mode, or a module whose p is constant.
        """
        if self.rates is None:
            raise ValueError(f"p must be a RateSchedule for rates to be set, got the constant {self.p!r}")
        with torch.no_grad():
            for rate, value in zip(self.rates.unbind(), check_rates(p, self.mode), strict=True):
                rate.fill_(value)  # a number is an argument of the kernel: no copy from the host to wait for

    def set_step(self, step: int) -> None:
        """Set the drop rates to those that the schedule has at a step; where p is constant there is nothing to set."""
        if isinstance(self.p, RateSchedule):
            self.set_rates(self.p(step))

    def forward(self, image: Tensor, features: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """Image (N, Ci, D, H, W) and features (N, Cf, d, h, w) to the network's input (N, C, D, H, W).

        Raises:
            ValueError: an argument that `fuse_streams` refuses, or no features where the image is not used.
        """
        training = self.training
        if not self.use_image:
            if features is None:
                raise ValueError("features must be given where use_image is False")
            # A draw that is fixed is obeyed in training only.
            keep, training = _without_image(image, features, keep if training else None), True
        return fuse_streams(
            image, features, p=self.p if self.rates is None else self.rates, training=training, mode=self.mode, keep=keep,
            at_least_one=self.at_least_one, image_norm=self.image_norm, feature_norm=self.feature_norm, eps=self.eps,
            dtype=self.dtype,
            memory_format=torch.channels_last_3d if self.channels_last else torch.contiguous_format,
            channel_multiple=self.channel_multiple, backend=self.backend,
        )

    def extra_repr(self) -> str:
        """What was set."""
        return (f"p={self.p}, mode={self.mode}, at_least_one={self.at_least_one}, use_image={self.use_image}, "
                f"image_norm={self.image_norm}, feature_norm={self.feature_norm}, channel_multiple={self.channel_multiple}, "
                f"backend={self.backend}")


def _without_image(image: Tensor, features: Tensor, keep: Tensor | None) -> Tensor:
    """The draw (N, Ci + Cf) bool that drops the image and, of the features, what `keep` does."""
    shape = (image.shape[0], image.shape[1] + features.shape[1])
    kept = torch.ones(shape, dtype=torch.bool, device=image.device) if keep is None else keep.clone()
    kept[:, :image.shape[1]] = False
    return kept
