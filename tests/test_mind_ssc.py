"""`mind_ssc`: each backend against its definition in float64, within a bound that follows from the arithmetic."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from dropgen_fast.kernels.mind_ssc import CHANNELS, available_backends, mind_ssc, native, reference
from dropgen_fast.kernels.mind_ssc.op import forward_op

UNIT = 2**-24  # a rounding of float32, relative
ROUNDING = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}
"""Of the result's type: half the last place of numbers below 1, relative to the lower end of their binade."""
SMALLEST = {torch.float32: 2**-126, torch.float16: 2**-25, torch.bfloat16: 2**-126}
"""What may be lost of results that are no normal numbers."""


@pytest.fixture(params=("reference", "native", "triton"))
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend by name."""
    if reason := available_backends()[request.param]:
        pytest.fail(f"{request.param} must be here for the tests: {reason}")
    return str(request.param)


@dataclass(frozen=True)
class Case:
    """A call, and the image that it is made with."""

    size: tuple[int, int, int] = (3, 4, 7)
    n: int = 1
    radius: int = 1
    dilation: int = 1
    image_dtype: torch.dtype = torch.float32
    dtype: torch.dtype = torch.float32
    image: str = "noise"

    def make(self, device: str = "cpu") -> Tensor:
        """The image."""
        g = torch.Generator().manual_seed(sum(self.size) + self.n)
        image = torch.rand(self.n, 1, *self.size, generator=g)
        if self.image == "quiet":  # the variance is held from below in most of it
            image[:, :, :, :, self.size[2] // 4:] *= 0.003
        if self.image == "spike":  # and here from above at the spike, in a volume of nearly nothing
            image *= 1e-4
            image[:, :, self.size[0] // 2, self.size[1] // 2, self.size[2] // 2] = 1.0
        if self.image == "ramp":
            image = image * 1e-3 + torch.linspace(0, 1, self.size[2])
        if self.image_dtype in (torch.int16, torch.uint8):
            return (image * (255 if self.image_dtype == torch.uint8 else 20000)).to(self.image_dtype).to(device)
        return image.to(self.image_dtype).to(device)


def bound(image: Tensor, case: Case, backend: str) -> tuple[Tensor, Tensor]:
    """The definition in float64 and how far float32 may be from it, both (N, 12, D, H, W): the roundings of a call, one by one.

    A squared difference has 3, a sum over the box as many more as terms are added one after the other; both are of numbers that
    are not negative, so that they are relative to the sum. The definition in float32 scales the image first, by a number that is
    rounded as the products are: it adds 3 roundings of each intensity.
    """
    taps, greatest = 2 * case.radius + 1, image.abs().amax((1, 2, 3, 4), keepdim=True)
    ssd = reference.mean_squared_differences(image[:, 0], case.radius, case.dilation)
    roundings = UNIT * (3 + taps**2 + taps)

    def error_of(distance: Tensor) -> Tensor:
        scaled = 2 * 3 * UNIT * 2 * greatest * distance.sqrt() if backend == "reference" else 0.0  # (d + e)² - d² is about 2 d e
        return roundings * distance + scaled

    error, least = error_of(ssd), ssd.amin(1, keepdim=True)
    above = ssd - least
    above_error = error + error_of(least) + UNIT * above
    variance = above.mean(1, keepdim=True)
    variance_error = above_error.mean(1, keepdim=True) + 13 * UNIT * (variance + ssd.mean(1, keepdim=True))
    usual, usual_error = (t.mean((1, 2, 3, 4), keepdim=True) for t in (variance, variance_error))
    lower, upper = usual * 1e-3, usual * 1e3
    held_error = variance_error
    held_error = held_error.maximum(torch.where(variance < lower * 1.001, usual_error * 1e-3 + 3 * UNIT * lower, 0.0))
    held_error = held_error.maximum(torch.where(variance > upper * 0.999, usual_error * 1e3 + 3 * UNIT * upper, 0.0))
    held = variance.maximum(lower).minimum(upper) + reference.FLOOR
    exponent = above / held
    exponent_error = 1.01 * (above_error / held + exponent * (held_error / held + 8 * UNIT))  # 1.01: products of errors
    out = torch.exp(-exponent)
    largest = torch.exp(-(exponent - exponent_error).clamp(min=0))
    return out, largest - out + largest * (4 * UNIT + 1.01 * ROUNDING[case.dtype]) + SMALLEST[case.dtype]


def check(case: Case, backend: str, image: Tensor | None = None) -> Tensor:
    """A call against the definition; its result."""
    image = case.make() if image is None else image
    out = mind_ssc(image, radius=case.radius, dilation=case.dilation, dtype=case.dtype, backend=backend)
    assert (out.dtype, out.shape, out.device) == (case.dtype, (case.n, CHANNELS, *case.size), image.device)
    assert out.is_contiguous()
    wanted, allowed = bound(image.cpu().double(), case, backend)
    # Triton's interpreter cuts digits off where a GPU rounds to bfloat16.
    if backend == "triton" and case.dtype == torch.bfloat16 and not image.is_cuda:
        allowed = allowed + wanted * ROUNDING[case.dtype]
    excess = ((out.cpu().double() - wanted).abs() - allowed).max().item()
    assert excess <= 0, excess
    return out


CASES = {
    "plain": Case(),
    "two samples": Case(n=2, size=(4, 5, 6)),
    "beyond a column along z": Case(size=(17, 2, 2)), "beyond a column along y and x": Case(size=(1, 5, 65)),
    "radius 0": Case(radius=0), "radius 2": Case(radius=2, size=(2, 4, 6)), "radius 3": Case(radius=3, size=(4, 5, 6)),
    "two apart": Case(dilation=2), "three apart": Case(dilation=3, size=(7, 4, 7)),
    "radius 2, three apart": Case(radius=2, dilation=3, size=(2, 3, 7)),
    "radius and dilation beyond the volume": Case(radius=3, dilation=5, size=(2, 3, 4)),
    "one z": Case(size=(1, 7, 9)), "one y": Case(size=(8, 1, 9)), "one x": Case(size=(8, 4, 1)),
    "one voxel": Case(size=(1, 1, 1)),
    "two": Case(size=(2, 2, 2)), "two, two apart": Case(size=(2, 2, 2), dilation=2),
    "row": Case(size=(1, 1, 40)), "column": Case(size=(18, 1, 1)),
    "float16": Case(image_dtype=torch.float16), "bfloat16": Case(image_dtype=torch.bfloat16, n=2),
    "int16": Case(image_dtype=torch.int16), "uint8": Case(image_dtype=torch.uint8),
    "to bfloat16": Case(dtype=torch.bfloat16, size=(3, 4, 17)), "to float16": Case(dtype=torch.float16),
    "quiet": Case(image="quiet", size=(6, 4, 20)), "spike": Case(image="spike", radius=0, size=(30, 4, 64)),
    "ramp": Case(image="ramp", size=(6, 4, 20)),
}
LONG_INTERPRETED = ("radius 3", "radius and dilation beyond the volume")  # by the code of any radius but 1, as radius 2


@pytest.mark.parametrize("name", CASES)
def test_against_the_definition(name: str, backend: str) -> None:
    if backend == "triton" and name in LONG_INTERPRETED:
        pytest.skip("minutes in Triton's interpreter; the suite for a GPU has it")
    check(CASES[name], backend)


def test_the_images_hold_the_variance_at_both_ends() -> None:
    """Else the cases "quiet" and "spike" would not show what they are for."""
    for name, beyond in (("quiet", lambda v, usual: v < usual * 1e-3), ("spike", lambda v, usual: v > usual * 1e3)):
        case = CASES[name]
        ssd = reference.mean_squared_differences(case.make()[:, 0].double(), case.radius, case.dilation)
        variance = ssd.mean(1) - ssd.amin(1)
        held = beyond(variance, variance.mean())
        assert held.any()
        assert not held.all()


@pytest.mark.parametrize("case", [
    Case(size=(40, 70, 300)), Case(size=(3, 300, 17), n=2), Case(size=(50, 33, 129), dilation=2), Case(size=(9, 40, 1030)),
    Case(size=(30, 90, 150), radius=2), Case(size=(20, 130, 64), image="quiet", dtype=torch.bfloat16),
    Case(size=(24, 160, 160), radius=0, dilation=4), Case(size=(60, 60, 60), image="spike"),
], ids=str)
def test_the_native_kernel_beyond_one_strip(case: Case) -> None:
    check(case, "native")


@pytest.mark.parametrize("radius", [0, 1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
def test_every_small_size(radius: int, dilation: int) -> None:
    """Where most boxes leave the volume, along one axis or several, and neighbours beyond that."""
    for size in itertools.product(range(1, 6), repeat=3):
        check(Case(size=size, radius=radius, dilation=dilation), "native")


@pytest.mark.parametrize("level", ["0", "1"])
def test_each_level_of_the_cpu(level: str) -> None:
    """The library holds code for several instruction sets; one per process is picked, so ask other processes."""
    program = """
import torch
from test_mind_ssc import Case, check
for case in (Case(size=(5, 40, 37), n=2), Case(size=(3, 4, 16)), Case(size=(3, 4, 5), dilation=2),
             Case(radius=2, size=(4, 5, 33)), Case(size=(9, 8, 40), image="quiet"),
             Case(image="spike", radius=0, size=(24, 24, 36)),
             Case(dtype=torch.bfloat16), Case(image_dtype=torch.float16, dtype=torch.float16)):
    check(case, "native")
    print("fits")
"""
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "DROPGEN_FAST_CPU_LEVEL": level},
                          cwd=os.path.dirname(__file__), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["fits"] * 8


@pytest.mark.parametrize("case", [Case(size=(30, 70, 90), n=2), Case(size=(20, 40, 50), radius=2)], ids=str)
def test_threads_do_not_change_a_bit(case: Case) -> None:
    image, threads = case.make(), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 8, 64):
            torch.set_num_threads(count)
            found.append(mind_ssc(image, radius=case.radius, backend="native"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_a_sample_does_not_know_what_lies_beside_it(backend: str) -> None:
    image = Case(n=3).make()
    image[1] *= 100
    image[2] = 0.5
    whole = mind_ssc(image, backend=backend)
    for n in range(2):
        torch.testing.assert_close(mind_ssc(image[n:n + 1], backend=backend), whole[n:n + 1], rtol=0, atol=4 * UNIT)


# ---- results that are known ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "value"), [((2, 4, 6), 0.5), ((1, 1, 1), 0.0), ((1, 2, 40), -3e4)])
def test_a_constant_volume_is_ones(size: tuple[int, int, int], value: float, backend: str) -> None:
    assert torch.equal(mind_ssc(torch.full((2, 1, *size), value), backend=backend), torch.ones(2, CHANNELS, *size))


def test_the_most_alike_pair_has_one(backend: str) -> None:
    out = mind_ssc(Case(size=(6, 4, 20)).make(), backend=backend)
    assert torch.equal(out.amax(1), torch.ones(1, 6, 4, 20))
    assert out.min() > 0


@pytest.mark.parametrize(("power", "backend"), [(-8, "native"), (20, "native"), (40, "native"), (40, "triton")])
def test_intensities_of_any_size(power: int, backend: str) -> None:
    """Powers of 2 are exact: nothing changes but what 1e-9 is beside the variance, a rounding at most from a scale of 2^-8 on."""
    image = Case(size=(6, 4, 20)).make() * 8
    ssd = reference.mean_squared_differences((image * 2.0**-8)[:, 0].double(), 1, 1)
    floor = reference.FLOOR / (ssd.mean(1) - ssd.amin(1)).min().item()
    out, scaled = mind_ssc(image, backend=backend), mind_ssc(image * 2.0**power, backend=backend)
    # The exponent x moves by the share that the floor has of the variance, and x e^-x is at most 1/e.
    torch.testing.assert_close(scaled, out, rtol=0, atol=(floor if power < 0 else 1e-9) / math.e + 4 * UNIT)


def test_faint_intensities(backend: str) -> None:
    """Where 1e-9 decides."""
    case = Case(size=(6, 4, 20))
    assert check(case, backend, case.make() * 1e-6).min() > 0.9


def test_it_does_not_see_contrast(backend: str) -> None:
    """Inverted and shifted by what float32 represents: voxels are multiples of 2^-8."""
    image = (Case(size=(6, 4, 20)).make() * 256).round() / 256
    out = mind_ssc(image, backend=backend)
    for other in (1 - image, image + 2):
        torch.testing.assert_close(mind_ssc(other, backend=backend), out, rtol=0, atol=1e-5)
    assert (mind_ssc(image.square(), backend=backend) - out).abs().max() > 0.05


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_stays_in_its_sample(value: float, backend: str) -> None:
    image = Case(n=2, size=(4, 4, 20)).make()
    before = mind_ssc(image, backend=backend)
    image[1, 0, 2, 3, 4] = value
    out = mind_ssc(image, backend=backend)
    assert torch.equal(out[0], before[0])
    assert out[1].isnan().any()
    if math.isnan(value):
        assert out[1].isnan().all()


# ---- the call ----------------------------------------------------------------------------------------------------------


def test_strides_do_not_matter(backend: str) -> None:
    image = Case(n=2).make()
    wanted = mind_ssc(image, backend=backend)
    wide = torch.zeros(2, 3, 5, 6, 9)
    wide[:, 1:2, 1:4, 1:5, 1:8] = image
    turned = image.permute(0, 1, 4, 3, 2).contiguous().permute(0, 1, 4, 3, 2)
    for other in (wide[:, 1:2, 1:4, 1:5, 1:8], turned, image.contiguous(memory_format=torch.channels_last_3d)):
        assert torch.equal(mind_ssc(other, backend=backend), wanted)
    expanded = image[:1].expand(2, 1, 3, 4, 7)
    assert torch.equal(mind_ssc(expanded, backend=backend)[1], mind_ssc(image[:1], backend=backend)[0])


def test_defaults_of_torch_do_not_matter(backend: str) -> None:
    image = Case().make()
    wanted, dtype = mind_ssc(image, backend=backend), torch.get_default_dtype()
    try:
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.float64)
        out = mind_ssc(image, backend=backend)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(dtype)
    assert torch.equal(out, wanted)


def test_a_result_is_not_written_again() -> None:
    """Large results lie in memory that is used again, once nothing holds them."""
    image = Case(size=(32, 64, 64)).make()
    first = mind_ssc(image, backend="native")
    kept = first.clone()
    mind_ssc(1 - image.square(), backend="native")
    assert torch.equal(first, kept)


@pytest.mark.parametrize("chosen", ["auto", "native"])
def test_under_compile(chosen: str) -> None:
    image = Case(n=2).make()
    compiled = torch.compile(lambda x: mind_ssc(x, backend=chosen) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(image), mind_ssc(image) * 2)


def test_the_op_is_what_it_says(backend: str) -> None:
    if backend != "reference":
        torch.library.opcheck(forward_op, (Case().make(), 1, 2, torch.bfloat16, backend))


def test_auto_takes_what_fits() -> None:
    image = Case().make()
    assert torch.equal(mind_ssc(image), mind_ssc(image, backend="native"))
    assert torch.equal(mind_ssc(image.double()), mind_ssc(image.double(), backend="reference"))
    assert mind_ssc(image.double()).dtype == torch.float64
    far = native.FURTHEST + 1
    assert torch.equal(mind_ssc(image, dilation=far), mind_ssc(image, dilation=far, backend="reference"))


@pytest.mark.parametrize(("arguments", "message"), [
    ({"image": 3}, r"image must be a tensor \(N, 1, D, H, W\), got int"),
    ({"image": torch.zeros(1, 1, 4, 4)}, r"\(N, 1, D, H, W\) with no empty axis, got shape \(1, 1, 4, 4\)"),
    ({"image": torch.zeros(1, 2, 4, 4, 4)}, r"\(N, 1, D, H, W\) .* got shape \(1, 2, 4, 4, 4\)"),
    ({"image": torch.zeros(1, 1, 4, 0, 4)}, "no empty axis"),
    ({"image": torch.zeros(1, 1, 4, 4, 4, dtype=torch.int32)}, "image must be one of float32, .* got int32"),
    ({"image": torch.zeros(1, 1, 4, 4, 4).to_sparse()}, "dense tensor, got torch.sparse_coo"),
    ({"image": torch.zeros(1, 1, 4, 4, 4, requires_grad=True)}, "must not require a gradient: mind_ssc is not differentiable"),
    ({"radius": -1}, "radius must be at least 0 and dilation at least 1, both whole voxels, got -1 and 1"),
    ({"dilation": 0}, "got 1 and 0"),
    ({"dilation": 1.5}, "got 1 and 1.5"),
    ({"dtype": torch.float64}, "dtype must be one of float32, float16, bfloat16, got float64"),
    ({"backend": "cuda"}, "backend must be one of auto, native, reference, triton, got 'cuda'"),
])
def test_arguments_that_do_not_fit(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mind_ssc(**{"image": torch.zeros(1, 1, 4, 4, 4), **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_backend_that_cannot(backend: str) -> None:
    image = Case().make()
    wanted = f"'{backend}' cannot take this call: it computes in float32, and the image is float64"
    with pytest.raises(RuntimeError, match=wanted):
        mind_ssc(image.double(), backend=backend)
    with pytest.raises(RuntimeError, match="and dilation 64, and they are 1 and 65"):
        mind_ssc(image, dilation=65, backend=backend)
    with pytest.raises(RuntimeError, match=f"it looks up to radius {3 if backend == 'triton' else 64} .* they are 65 and 1"):
        mind_ssc(image, radius=65, backend=backend)


def test_the_op_checks_what_reaches_it_past_the_public_function() -> None:
    with pytest.raises(RuntimeError, match=r"'native' cannot take this call: it has no kernel for torch\.int32"):
        forward_op(torch.zeros(1, 1, 4, 4, 4, dtype=torch.int32), 1, 1, torch.float32, "native")


def test_the_bound_is_one() -> None:
    """It sees a distance that is off by one part in 10⁴, and is some sixty roundings at the median."""
    case = replace(Case(), size=(6, 4, 20))
    image = case.make().double()
    wanted, allowed = bound(image, case, "native")
    ssd = reference.mean_squared_differences(image[:, 0], 1, 1)
    ssd[:, 3] *= 1 + 1e-4
    above = ssd - ssd.amin(1, keepdim=True)
    other = torch.exp(-above / (above.mean(1, keepdim=True) + reference.FLOOR))
    assert ((other - wanted).abs() > allowed).any()
    assert allowed.median() < 64 * UNIT
