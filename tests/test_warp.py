"""`warp`: each backend against its definition, and the definition against torch, MONAI and SciPy."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.transforms import Affine, AffineGrid, Rand3DElastic, Resample
from monai.transforms.utils import create_grid
from scipy.ndimage import map_coordinates
from torch import Tensor

from dropgen_fast.kernels import library
from dropgen_fast.kernels.warp import available_backends, reference, warp
from dropgen_fast.kernels.warp import triton as triton_backend

# Voxels: the error of a coordinate in float32 that `warp` states, for maps that move neighbours at most 2 voxels apart; a few
# roundings of an |A·u| of some voxels are within its last digit.
COORDINATE = 1.2e-5
# Of a value in [0, 1], whose neighbours differ by at most 1 along each of three axes, with 8 products and 7 sums in float32;
# and half of the last place of a 16-bit result.
VALUE = 3 * COORDINATE + 16 * 2**-24
ROUNDING = {torch.float32: 0.0, torch.float16: 2**-12, torch.bfloat16: 2**-9}


@triton.jit
def taps(out, first, size, coarse, COUNT: tl.constexpr):
    """`_tap` of COUNT voxels: (3, COUNT)."""
    i = tl.arange(0, COUNT)
    low, high, weight = triton_backend._tap(first + i, size, coarse)
    tl.store(out + i, low.to(tl.float64))
    tl.store(out + COUNT + i, high.to(tl.float64))
    tl.store(out + 2 * COUNT + i, weight.to(tl.float64))


@pytest.fixture(params=("reference", "native", "triton"))
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend by name."""
    if reason := available_backends()[request.param]:
        pytest.fail(f"{request.param} must be here for the tests: {reason}")
    return str(request.param)


@dataclass(frozen=True)
class Case:
    """A call: sizes, types, and how far the map goes."""

    size: tuple[int, int, int] = (9, 10, 11)
    grid: tuple[int, int, int] | None = None  # of the displacement
    n: int = 1
    channels: int = 1
    labels: int = 1
    dtype: torch.dtype = torch.float32
    label_dtype: torch.dtype = torch.uint8
    padding: str = "zeros"
    turn: float = 0.7
    """Largest angle about each axis, in radians."""

    def make(self, device: str = "cpu") -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """(image, label, matrix, displacement); the last two on the CPU."""
        g = torch.Generator().manual_seed(sum(self.size) + self.n + (sum(self.grid) if self.grid else 0))
        image = torch.rand(self.n, self.channels, *self.size, generator=g).to(self.dtype)
        label = torch.randint(0, 200, (self.n, self.labels, *self.size), generator=g).to(self.label_dtype)
        if self.label_dtype != torch.uint8:
            label = label * 150 - 15000
        displacement = torch.randn(self.n, 3, *self.grid, generator=g) * 1.5 if self.grid else None
        return (image.to(device), label.to(device) if self.labels else None, maps(self.size, self.n, g, self.turn), displacement)


def maps(size: tuple[int, int, int], n: int, g: torch.Generator, turn: float = 0.7) -> Tensor:
    """(n, 3, 4): rotations, shears and scales about the centre, and a shift."""
    found = torch.empty(n, 3, 4)
    centre = (torch.tensor(size, dtype=torch.float64) - 1) / 2
    for k in range(n):
        a = torch.eye(3, dtype=torch.float64)
        for axis, angle in enumerate((torch.rand(3, generator=g, dtype=torch.float64) * 2 - 1) * turn):
            i, j = (axis + 1) % 3, (axis + 2) % 3
            r = torch.eye(3, dtype=torch.float64)
            r[i, i] = r[j, j] = angle.cos()
            r[i, j], r[j, i] = -angle.sin(), angle.sin()
            a = a @ r
        a = a @ (torch.eye(3) + (torch.rand(3, 3, generator=g, dtype=torch.float64) - 0.5) * 0.4)
        found[k] = torch.cat([a, (centre - a @ centre + torch.randn(3, generator=g, dtype=torch.float64))[:, None]], 1)
    return found


def definition(image: Tensor, label: Tensor | None, matrix: Tensor, displacement: Tensor | None, padding: str,
               ) -> tuple[Tensor, Tensor | None]:
    """The definition, all in float64 on the CPU."""
    return reference.warp(image.cpu().double(), label.cpu() if label is not None else None, matrix.cpu(),
                          displacement.cpu() if displacement is not None else None, border=padding == "border")


def near_tie(matrix: Tensor, displacement: Tensor | None, size: torch.Size, within: float = 2 * COORDINATE) -> Tensor:
    """(N, 1, D, H, W): where a coordinate is so close to halfway between two voxels that its error may choose the other."""
    found = []
    for n in range(len(matrix)):
        source = reference.source_coordinates(matrix[n].cpu(), displacement[n].cpu() if displacement is not None else None, size)
        found.append(((source - source.floor() - 0.5).abs() < within).any(0))
    return torch.stack(found)[:, None]


def check(inputs: tuple[Tensor, Tensor | None, Tensor, Tensor | None], padding: str, backend: str) -> None:
    """A call against the definition: types, layout, values."""
    image, label, matrix, displacement = inputs
    out, label_out = warp(image, label, matrix, displacement, padding=padding, backend=backend)
    wanted, label_wanted = definition(image, label, matrix, displacement, padding)
    assert (out.dtype, out.shape, out.device) == (image.dtype, image.shape, image.device)
    assert out.is_contiguous()
    # Triton's interpreter cuts digits off where a GPU rounds to bfloat16.
    cut = 2 if backend == "triton" and image.dtype == torch.bfloat16 and not image.is_cuda else 1
    assert (out.cpu().double() - wanted).abs().max().item() <= VALUE + cut * ROUNDING[image.dtype]
    assert (label is None) == (label_out is None)
    if label is not None and label_out is not None and label_wanted is not None:
        assert (label_out.dtype, label_out.shape) == (label.dtype, label.shape)
        assert label_out.is_contiguous()
        tie = near_tie(matrix, displacement, image.shape[2:])
        # Of evenly spread coordinates three axes leave a share of 3 · 2 · within; and a few.
        assert tie.sum() <= 10 * 12 * COORDINATE * tie.numel() + 3
        assert torch.equal(label_out.cpu().where(~tie, 0), label_wanted.where(~tie, 0))


CASES = {
    "affine": Case(),
    "border": Case(padding="border", n=2),
    "two samples, three channels, two labels": Case(n=2, channels=3, labels=2, label_dtype=torch.int16),
    "image alone": Case(labels=0, channels=2, size=(6, 5, 20)),
    "coarse": Case(size=(11, 9, 18), grid=(3, 2, 4), n=2),
    "coarse, border": Case(size=(11, 9, 18), grid=(3, 2, 4), padding="border", label_dtype=torch.int32),
    "dense": Case(size=(7, 9, 10), grid=(7, 9, 10)),
    "dense along x": Case(size=(7, 9, 10), grid=(2, 5, 10)),
    "one control point": Case(grid=(1, 1, 1), n=3),
    "half": Case(dtype=torch.float16, grid=(3, 3, 3)),
    "bfloat16": Case(dtype=torch.bfloat16, channels=2, padding="border"),
    "vectors": Case(size=(8, 8, 32), grid=(2, 2, 2)),
    "by 4": Case(size=(5, 6, 20), label_dtype=torch.int32),
    "turned far": Case(size=(6, 7, 19), turn=math.pi),
    "one z": Case(size=(1, 9, 17), grid=(1, 2, 3), turn=0.1),
    "one y": Case(size=(8, 1, 9), grid=(3, 1, 2), turn=0.1),
    "one x": Case(size=(8, 7, 1), grid=(2, 2, 1), turn=0.1, dtype=torch.float16),
    "one x, border": Case(size=(8, 7, 1), turn=0.1, padding="border"),
    "one voxel": Case(size=(1, 1, 1), grid=(1, 1, 1), n=2),
    "two voxels": Case(size=(2, 2, 2), grid=(2, 1, 2), padding="border"),
}


@pytest.mark.parametrize("name", CASES)
def test_against_the_definition(name: str, backend: str) -> None:
    case = CASES[name]
    check(case.make(), case.padding, backend)


@pytest.mark.parametrize("case", [
    Case(size=(40, 50, 300), grid=(5, 6, 40), channels=2), Case(size=(40, 50, 300), grid=(40, 50, 300), padding="border"),
    Case(size=(70, 33, 129), dtype=torch.float16), Case(size=(3, 40, 257), turn=math.pi, label_dtype=torch.int16),
], ids=str)
def test_the_native_kernel_beyond_one_run(case: Case) -> None:
    """Several runs a row, and blocks of planes."""
    check(case.make(), case.padding, "native")


@pytest.mark.parametrize("level", ["0", "1"])
def test_each_level_of_the_cpu(level: str) -> None:
    """The library holds code for several instruction sets; one per process is picked, so ask other processes."""
    program = """
import torch
from dropgen_fast.kernels.warp import reference, warp
torch.manual_seed(0)
matrix = torch.eye(3, 4) + torch.randn(2, 3, 4) * 0.1
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for displacement in (None, torch.randn(2, 3, 2, 3, 5)):
        for border in (False, True):
            image, label = torch.rand(2, 1, 9, 10, 150).to(dtype), torch.randint(0, 9, (2, 1, 9, 10, 150), dtype=torch.int16)
            out, found = warp(image, label, matrix, displacement, padding="border" if border else "zeros", backend="native")
            wanted, nearest = reference.warp(image.double(), label, matrix, displacement, border=border)
            print((out - wanted).abs().max().item() - torch.finfo(dtype).eps / 4, (found != nearest).sum().item())
"""
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "DROPGEN_FAST_CPU_LEVEL": level},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 12
    assert all(float(error) <= VALUE for error, _ in rows), rows
    assert sum(int(differ) for _, differ in rows) <= 12 * 27000 * 6 * COORDINATE, rows  # what a tie may turn


def skip_long_interpreted(axis: int, backend: str) -> None:
    """Of a volume that is long along other axes than the last, Triton's interpreter takes many more boxes."""
    if backend == "triton" and axis != 2:
        pytest.skip("long in Triton's interpreter, by the same arithmetic for each axis")


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_coordinates_do_not_lose_digits_along_a_long_axis(axis: int, backend: str) -> None:
    skip_long_interpreted(axis, backend)
    """Voxels alternate between 0 and 1 along one axis, so that the result is the coordinate, but for reflections."""
    size = [4, 4, 4]
    size[axis] = 600
    image = (torch.arange(600) % 2).to(torch.float32).view(1, 1, *(600 if k == axis else 1 for k in range(3)))
    image = image.expand(1, 1, *size).contiguous()
    matrix = torch.eye(3, 4)[None].clone()
    matrix[0, axis, axis], matrix[0, axis, 3] = 0.9337, 17.3391
    out, _ = warp(image, None, matrix, backend=backend)
    wanted, _ = definition(image, None, matrix, None, "zeros")
    assert wanted.std() > 0.2
    assert (out.double() - wanted).abs().max().item() <= COORDINATE + 4 * 2**-24


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_fine_grid_does_not_lose_digits_along_a_long_axis(axis: int, backend: str) -> None:
    """One control point fewer than voxels: an index of the grid in float32 would be off by length · 2⁻²⁴ · a few."""
    skip_long_interpreted(axis, backend)
    g = torch.Generator().manual_seed(axis)
    length = (300, 400, 600)[axis]  # shorter where the interpreter takes more boxes for it
    size, grid = [4, 4, 4], [2, 2, 2]
    size[axis], grid[axis] = length, length - 1
    image = (torch.arange(length) % 2).to(torch.float32).view(1, 1, *(length if k == axis else 1 for k in range(3)))
    image = image.expand(1, 1, *size).contiguous()
    displacement = torch.zeros(1, 3, *grid)
    displacement[:, axis] = torch.randn(1, *grid, generator=g) * 0.7
    matrix = torch.eye(3, 4)[None]
    out, _ = warp(image, None, matrix, displacement, backend=backend)
    wanted, _ = definition(image, None, matrix, displacement, "zeros")
    assert wanted.std() > 0.2
    # 16 roundings of an |A·u| below 4 are 16 · 2⁻²³; then 4 of the value.
    assert (out.double() - wanted).abs().max().item() <= COORDINATE + 16 * 2**-23 + 4 * 2**-24


finite = st.floats(-2, 2, width=32)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(size=st.tuples(*[st.integers(1, 12)] * 3), coefficients=st.lists(finite, min_size=9, max_size=9),
       shift=st.lists(st.floats(-30, 30, width=32), min_size=3, max_size=3), border=st.booleans(), seed=st.integers(0, 2**20),
       coarse=st.one_of(st.none(), st.integers(1, 4)))
def test_any_matrix(size: tuple[int, int, int], coefficients: list[float], shift: list[float], border: bool, seed: int,
                    coarse: int | None) -> None:
    g = torch.Generator().manual_seed(seed)
    image, label = torch.rand(1, 1, *size, generator=g), torch.randint(0, 9, (1, 1, *size), generator=g, dtype=torch.uint8)
    matrix = torch.cat([torch.tensor(coefficients).view(3, 3), torch.tensor(shift)[:, None]], 1)[None]
    grid = tuple(min(coarse, edge) for edge in size) if coarse else None
    displacement = torch.randn(1, 3, *grid, generator=g) if grid else None
    padding = "border" if border else "zeros"
    out, label_out = warp(image, label, matrix, displacement, padding=padding, backend="native")
    wanted, label_wanted = definition(image, label, matrix, displacement, padding)
    # Three steps of 2 along an axis: sums of up to 3 · 2 · 12 + 30 voxels, three times the error of a map that is stated.
    assert (out.double() - wanted).abs().max().item() <= 3 * VALUE
    assert label_wanted is not None
    assert label_out is not None
    tie = near_tie(matrix, displacement, image.shape[2:], within=6 * COORDINATE)
    assert torch.equal(label_out.where(~tie, 0), label_wanted.where(~tie, 0))


# ---- exact results ---------------------------------------------------------------------------------------------------


def lattice(axes: tuple[int, int, int], signs: tuple[int, int, int], shift: tuple[int, int, int]) -> Tensor:
    """(1, 3, 4): source axis i = signs[i] · output axis axes[i] + shift[i]."""
    matrix = torch.zeros(1, 3, 4)
    for i in range(3):
        matrix[0, i, axes[i]], matrix[0, i, 3] = signs[i], shift[i]
    return matrix


@pytest.mark.parametrize("zero", [False, True], ids=["no displacement", "zero displacement"])
def test_the_identity_is_a_copy(zero: bool, backend: str) -> None:
    image, label, matrix, _ = Case(n=2, channels=2, size=(5, 7, 18)).make()
    matrix[0] = torch.eye(3, 4)
    assert label is not None
    out, label_out = warp(image, label, matrix, torch.zeros(2, 3, 2, 2, 2) if zero else None, backend=backend)
    assert label_out is not None
    assert torch.equal(out[0], image[0])
    assert torch.equal(label_out[0], label[0])
    assert out.data_ptr() != image.data_ptr()
    assert not torch.equal(out[1], image[1])


@pytest.mark.parametrize("flipped", [(0,), (1,), (2,), (0, 2), (0, 1, 2)], ids=str)
def test_flips_are_exact(flipped: tuple[int, ...], backend: str) -> None:
    image, label, _, _ = Case(channels=2, size=(5, 7, 18)).make()
    assert label is not None
    matrix = torch.eye(3, 4)[None].clone()
    for axis in flipped:
        matrix[0, axis, axis], matrix[0, axis, 3] = -1, image.shape[2 + axis] - 1
    out, label_out = warp(image, label, matrix, backend=backend)
    assert label_out is not None
    assert torch.equal(out, image.flip([axis + 2 for axis in flipped]))
    assert torch.equal(label_out, label.flip([axis + 2 for axis in flipped]))


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize(("axes", "signs", "shift"), [
    ((0, 1, 2), (1, 1, 1), (2, -3, 5)), ((0, 1, 2), (1, 1, -1), (0, 0, 3)), ((1, 2, 0), (1, -1, 1), (1, 6, -2)),
    ((2, 1, 0), (-1, 1, -1), (9, 0, 4)), ((0, 1, 2), (1, 1, 1), (0, 0, 40)), ((2, 0, 1), (1, 1, 1), (-30, 0, 0)),
    ((0, 1, 2), (1, 1, 1), (0, 0, -40)), ((0, 1, 2), (1, -1, 1), (0, 99, 0)),
    ((2, 2, 1), (1, -1, 1), (-6, 8, 2)), ((0, 0, 2), (1, 1, 1), (0, 1, 0)),  # not one to one
], ids=str)
def test_voxels_to_voxels_are_exact(axes: Any, signs: Any, shift: Any, padding: str, backend: str) -> None:
    image, label, _, _ = Case(channels=2, labels=2, size=(5, 7, 18), dtype=torch.bfloat16).make()
    matrix = lattice(axes, signs, shift)
    out, label_out = warp(image, label, matrix, padding=padding, backend=backend)
    wanted, label_wanted = definition(image, label, matrix, None, padding)
    assert torch.equal(out.double(), wanted)
    assert label_out is not None
    assert label_wanted is not None
    assert torch.equal(label_out, label_wanted)


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize(("scale", "shift", "u"), [
    (1.0, 0.5, 0.0), (1.0, -0.5, 0.0), (1.0, 1.5, 0.0), (0.5, 0.0, 0.0), (0.5, -0.5, 0.0), (1.5, 0.0, 0.0), (1.5, -2.0, 0.0),
    (1.0, 0.0, 0.5), (1.0, -1.0, 0.5), (0.5, 0.25, 0.5), (-1.0, 15.5, 0.0), (-1.0, 16.0, 0.5),
])
def test_ties_go_up(scale: float, shift: float, u: float, padding: str, backend: str) -> None:
    """Every number here is one of float32's, and so are sums and products: the label is that of floor(s + 1/2), to the letter."""
    size = (8, 12, 16)
    label = torch.randint(1, 200, (1, 1, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    displacement = torch.full((1, 3, 2, 3, 4), u) if u else None
    for axis, length in enumerate(size):
        matrix = torch.eye(3, 4)[None].clone()
        matrix[0, :, 3] = -u  # which takes u back along the others
        matrix[0, axis, axis], matrix[0, axis, 3] = scale, shift
        _, found = warp(label.float(), label, matrix, displacement, padding=padding, backend=backend)
        nearest = np.floor((np.arange(length) + u) * scale + shift + 0.5).astype(int)
        inside = (nearest >= 0) & (nearest < length) | (padding == "border")
        wanted = label.index_select(axis + 2, torch.from_numpy(nearest.clip(0, length - 1)))
        wanted = wanted * torch.from_numpy(inside).view(*(length if k == axis else 1 for k in range(3)))
        assert found is not None
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("zero", [False, True], ids=["no displacement", "zero displacement"])
def test_a_copied_sample_keeps_what_is_not_a_number_to_itself(zero: bool, backend: str) -> None:
    """Read with weights, a NaN would reach its neighbours at weight 0."""
    image, label, matrix, _ = Case(n=2, channels=2, size=(5, 7, 18)).make()
    matrix[1] = torch.eye(3, 4)
    image[1, :, 2, 3, 4] = math.nan
    out, _ = warp(image, label, matrix, torch.zeros(2, 3, 2, 2, 2) if zero else None, backend=backend)
    assert torch.equal(out[1].nan_to_num(nan=-1.0), image[1].nan_to_num(nan=-1.0))
    assert torch.isfinite(out[0]).all()
    assert not torch.equal(out[0], image[0])


def test_only_a_zero_displacement_is_none(backend: str) -> None:
    """The identity with a displacement that is nowhere positive, and with one of a single control point; beside none."""
    image, label, _, _ = Case(n=3, size=(5, 7, 18)).make()
    matrix = torch.eye(3, 4).repeat(3, 1, 1)
    displacement = torch.zeros(3, 3, 2, 2, 2)
    displacement[0] = -torch.rand(3, 2, 2, 2, generator=torch.Generator().manual_seed(0)) - 0.25
    displacement[1, 2, 1, 1, 1] = -1.25
    check((image, label, matrix, displacement), "zeros", backend)
    out, _ = warp(image, label, matrix, displacement, backend=backend)
    assert [torch.equal(a, b) for a, b in zip(out, image, strict=True)] == [False, False, True]


@pytest.mark.parametrize("shift", [1e3, 1e7, 1e30, -1e3, -1e7, -1e30])
def test_far_outside(shift: float, backend: str) -> None:
    image, label, _, _ = Case(size=(3, 4, 17)).make()
    for axis in range(3):
        matrix = torch.eye(3, 4)[None] * 1.1
        matrix[0, axis, 3] = shift
        out, label_out = warp(image, label, matrix, backend=backend)
        assert label_out is not None
        assert not out.any()
        assert not label_out.any()
        inside, _ = warp(image, label, matrix, padding="border", backend=backend)
        edge = image.select(axis + 2, -1 if shift > 0 else 0).unsqueeze(axis + 2)
        assert inside.max() <= edge.max() + VALUE
        assert inside.min() >= edge.min() - VALUE


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_displacement_that_is_not_a_number_reads_outside_and_stays_where_it_is(value: float, backend: str) -> None:
    image, label, matrix, displacement = Case(size=(4, 5, 18), grid=(4, 5, 18), turn=0.2).make()
    assert displacement is not None
    before, _ = warp(image, label, matrix, displacement, backend=backend)
    displacement[0, 1, 2, 3, 4] = value
    out, label_out = warp(image, label, matrix, displacement, backend=backend)
    assert label_out is not None
    assert out[0, 0, 2, 3, 4] == 0
    assert label_out[0, 0, 2, 3, 4] == 0
    before[0, 0, 2, 3, 4] = 0
    assert torch.equal(out, before)
    clamped, _ = warp(image, label, matrix, displacement, padding="border", backend=backend)
    assert torch.isfinite(clamped).all()
    if math.isnan(value):
        assert clamped[0, 0, 2, 3, 4] == image[0, 0, 0, 0, 0]


def test_strides_do_not_matter(backend: str) -> None:
    image, label, matrix, displacement = Case(channels=2, n=2, size=(5, 6, 9), grid=(2, 3, 2)).make()
    assert label is not None
    assert displacement is not None
    wanted, label_wanted = warp(image, label, matrix, displacement, backend=backend)
    wide = torch.zeros(2, 2, 7, 8, 11)
    wide[:, :, 1:6, 1:7, 1:10] = image
    turned = displacement.permute(0, 1, 4, 3, 2).contiguous().permute(0, 1, 4, 3, 2)
    for other in (image.contiguous(memory_format=torch.channels_last_3d), wide[:, :, 1:6, 1:7, 1:10]):
        out, label_out = warp(other, label.transpose(3, 4).contiguous().transpose(3, 4),
                              matrix.transpose(1, 2).contiguous().transpose(1, 2), turned, backend=backend)
        assert label_out is not None
        assert label_wanted is not None
        assert torch.equal(out, wanted)
        assert torch.equal(label_out, label_wanted)


@pytest.mark.parametrize("name", ["two samples, three channels, two labels", "coarse"])
def test_defaults_of_torch_do_not_matter(name: str, backend: str) -> None:
    """Neither a default device, on which nothing here is, nor a default type reaches what `warp` makes for itself."""
    inputs = CASES[name].make()
    wanted, label_wanted = warp(*inputs, backend=backend)
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.float64)
        out, label_out = warp(*inputs, backend=backend)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(dtype)
    assert torch.equal(out, wanted)
    assert label_out is not None
    assert label_wanted is not None
    assert torch.equal(label_out, label_wanted)


def test_taps_of_the_longest_axis_are_exact() -> None:
    """The longest axis that Triton's kernel takes is where its integers of 32 bits are nearly used up."""
    size = triton_backend.LONGEST_AXIS
    for coarse in (size, size - 1, 3, 1):
        for first in (0, size // 2, size - 64):
            found = torch.empty(3, 64, dtype=torch.float64)
            taps[(1,)](found, first, size, coarse, COUNT=64)
            numerator = ((2 * np.arange(first, first + 64, dtype=np.int64) + 1) * coarse - size).clip(0)
            low, rest = numerator // (2 * size), numerator % (2 * size)
            high = np.where(rest > 0, np.minimum(low + 1, coarse - 1), low)
            assert found[:2].tolist() == [low.tolist(), high.tolist()]
            assert np.abs(found[2].numpy() - rest / (2 * size)).max() <= 2**-24


def test_threads_do_not_change_a_bit() -> None:
    inputs = Case(n=2, channels=2, size=(33, 40, 150), grid=(4, 5, 6)).make()
    threads = torch.get_num_threads()
    try:
        found = []
        for torch_threads in (1, 2, 3):
            torch.set_num_threads(torch_threads)
            found.append(warp(*inputs, backend="native"))
    finally:
        torch.set_num_threads(threads)
    for out, label_out in found[1:]:
        assert torch.equal(out, found[0][0])
        assert label_out is not None
        assert torch.equal(label_out, found[0][1])


# ---- the definition against others' ----------------------------------------------------------------------------------


def sources(matrix: Tensor, displacement: Tensor | None, size: torch.Size) -> Tensor:
    """(N, 3, D, H, W) float64, computed voxel by voxel in NumPy."""
    found = np.empty((len(matrix), 3, *size))
    for n in range(len(matrix)):
        u = np.zeros((3, *size))
        if displacement is not None:
            field = displacement[n].double().numpy()
            at = np.stack(np.meshgrid(*[np.clip((np.arange(big) + 0.5) * small / big - 0.5, 0, small - 1)
                                        for big, small in zip(size, field.shape[1:], strict=True)], indexing="ij"))
            u = np.stack([map_coordinates(component, at, order=1, mode="nearest") for component in field])
        place = np.indices(size) + u
        m = matrix[n].double().numpy()
        found[n] = np.tensordot(m[:, :3], place, 1) + m[:, 3, None, None, None]
    return torch.from_numpy(found)


DEFINITION = [Case(n=2, channels=2, size=(9, 10, 11)), Case(size=(8, 9, 13), grid=(3, 4, 5), n=2),
              Case(size=(6, 7, 8), grid=(6, 7, 8))]


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("case", DEFINITION, ids=str)
def test_the_definition_is_grid_sample(case: Case, padding: str) -> None:
    """In float64: to rounding of 1e-16 times sizes and steps."""
    image, label, matrix, displacement = case.make()
    assert label is not None
    source = sources(matrix, displacement, image.shape[2:])
    spans = torch.tensor(case.size, dtype=torch.float64).view(1, 3, 1, 1, 1)
    grid = ((2 * source + 1) / spans - 1).flip(1).permute(0, 2, 3, 4, 1)
    out, label_out = definition(image, label, matrix, displacement, padding)
    wanted = F.grid_sample(image.double(), grid, mode="bilinear", padding_mode=padding, align_corners=False)
    assert (out - wanted).abs().max() <= 1e-12
    nearest = F.grid_sample(label.double(), grid, mode="nearest", padding_mode=padding, align_corners=False)
    assert label_out is not None
    assert torch.equal(label_out.double(), nearest)  # no coordinate here is within 1e-12 of a tie
    assert not near_tie(matrix, displacement, image.shape[2:], within=1e-12).any()


@pytest.mark.parametrize("case", DEFINITION, ids=str)
def test_the_border_is_scipys_nearest(case: Case) -> None:
    image, label, matrix, displacement = case.make()
    out, _ = definition(image, label, matrix, displacement, "border")
    source = sources(matrix, displacement, image.shape[2:]).numpy()
    for n in range(case.n):
        for c in range(case.channels):
            wanted = map_coordinates(image[n, c].double().numpy(), source[n], order=1, mode="nearest")
            assert np.abs(out[n, c].numpy() - wanted).max() <= 1e-12


def centred(affine: Tensor, size: tuple[int, ...]) -> Tensor:
    """MONAI's 4 × 4 matrix, whose coordinates count from the centre, as one of ours: (1, 3, 4)."""
    centre = (torch.tensor(size, dtype=torch.float64) - 1) / 2
    a, t = affine[:3, :3].double(), affine[:3, 3].double()
    return torch.cat([a, (t + centre - a @ centre)[:, None]], 1)[None].float()


def plain(tensor: Any) -> Tensor:
    """MONAI's tensor without what it knows of its place."""
    return torch.as_tensor(tensor).as_subclass(Tensor)


# MONAI's coordinates are float32, normalised to [-1, 1] and back: a few roundings of numbers up to the size of an axis.
def monai_error(size: tuple[int, ...]) -> float:
    return 8 * 2**-24 * max(size)


@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_monai_affine(padding: str, backend: str) -> None:
    image, label, _, _ = Case(size=(12, 9, 20)).make()
    assert label is not None
    how: dict[str, Any] = {"rotate_params": (0.4, -0.6, 0.25), "shear_params": (0.1, -0.2, 0.05, 0.15, -0.1, 0.2),
                           "translate_params": (1.3, -0.7, 2.1), "scale_params": (1.15, 0.85, 0.95), "padding_mode": padding}
    wanted = plain(Affine(**how, mode="bilinear", image_only=True)(image[0]))
    nearest = plain(Affine(**how, mode="nearest", image_only=True)(label[0].float()))
    del how["padding_mode"]
    _, affine = AffineGrid(**how)(tuple(image.shape[2:]))
    matrix = centred(plain(affine), image.shape[2:])
    out, label_out = warp(image, label, matrix, padding=padding, backend=backend)
    error = monai_error(image.shape[2:])
    assert (out[0] - wanted).abs().max() <= VALUE + 3 * error
    tie = near_tie(matrix, None, image.shape[2:], within=COORDINATE + error)
    assert tie.sum() <= 5
    assert label_out is not None
    assert torch.equal(label_out.where(~tie, 0).float(), nearest[None].where(~tie, 0).float())


def test_monai_resample_of_a_dense_field(backend: str) -> None:
    image, _, matrix, displacement = Case(size=(8, 9, 13), grid=(8, 9, 13)).make()
    source = sources(matrix, displacement, image.shape[2:])[0]
    grid = create_grid((8, 9, 13), backend="torch")
    grid[:3] = source - (torch.tensor([8, 9, 13]).view(3, 1, 1, 1) - 1) / 2
    wanted = plain(Resample(mode="bilinear", padding_mode="zeros")(image[0], grid))
    out, _ = warp(image, None, matrix, displacement, backend=backend)
    assert (out[0] - wanted).abs().max() <= VALUE + 3 * monai_error((8, 9, 13))


def test_monai_elastic(backend: str) -> None:
    """Its smoothed field is our displacement on the image's own grid; its affine map comes after, as ours does."""
    image, _, _, _ = Case(size=(12, 9, 20)).make()
    transform = Rand3DElastic(sigma_range=(1, 2), magnitude_range=(8, 12), prob=1, rotate_range=(0.5, 0.5, 0.5),
                              scale_range=(0.1, 0.1, 0.1), mode="bilinear", padding_mode="zeros")
    transform.set_random_state(3)
    fields: list[Tensor] = []
    resampler = transform.resampler
    transform.resampler = lambda *a, **k: fields.append(plain(a[1]).clone()) or resampler(*a, **k)
    wanted = plain(transform(image[0]))
    affine = plain(transform.rand_affine_grid.get_transformation_matrix())
    size = image.shape[2:]
    moved = torch.linalg.inv(affine.double()) @ fields[0].double().flatten(1)  # what the affine map was given: o - centre + u
    centre = (torch.tensor(size, dtype=torch.float64).view(3, 1, 1, 1) - 1) / 2
    displacement = moved.view(4, *size)[:3] + centre - torch.from_numpy(np.indices(size))
    assert displacement.abs().max() > 0.5
    out, _ = warp(image, None, centred(affine, size), displacement[None].float(), backend=backend)
    assert (out[0] - wanted).abs().max() <= VALUE + 3 * monai_error(size)


# ---- wrong calls -----------------------------------------------------------------------------------------------------

IMAGE, LABEL, MATRIX = torch.rand(2, 1, 4, 5, 6), torch.zeros(2, 1, 4, 5, 6, dtype=torch.uint8), torch.eye(3, 4).repeat(2, 1, 1)


def with_value(value: float) -> Tensor:
    matrix = MATRIX.clone()
    matrix[1, 2, 3] = value
    return matrix


@pytest.mark.parametrize(("changed", "message"), [
    ({"image": IMAGE[0]}, r"image must be \(N, C, D, H, W\) with no empty axis, got shape \(1, 4, 5, 6\)"),
    ({"image": IMAGE[:, :0]}, r"image must be .* no empty axis, got shape \(2, 0, 4, 5, 6\)"),
    ({"image": IMAGE.double()}, "image must be float32 or float16 or bfloat16, got float64"),
    ({"image": IMAGE.numpy()}, "image must be a tensor .*, got ndarray"),
    ({"image": IMAGE.to_sparse()}, "image must be a dense tensor, got torch.sparse_coo"),
    ({"image": IMAGE.clone().requires_grad_()}, "image must not require a gradient"),
    ({"label": LABEL.long()}, "label must be uint8 or int16 or int32, got int64"),
    ({"label": LABEL[:1]}, r"label must have the image's samples and voxels, \(2, 'L', 4, 5, 6\), got \(1, 1, 4, 5, 6\)"),
    ({"label": LABEL[..., :5]}, r"label must have .*, got \(2, 1, 4, 5, 5\)"),
    ({"label": LABEL.to("meta")}, "label must be on the image's device cpu, got meta"),
    ({"matrix": MATRIX[:1]}, r"matrix must be \(2, 3, 4\), got \(1, 3, 4\)"),
    ({"matrix": MATRIX[:, :, :3]}, r"matrix must be \(2, 3, 4\), got \(2, 3, 3\)"),
    ({"matrix": MATRIX.double()}, "matrix must be float32, got float64"),
    ({"matrix": MATRIX.to("meta")}, "matrix must be on the CPU or on the image's device cpu, got meta"),
    ({"matrix": MATRIX.clone().requires_grad_()}, "matrix must not require a gradient"),
    ({"matrix": with_value(math.nan)}, "matrix must be finite, got nan"),
    ({"matrix": with_value(-math.inf)}, "matrix must be finite, got -inf"),
    ({"displacement": torch.zeros(2, 2, 2, 2, 2)}, r"displacement must be \(2, 3, 'd', 'h', 'w'\), got \(2, 2, 2, 2, 2\)"),
    ({"displacement": torch.zeros(2, 3, 2, 2)}, r"displacement must be \(N, 3, d, h, w\) .*, got shape \(2, 3, 2, 2\)"),
    ({"displacement": torch.zeros(2, 3, 5, 5, 6)},
     r"displacement must be no larger than the image: grid \(5, 5, 6\) against \(4, 5, 6\)"),
    ({"displacement": torch.zeros(2, 3, 2, 2, 2).half()}, "displacement must be float32, got float16"),
    ({"displacement": torch.zeros(2, 3, 2, 2, 2, requires_grad=True)}, "displacement must not require a gradient"),
    ({"padding": "reflection"}, "padding must be one of zeros, border, got 'reflection'"),
    ({"backend": "cuda"}, "backend must be one of auto, native, reference, triton, got 'cuda'"),
])
def test_wrong_calls(changed: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"image": IMAGE, "label": LABEL, "matrix": MATRIX, **changed}
    with pytest.raises(ValueError, match=message) as caught:
        warp(**call)
    assert "\n" not in str(caught.value)


def test_auto_on_the_cpu_is_native(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Case(size=(12, 13, 40), grid=(2, 2, 2)).make()
    assert torch.equal(warp(*inputs)[0], warp(*inputs, backend="native")[0])
    monkeypatch.setattr("dropgen_fast.kernels.warp.native.MISSING", "the native library was not built")
    assert torch.equal(warp(*inputs)[0], warp(*inputs, backend="reference")[0])
    with pytest.raises(RuntimeError, match="backend 'native' cannot take this call: the native library was not built; what can"):
        warp(*inputs, backend="native")


def test_a_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.sizeof", lambda kind: 8)
    with pytest.raises(RuntimeError, match=f"warp: {library.STATUS[3]}"):
        warp(IMAGE, LABEL, MATRIX, backend="native")
