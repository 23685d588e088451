"""Volumes and the grids they live on: load, reorient to RAS, resample, and the exact way back.

Only axis-aligned steps are ever taken: axes are permuted and flipped, then the voxels of each axis are stretched. An oblique
scan stays oblique, and the way back is exact. A grid's field of view is the box made of whole voxels (not of their centres);
resampling keeps that box, as ``torch.nn.functional.interpolate(align_corners=False)`` does, so the spacing that results
differs from the requested one by what rounding to whole voxels asks for.

Images are interpolated linearly along every axis, whatever the spacing, as the paper's code does. nnU-Net treats axes with thick
slices apart (nearest neighbour across slices) because it interpolates with cubic splines, which overshoot where slices differ
much. Linear interpolation is done axis by axis as it is, never leaves the range of the voxels it lies between, and keeps
structures where they are, where taking the nearest slice would shift them by up to half a slice. Labels take the nearest voxel.

Everything that touches voxels runs on CuPy where there is a GPU and on NumPy and SciPy otherwise, through the same lines.
"""

from __future__ import annotations

import functools
import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel import orientations
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError, HeaderTypeError

from dropgen_fast.errors import InputError
from dropgen_fast.files import write_atomically

Triple = tuple[float, float, float]
Shape = tuple[int, int, int]

UNREADABLE = (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError, HeaderTypeError)


@functools.cache
def array_module() -> tuple[ModuleType, ModuleType]:
    """``(cupy, cupyx.scipy.ndimage)`` where CuPy and a GPU are at hand, else ``(numpy, scipy.ndimage)``."""
    try:
        import cupy
        import cupyx.scipy.ndimage as cupy_ndimage

        if cupy.cuda.runtime.getDeviceCount() > 0:
            return cupy, cupy_ndimage
    except Exception:  # an installed CuPy without a working driver raises errors of its own making; the CPU serves then
        pass
    import scipy.ndimage

    return np, scipy.ndimage


def _to_host(array: Any) -> npt.NDArray[Any]:
    return array.get() if hasattr(array, "get") else np.asarray(array)


@dataclass(frozen=True)
class Volume:
    """A volume as its file stores it: `array` (I, J, K) and the voxel-to-world `affine` (4, 4), millimetres, RAS+ world."""

    array: npt.NDArray[Any]
    affine: npt.NDArray[np.float64]
    path: Path


@dataclass(frozen=True)
class Grid:
    """Where voxels are: a shape and the voxel-to-world affine (4, 4) in millimetres."""

    shape: Shape
    affine: npt.NDArray[np.float64]

    @property
    def spacing_mm(self) -> Triple:
        """Distance of neighbouring voxel centres along each axis."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(x), float(y), float(z)


def load_volume(path: Path) -> Volume:
    """Read a NIfTI file: three axes (a fourth of length 1 is dropped), numbers as stored or, where scaled, as float32.

    Raises:
        InputError: the file does not exist, is not readable to its end, is not a volume of real numbers, or its affine
            cannot be inverted.
    """
    path = Path(path)
    image = _open(path)
    shape = tuple(image.shape)
    try:
        if path.name.endswith(".gz"):
            # Read to the end, where gzip keeps its checksum: nibabel stops at the last voxel and never looks at it, so that
            # most damaged files would pass as images.
            image = type(image).from_bytes(gzip.decompress(path.read_bytes()))
        scaled = image.dataobj.slope not in (1, None) or image.dataobj.inter not in (0, None)
        array = image.get_fdata(dtype=np.float32, caching="unchanged") if scaled else np.asanyarray(image.dataobj)
    except (*UNREADABLE, MemoryError) as error:
        raise InputError(f"{path} is truncated or damaged: {_one_line(error)}") from error
    if array.dtype.kind not in "buif":
        raise InputError(f"{path} holds {array.dtype} voxels; expected real numbers (not RGB, not complex)")
    return Volume(array.reshape(shape[:3]), _affine(image, path), path)


def read_grid(path: Path) -> Grid:
    """The grid of a NIfTI file as stored, from its header alone; raises as `load_volume` does."""
    image = _open(Path(path))
    shape = tuple(image.shape)
    return Grid((shape[0], shape[1], shape[2]), _affine(image, Path(path)))


def _open(path: Path) -> Any:
    """The NIfTI image, its voxels not yet read, its shape known to be (I, J, K) or (I, J, K, 1)."""
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        image = nib.load(path)
    except UNREADABLE as error:
        raise InputError(f"{path} is not a readable NIfTI file: {_one_line(error)}") from error
    if not isinstance(image, nib.Nifti1Pair):
        raise InputError(f"{path} is a {type(image).__name__}, not a NIfTI file; convert it to .nii.gz")
    shape = tuple(image.shape)
    if len(shape) < 3 or any(n != 1 for n in shape[3:]):
        raise InputError(f"{path} has {len(shape)} axes {shape}; expected a 3D volume: one file per channel")
    if 0 in shape:
        raise InputError(f"{path} has no voxels, its shape is {shape}")
    return image


def _affine(image: Any, path: Path) -> npt.NDArray[np.float64]:
    affine = np.asarray(image.affine, dtype=np.float64)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    # The determinant over the product of the edge lengths is the volume of the cell over that of a box: 1 for right angles.
    if not np.isfinite(affine).all() or lengths.min() == 0 or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-3:
        raise InputError(f"{path} has an affine that cannot be inverted: {affine[:3].round(4).tolist()}; correct its header")
    return affine


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def largest_offset_mm(a: Grid, b: Grid) -> float:
    """The largest distance, over the corners of grid `a`, between where `a` and `b` place the same voxel."""
    corners = np.array([[i, j, k, 1] for i in (0, a.shape[0]) for j in (0, a.shape[1]) for k in (0, a.shape[2])], np.float64)
    return float(np.linalg.norm((corners @ (a.affine - b.affine).T)[:, :3], axis=1).max())


def to_ras(array: npt.NDArray[Any], affine: npt.NDArray[np.float64]) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    """Permute and flip the axes so that they run to the right, the front and the top, as nearly as the affine allows."""
    ornt = orientations.io_orientation(affine)
    return (orientations.apply_orientation(array, ornt),
            affine @ orientations.inv_ornt_aff(ornt, array.shape))


def ras_grid(grid: Grid) -> Grid:
    """A grid as it is after `to_ras`: axes that run to the right, the front and the top."""
    ornt = orientations.io_orientation(grid.affine)
    i, j, k = (int(grid.shape[axis]) for axis in np.argsort(ornt[:, 0]))
    return Grid((i, j, k), grid.affine @ orientations.inv_ornt_aff(ornt, grid.shape))


def resampled_shape(shape: Sequence[int], from_mm: Sequence[float], to_mm: Sequence[float]) -> Shape:
    """Voxels per axis that come nearest to the spacing `to_mm` within the same field of view, at least one."""
    counts = [max(1, round(n * a / b)) for n, a, b in zip(shape, from_mm, to_mm, strict=True)]
    return counts[0], counts[1], counts[2]


def resized_affine(affine: npt.NDArray[np.float64], shape: Sequence[int], new_shape: Sequence[int]) -> npt.NDArray[np.float64]:
    """The affine after the field of view of `shape` voxels was divided into `new_shape` voxels."""
    factor = np.asarray(shape, np.float64) / np.asarray(new_shape, np.float64)
    # The centre of new voxel 0 lies half a new voxel from the outer edge, which is at old coordinate -1/2.
    step = np.diag([*factor, 1.0])
    step[:3, 3] = 0.5 * factor - 0.5
    return np.asarray(affine @ step)


def resize(array: Any, shape: Sequence[int], order: int) -> Any:
    """Bring a volume onto `shape` voxels of the same field of view: `order` 1 trilinear (float32), 0 nearest (dtype kept).

    Equal to ``F.interpolate(mode="trilinear", align_corners=False)`` for order 1 and, except where a new centre lies
    exactly between two voxels, to ``mode="nearest-exact"`` for order 0. Accepts and returns arrays of `array_module`.
    """
    if tuple(array.shape) == tuple(shape):
        return array.astype(np.float32, copy=False) if order else array
    xp, ndimage = array_module()
    factor = np.asarray(array.shape, np.float64) / np.asarray(shape, np.float64)
    source = xp.asarray(array, dtype=np.float32 if order else array.dtype)
    return ndimage.affine_transform(source, xp.asarray(factor), offset=tuple(0.5 * factor - 0.5), output_shape=tuple(shape),
                                    output=source.dtype, order=order, mode="nearest", prefilter=False)


def resample(array: npt.NDArray[Any], affine: npt.NDArray[np.float64], spacing_mm: Sequence[float], order: int
             ) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    """Resample a volume to a spacing (module docstring); returns it with its affine. `order` as in `resize`."""
    shape = resampled_shape(array.shape, np.linalg.norm(affine[:3, :3], axis=0), spacing_mm)
    return _to_host(resize(array, shape, order)), resized_affine(affine, array.shape, shape)


@dataclass(frozen=True)
class GridMap:
    """The way between a volume as stored in a file and as prepared: reorientation, then stretching."""

    original: Grid
    prepared: Grid

    @classmethod
    def to_spacing(cls, original: Grid, spacing_mm: Sequence[float]) -> GridMap:
        """The map that reorients `original` to RAS and resamples it to `spacing_mm` (given for the RAS axes)."""
        ras = ras_grid(original)
        new_shape = resampled_shape(ras.shape, ras.spacing_mm, spacing_mm)
        return cls(original, Grid(new_shape, resized_affine(ras.affine, ras.shape, new_shape)))

    def forward(self, array: npt.NDArray[Any], order: int) -> npt.NDArray[Any]:
        """Bring a volume from the original to the prepared grid; `order` as in `resize`."""
        ras, _ = to_ras(array, self.original.affine)
        return np.ascontiguousarray(_to_host(resize(ras, self.prepared.shape, order)))

    def labels_back(self, labels: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Bring a label map (D, H, W) back to the original grid, nearest neighbour, dtype kept."""
        if labels.shape != self.prepared.shape:
            raise ValueError(f"labels have shape {labels.shape}, the prepared grid {self.prepared.shape}")
        return self._reorient_back(_to_host(resize(labels, self._ras_shape, 0)))

    def classes_back(self, scores: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """The class of the highest score per voxel of the original grid, from class scores (K, D, H, W) on the prepared one.

        Scores (probabilities or logits) are interpolated trilinearly, class by class, before the largest is taken: edges
        come out smoother than by interpolating labels. Ties go to the lower class.
        """
        if scores.shape[1:] != self.prepared.shape:
            raise ValueError(f"scores have shape {scores.shape}, wanted (K, *{self.prepared.shape})")
        xp, _ = array_module()
        best = xp.asarray(resize(xp.asarray(scores[0]), self._ras_shape, 1))
        labels = xp.zeros(self._ras_shape, np.uint8)
        for k in range(1, scores.shape[0]):
            score = resize(xp.asarray(scores[k]), self._ras_shape, 1)
            better = score > best
            labels[better] = k
            best = xp.where(better, score, best)
        return self._reorient_back(_to_host(labels))

    @property
    def _ras_shape(self) -> Shape:
        return ras_grid(self.original).shape

    def _reorient_back(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        to_original = orientations.ornt_transform(orientations.axcodes2ornt("RAS"),
                                                  orientations.io_orientation(self.original.affine))
        return np.ascontiguousarray(orientations.apply_orientation(array, to_original))


def save_like(original: Path, labels: npt.NDArray[Any], path: Path) -> None:
    """Write a label map on the grid of the file `original`: same shape, affine, sform and qform codes, units, integers.

    The file appears whole or not at all. A file with a fourth axis of length 1 gets one again.

    Raises:
        InputError: the labels do not have the shape of `original`, or the file cannot be written.
    """
    image = _open(Path(original))
    shape = tuple(image.shape)
    if labels.shape != shape[:3]:
        raise InputError(f"labels of shape {labels.shape} cannot be written on the grid of {original}, shape {shape}")
    if labels.dtype.kind not in "bui":
        raise InputError(f"labels to write to {path} must be integers, got {labels.dtype}")
    dtype = np.uint8 if labels.size == 0 or (labels.min() >= 0 and labels.max() <= 255) else np.int32
    header = image.header.copy()
    header.set_data_dtype(dtype)
    header["cal_min"] = header["cal_max"] = 0  # display limits of the image mean nothing for labels
    result = type(image)(np.ascontiguousarray(labels.reshape(shape), dtype=dtype), image.affine, header)
    path = Path(path)
    ending = ".nii.gz" if path.name.endswith(".nii.gz") else path.suffix
    if ending not in (".nii", ".nii.gz"):
        raise InputError(f"{path} must end in .nii or .nii.gz")
    content = result.to_bytes()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, gzip.compress(content, compresslevel=1, mtime=0) if ending == ".nii.gz" else content)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {_one_line(error)}") from error
