"""Grids: what `prepare` does to a volume, and that the way back is exact."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nifti_factory import blobs, make_affine, write_nifti

from dropgen_fast.data.geometry import (
    Grid,
    GridMap,
    load_volume,
    ras_grid,
    read_grid,
    resample,
    resampled_shape,
    resize,
    resized_affine,
    save_like,
    to_ras,
)
from dropgen_fast.errors import InputError

ORIENTATIONS = ["RAS", "LAS", "RPI", "LIA", "SRA", "PIR"]
ANGLES_RAD = {"straight": (0, 0, 0), "oblique": (0.3, -0.2, 0.15)}


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


def ball(shape: tuple[int, int, int], center: tuple[float, float, float], radius: float, spacing: tuple[float, float, float]
         ) -> np.ndarray:
    """Distance from the surface in mm, positive inside."""
    axes = [(np.arange(n) - c) * s for n, c, s in zip(shape, center, spacing, strict=True)]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    return radius - np.sqrt(x**2 + y**2 + z**2)


@pytest.mark.parametrize(("shape", "new_shape"), [((9, 10, 11), (13, 7, 11)), ((8, 8, 8), (16, 4, 5)), ((5, 6, 7), (1, 20, 9))])
def test_resize_is_interpolate(shape: tuple[int, int, int], new_shape: tuple[int, int, int]) -> None:
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    expected = F.interpolate(torch.from_numpy(array).double()[None, None], new_shape, mode="trilinear", align_corners=False)
    np.testing.assert_allclose(resize(array, new_shape, 1), expected[0, 0].numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("shape", "new_shape"), [((9, 10, 11), (13, 7, 11)), ((5, 6, 7), (9, 20, 4))])
def test_nearest_is_nearest_exact(shape: tuple[int, int, int], new_shape: tuple[int, int, int]) -> None:
    array = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)
    expected = F.interpolate(torch.from_numpy(array)[None, None].float(), new_shape, mode="nearest-exact")[0, 0]
    result = resize(array, new_shape, 0)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, expected.numpy().astype(np.uint8))


def test_field_of_view_stays() -> None:
    affine = make_affine((0.8, 1.1, 5.0), ANGLES_RAD["oblique"])
    shape = (40, 31, 7)
    new_shape = resampled_shape(shape, (0.8, 1.1, 5.0), (1, 1, 1.5))
    assert new_shape == (32, 34, 23)
    new = resized_affine(affine, shape, new_shape)
    for corner in ((0, 0, 0), (1, 0, 0), (0, 1, 1), (1, 1, 1)):
        old_edge = np.array([*(n * c - 0.5 for n, c in zip(shape, corner, strict=True)), 1])
        new_edge = np.array([*(n * c - 0.5 for n, c in zip(new_shape, corner, strict=True)), 1])
        np.testing.assert_allclose(new @ new_edge, affine @ old_edge, atol=1e-9)


@pytest.mark.parametrize("angles", ANGLES_RAD.values(), ids=ANGLES_RAD)
@pytest.mark.parametrize("axcodes", ORIENTATIONS)
def test_label_comes_back_exactly_at_equal_spacing(tmp_path: Path, axcodes: str, angles: tuple[float, float, float]) -> None:
    spacing = (1.0, 1.5, 4.0)
    _, label = blobs((14, 11, 6), classes=5)
    path = write_nifti(tmp_path / "label.nii.gz", label, make_affine(spacing, angles), axcodes)
    volume = load_volume(path)
    grid = read_grid(path)
    assert ras_grid(grid).spacing_mm == pytest.approx(spacing, abs=1e-5)
    grid_map = GridMap.to_spacing(grid, spacing)
    prepared = grid_map.forward(volume.array, order=0)
    np.testing.assert_array_equal(prepared, label)  # RAS order, whatever the file's
    np.testing.assert_allclose(grid_map.prepared.affine, make_affine(spacing, angles), atol=1e-4)
    np.testing.assert_array_equal(grid_map.labels_back(prepared), volume.array)
    one_hot = np.eye(5, dtype=np.float32)[prepared].transpose(3, 0, 1, 2)
    np.testing.assert_array_equal(grid_map.classes_back(one_hot), volume.array)


@pytest.mark.parametrize("angles", ANGLES_RAD.values(), ids=ANGLES_RAD)
@pytest.mark.parametrize("axcodes", ORIENTATIONS)
def test_resampled_shape_and_landmark_stay_in_place(tmp_path: Path, axcodes: str, angles: tuple[float, float, float]) -> None:
    shape, spacing, target = (48, 40, 22), (1.0, 1.2, 2.5), (1.6, 0.9, 2.0)
    inside = ball(shape, (21.3, 17.2, 10.6), 14.0, spacing)
    label = (inside > 0).astype(np.uint8)
    image = np.exp(np.minimum(inside, 14.0) / 3).astype(np.float32)  # a smooth peak at the ball's centre
    affine = make_affine(spacing, angles)
    path = write_nifti(tmp_path / "image.nii.gz", image, affine, axcodes)
    label_path = write_nifti(tmp_path / "label.nii.gz", label, affine, axcodes)
    grid_map = GridMap.to_spacing(read_grid(path), target)
    assert np.linalg.norm(grid_map.prepared.affine[:3, :3], axis=0) == pytest.approx(target, rel=0.03)

    def centroid(volume: np.ndarray, at: np.ndarray) -> np.ndarray:
        voxels = np.stack(np.meshgrid(*map(np.arange, volume.shape), indexing="ij"), -1).reshape(-1, 3)
        return nib.affines.apply_affine(at, np.average(voxels, axis=0, weights=volume.ravel()))

    truth = nib.affines.apply_affine(affine, (21.3, 17.2, 10.6))
    prepared = grid_map.forward(load_volume(path).array, order=1)
    # Half a voxel of either grid, the classical mistake, is 0.45 mm at least.
    np.testing.assert_allclose(centroid(prepared, grid_map.prepared.affine), truth, atol=0.1)

    stored = load_volume(label_path).array
    prepared_label = grid_map.forward(stored, order=0)
    np.testing.assert_allclose(centroid(prepared_label, grid_map.prepared.affine), truth, atol=0.2)
    assert dice(grid_map.labels_back(prepared_label) > 0, stored > 0) > 0.93
    smooth = 1 / (1 + np.exp(-grid_map.forward(to_file_order(inside, path, affine), order=1)))
    assert dice(grid_map.classes_back(np.stack([1 - smooth, smooth])) > 0, stored > 0) > 0.97


def to_file_order(array: np.ndarray, like: Path, affine: np.ndarray) -> np.ndarray:
    ornt = nib.orientations.ornt_transform(nib.orientations.io_orientation(affine),
                                           nib.orientations.io_orientation(nib.load(like).affine))
    return np.asarray(nib.orientations.apply_orientation(array, ornt))


def test_resample_after_reorientation_serves_the_axes_by_name(tmp_path: Path) -> None:
    """The target spacing is for the RAS axes: stored as SRA, an anisotropic spacing must not land on the wrong axis."""
    path = write_nifti(tmp_path / "image.nii.gz", np.zeros((10, 20, 30), np.float32), make_affine((2, 1, 1)), "SRA")
    volume = load_volume(path)
    ras, affine = to_ras(volume.array, volume.affine)
    array, affine = resample(ras, affine, (1, 1, 3), order=1)
    assert array.shape == (20, 20, 10)
    np.testing.assert_allclose(np.diag(affine), (1, 1, 3, 1))


def test_classes_back_takes_the_largest_after_interpolation() -> None:
    grid_map = GridMap.to_spacing(Grid((8, 8, 8), np.eye(4)), (2, 2, 2))
    scores = np.random.default_rng(0).standard_normal((4, *grid_map.prepared.shape)).astype(np.float32)
    expected = F.interpolate(torch.from_numpy(scores)[None], (8, 8, 8), mode="trilinear", align_corners=False)[0].argmax(0)
    np.testing.assert_array_equal(grid_map.classes_back(scores), expected.numpy())


@pytest.mark.parametrize("shape", [(6, 7, 8), (6, 7, 8, 1)])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_save_like_keeps_the_header(tmp_path: Path, shape: tuple[int, ...], ending: str) -> None:
    affine = make_affine((0.7, 0.8, 3), ANGLES_RAD["oblique"]) @ np.diag([-1, -1, 1, 1])
    image = nib.Nifti1Image(np.random.default_rng(0).integers(-900, 3000, shape).astype(np.int16), affine)
    image.header.set_slope_inter(2.0, -1024.0)
    image.set_sform(affine, code=4)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, tmp_path / f"image{ending}")
    labels = np.random.default_rng(1).integers(0, 200, (6, 7, 8))
    save_like(tmp_path / f"image{ending}", labels, tmp_path / "out" / f"prediction{ending}")
    original, saved = nib.load(tmp_path / f"image{ending}"), nib.load(tmp_path / "out" / f"prediction{ending}")
    assert saved.shape == shape
    assert saved.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asanyarray(saved.dataobj).reshape(6, 7, 8), labels)
    for key in ("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "pixdim", "xyzt_units"):
        np.testing.assert_array_equal(saved.header[key], original.header[key], err_msg=key)
    assert [p.name for p in (tmp_path / "out").iterdir()] == [f"prediction{ending}"]


def test_save_like_refuses_and_leaves_nothing(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "image.nii.gz", np.zeros((4, 5, 6), np.float32), np.eye(4))
    with pytest.raises(InputError, match=r"\(4, 5, 7\).*\(4, 5, 6\)"):
        save_like(path, np.zeros((4, 5, 7), np.uint8), tmp_path / "a.nii.gz")
    with pytest.raises(InputError, match="integers"):
        save_like(path, np.zeros((4, 5, 6), np.float32), tmp_path / "a.nii.gz")
    assert [p.name for p in tmp_path.iterdir()] == ["image.nii.gz"]


def test_load_volume_reads_what_the_file_means(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4, 1) * 0.5 - 1
    image = nib.Nifti1Image(values, np.eye(4))
    image.set_data_dtype(np.int16)  # nibabel chooses a scale factor, since the values are no integers
    nib.save(image, tmp_path / "scaled.nii.gz")
    volume = load_volume(tmp_path / "scaled.nii.gz")
    assert volume.array.shape == (2, 3, 4)
    assert volume.array.dtype == np.float32
    np.testing.assert_allclose(volume.array, values[..., 0], atol=1e-3)


def spoiled(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / f"{kind}.nii.gz"
    good = np.random.default_rng(0).standard_normal((12, 12, 12)).astype(np.float32)
    if kind == "missing":
        return path
    if kind == "garbage":
        path.write_bytes(b"this is no NIfTI file" * 50)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "garbage inside gzip":
        path.write_bytes(gzip.compress(b"neither is this" * 50))
    elif kind == "4D":
        nib.save(nib.Nifti1Image(np.zeros((4, 4, 4, 3), np.float32), np.eye(4)), path)
    elif kind == "2D":
        nib.save(nib.Nifti1Image(np.zeros((4, 4), np.float32), np.eye(4)), path)
    elif kind == "colour":
        nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")]), np.eye(4)), path)
    elif kind == "singular":
        image = nib.Nifti1Image(good, np.eye(4))
        image.header["srow_z"] = 0
        image.header["sform_code"] = 1
        nib.Nifti1Image(good, None, image.header).to_filename(path)
    else:
        write_nifti(path, good, np.eye(4))
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    return path


@pytest.mark.parametrize(("kind", "message"), [
    ("missing", "does not exist"), ("garbage", "not a readable NIfTI"), ("empty", "not a readable NIfTI"),
    ("garbage inside gzip", "not a readable NIfTI"), ("4D", "4 axes"), ("2D", "2 axes"), ("colour", "real numbers"),
    ("singular", "cannot be inverted"), ("truncated", "truncated or damaged")])
def test_bad_files_are_named_in_one_line(tmp_path: Path, kind: str, message: str) -> None:
    path = spoiled(tmp_path, kind)
    with pytest.raises(InputError, match=message) as caught:
        load_volume(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["one bit in the middle", "one byte short"])
def test_checksum_is_looked_at(tmp_path: Path, damage: str) -> None:
    path = write_nifti(tmp_path / "image.nii.gz", blobs((20, 20, 20))[0], np.eye(4))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4 * (damage == "one bit in the middle")
    path.write_bytes(content[: len(content) - (damage == "one byte short")])
    with pytest.raises(InputError, match="truncated or damaged"):
        load_volume(path)


def test_truncated_uncompressed_file(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "image.nii", np.zeros((8, 8, 8), np.float32), np.eye(4))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated or damaged"):
        load_volume(path)


# --- one code path for NumPy and CuPy -----------------------------------------------------------------------------------


class DeviceArray:
    """What CuPy's arrays allow, over NumPy: no implicit way to NumPy, no mixing with NumPy's arrays, `get` brings them back."""

    __array_priority__ = 100
    __array_ufunc__ = None  # NumPy arrays do not compute with it either

    def __init__(self, host: np.ndarray) -> None:
        assert type(host) is np.ndarray
        self._host = host

    def __array__(self, *args: object, **options: object) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def get(self) -> np.ndarray:
        return self._host.copy()

    shape = property(lambda self: self._host.shape)
    dtype = property(lambda self: self._host.dtype)
    ndim = property(lambda self: self._host.ndim)

    def astype(self, dtype: object, copy: bool = True) -> DeviceArray:
        return DeviceArray(self._host.astype(dtype, copy=copy))

    def __gt__(self, other: DeviceArray) -> DeviceArray:
        return DeviceArray(self._host > on_device(other))

    def __setitem__(self, key: DeviceArray, value: int) -> None:
        self._host[on_device(key)] = value


def on_device(array: object) -> np.ndarray:
    assert isinstance(array, DeviceArray), f"{type(array)} where only an array of the device may be"
    return array._host


class Cupy:
    """As much of `cupy` as is used."""

    @staticmethod
    def asarray(array: object, dtype: object = None) -> DeviceArray:
        return DeviceArray(np.array(array.get() if isinstance(array, DeviceArray) else array, dtype))

    @staticmethod
    def zeros(shape: object, dtype: object) -> DeviceArray:
        return DeviceArray(np.zeros(shape, dtype))

    @staticmethod
    def where(condition: DeviceArray, a: DeviceArray, b: DeviceArray) -> DeviceArray:
        return DeviceArray(np.where(on_device(condition), on_device(a), on_device(b)))


class CupyNdimage:
    """As much of `cupyx.scipy.ndimage`; `calls` counts what was computed on the device."""

    calls = 0

    @classmethod
    def affine_transform(cls, array: DeviceArray, matrix: DeviceArray, **options: object) -> DeviceArray:
        import scipy.ndimage

        cls.calls += 1
        return DeviceArray(scipy.ndimage.affine_transform(on_device(array), on_device(matrix), **options))


def test_a_gpu_gets_and_gives_back_what_the_cpu_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of `prepare`, and the way back of a prediction, over arrays that never turn into NumPy's by themselves."""
    from dropgen_fast.data import geometry
    from dropgen_fast.data.prepare import prepare_image, prepare_label

    image, label = blobs((12, 10, 9))
    image_path = write_nifti(tmp_path / "image.nii.gz", image, make_affine((1, 1.5, 2)), "LIA")
    label_path = write_nifti(tmp_path / "label.nii.gz", label, make_affine((1, 1.5, 2)), "LIA")

    def everything(spacing_mm: tuple[float, float, float]) -> list[np.ndarray]:
        prepared = prepare_image([image_path, image_path], spacing_mm, (0.0, 900.0))
        found, _ = prepare_label(label_path, prepared.grid_map, image_path, 3)
        scores = np.stack([found == k for k in range(3)]).astype(np.float32)
        back, classes = prepared.grid_map.labels_back(found), prepared.grid_map.classes_back(scores)
        resampled, affine = resample(image, make_affine((1, 1.5, 2)), spacing_mm, 1)
        return [prepared.array, found, back, classes, resampled, affine]

    for spacing_mm, resampled in (((1, 1, 1), True), ((1, 1.5, 2), False)):
        expected = everything(spacing_mm)
        with monkeypatch.context() as patched:
            patched.setattr(geometry, "array_module", lambda: (Cupy, CupyNdimage))
            patched.setattr(CupyNdimage, "calls", 0)
            found = everything(spacing_mm)
            assert (CupyNdimage.calls > 0) == resampled
        for a, b in zip(found, expected, strict=True):
            assert type(a) is np.ndarray
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
