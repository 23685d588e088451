"""Segmenting a whole volume: sliding window with half-overlapping patches, Gaussian weights."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from monai.inferers import sliding_window_inference
from torch import Tensor

from dropgen_fast.data.prepare import minmax
from dropgen_fast.errors import InputError
from dropgen_fast.model import DropGen


def choose_device(name: str) -> torch.device:
    """"auto" is the GPU where there is one, else the CPU; any other name is torch's.

    Raises:
        InputError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device must be auto, cpu, cuda or cuda:<n>, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device must be auto, cpu, cuda or cuda:<n>, got {name!r}")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InputError(f"device {name!r} cannot be had: torch sees {count or 'no'} GPU{'s' if count > 1 else ''} here")
    return device


@torch.inference_mode()
def class_probabilities(
    model: DropGen, image: npt.NDArray[np.float32], patch: tuple[int, int, int], *, overlap: float = 0.5,
    windows_per_batch: int = 1,
) -> Tensor:
    """Class probabilities (classes, D, H, W), float32 on the model's device, of a prepared volume (D, H, W, C).

    The whole volume is rescaled to [0, 1]; the extractor runs on each window, as in training on each patch. A volume
    smaller than the patch is padded with zeros. The model is left in the mode in which it came.
    """
    device = next(model.parameters()).device
    volume = torch.from_numpy(np.ascontiguousarray(minmax(image).transpose(3, 0, 1, 2))).to(device)[None]
    training = model.training
    model.eval()
    try:
        scores = sliding_window_inference(
            volume, patch, windows_per_batch, lambda windows: model(windows).float().softmax(1),
            overlap=overlap, mode="gaussian")
    finally:
        model.train(training)
    assert isinstance(scores, Tensor)
    return scores[0]


def dice_per_class(prediction: Tensor, label: Tensor, classes: int) -> Tensor:
    """Dice (classes,) of two label maps of one shape, 2 |A ∩ B| / (|A| + |B|); NaN for a class that is in neither."""
    prediction, label = prediction.flatten().long(), label.flatten().long()
    both = torch.bincount(label[prediction == label], minlength=classes)
    sizes = torch.bincount(prediction, minlength=classes) + torch.bincount(label, minlength=classes)
    return 2 * both / sizes  # 0 / 0 is NaN
