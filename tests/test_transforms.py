"""Low resolution, Gibbs ringing, smoothing, sharpening: against MONAI voxel by voxel, and what differs on purpose."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import monai.transforms as mt
import numpy as np
import pytest
import torch
from torch import Tensor

from dropgen_fast.data import transforms
from dropgen_fast.data.augmentation import AugmentationConfig
from dropgen_fast.data.transforms import gaussian_sharpen, gaussian_smooth, gibbs_ringing, is_smoothed, low_resolution
from dropgen_fast.kernels.intensity_chain import IntensityParameters
from dropgen_fast.kernels.intensity_chain.reference import intensity_chain

ROUNDING = 2.0**-24  # of a float32 near 1; images are in [0, 1]
SHAPES = [(9, 16, 13), (12, 7, 20), (16, 16, 16), (1, 6, 5)]
N, C = 3, 2


def make_image(shape: tuple[int, ...], samples: int = N, channels: int = C, seed: int = 0) -> Tensor:
    return torch.rand((samples, channels, *shape), generator=torch.Generator().manual_seed(seed))


def array(result: Any) -> np.ndarray:
    """What a MONAI transform gave."""
    return np.asarray(torch.as_tensor(result))


def compare(got: Tensor, image: Tensor, expected: dict[int, np.ndarray], atol: float) -> None:
    """The chosen samples are as expected, the others untouched; the result is new memory, contiguous and float32."""
    for i in range(image.shape[0]):
        if i in expected:
            np.testing.assert_allclose(got[i].numpy(), expected[i], rtol=0, atol=atol, err_msg=f"sample {i}")
        else:
            assert torch.equal(got[i], image[i])
    assert got.is_contiguous()
    assert got.dtype == torch.float32
    assert got.untyped_storage().data_ptr() != image.untyped_storage().data_ptr()


CALLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "low_resolution": lambda image, on: low_resolution(image, 1 - 0.6 * on),
    "gibbs_ringing": lambda image, on: gibbs_ringing(image, 0.6 * on),
    "gaussian_smooth": lambda image, on: gaussian_smooth(image, on[:, None] * torch.tensor([0.5, 1.0, 0.7])),
    "gaussian_sharpen": lambda image, on: gaussian_sharpen(
        image, torch.full((len(on), 3), 0.8), torch.full((len(on), 3), 0.6), 20 * on),
}
"""Each transform with 1 = on and 0 = off for each sample."""


# --- what holds for all of them -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_nothing_chosen_gives_the_image_itself(name: str) -> None:
    image = make_image((6, 7, 5))
    assert CALLS[name](image, torch.zeros(N)) is image


@pytest.mark.parametrize("name", CALLS)
def test_only_the_chosen_samples_change_and_never_the_input(name: str) -> None:
    image = make_image((8, 9, 10), samples=4)
    before = image.clone()
    on = torch.tensor([1.0, 0, 0, 1])
    result = CALLS[name](image, on)
    assert torch.equal(image, before)
    for i in range(4):
        assert torch.equal(result[i], image[i]) == (on[i] == 0)
        alone = CALLS[name](image[i:i + 1], on[i:i + 1])
        assert torch.equal(result[i], alone[0])  # a sample does not depend on its batch


@pytest.mark.parametrize("name", CALLS)
def test_layout_and_autocast_change_no_voxel(name: str) -> None:
    image, on = make_image((8, 9, 10)), torch.ones(N)
    expected = CALLS[name](image, on)
    strided = image.to(memory_format=torch.channels_last_3d)
    assert not strided.is_contiguous()
    result = CALLS[name](strided, on)
    assert result.is_contiguous()
    torch.testing.assert_close(result, expected, rtol=0, atol=64 * ROUNDING)  # sharpening multiplies a rounding by 41
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(CALLS[name](image, on), expected)


@pytest.mark.parametrize("name", CALLS)
def test_wrong_images_are_refused(name: str) -> None:
    for image in (torch.zeros(2, 3, 4, 5), torch.zeros(1, 1, 4, 4, 4).double(), torch.zeros(1, 0, 4, 4, 4)):
        with pytest.raises(ValueError, match=r"image must be \(N, C, D, H, W\) float32"):
            CALLS[name](image, torch.ones(image.shape[0]))
    with pytest.raises(ValueError, match="must not require gradients"):
        CALLS[name](torch.zeros(1, 1, 4, 4, 4, requires_grad=True), torch.ones(1))
    with pytest.raises(ValueError, match=r"must be \(2,.*on the CPU, got \(3,"):
        CALLS[name](torch.zeros(2, 1, 4, 4, 4), torch.ones(3))


@pytest.mark.parametrize(("call", "message"), [
    (lambda x: low_resolution(x, torch.tensor([0.0])), "zoom must be above 0 and at most 1"),
    (lambda x: low_resolution(x, torch.tensor([1.5])), "zoom must be above 0 and at most 1"),
    (lambda x: low_resolution(x, torch.tensor([math.nan])), "zoom must be above 0 and at most 1"),
    (lambda x: gibbs_ringing(x, torch.tensor([-0.1])), "alpha must be from 0 to 1"),
    (lambda x: gibbs_ringing(x, torch.tensor([math.nan])), "alpha must be from 0 to 1"),
    (lambda x: gaussian_smooth(x, torch.tensor([[-1.0, 0, 0]])), "sigma_voxels must be finite and not negative"),
    (lambda x: gaussian_smooth(x, torch.tensor([[math.inf, 0, 0]])), "sigma_voxels must be finite and not negative"),
    (lambda x: gaussian_sharpen(x, torch.ones(1, 3), torch.full((1, 3), -1.0), torch.ones(1)), "sigma2_voxels must be finite"),
    (lambda x: gaussian_sharpen(x, torch.ones(1, 3), torch.ones(1, 3), torch.tensor([math.inf])), "alpha must be finite"),
])
def test_wrong_parameters_are_refused(call: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 1, 4, 4, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_a_gpu_gives_the_same_and_nothing_waits_for_it(name: str) -> None:
    image, on = make_image((24, 17, 30)), torch.tensor([1.0, 0, 1])
    expected = CALLS[name](image, on)
    on_gpu = image.cuda()
    CALLS[name](on_gpu, on)  # plans of the FFT are made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = CALLS[name](on_gpu, on)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=1e-5)  # sharpening: 41 times a few roundings; FFT: see below


# --- low resolution -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_low_resolution_like_monai(shape: tuple[int, int, int]) -> None:
    for zooms in ([0.25, 1.0, 0.71], [0.5, 0.333, 0.97], [1.0, 0.01, 0.6]):
        image, zoom = make_image(shape), torch.tensor(zooms)
        monai = mt.RandSimulateLowResolution(prob=1)
        monai._do_transform = True
        expected = {}
        for i in range(N):
            monai.zoom_factor = zoom[i].item()
            if zooms[i] < 1:
                expected[i] = array(monai(image[i], randomize=False))
        # The same operations; a trilinear mean of values up to 1 takes about a dozen roundings.
        compare(low_resolution(image, zoom, like_monai=True), image, expected, atol=12 * ROUNDING)


@pytest.mark.parametrize("shape", SHAPES)
def test_low_resolution_takes_the_voxel_nearest_to_each_coarse_centre(shape: tuple[int, int, int]) -> None:
    """Against the definition in float64: pick, then interpolate along each axis."""
    image, zoom = make_image(shape), torch.tensor([0.27, 1.0, 0.64])
    expected = {}
    for i in (0, 2):
        x = image[i].double().numpy()
        for axis, size in enumerate(shape, start=1):
            coarse = max(1, int(np.round(size * zoom[i].item())))
            centres = (np.arange(coarse) + 0.5) * size / coarse - 0.5
            assert np.abs(centres - np.floor(centres + 0.5)).max() <= 0.5
            picked = np.take(x, np.floor(centres + 0.5).astype(int), axis)
            weights = np.stack([np.interp(np.arange(size), centres, unit) for unit in np.eye(coarse)])
            x = np.moveaxis(np.tensordot(picked, weights, (axis, 0)), -1, axis)
        expected[i] = x
    # Source coordinates are float32: about 1e-6 of a voxel each, times a step of at most 1 to the neighbour.
    compare(low_resolution(image, zoom), image, expected, atol=12 * ROUNDING + 3e-6)


def shift_voxels(zoom: float, like_monai: bool, size: int = 48) -> np.ndarray:
    """How far the centre of mass of a blob moves along each axis."""
    at = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
    line = torch.exp(-at**2 / (2 * 5.0**2))
    image = (line[:, None, None] * line[:, None] * line)[None, None]
    result = low_resolution(image, torch.tensor([zoom]), like_monai=like_monai)[0, 0].double()
    return np.array([(result.sum(tuple({0, 1, 2} - {axis})) * at).sum() / result.sum() for axis in range(3)])


def test_low_resolution_leaves_the_image_where_it_is_and_monai_s_does_not() -> None:
    """Of three voxels ours takes the middle one, MONAI the first: (3 - 1) / 2 off. Of two neither is in the middle."""
    tail = 0.01  # what of the blob is beyond the border, times a shift
    np.testing.assert_allclose(shift_voxels(1 / 3, like_monai=False), 0, atol=tail)
    np.testing.assert_allclose(shift_voxels(1 / 3, like_monai=True), 1, atol=tail)
    np.testing.assert_allclose(shift_voxels(1 / 2, like_monai=False), -0.5, atol=tail)
    np.testing.assert_allclose(shift_voxels(1 / 2, like_monai=True), 0.5, atol=tail)


def test_low_resolution_errs_by_half_a_voxel_and_monai_s_by_half_a_coarse_one() -> None:
    size, inner = 60, slice(6, 54)
    ramp = torch.arange(size, dtype=torch.float32).view(1, 1, size, 1, 1).expand(1, 1, size, 4, 4)
    worst = {False: 0.0, True: 0.0}
    for zoom, like_monai in itertools.product(torch.linspace(0.2, 0.95, 60), worst):
        off = (low_resolution(ramp, zoom[None], like_monai=like_monai) - ramp)[:, :, inner].abs().max().item()
        worst[like_monai] = max(worst[like_monai], off)
    assert worst[False] <= 0.5 + 1e-4  # float32 of a ramp up to 60
    assert (5 - 1) / 2 <= worst[True] <= (5 + 1) / 2  # voxels of 5: the first is 2 from their middle


# --- Gibbs ringing ------------------------------------------------------------------------------------------------------


def fft_error(shape: tuple[int, int, int]) -> float:
    """Of a transform and its inverse in float32, for values up to 1.

    Each of the log2(voxels) stages adds about a rounding of the whole image's norm, which spreads evenly over the voxels;
    the largest of many is about five times as far out as the root mean square.
    """
    return 5 * 2 * max(1, math.log2(math.prod(shape))) * ROUNDING


def full_spectrum(image: Tensor, alpha: float) -> np.ndarray:
    """The definition in float64: every bin of the whole spectrum is kept or removed by its distance from zero frequency."""
    x = image.double().numpy()
    shape = x.shape[1:]
    frequencies = np.meshgrid(*(np.fft.fftfreq(n, 1 / n) for n in shape), indexing="ij")
    kept = np.sqrt(sum(f**2 for f in frequencies)) <= (1 - alpha) * max(shape) * np.sqrt(2) / 2
    return np.fft.ifftn(np.fft.fftn(x, axes=(1, 2, 3)) * kept, axes=(1, 2, 3)).real


ALPHAS = [[0.0, 0.33, 0.8], [0.1, 0.0, 0.5], [1.0, 0.95, 0.0], [0.6, 0.29289323, 0.7]]


@pytest.mark.parametrize("shape", SHAPES)
def test_gibbs_like_monai(shape: tuple[int, int, int]) -> None:
    for alphas in ALPHAS:
        image, alpha = make_image(shape), torch.tensor(alphas)
        expected = {i: array(mt.GibbsNoise(alpha[i].item())(image[i].double())) for i in range(N) if alphas[i] > 0}
        compare(gibbs_ringing(image, alpha, like_monai=True), image, expected, atol=fft_error(shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_gibbs_is_a_mask_about_zero_frequency(shape: tuple[int, int, int]) -> None:
    for alphas in ALPHAS:
        image, alpha = make_image(shape), torch.tensor(alphas)
        expected = {i: full_spectrum(image[i], alpha[i].item()) for i in range(N) if alphas[i] > 0}
        compare(gibbs_ringing(image, alpha), image, expected, atol=fft_error(shape))


def test_gibbs_on_odd_sizes_is_monai_s() -> None:
    image, alpha = make_image((9, 7, 11)), torch.tensor([0.3, 0.5, 0.8])
    assert torch.equal(gibbs_ringing(image, alpha), gibbs_ringing(image, alpha, like_monai=True))


def test_gibbs_keeps_a_constant_and_monai_s_mask_does_not() -> None:
    """MONAI's centre is √3/2 bins from zero frequency where all sizes are even: a radius below that loses the mean."""
    size = 16
    alpha = torch.tensor([1 - 0.85 * math.sqrt(3) / 2 / (size * math.sqrt(2) / 2)])
    constant = torch.full((1, 1, size, size, size), 0.7)
    error = 0.7 * fft_error((size, size, size))
    torch.testing.assert_close(gibbs_ringing(constant, alpha), constant, rtol=0, atol=error)
    torch.testing.assert_close(gibbs_ringing(constant, alpha, like_monai=True), torch.zeros_like(constant), rtol=0, atol=error)


def test_gibbs_treats_a_frequency_and_its_mirror_alike_and_monai_s_mask_does_not() -> None:
    """A cosine is two bins, f and -f. MONAI's distances of the two are |f + 1/2| and |f - 1/2|: between them it keeps half."""
    size, frequency = 32, 9
    wave = torch.cos(2 * math.pi * frequency * torch.arange(size, dtype=torch.float64) / size).float()
    image = wave.view(1, 1, size, 1, 1).expand(1, 1, size, 9, 9).contiguous()  # odd axes: MONAI's centre is right along them
    alpha = torch.tensor([1 - frequency / (size * math.sqrt(2) / 2) - 1e-3])  # radius just above 9
    error = fft_error((size, 9, 9))
    torch.testing.assert_close(gibbs_ringing(image, alpha), image, rtol=0, atol=error)
    torch.testing.assert_close(gibbs_ringing(image, alpha, like_monai=True), 0.5 * image, rtol=0, atol=error)


@pytest.mark.parametrize("radius", [0.0, 0.4999, 0.5, math.sqrt(2), math.sqrt(8.5), 11.313708498984761])
def test_the_squared_bound_decides_as_the_square_root_does(radius: float) -> None:
    squares = np.arange(0, 4 * 200) / 4
    np.testing.assert_array_equal(squares <= transforms._largest_within(radius), np.sqrt(squares) <= radius)


# --- smoothing and sharpening -------------------------------------------------------------------------------------------


def filter_error(*sigmas: float) -> float:
    """Of a filter in float32, for values up to 1, against another in float32.

    Along each axis every tap adds a product and a sum, one rounding each, and is itself known to about a rounding of 1,
    because MONAI takes it as a difference of two error functions.
    """
    return sum(3 * (2 * int(4 * s + 1) + 1) * ROUNDING for s in sigmas)


SIGMAS = torch.tensor([[0.0, 1.2, 0.5], [0.0, 0.0, 0.0], [0.11, 3.0, 0.9]])


@pytest.mark.parametrize("shape", SHAPES)
def test_smoothing_is_monai_s(shape: tuple[int, int, int]) -> None:
    """Sizes below the filters' among them."""
    image = make_image(shape)
    expected = {i: array(mt.GaussianSmooth(SIGMAS[i].tolist())(image[i])) for i in (0, 2)}
    compare(gaussian_smooth(image, SIGMAS), image, expected, atol=filter_error(*SIGMAS[2].tolist()))


def test_smoothing_draws_in_zeros_from_outside() -> None:
    """As MONAI, whose weights are not renormalised at a border: a constant fades there, to half of it for each axis."""
    constant = torch.ones(1, 1, 40, 40, 40)
    result = gaussian_smooth(constant, torch.tensor([[2.0, 0.0, 0.0]]))[0, 0]
    centre = math.erf(0.5 / (math.sqrt(2) * 2.0))
    torch.testing.assert_close(result[0], torch.full((40, 40), 0.5 + centre / 2), rtol=0, atol=1e-4)  # 6e-5 lies beyond 4 sigma
    torch.testing.assert_close(result[20], torch.ones(40, 40), rtol=0, atol=1e-4)


def worst_change(sigma: float, signed: bool) -> float:
    """The most that MONAI's filter of one sigma on all axes changes a voxel, in float64, over images of size up to 1."""
    taps = np.array([0.5 * (math.erf((k + 0.5) / (math.sqrt(2) * sigma)) - math.erf((k - 0.5) / (math.sqrt(2) * sigma)))
                     for k in range(-4, 5)])
    kernel = taps[:, None, None] * taps[:, None] * taps
    centre = kernel[4, 4, 4]
    neighbours = kernel.sum() - centre
    return (1 - centre) + neighbours if signed else max(1 - centre, neighbours)


def test_smoothing_that_changes_nothing_is_left_out() -> None:
    """The paper's sigma, 0 to 0.1 voxel: no voxel changes by more than 2e-6 of the image's largest value."""
    image = make_image((10, 11, 12), samples=5)
    image[4] = 0
    image[4, :, 5, 5, 5] = 1  # nothing loses more than a lonely voxel
    sigma = torch.tensor([0.1, 0.05, 0.0, 0.09, 0.1])[:, None].expand(5, 3).contiguous()
    assert gaussian_smooth(image, sigma) is image
    assert worst_change(0.1, signed=False) < 2e-6
    for i in (0, 1, 3, 4):
        monai = array(mt.GaussianSmooth(sigma[i].tolist())(image[i]))
        np.testing.assert_allclose(monai, image[i].numpy(), rtol=0, atol=2e-6 + filter_error(0.1))


def test_the_bound_under_which_smoothing_is_left_out() -> None:
    """Three axes left out change a voxel by at most 3e-6 of the largest value, 6e-6 where signs alternate."""
    below, above = 0.10220, 0.10230
    weight = transforms._neighbours_weight
    assert weight(below) < transforms.NEGLIGIBLE < weight(above)
    assert worst_change(below, signed=False) < 3 * transforms.NEGLIGIBLE
    assert worst_change(below, signed=True) < 6 * transforms.NEGLIGIBLE
    image = make_image((5, 6, 7), samples=1)
    assert gaussian_smooth(image, torch.full((1, 3), below)) is image
    result = gaussian_smooth(image, torch.full((1, 3), above))
    compare(result, image, {0: array(mt.GaussianSmooth(above)(image[0]))}, atol=filter_error(above))
    assert not torch.equal(result, image)
    assert is_smoothed(torch.tensor([[below] * 3, [below, above, 0.0], [0.0] * 3])).tolist() == [False, True, False]
    assert is_smoothed(torch.zeros(0, 3)).tolist() == []
    mixed = gaussian_smooth(image, torch.tensor([[below, 0.8, below]]))
    assert torch.equal(mixed, gaussian_smooth(image, torch.tensor([[0.0, 0.8, 0.0]])))


@pytest.mark.parametrize("shape", SHAPES)
def test_sharpening_is_monai_s(shape: tuple[int, int, int]) -> None:
    image = make_image(shape)
    first, second = SIGMAS + torch.tensor([0.3, 0.0, 0.4]), torch.tensor([[0.5, 0.0, 0.7], [0.5, 0.5, 0.5], [0.05, 1.0, 2.0]])
    for alphas in ([10.0, 0.0, 30.0], [-0.7, 17.3, 0.0]):
        expected = {i: array(mt.GaussianSharpen(first[i].tolist(), second[i].tolist(), alphas[i])(image[i]))
                    for i in range(N) if alphas[i] != 0}
        got = gaussian_sharpen(image, first, second, torch.tensor(alphas))
        # b + alpha (b - g2 * b) multiplies an error of b by up to 1 + 2 alpha.
        error = filter_error(*first[2].tolist(), *second[2].tolist())
        compare(got, image, expected, atol=(1 + 2 * max(map(abs, alphas))) * error)


def test_sharpening_does_not_leave_out_small_sigmas() -> None:
    """What smoothing may leave out is multiplied by alpha here. Beside a lonely voxel there is nothing else to see."""
    image, alpha = torch.zeros(1, 1, 5, 5, 5), 30.0
    image[0, 0, 2, 2, 2] = 1
    sigma = torch.full((1, 3), 0.1)
    got = gaussian_sharpen(image, torch.zeros(1, 3), sigma, torch.tensor([alpha]))
    weight = 0.5 * math.erfc(0.5 / (math.sqrt(2) * sigma[0, 0].item()))
    for beside in ((1, 2, 2), (2, 3, 2), (2, 2, 1)):
        assert got[0, 0][beside].item() == pytest.approx(-alpha * weight, rel=1e-5)  # weights of 1 - 6e-7 left out, roundings
        blurred = gaussian_sharpen(image, sigma, torch.zeros(1, 3), torch.tensor([alpha]))
        assert blurred[0, 0][beside].item() == pytest.approx(weight, rel=1e-5)


@pytest.mark.parametrize("sigma", [1e-30, 0.05, 0.1, 0.13, 0.5, 0.9, 3.0])
def test_taps_are_monai_s(sigma: float) -> None:
    from monai.networks.layers import gaussian_1d

    taps = transforms._taps(sigma)
    np.testing.assert_allclose([*taps[:0:-1], *taps], gaussian_1d(torch.tensor(sigma)).numpy(), rtol=0, atol=2 * ROUNDING)


# --- the page -----------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "augmentation.md"


def value_of(cell: str) -> Any:
    """What a cell of the page's table of settings says."""
    if cell in ("true", "false"):
        return cell == "true"
    if " … " in cell:
        return tuple(value_of(part) for part in cell.split(" … "))
    if "," in cell:
        return tuple(int(part) for part in cell.split(","))
    angle = re.fullmatch(r"(-?)π/(\d+)", cell)
    return float(f"{angle[1]}{math.pi / int(angle[2])}") if angle else float(cell)


def test_the_page_has_every_setting_and_its_value_in_each_recipe() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    assert [row[0] for row in rows] == [field.name for field in dataclasses.fields(AugmentationConfig)]
    for column, recipe in ((1, AugmentationConfig()), (2, AugmentationConfig.nnunet())):
        probability = 1.0
        for row in rows:
            value = getattr(recipe, row[0])
            if row[0].endswith("_probability"):
                probability = value
            if row[column] == "–":
                assert probability == 0, row
            else:
                assert value_of(row[column]) == pytest.approx(value), row


def test_the_page_s_pictures_are_drawn_by_their_script(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("draw_augmentation", ROOT / "docs" / "draw_augmentation.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    drawn = {path.name for path in module.draw(tmp_path)}
    assert drawn == set(re.findall(r"\]\((augmentation_\w+\.png)\)", PAGE.read_text()))
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in drawn)


def rescaled(image: Tensor, *, smoothed: bool = False, **factors: Sequence[float]) -> Tensor:
    """One sample through brightness and contrast as given, smoothing where asked for, and the last rescaling."""
    neutral = IntensityParameters.neutral(1, image.shape[1])
    image = intensity_chain(image, dataclasses.replace(neutral, **{name: torch.tensor([f]) for name, f in factors.items()}))
    if smoothed:
        image = gaussian_smooth(image, torch.ones(1, 3))
    return intensity_chain(image, dataclasses.replace(neutral, rescale=torch.tensor([True])))


def test_what_the_page_says_that_the_last_rescaling_undoes() -> None:
    one, two = make_image((9, 8, 7), 1, 1), make_image((9, 8, 7), 1, 2)
    error = 100 * ROUNDING  # some ten roundings of values up to 1.3, over a range of at least 0.2
    for smoothed in (False, True):
        plain = rescaled(one, smoothed=smoothed)
        torch.testing.assert_close(rescaled(one, brightness=[1.3], smoothed=smoothed), plain, rtol=0, atol=error)
        assert (rescaled(one, contrast=[1.3], smoothed=smoothed) - plain).abs().max() > 0.01
    torch.testing.assert_close(rescaled(one, contrast=[0.7]), rescaled(one), rtol=0, atol=error)
    assert (rescaled(one, contrast=[0.7], smoothed=True) - rescaled(one, smoothed=True)).abs().max() > 0.01
    assert (rescaled(two, brightness=[1.3, 0.8]) - rescaled(two)).abs().max() > 0.1
