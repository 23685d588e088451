"""`FrozenExtractor`: a feature extractor that nothing can unfreeze."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropgen_fast.errors import InputError
from dropgen_fast.networks import size_problem


class FrozenExtractor(nn.Module):
    """Features of a frozen model: (N, Ci, D, H, W) in [0, 1] → (N, Ci · channels, d, h, w), without gradient.

    Frozen by construction. The model is in evaluation mode and stays there: it is no submodule, so a parent's ``train()``
    does not reach it, and its own ``train()`` and that of every part of it do nothing. Its weights are no parameters of
    a parent and not in a parent's ``state_dict()``; they follow a parent's ``to()``. `identity` names them instead.

    Several image channels go through the model each on its own; their features are concatenated.

    Args:
        module: (N, 1, D, H, W) → (N, channels, d, h, w).
        name: for messages and checkpoints.
        channels: features per image channel.
        stride: the model runs on the image downsampled by this factor (see `downsample`): 8 times less work for 2.
        sha256: hash of the weights (or the name and version of an algorithm that has none).
    """

    def __init__(self, module: nn.Module, *, name: str, channels: int, stride: int = 1, sha256: str) -> None:
        super().__init__()
        if stride < 1:
            raise ValueError(f"stride must be at least 1, got {stride}")
        self.name, self.channels, self.stride, self.sha256 = name, channels, stride, sha256
        self.training = False
        module.eval().requires_grad_(False)
        for part in module.modules():
            part.train = functools.partial(_stay_frozen, part)  # type: ignore[method-assign]
        self._held = (module,)  # in a tuple torch does not see it as a submodule

    def train(self, mode: bool = True) -> FrozenExtractor:
        """Do nothing: an extractor stays in evaluation mode."""
        return self

    def requires_grad_(self, requires_grad: bool = True) -> FrozenExtractor:
        """Do nothing: an extractor has no gradient."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenExtractor:
        super()._apply(fn, recurse)
        self._held[0]._apply(fn, recurse)
        return self

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile as any module does, if the model gains by it (its attribute `compilable`); other models stay as they are."""
        if getattr(self._held[0], "compilable", False):
            super().compile(*args, **kwargs)

    def identity(self) -> dict[str, Any]:
        """What decides the features: name, stride, hash of the weights. Goes into checkpoints."""
        return {"name": self.name, "stride": self.stride, "sha256": self.sha256}

    def check_patch(self, patch: Sequence[int]) -> None:
        """Raise InputError for a patch (D, H, W) that the model cannot take at this stride.

        A model such as anatomix tells by an attribute `divisor`, as `UNet` has it; of others nothing is known.
        """
        problem = self._patch_problem(patch)
        if problem is not None:
            raise InputError(problem)

    def _patch_problem(self, patch: Sequence[int]) -> str | None:
        divisor = getattr(self._held[0], "divisor", None)
        if not isinstance(divisor, int) or size_problem(coarse_size(patch, self.stride), divisor) is None:
            return None
        # Sizes that do are told in voxels of the image, which is what the user sets.
        return f"extractor {self.name} at stride {self.stride}: {size_problem(patch, divisor * self.stride)}"

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Features of an image (N, Ci, D, H, W) in [0, 1].

        Raises:
            ValueError: not five axes, or a size that the model cannot take.
        """
        if image.dim() != 5:
            raise ValueError(f"image must be (N, Ci, D, H, W), got shape {tuple(image.shape)}")
        if type(image) is not Tensor:  # MONAI's MetaTensor overrides what models call
            image = image.as_subclass(Tensor)
        n, channels, *size = image.shape
        problem = self._patch_problem(size)
        if problem is not None:
            raise ValueError(problem)
        features: Tensor = self._held[0](downsample(image.reshape(n * channels, 1, *size), self.stride))
        return features.reshape(n, channels * features.shape[1], *features.shape[2:])

    def extra_repr(self) -> str:
        """Name, channels and stride."""
        return f"name={self.name}, channels={self.channels}, stride={self.stride}"


def coarse_size(size: Sequence[int], stride: int) -> tuple[int, ...]:
    """ceil(n / stride) of each axis."""
    return tuple(-(-n // stride) for n in size)


def downsample(image: Tensor, stride: int) -> Tensor:
    """An image (N, C, D, H, W) on the grid of `coarse_size` that covers the same field of view.

    Cells of stride³ voxels are averaged; a trilinear sample would look at 2³ voxels of each and let finer detail alias from a
    stride of 3 on. Interpolation back to the image with half-pixel centres takes coarse voxel j of d to lie at
    (j + 1/2) · D/d - 1/2. Those are the centres of the cells where the stride divides D; where it does not, the image is
    stretched to the next multiple first, by that same interpolation, and then they are too.
    """
    if stride == 1:
        return image
    multiple = [n * stride for n in coarse_size(image.shape[2:], stride)]
    if multiple != list(image.shape[2:]):
        image = F.interpolate(image, size=multiple, mode="trilinear", align_corners=False)
    return F.avg_pool3d(image, stride)


def _stay_frozen(module: nn.Module, mode: bool = True) -> nn.Module:
    """Stands where a frozen module's `train` was."""
    return module
