"""How near an extractor's approximations come to its features at full resolution in float32, on a real MR volume.

::

    python benchmarks/extractor_quality.py                                                   # mind, which needs no weights
    python benchmarks/extractor_quality.py --extractor anatomix --weights anatomix.pth

The volume is the T1 of the ICBM152 template inside nilearn, 1 mm, its middle, scaled to [0, 1]. What is compared is what the
network sees: features normalized per channel (instance norm), brought to the image's grid by trilinear interpolation. The cosine
of the angle between both feature vectors is taken at every voxel of the brain: its mean, and what 5 % of the voxels stay below.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dropgen_fast.errors import InputError
from dropgen_fast.features import FrozenExtractor, load_extractor

TEMPLATE = "datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
BRAIN = 0.02
"""The template is zero outside the brain; of its brightest voxel, this much is inside."""


def template(size: tuple[int, int, int]) -> Tensor:
    """The middle of the T1 template, (1, 1, D, H, W) in [0, 1]."""
    spec = importlib.util.find_spec("nilearn")
    if spec is None or spec.origin is None:
        raise InputError('the MR template is inside nilearn: pip install "dropgen_fast[demo]"')
    volume = np.asanyarray(nib.load(Path(spec.origin).parent / TEMPLATE).dataobj).astype(np.float32)
    if any(n > m for n, m in zip(size, volume.shape, strict=True)):
        raise InputError(f"--size must be at most {volume.shape}, got {size}")
    starts = [(m - n) // 2 for n, m in zip(size, volume.shape, strict=True)]
    cut = volume[tuple(slice(start, start + n) for start, n in zip(starts, size, strict=True))]
    return torch.from_numpy((cut - cut.min()) / (cut.max() - cut.min()))[None, None]


def seen(extractor: FrozenExtractor, image: Tensor, *, bf16: bool = False) -> Tensor:
    """Features (1, Cf, D, H, W) in float32 as the fusion hands them to the network, undropped."""
    with torch.autocast(image.device.type, torch.bfloat16, enabled=bf16):
        features = extractor(image).float()
    return F.instance_norm(F.interpolate(features, size=image.shape[2:], mode="trilinear", align_corners=False))


def cosine(features: Tensor, reference: Tensor, inside: Tensor) -> tuple[float, float]:
    """Mean and 5th percentile over the voxels inside."""
    similarity = F.cosine_similarity(features, reference, dim=1)[0][inside].double().numpy()
    return float(similarity.mean()), float(np.percentile(similarity, 5))


def main(argv: list[str]) -> int:
    """Print a row for each approximation."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--extractor", default="mind", help="as train's")
    parser.add_argument("--weights", type=Path, help="file of the published weights; without it they come from the Hub")
    parser.add_argument("--strides", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--size", type=int, nargs=3, default=[128, 128, 128], help="voxels of 1 mm")
    options = parser.parse_args(argv)
    try:
        image = template(tuple(options.size))
        extractors = {stride: load_extractor(options.extractor, stride=stride, weights=options.weights)
                      for stride in (1, *options.strides)}
        for extractor in extractors.values():
            extractor.check_patch(options.size)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    inside = image[0, 0] > BRAIN
    reference = seen(extractors[1], image)
    print(f"{options.extractor}, {' × '.join(map(str, options.size))} voxels of 1 mm, {int(inside.sum())} of them brain")
    print(f"{'':<14}{'cosine':>10}{'5 % below':>12}")
    rows = {"bfloat16": seen(extractors[1], image, bf16=True)}
    rows |= {f"stride {stride}": seen(extractors[stride], image) for stride in options.strides}
    for name, features in rows.items():
        mean, low = cosine(features, reference, inside)
        print(f"{name:<14}{mean:>10.4f}{low:>12.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
