"""A small cohort of heads for the demonstration, made from one real template and written as an nnU-Net style folder.

The template is ICBM152 (MNI, 2009a, symmetric): an average T1 of 152 people with its grey and white matter maps, which
ship inside nilearn's wheel. What is real here and what is made:

* anatomy: the template, moved by a random affine map and by smooth displacements at two scales, one draw per subject;
* labels: cerebrospinal fluid, grey and white matter, from the template's tissue maps moved alike;
* the source contrast: the template's own T1 intensities; the others are piecewise linear maps of them, so that texture
  and partial volume stay but the order of the tissues' brightness does not;
* every image: tissue brightness of its own, a smooth bias field, Rician noise and a scanner gain, stored as int16.

A test subject has the same anatomy in every contrast: what differs between two scores of it is the contrast alone.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.affines import apply_affine
from scipy import ndimage

from dropgen_fast.errors import InputError

Floats = npt.NDArray[np.float32]

SHAPE = (60, 72, 60)
SPACING_MM = 3.0
CLASSES = ("background", "CSF", "grey matter", "white matter")
SOURCE = "t1"

TEMPLATE_FILE = "datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
BRAIN_T1 = 0.02
"""The template is zero outside the brain; of its brightest voxel, this much is inside."""

AFFINE_STD = 0.05
"""Of the entries of the affine matrix around the identity."""
SHIFT_STD_MM = 2.0
DISPLACEMENTS = ((5, 5.0), (10, 1.5))
"""Control points per axis and standard deviation in mm of the coarse and of the fine displacement."""
SMALLEST_JACOBIAN = 0.2
"""A displacement that squeezes a voxel below this share of its volume, or folds it, is drawn in until it does not."""

BRIGHTNESS_STD = 0.03
BIAS_POINTS, BIAS_STD = 3, 0.15
NOISE_STD = (0.01, 0.025)
GAIN = (400.0, 1600.0)


@dataclass(frozen=True)
class Domain:
    """A contrast: the brightness of each tissue, 0 to 1; None keeps the template's own T1."""

    title: str
    csf_grey_white: tuple[float, float, float] | None


DOMAINS = {
    SOURCE: Domain("T1 (source)", None),
    "t2": Domain("T2-like", (0.95, 0.55, 0.30)),
    "pd": Domain("PD-like", (0.70, 0.90, 0.50)),
    "inv": Domain("inverted T1", (0.80, 0.45, 0.15)),
}
TARGETS = tuple(name for name in DOMAINS if name != SOURCE)


@dataclass(frozen=True)
class CohortConfig:
    """How many subjects, and the two seeds: one for the anatomies, one for everything that a scanner adds."""

    training: int = 10
    validation: int = 2
    test: int = 4
    seed: int = 0
    """Of brightness, bias, noise and gain."""
    anatomy_seed: int = 0
    """Of the deformations; kept apart so that two seeds can be compared on the same heads."""


@dataclass(frozen=True)
class Template:
    """Maps (x, y, z) in 0..1 at the template's 1 mm, blurred to the cohort's resolution, and where they lie."""

    t1: Floats
    grey: Floats
    white: Floats
    brain: Floats
    affine: npt.NDArray[np.float64]
    centre_mm: npt.NDArray[np.float64]
    """Middle of the brain's bounding box, in mm."""
    brightness: tuple[float, float, float]
    """Median T1 of the voxels of each tissue."""


@dataclass(frozen=True)
class Subject:
    """One anatomy on the cohort's grid, arrays of SHAPE."""

    t1: Floats
    brain: Floats
    """Share of the voxel inside the brain."""
    label: npt.NDArray[np.uint8]


def case_name(subject: int, domain: str) -> str:
    """Name of a case, counting subjects from 1: sub03_t1."""
    return f"sub{subject:02d}_{domain}"


def domain_of(case: str) -> str:
    """The domain in a case's name."""
    return case.rsplit("_", 1)[1]


def write_cohort(folder: Path, config: CohortConfig) -> int:
    """Write imagesTr, labelsTr, imagesVal, labelsVal, imagesTs, labelsTs and, last of all, dataset.json.

    Training and validation subjects have the source contrast only; test subjects have every one.

    Args:
        folder: gets the cohort; made if it is not there.
        config: numbers of subjects and seeds. A subject does not depend on how many others there are.

    Returns:
        The number of images written.

    Raises:
        InputError: the template's files are not installed.
    """
    template = load_template()
    splits = {"Tr": (config.training, (SOURCE,)), "Val": (config.validation, (SOURCE,)), "Ts": (config.test, tuple(DOMAINS))}
    numbers = itertools.count(1)
    images = 0
    for split, (subjects, domains) in splits.items():
        for kind in ("images", "labels"):
            (folder / f"{kind}{split}").mkdir(parents=True, exist_ok=True)
        for number in itertools.islice(numbers, subjects):
            subject = make_subject(template, np.random.default_rng([config.anatomy_seed, number]))
            for domain in domains:
                case = case_name(number, domain)
                rng = np.random.default_rng([config.seed, number, list(DOMAINS).index(domain)])
                _save(folder / f"images{split}" / f"{case}_0000.nii.gz", render(subject, domain, template, rng), template)
                _save(folder / f"labels{split}" / f"{case}.nii.gz", subject.label, template)
                images += 1
    dataset = {"name": "dropgen_fast demonstration", "channel_names": {"0": "MR"},
               "labels": {name: value for value, name in enumerate(CLASSES)}, "numTraining": config.training,
               "file_ending": ".nii.gz",
               "description": "ICBM152 2009a template (MNI), randomly deformed; contrasts but T1 are made from T1",
               "domains": {name: domain.title for name, domain in DOMAINS.items()}}
    (folder / "dataset.json").write_text(json.dumps(dataset, indent=2) + "\n")
    return images


def load_template() -> Template:
    """The ICBM152 template from nilearn's package data (nilearn itself is not imported).

    Raises:
        InputError: nilearn is not installed, or without these files.
    """
    spec = importlib.util.find_spec("nilearn")
    if spec is None or spec.origin is None:
        raise InputError('the demo needs the MR template inside nilearn: pip install "dropgen_fast[demo]"')
    images = []
    for name in ("t1", "gm", "wm"):
        path = Path(spec.origin).parent / TEMPLATE_FILE.format(name)
        if not path.is_file():
            raise InputError(f"{path} is not there; the demo needs a nilearn of at least 0.10.4 with its data files")
        images.append(nib.load(path))
    t1, grey, white = (np.asanyarray(image.dataobj).astype(np.float32) for image in images)
    t1, grey, white = t1 / t1.max(), grey / grey.max(), white / white.max()
    brain = t1 > BRAIN_T1
    box = ndimage.find_objects(brain.astype(np.uint8))[0]
    middle = [(axis.start + axis.stop - 1) / 2 for axis in box]
    # A blur as wide at half its maximum as a voxel of the cohort stands for that voxel's partial volume.
    t1, grey, white, inside = (ndimage.gaussian_filter(values, SPACING_MM / 2.355)
                               for values in (t1, grey, white, brain.astype(np.float32)))
    label = _label_of(grey, white, inside)
    csf_t1, grey_t1, white_t1 = (float(np.median(t1[label == value])) for value in (1, 2, 3))
    affine = np.asarray(images[0].affine, dtype=np.float64)
    return Template(t1, grey, white, inside, affine, apply_affine(affine, middle), (csf_t1, grey_t1, white_t1))


def make_subject(template: Template, rng: np.random.Generator) -> Subject:
    """One anatomy: the template seen through a random deformation, at the cohort's spacing."""
    voxels = apply_affine(np.linalg.inv(template.affine), _sample_points_mm(template, rng))
    at = np.moveaxis(voxels, -1, 0)

    def moved(values: Floats) -> Floats:
        sampled: Floats = ndimage.map_coordinates(values, at, order=1, mode="constant")
        return sampled

    t1, grey, white, brain = map(moved, (template.t1, template.grey, template.white, template.brain))
    return Subject(t1, brain, _label_of(grey, white, brain))


def render(subject: Subject, domain: str, template: Template, rng: np.random.Generator) -> npt.NDArray[np.int16]:
    """An image of a subject in a contrast, as a scanner would give it."""
    target = DOMAINS[domain].csf_grey_white
    knots = np.array([0.0, *template.brightness, 1.0])
    tissue = np.array(template.brightness if target is None else target) + BRIGHTNESS_STD * rng.standard_normal(3)
    ends = (0.0, 1.0) if target is None else (tissue[0], tissue[2])
    image = np.interp(subject.t1, knots, [ends[0], *tissue, ends[1]]) * subject.brain
    image *= np.exp(_smooth_field(BIAS_POINTS, BIAS_STD, rng))
    noise = rng.uniform(*NOISE_STD) * rng.standard_normal((2, *SHAPE))
    magnitude = np.hypot(image + noise[0], noise[1])  # Rician, as the magnitude of a complex signal is
    scaled: npt.NDArray[np.int16] = np.rint(magnitude * rng.uniform(*GAIN)).astype(np.int16)
    return scaled


def grid_affine(template: Template) -> npt.NDArray[np.float64]:
    """Voxel to mm of the cohort's grid: RAS, centred on the template's brain."""
    affine = np.diag([SPACING_MM] * 3 + [1.0])
    affine[:3, 3] = template.centre_mm - SPACING_MM * (np.array(SHAPE) - 1) / 2
    return affine


def _label_of(grey: Floats, white: Floats, brain: Floats) -> npt.NDArray[np.uint8]:
    """The tissue with the largest share of each voxel of the brain; what is neither grey nor white is CSF."""
    largest = np.argmax(np.stack([brain - grey - white, grey, white]), axis=0) + 1
    label: npt.NDArray[np.uint8] = np.where(brain > 0.5, largest, 0).astype(np.uint8)
    return label


def _sample_points_mm(template: Template, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Where in the template each voxel of the subject's grid looks, (x, y, z, 3) in mm."""
    grid_mm = apply_affine(grid_affine(template), np.moveaxis(np.indices(SHAPE, dtype=np.float64), 0, -1))
    matrix = np.eye(3) + AFFINE_STD * rng.standard_normal((3, 3))
    shift_mm = SHIFT_STD_MM * rng.standard_normal(3)
    displacement_mm = np.zeros_like(grid_mm)
    for points, std_mm in DISPLACEMENTS:
        displacement_mm += np.stack([_smooth_field(points, std_mm, rng) for _ in range(3)], axis=-1)
    linear_mm = (grid_mm - template.centre_mm) @ matrix.T + template.centre_mm + shift_mm
    points_mm: npt.NDArray[np.float64] = linear_mm + displacement_mm
    while jacobian(points_mm).min() < SMALLEST_JACOBIAN * np.linalg.det(matrix):
        displacement_mm = 0.9 * displacement_mm
        points_mm = linear_mm + displacement_mm
    return points_mm


def jacobian(points_mm: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Determinant of the map from the cohort's grid to `points_mm` (x, y, z, 3): volume kept, below 0 where it folds."""
    rows = [np.stack([np.gradient(points_mm[..., of], SPACING_MM, axis=along) for along in range(3)], axis=-1) for of in range(3)]
    gradient = np.stack(rows, axis=-2)
    determinant: npt.NDArray[np.float64] = np.linalg.det(gradient)
    return determinant


def _smooth_field(points: int, std: float, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Cubic interpolation of normally distributed control points, `points` per axis, over SHAPE."""
    control = std * rng.standard_normal((points,) * 3)
    at = np.meshgrid(*[np.linspace(0, points - 1, n) for n in SHAPE], indexing="ij")
    field: npt.NDArray[np.float64] = ndimage.map_coordinates(control, at, order=3, mode="nearest")
    return field


def _save(path: Path, volume: npt.NDArray[np.int16] | npt.NDArray[np.uint8], template: Template) -> None:
    image = nib.Nifti1Image(volume, grid_affine(template))
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
