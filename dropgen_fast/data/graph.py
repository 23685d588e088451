"""The DALI graph behind `pipeline.TrainingPipeline`: read a region, augment, rescale. Imported when a pipeline is built.

Shapes: volumes are (D, H, W, C) in DALI's layout "DHWC", whose x, y, z are our axes 2, 1, 0. The same graph serves DALI's CPU
backend and the GPU: regions are always read on the CPU (DALI's GPU reader reads whole files), as are all draws, which are a few
numbers; volumes move to the GPU right after they are read. `if` on a draw is DALI's conditional execution: only the samples
of a batch that were chosen pay for an operation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import nvidia.dali.math as dmath
from nvidia.dali import fn, pipeline_def, types

from dropgen_fast.data.augmentation import AugmentationConfig

BIAS_DEGREE = 3
MAX_SHUFFLE_BUFFER = 1024
"""Cases among which DALI's readers shuffle: below this number an epoch's order is uniform. They hold open maps, not copies."""


@pipeline_def(enable_conditionals=True, enable_checkpointing=True, prefetch_queue_depth=2)
def training_graph(images: Sequence[str], labels: Sequence[str], foregrounds: Sequence[str], patch: tuple[int, int, int],
                   augmentation: AugmentationConfig, foreground_fraction: float, reader_seed: int, rank: int, world_size: int,
                   gpu: bool) -> tuple[Any, Any, Any]:
    """Image (D, H, W, C) float32 in [0, 1], label (D, H, W, 1) uint8, and the path of foreground.npy, which names the case."""
    # Readers with the same seed and shuffling stay in step, so the three files always belong to one case.
    reader: dict[str, Any] = {"random_shuffle": True, "seed": reader_seed, "shard_id": rank, "num_shards": world_size,
                              "initial_fill": min(len(images), MAX_SHUFFLE_BUFFER)}
    rows = fn.readers.numpy(files=list(foregrounds), name="foreground", **reader)
    turns = _draw_turns(augmentation)
    size = _size_before_turning(turns, patch)
    region: dict[str, Any] = {"roi_start": _draw_start(rows, size, foreground_fraction), "roi_shape": size,
                              "roi_axes": [0, 1, 2], "out_of_bounds_policy": "pad", "fill_value": 0}
    image = fn.readers.numpy(files=list(images), name="image", **region, **reader)
    label = fn.readers.numpy(files=list(labels), name="label", **region, **reader)
    if gpu:
        image, label = image.gpu(), label.gpu()
    image = fn.cast(fn.reshape(image, layout="DHWC"), dtype=types.FLOAT)
    label = fn.reshape(label, layout="DHWC")

    image, label = _orient(image, label, augmentation, turns)
    if augmentation.noise_probability > 0 and _coin(augmentation.noise_probability):
        image = fn.noise.gaussian(image, stddev=_uniform(augmentation.noise_std))
    if augmentation.bias_field_probability > 0 and _coin(augmentation.bias_field_probability):
        image = image * dmath.exp(_log_bias_field(patch, augmentation.bias_field_coefficient, gpu))
    if augmentation.gamma_probability > 0 and _coin(augmentation.gamma_probability):
        image = _gamma(image, _on(_uniform(augmentation.gamma), gpu))
    if augmentation.affine_probability > 0 and _coin(augmentation.affine_probability):
        matrix = _draw_affine(patch, augmentation)
        image = fn.warp_affine(image, matrix=matrix, interp_type=types.INTERP_LINEAR, fill_value=0)
        label = fn.warp_affine(label, matrix=matrix, interp_type=types.INTERP_NN, fill_value=0)
    return _minmax(image), label, fn.get_property(rows, key="source_info")


def _coin(probability: float) -> Any:
    return fn.random.coin_flip(probability=probability, dtype=types.BOOL)


def _uniform(low_high: tuple[float, float], **shape: Any) -> Any:
    """Uniform between two numbers, which may be equal."""
    low, high = low_high
    return fn.random.uniform(range=(0.0, 1.0), **shape) * (high - low) + low


def _on(node: Any, gpu: bool) -> Any:
    return node.gpu() if gpu else node


def _draw_start(rows: Any, size: Any, foreground_fraction: float) -> Any:
    """First voxel (3,) int32 of the region to read, inside the volume; a volume smaller than `size` is padded on both sides.

    Uniform over all positions or, with probability `foreground_fraction`, uniform over those that contain a stored foreground
    voxel, as far as the volume's borders allow. `rows` is foreground.npy: the shape, then voxels.
    """
    size = fn.cast(size, dtype=types.FLOAT)
    room = fn.cast(rows[0], dtype=types.FLOAT) - size
    lowest = dmath.min(dmath.floor(room * 0.5), 0.0)
    highest = dmath.max(room, lowest)
    uniform = fn.random.uniform(range=(0.0, 1.0), shape=[3])
    start = dmath.floor(uniform * (room + 1.0))
    if foreground_fraction > 0:
        count = fn.cast(rows.shape(dtype=types.INT32)[0], dtype=types.FLOAT)
        chosen = _coin(foreground_fraction)
        row = dmath.min(dmath.floor(_uniform((0.0, 1.0)) * (count - 1.0)) + 1.0, count - 1.0)
        if chosen & (count > 1.0):
            voxel = fn.cast(rows[fn.cast(row, dtype=types.INT32)], dtype=types.FLOAT)
            start = voxel - dmath.min(dmath.floor(uniform * size), size - 1.0)
    return fn.cast(dmath.clamp(start, lowest, highest), dtype=types.INT32)


def _draw_turns(augmentation: AugmentationConfig) -> Any:
    """Quarter turns in the plane of axes 0 and 1, per sample, 0 to 3 (an int where they are switched off)."""
    if not augmentation.turning:
        return 0
    turned = fn.random.coin_flip(probability=augmentation.rotate90_probability, dtype=types.INT32)
    return turned * fn.cast(fn.random.choice(list(augmentation.rotate90_turns)), dtype=types.INT32)


def _size_before_turning(turns: Any, patch: tuple[int, int, int]) -> Any:
    """The region to read so that it has the shape of the patch once it is turned: no voxel is cut off or made up."""
    size = types.Constant(np.array(patch, np.int32))
    if isinstance(turns, int):
        return size
    odd = (turns == 1) | (turns == 3)
    if odd:
        size = types.Constant(np.array([patch[1], patch[0], patch[2]], np.int32))
    return size


def _orient(image: Any, label: Any, augmentation: AugmentationConfig, turns: Any) -> tuple[Any, Any]:
    """Flip axis 0, flip one random axis, rotate by `turns` quarter turns: one flip at most, and a transpose for odd turns.

    Flips of one axis cancel in pairs, and as in `numpy.rot90`: one turn is the transpose of a flip of axis 1, three turns that
    of axis 0, two turns a flip of both.
    """
    if not augmentation.flipping and not augmentation.turning:
        return image, label
    flips = [fn.random.coin_flip(probability=augmentation.flip_probability, dtype=types.INT32), 0, 0]
    if augmentation.flip_random_axis_probability > 0:
        axis = fn.random.choice(list(augmentation.flip_axes))
        once = fn.random.coin_flip(probability=augmentation.flip_random_axis_probability, dtype=types.INT32)
        flips = [flip ^ (once * fn.cast(axis == a, dtype=types.INT32)) for a, flip in enumerate(flips)]
    if augmentation.turning:
        flips[0] = flips[0] ^ fn.cast(turns >= 2, dtype=types.INT32)
        flips[1] = flips[1] ^ fn.cast((turns == 1) | (turns == 2), dtype=types.INT32)
    if (flips[0] + flips[1] + flips[2]) > 0:
        image = fn.flip(image, depthwise=flips[0], vertical=flips[1], horizontal=flips[2])
        label = fn.flip(label, depthwise=flips[0], vertical=flips[1], horizontal=flips[2])
    if augmentation.turning:
        odd = (turns == 1) | (turns == 3)
        if odd:
            image = fn.transpose(image, perm=[1, 0, 2, 3], transpose_layout=False)
            label = fn.transpose(label, perm=[1, 0, 2, 3], transpose_layout=False)
    return image, label


def _log_bias_field(patch: tuple[int, int, int], coefficient: tuple[float, float], gpu: bool) -> Any:
    """Σ c_ijk P_i(u) P_j(v) P_k(w) over i + j + k ≤ 3, with Legendre polynomials P over [-1, 1] along each axis: (D, H, W, 1).

    MONAI's `RandBiasField`; its coefficients are uniform. The terms are gathered by i: four planes (H, W), so that the volume
    is passed four times and not twenty.
    """
    legendre = [[np.polynomial.legendre.Legendre.basis(k)(np.linspace(-1, 1, n)).astype(np.float32)
                 for k in range(BIAS_DEGREE + 1)] for n in patch]
    field = None
    for i in range(BIAS_DEGREE + 1):
        terms = np.stack([np.outer(legendre[1][j], legendre[2][k]) for j in range(BIAS_DEGREE + 1 - i)
                          for k in range(BIAS_DEGREE + 1 - i - j)], axis=-1)
        plane = fn.reductions.sum(types.Constant(terms) * _uniform(coefficient, shape=[terms.shape[-1]]), axes=[2])
        plane = _on(fn.reshape(plane, shape=[1, patch[1], patch[2], 1]), gpu)
        depth = types.Constant(legendre[0][i].reshape(-1, 1, 1, 1), device="gpu" if gpu else "cpu")
        field = plane * depth if field is None else field + plane * depth
    return field


def _gamma(image: Any, gamma: Any) -> Any:
    """MONAI's `AdjustContrast`: ((x - min) / (range + 1e-7)) ** gamma * range + min."""
    low = fn.reductions.min(image)
    extent = fn.reductions.max(image) - low
    # Division may round a hair below zero or leave it as -0: a power of that with a fraction would be NaN.
    return dmath.pow(dmath.max((image - low) / (extent + 1e-7), 0.0), gamma) * extent + low


def _draw_affine(patch: tuple[int, int, int], augmentation: AugmentationConfig) -> Any:
    """Matrix (3, 4) from output to input voxels about the patch's centre: rotation · shear · scale, as MONAI's `RandAffine`.

    The shear is one matrix with six entries off the diagonal, as in the MONAI release that the paper's code pins (1.5); later
    ones multiply six elementary shears. DALI's axes run the other way round, so axes are exchanged and angles change sign.
    """
    center = [size / 2 for size in reversed(patch)]
    matrix = fn.transforms.scale(scale=_uniform(augmentation.scale, shape=[3]), center=center)
    matrix = fn.transforms.shear(matrix, shear=_uniform(augmentation.shear, shape=[3, 2]), center=center)
    for axis in ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]):
        angle_deg = _uniform(augmentation.rotation_rad) * (-180.0 / math.pi)
        matrix = fn.transforms.rotation(matrix, angle=angle_deg, axis=axis, center=center)
    return matrix


def _minmax(image: Any) -> Any:
    """Rescale each sample to [0, 1] by its own minimum and maximum over all channels; constant → 0."""
    low = fn.reductions.min(image)
    extent = fn.reductions.max(image) - low
    return (image - low) / (extent + fn.cast(extent == 0.0, dtype=types.FLOAT))
