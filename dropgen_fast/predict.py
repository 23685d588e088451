"""``python -m dropgen_fast.predict``: segment NIfTI images with trained runs, in their original geometry.

While a case is computed, the next one is read and the last one is written, each in a thread of its own. A case that is done is
done: the same command again goes on with those that are missing.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
import tyro
from nibabel import orientations
from torch import Tensor
from tqdm import tqdm

from dropgen_fast import checkpoint
from dropgen_fast.cli import run
from dropgen_fast.data.augmentation import sided_classes
from dropgen_fast.data.cohort import ENDINGS, Case, Cohort, read_images
from dropgen_fast.data.geometry import GridMap, ras_grid, resize, save_like
from dropgen_fast.data.prepare import PreparedImage, prepare_image
from dropgen_fast.device import choose_device
from dropgen_fast.errors import InputError
from dropgen_fast.features.cache import FeatureCache
from dropgen_fast.files import replacing, write_atomically
from dropgen_fast.inference import FeatureSource, Offload, class_probabilities
from dropgen_fast.model import DropGen, ModelConfig, build_model, check_extractor

MANIFEST = "predictions.json"
PROBABILITIES = "probabilities"
NAMED = ("best", "last")
LEVELS = 65535
"""Probability 1 as uint16. NIfTI has no 16-bit floating point; whole numbers with a slope are as small and readable anywhere."""
FAILURES = (InputError, RuntimeError, MemoryError, OSError)
"""What stops one case and not the others: files, disks, a case too large for the memory."""


@dataclass(frozen=True)
class PredictConfig:
    """Segment NIfTI images with trained runs; writes <case>.nii.gz on each image's own grid.

    The same command again goes on where it was stopped, and redoes the cases whose images have changed since.
    """

    images: Path
    """Folder of images, <case>_0000.nii.gz for the first channel and so on (nnU-Net's naming); or one image of it."""
    out: Path
    """Folder for the label maps."""
    run: tuple[Path, ...] = ()
    """Folder of the run; of several, the probabilities are averaged."""
    checkpoint: tuple[str, ...] = ("best",)
    """best and last are a run's; or .pt files. All that are named are averaged."""
    extractor_weights: Path | None = None
    """Weights of the extractor, where they have moved since training."""
    overlap: float = 0.5
    """Share of a window that overlaps the next, in [0, 1)."""
    windows_per_batch: int = 1
    """Windows that go through the network at once."""
    mirror: tuple[int, ...] = ()
    """Average over flips along these axes: 0 left-right, 1 back-front, 2 down-up; not where classes are sided."""
    features: FeatureSource = "window"
    """Run the extractor on each window, as in training, or once on the volume, which is faster; see docs/prediction.md."""
    feature_cache: Path | None = None
    """Folder that keeps the features of volumes (--features volume): models with the same extractor compute them once."""
    offload: Offload = "auto"
    """Keep a volume in the CPU's memory while its windows go through the GPU; auto: where it would not fit."""
    save_probabilities: bool = False
    """Write probabilities/<case>.nii.gz too: (x, y, z, class) on the image's grid."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:<n>."""
    overwrite: bool = False
    """Remove the predictions in --out, of whatever run, and begin anew."""

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < 1:
            raise InputError(f"overlap must be in [0, 1), got {self.overlap}")
        if self.windows_per_batch < 1:
            raise InputError(f"windows_per_batch must be at least 1, got {self.windows_per_batch}")
        if self.feature_cache is not None and self.features != "volume":
            raise InputError("feature_cache keeps the features of whole volumes: it needs --features volume")
        if not set(self.mirror) <= {0, 1, 2} or len(set(self.mirror)) != len(self.mirror):
            raise InputError(f"mirror must be different axes of 0, 1 and 2, got {self.mirror}")
        named = [name for name in self.checkpoint if name in NAMED]
        for name in self.checkpoint:
            if name not in NAMED and not name.endswith(".pt"):
                raise InputError(f"checkpoint must be best, last or .pt files, got {name!r}")
        if bool(named) != bool(self.run):
            raise InputError(f"checkpoint {named[0]} is a run's: name its folder with --run" if named else
                             f"run {self.run[0]} is of no use beside .pt files alone: leave it out, or add best or last")

    @property
    def checkpoints(self) -> list[Path]:
        """The files to average, in the order of the command line."""
        return [*(folder / f"{name}.pt" for folder in self.run for name in self.checkpoint if name in NAMED),
                *(Path(name) for name in self.checkpoint if name not in NAMED)]


class Member:
    """A trained model, with what it needs to know of its data."""

    def __init__(self, path: Path, device: torch.device, extractor_weights: Path | None = None) -> None:
        """Load a checkpoint; its averaged weights, where it has some.

        Raises:
            InputError: no checkpoint there, a damaged one, or an extractor that is not the one of training.
        """
        state = checkpoint.load(path)
        self.path = path
        self.task: dict[str, Any] = state["task"]
        """Its classes, channels, spacing_mm, intensity_window and patch."""
        self.step: int = state["step"]
        self.patch: tuple[int, int, int] = tuple(self.task["patch"])
        config = ModelConfig.from_plain(state["model"], extractor_weights)
        self.model: DropGen = build_model(config, image_channels=len(self.task["channels"]), classes=len(self.task["classes"]),
                                          patch=self.patch)
        check_extractor(path, state["extractor"], self.model)
        self.model.network.load_state_dict(state.get("ema") or state["network"])
        self.model.to(device).eval()

    def identity(self) -> dict[str, Any]:
        """What decides its predictions."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return {"checkpoint": str(self.path.resolve()), "step": self.step, "sha256": digest.hexdigest()}


class Predictor:
    """One trained model, or several of one task whose probabilities are averaged."""

    AGREED = ("classes", "channels", "spacing_mm", "intensity_window")

    def __init__(self, checkpoints: Sequence[Path], device: torch.device, extractor_weights: Path | None = None) -> None:
        """Load the checkpoints.

        Raises:
            InputError: as `Member`; checkpoints of different tasks.
        """
        self.members = [Member(path, device, extractor_weights) for path in checkpoints]
        first = self.members[0]
        self.task = first.task
        for member in self.members[1:]:
            for key in self.AGREED:
                if member.task[key] != first.task[key]:
                    raise InputError(f"checkpoints of different tasks cannot be averaged: {key} of {member.path} is "
                                     f"{member.task[key]}, of {first.path} {first.task[key]}; predict with one after the other")

    def prepare(self, images: Sequence[Path]) -> PreparedImage:
        """Read a case, its channels in order, as the networks were trained to see it.

        Raises:
            InputError: as `prepare_image`; another number of channels.
        """
        channels = self.task["channels"]
        if len(images) != len(channels):
            raise InputError(f"{images[0]}: the run was trained on {len(channels)} channels {channels}, "
                             f"this case has {len(images)}")
        return prepare_image(images, self.task["spacing_mm"], self.task["intensity_window"])

    @torch.inference_mode()  # what is added up are its tensors
    def probabilities(self, image: npt.NDArray[np.float32], *, overlap: float = 0.5, windows_per_batch: int = 1,
                      mirror: Sequence[int] = (), features: FeatureSource = "window", offload: Offload = "auto",
                      cache: FeatureCache | None = None) -> Tensor:
        """Mean probabilities (classes, D, H, W), on the CPU, of a prepared volume (D, H, W, C); see `class_probabilities`.

        Raises:
            InputError: scores that are not finite.
        """
        total: Tensor | None = None
        for member in self.members:
            share = class_probabilities(member.model, image, member.patch, overlap=overlap, windows_per_batch=windows_per_batch,
                                        mirror=mirror, features=features, offload=offload, cache=cache).cpu()
            if not all(values.isfinite().all() for values in share):  # class by class: isfinite makes copies
                raise InputError(f"the scores of {member.path} are not finite; the run has diverged")
            total = share if total is None else total.add_(share)
        assert total is not None
        return total.div_(len(self.members)) if len(self.members) > 1 else total


# ---- a folder of cases -----------------------------------------------------------------------------------------------


def predict_all(config: PredictConfig) -> dict[str, str]:
    """Predict every case that is not done; the cases that could not be, with the reason."""
    cohort = _cohort(config.images)
    predictor = Predictor(config.checkpoints, choose_device(config.device), config.extractor_weights)
    sided = sided_classes(predictor.task["classes"])
    if config.mirror and sided:
        print(f"dropgen-fast predict: warning: --mirror is on, and {sided[0]!r} is a side: in a mirror image left is right",
              file=sys.stderr)
    folder = OutputFolder(config.out, config.save_probabilities)
    folder.claim({"models": [member.identity() for member in predictor.members], "images": str(config.images.resolve()),
                  "overlap": config.overlap, "mirror": sorted(config.mirror), "features": config.features},
                 {case.id: _files(case) for case in cohort.cases}, config.overwrite)
    write_atomically(config.out / "dataset.json", json.dumps(
        {"labels": {name: value for value, name in enumerate(predictor.task["classes"])}}, indent=1))
    todo = [case for case in cohort.cases if not folder.is_done(case.id)]
    segment = functools.partial(predictor.probabilities, overlap=config.overlap, windows_per_batch=config.windows_per_batch,
                                mirror=config.mirror, features=config.features, offload=config.offload,
                                cache=FeatureCache(config.feature_cache) if config.feature_cache is not None else None)
    failed = {entry.id: entry.reason for entry in cohort.left_out} | _predict_cases(predictor, segment, todo, folder)
    total, before = len(cohort.cases) + len(cohort.left_out), len(cohort.cases) - len(todo)
    print(f"{total - len(failed)} of {total} cases predicted into {config.out}"
          + (f", {before} of them before" if before else ""))
    for case_id, reason in failed.items():
        print(f"  left out {case_id}: {reason}", file=sys.stderr)
    return failed


def _predict_cases(
    predictor: Predictor, segment: Callable[[npt.NDArray[np.float32]], Tensor], cases: Sequence[Case], folder: OutputFolder,
) -> dict[str, str]:
    """Read, compute and write, three cases at a time at most; the cases that failed, with the reason."""
    failed: dict[str, str] = {}

    @contextlib.contextmanager
    def reported(case: Case) -> Iterator[None]:
        try:
            yield
        except FAILURES as error:
            failed[case.id] = " ".join(str(error).split()) or type(error).__name__
            folder.remove(case.id)  # an earlier map of this case is not this run's
            progress.update()

    def finish(case: Case, written: Future[None]) -> None:
        with reported(case):
            written.result()
            progress.update()

    with (ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as writer,
          tqdm(total=len(cases), desc="predict", unit="case", disable=None) as progress):
        writing: list[tuple[Case, Future[None]]] = []
        for case, reading in _one_ahead(lambda case: predictor.prepare(case.images), cases, reader):
            with reported(case):
                prepared = reading.result()
                probabilities = segment(prepared.array).numpy()
                while writing:  # no more than one case's probabilities wait beside those that are computed
                    finish(*writing.pop())
                writing.append((case, writer.submit(folder.write, case, prepared.grid_map, probabilities)))
        while writing:
            finish(*writing.pop())
    return failed


def _one_ahead(
    function: Callable[[Case], PreparedImage], cases: Iterable[Case], pool: ThreadPoolExecutor,
) -> Iterator[tuple[Case, Future[PreparedImage]]]:
    """Each case with the future of `function` on it; that of the next one is already begun."""
    current = None
    for case in cases:
        following = case, pool.submit(function, case)
        if current is not None:
            yield current
        current = following
    if current is not None:
        yield current


def _cohort(images: Path) -> Cohort:
    """The cases of a folder, or the one case that an image file belongs to."""
    if not (images.is_file() and images.name.endswith(ENDINGS)):
        return read_images(images)
    cohort = read_images(images.parent)
    mine = tuple(case for case in cohort.cases if images in case.images)
    # The channels of a case that was left out are not told, so all that were are.
    return replace(cohort, cases=mine, left_out=() if mine else cohort.left_out)


def _files(case: Case) -> list[list[str | int]]:
    """By what a change of a case's images is noticed: names, sizes and times of change in ns."""
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in case.images]


# ---- what is written ---------------------------------------------------------------------------------------------------


@dataclass
class OutputFolder:
    """A folder of predictions, with a manifest that says by what and from what they were made.

    A label map is written last of what belongs to a case, in one step: where it is, the case is done.
    """

    path: Path
    with_probabilities: bool = False

    def label(self, case_id: str) -> Path:
        """The label map of a case."""
        return self.path / f"{case_id}.nii.gz"

    def probabilities(self, case_id: str) -> Path:
        """The probabilities of a case."""
        return self.path / PROBABILITIES / f"{case_id}.nii.gz"

    def is_done(self, case_id: str) -> bool:
        """Whether all that is wanted of a case is there."""
        return self.label(case_id).exists() and (not self.with_probabilities or self.probabilities(case_id).exists())

    def remove(self, case_id: str) -> None:
        """Remove what was written of a case."""
        self.label(case_id).unlink(missing_ok=True)
        self.probabilities(case_id).unlink(missing_ok=True)

    def claim(self, settings: dict[str, Any], cases: dict[str, Any], overwrite: bool) -> None:
        """Make the folder ours, and remove from it the cases whose images have changed.

        Args:
            settings: what decides the predictions; they must be those of the folder.
            cases: by id, what decides the images. The folder may lack some, but must have no other.
            overwrite: remove all that a manifest says is of ours.

        Raises:
            InputError: a folder with the predictions of another run, or with other files. It is not touched.
        """
        held = self.path / MANIFEST
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"--out {self.path} is a file; name a folder")
        if held.exists():
            before = _read_manifest(held)
            if not overwrite and (before["settings"] != settings or not before["cases"].keys() <= cases.keys()):
                raise InputError(f"--out {self.path} holds the predictions of another run, or of images that are gone; give "
                                 "another folder, or --overwrite")
            for case_id, images in before["cases"].items():  # maps of two models side by side would be scored as one
                if overwrite or images != cases[case_id]:
                    self.remove(case_id)
        elif self.path.exists() and any(self.path.iterdir()):
            raise InputError(f"--out {self.path} holds files that are no predictions of ours; give an empty or a new folder")
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(held, json.dumps({"settings": settings, "cases": cases}, indent=1))

    def write(self, case: Case, grid_map: GridMap, probabilities: npt.NDArray[np.float32]) -> None:
        """Write a case's probabilities (classes, D, H, W) on the grid of its first image: their argmax, and themselves."""
        labels = grid_map.classes_back(probabilities)
        if self.with_probabilities:
            save_probabilities(case.images[0], quantized(grid_map, probabilities, labels), self.probabilities(case.id))
        save_like(case.images[0], labels, self.label(case.id))


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Settings and cases; of a damaged manifest, or one of another version, nothing is equal to ours."""
    with contextlib.suppress(ValueError):
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            cases = content.get("cases")
            return {"settings": content.get("settings") or {},
                    "cases": cases if isinstance(cases, dict) else dict.fromkeys(cases or [])}
    return {"settings": {}, "cases": {}}


def quantized(grid_map: GridMap, probabilities: npt.NDArray[np.float32], labels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint16]:
    """Probabilities (classes, D, H, W) on the original grid in steps of 1/65535: (I, J, K, classes), classes slowest in memory.

    Their argmax is `labels` (I, J, K), the argmax before rounding: another class that rounding made as large goes one step down.
    """
    result = np.empty((*labels.shape, len(probabilities)), np.uint16, order="F")
    highest = np.zeros(labels.shape, np.uint16)
    for k, values in enumerate(probabilities):
        result[..., k] = np.rint(_back(grid_map, values) * np.float32(LEVELS))
        np.maximum(highest, result[..., k], out=highest)
    for k in range(len(probabilities)):
        result[..., k] -= (labels != k) & (result[..., k] == highest)
    return result


def _back(grid_map: GridMap, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """A volume (D, H, W) from the prepared to the original grid (I, J, K), trilinearly."""
    ras = resize(values, ras_grid(grid_map.original).shape, 1)
    to_original = orientations.ornt_transform(orientations.axcodes2ornt("RAS"),
                                              orientations.io_orientation(grid_map.original.affine))
    return np.asarray(orientations.apply_orientation(ras.get() if hasattr(ras, "get") else ras, to_original))


def save_probabilities(original: Path, values: npt.NDArray[np.uint16], path: Path) -> None:
    """Write `quantized` probabilities (I, J, K, classes) as a NIfTI file with the affine and codes of the file `original`.

    Raises:
        InputError: the file cannot be written.
    """
    source = nib.load(original)
    header = source.header.copy()
    header.set_data_dtype(np.uint16)
    header["cal_min"] = header["cal_max"] = 0  # display limits of the image mean nothing here
    image = type(source)(values, source.affine, header)
    image.header.set_slope_inter(1 / LEVELS, 0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Straight into the compressor: a large volume's classes are not copied once more.
        with replacing(path) as file, gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=file, mtime=0) as packed:
            image.to_stream(packed)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error


def main(argv: Sequence[str]) -> int:
    """The command ``predict``; status 1 where a case could not be predicted."""
    return 1 if predict_all(tyro.cli(PredictConfig, args=argv, prog="dropgen-fast predict")) else 0


if __name__ == "__main__":
    sys.exit(run("predict", main, sys.argv[1:]))
