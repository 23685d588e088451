"""The DALI graph behind `pipeline.TrainingPipeline`: read a region, flip and turn it, draw. Imported when a pipeline is built.

Volumes are (C, D, H, W) in DALI's layout "CDHW", whose x, y, z are our axes 2, 1, 0, and keep the number type of the store.
The same graph serves DALI's CPU backend and the GPU: regions are always read on the CPU (DALI's GPU reader reads whole files),
as are all draws, which are a few numbers; bricks move to the GPU right after they are read. `if` on a draw is DALI's
conditional execution: only the samples of a batch that were chosen pay for an operation. What follows the flips and turns is
`augment.py`'s, which is fed with the numbers drawn here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import nvidia.dali.math as dmath
from nvidia.dali import fn, pipeline_def, types

from dropgen_fast.data.augmentation import AugmentationConfig
from dropgen_fast.data.bricks import Layout

MAX_SHUFFLE_BUFFER = 8000
"""Cases among which DALI's readers shuffle: up to this number an epoch's order is uniform.

They hold open maps, not copies. DALI allows itself half of Linux' usual 65530 maps in a process, and readers whose buffers find
no more read whole files: this is room for two pipelines of two readers each.
"""
NUMBERS = {"float32": types.FLOAT, "float16": types.FLOAT16, "int16": types.INT16}


@pipeline_def(enable_conditionals=True, enable_checkpointing=True, prefetch_queue_depth=2)
def training_graph(volumes: Sequence[str], foregrounds: Sequence[str], layout: Layout, patch: tuple[int, int, int],
                   augmentation: AugmentationConfig, uniforms: int, foreground_fraction: float, align: tuple[int, int, int],
                   reader_seed: int, rank: int, world_size: int, gpu: bool) -> tuple[Any, ...]:
    """What the pipeline puts out; `layout` is that of every volume but for their shapes.

    Returns:
        Image (C, D, H, W) in the store's number type; label (1, D, H, W) uint8; `uniforms` numbers, uniform in [0, 1), float32;
        the path of foreground.npy, which names the case; the first voxel (3,) int32 of the region that was read, which is
        negative where the volume is padded; where elastic deformation is on, one standard normal number for each axis and
        control point, (3, g, g, g) float32.
    """
    # Readers with the same seed and shuffling stay in step, so the two files always belong to one case.
    reader: dict[str, Any] = {"random_shuffle": True, "seed": reader_seed, "shard_id": rank, "num_shards": world_size,
                              "initial_fill": min(len(volumes), MAX_SHUFFLE_BUFFER)}
    rows = fn.readers.numpy(files=list(foregrounds), name="foreground", **reader)
    turns = _draw_turns(augmentation)
    size = _size_before_turning(turns, patch)
    start = _draw_start(rows, size, foreground_fraction, np.array(align, np.float32))
    image, label = _read(volumes, layout, start, size, gpu, reader)
    flips = _draw_flips(augmentation, turns)
    outputs = [fn.reinterpret(_orient(image, flips, turns), dtype=NUMBERS[layout.dtype]), _orient(label, flips, turns),
               fn.random.uniform(range=(0.0, 1.0), shape=[uniforms]), fn.get_property(rows, key="source_info"), start]
    if augmentation.elastic_probability > 0:
        outputs.append(fn.random.normal(shape=[3, *[augmentation.elastic_control_points] * 3]))
    return tuple(outputs)


def _read(files: Sequence[str], layout: Layout, start: Any, size: Any, gpu: bool, reader: dict[str, Any]) -> tuple[Any, Any]:
    """Image and label of the region of `size` voxels from `start` on, zeros where there is no volume.

    The bricks that the region touches are read, image and label taken out of each, put together and cut. Up to the end the
    image is made of integers as large as its numbers: voxels are only moved, and not every operator takes float16.
    """
    edge = types.Constant(np.array(layout.brick, np.int32))
    first = dmath.floor(fn.cast(start, dtype=types.FLOAT) / edge)
    count = fn.cast(dmath.ceil(fn.cast(start + size, dtype=types.FLOAT) / edge) - first, dtype=types.INT32)
    first = fn.cast(first, dtype=types.INT32)
    bricks = fn.readers.numpy(files=list(files), name="volume", roi_start=first, roi_shape=count, roi_axes=[0, 1, 2],
                              out_of_bounds_policy="pad", fill_value=0, **reader)
    if gpu:
        bricks = bricks.gpu()

    def part(begin: int, end: int, channels: int, dtype: types.DALIDataType) -> Any:
        inner = types.Constant(np.array([channels, *layout.brick], np.int32))
        numbers = fn.reinterpret(bricks[:, :, :, begin:end], dtype=dtype)
        apart = fn.transpose(fn.reshape(numbers, shape=fn.cat(count, inner)), perm=[3, 0, 4, 1, 5, 2, 6], transpose_layout=False)
        whole = fn.reshape(apart, shape=fn.cat(types.Constant(np.array([channels], np.int32)), count * edge), layout="CDHW")
        return fn.slice(whole, start - first * edge, size, axes=[1, 2, 3])

    image_dtype = types.INT32 if np.dtype(layout.dtype).itemsize == 4 else types.INT16
    return (part(0, layout.image_bytes, layout.channels, image_dtype),
            part(layout.image_bytes, layout.file_shape[-1], 1, types.UINT8))


def _coin(probability: float) -> Any:
    return fn.random.coin_flip(probability=probability, dtype=types.BOOL)


def _draw_start(rows: Any, size: Any, foreground_fraction: float, align: npt.NDArray[np.float32]) -> Any:
    """First voxel (3,) int32 of the region to read, inside the volume as `features.volume.pad` pads it to `size` at least.

    The volume is padded to a multiple of `align` (3,) voxels, and the region begins at one. Uniform over all such positions or,
    with probability `foreground_fraction`, uniform over all that contain a stored foreground voxel, as far as the volume's
    borders allow, and then rounded down to such a one. `rows` is foreground.npy: the shape, then voxels.
    """
    size = fn.cast(size, dtype=types.FLOAT)
    shape = fn.cast(rows[0], dtype=types.FLOAT)
    grid = types.Constant(align)
    padded = dmath.ceil(dmath.max(shape, size) / grid) * grid
    before = dmath.ceil((padded - shape) * 0.5)
    uniform = fn.random.uniform(range=(0.0, 1.0), shape=[3])
    start = dmath.floor(uniform * ((padded - size) / grid + 1.0)) * grid - before
    if foreground_fraction > 0:
        count = fn.cast(rows.shape(dtype=types.INT32)[0], dtype=types.FLOAT)
        chosen = _coin(foreground_fraction)
        row = dmath.min(dmath.floor(fn.random.uniform(range=(0.0, 1.0)) * (count - 1.0)) + 1.0, count - 1.0)
        if chosen & (count > 1.0):
            voxel = fn.cast(rows[fn.cast(row, dtype=types.INT32)], dtype=types.FLOAT)
            reach = size - grid + 1.0  # so that the region still holds the voxel once its start is rounded down
            start = voxel - dmath.min(dmath.floor(uniform * reach), reach - 1.0)
    start = dmath.clamp(start, -before, padded - size - before)
    return fn.cast(dmath.floor((start + before) / grid) * grid - before, dtype=types.INT32)


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


def _draw_flips(augmentation: AugmentationConfig, turns: Any) -> list[Any] | None:
    """Whether each axis is flipped, 0 or 1 per sample; None where nothing is ever flipped or turned.

    In order: flip axis 0, flip one random axis, mirror each axis, turn. Flips of one axis cancel in pairs, and a turn is a
    transpose and flips, as in `numpy.rot90`: one turn is the transpose of a flip of axis 1, three turns that of axis 0, two
    turns a flip of both.
    """
    if not augmentation.flipping and not augmentation.turning:
        return None
    flips: list[Any] = [0, 0, 0]
    if augmentation.mirror and augmentation.flip_probability > 0:
        flips[0] = fn.random.coin_flip(probability=augmentation.flip_probability, dtype=types.INT32)
    if augmentation.mirror and augmentation.flip_random_axis_probability > 0:
        axis = fn.random.choice(list(augmentation.flip_axes))
        once = fn.random.coin_flip(probability=augmentation.flip_random_axis_probability, dtype=types.INT32)
        flips = [flip ^ (once * fn.cast(axis == a, dtype=types.INT32)) for a, flip in enumerate(flips)]
    if augmentation.mirror and augmentation.mirror_probability > 0:
        for a in augmentation.mirror_axes:
            flips[a] = flips[a] ^ fn.random.coin_flip(probability=augmentation.mirror_probability, dtype=types.INT32)
    if augmentation.turning:
        flips[0] = flips[0] ^ fn.cast(turns >= 2, dtype=types.INT32)
        flips[1] = flips[1] ^ fn.cast((turns == 1) | (turns == 2), dtype=types.INT32)
    return flips


def _orient(volume: Any, flips: list[Any] | None, turns: Any) -> Any:
    """Flip and turn as drawn: one flip at most, and a transpose for odd turns."""
    if flips is None:
        return volume
    if (flips[0] + flips[1] + flips[2]) > 0:
        volume = fn.flip(volume, depthwise=flips[0], vertical=flips[1], horizontal=flips[2])
    if not isinstance(turns, int):
        odd = (turns == 1) | (turns == 3)
        if odd:
            volume = fn.transpose(volume, perm=[0, 2, 1, 3], transpose_layout=False)
    return volume
