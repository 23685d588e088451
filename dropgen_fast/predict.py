"""``python -m dropgen_fast.predict``: segment NIfTI images with a trained run, in their original geometry."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from tqdm import tqdm

from dropgen_fast import checkpoint
from dropgen_fast.cli import run
from dropgen_fast.data.cohort import read_images
from dropgen_fast.data.geometry import save_like
from dropgen_fast.data.prepare import prepare_image
from dropgen_fast.errors import InputError
from dropgen_fast.files import write_atomically
from dropgen_fast.inference import choose_device, class_probabilities
from dropgen_fast.model import DropGen, FusionConfig, ModelConfig, build_model, check_extractor

MANIFEST = "predictions.json"


@dataclass(frozen=True)
class PredictConfig:
    """Segment NIfTI images with a trained run; writes <case>.nii.gz on each image's own grid."""

    run: Path
    """Folder of the run."""
    images: Path
    """Folder of images, <case>_0000.nii.gz for the first channel and so on (nnU-Net's naming)."""
    out: Path
    """Folder for the label maps."""
    checkpoint: Literal["best", "last"] = "best"
    """Which of the run's checkpoints."""
    extractor_weights: Path | None = None
    """Weights of the extractor, where they have moved since training."""
    overlap: float = 0.5
    """Share of a window that overlaps the next, in [0, 1)."""
    windows_per_batch: int = 1
    """Windows that go through the network at once."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:<n>."""
    overwrite: bool = False
    """Replace the predictions of another run in --out."""

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < 1:
            raise InputError(f"overlap must be in [0, 1), got {self.overlap}")
        if self.windows_per_batch < 1:
            raise InputError(f"windows_per_batch must be at least 1, got {self.windows_per_batch}")


class Predictor:
    """A trained model with what it needs to know of its data: classes, channels, spacing, window, patch."""

    def __init__(self, path: Path, device: torch.device, extractor_weights: Path | None = None) -> None:
        """Load a checkpoint.

        Raises:
            InputError: no checkpoint there, a damaged one, or an extractor that is not the one of training.
        """
        state = checkpoint.load(path)
        self.task: dict[str, Any] = state["task"]
        self.step: int = state["step"]
        self.patch: tuple[int, int, int] = tuple(self.task["patch"])
        config = _model_config(state["model"], extractor_weights)
        self.model: DropGen = build_model(config, image_channels=len(self.task["channels"]), classes=len(self.task["classes"]),
                                          patch=self.patch)
        check_extractor(path, state["extractor"], self.model)
        self.model.network.load_state_dict(state["network"])
        self.model.to(device).eval()

    def predict(self, images: Sequence[Path], out: Path, *, overlap: float = 0.5, windows_per_batch: int = 1) -> None:
        """Segment one case, its channels in order, and write the label map to `out` on the grid of the first."""
        channels = self.task["channels"]
        if len(images) != len(channels):
            raise InputError(f"{images[0]}: the run was trained on {len(channels)} channels {channels}, "
                             f"this case has {len(images)}")
        prepared = prepare_image(images, self.task["spacing_mm"], self.task["intensity_window"])
        probabilities = class_probabilities(self.model, prepared.array, self.patch, overlap=overlap,
                                            windows_per_batch=windows_per_batch)
        if not probabilities.isfinite().all():
            raise InputError(f"{images[0]}: the network's scores are not finite; the run has diverged")
        save_like(images[0], prepared.grid_map.classes_back(probabilities.cpu().numpy()), out)


def _model_config(saved: dict[str, Any], extractor_weights: Path | None) -> ModelConfig:
    """The configuration that a checkpoint holds."""
    fusion = FusionConfig(mode=saved["fusion"]["mode"], p=tuple(saved["fusion"]["p"]))
    weights = extractor_weights or (Path(saved["extractor_weights"]) if saved["extractor_weights"] else None)
    return ModelConfig(**{**saved, "fusion": fusion, "extractor_weights": weights,
                          "network_options": tuple(saved["network_options"])})


def predict_all(config: PredictConfig) -> dict[str, str]:
    """Predict every case of a folder; the cases that could not be, with the reason."""
    cohort = read_images(config.images)
    path = config.run / f"{config.checkpoint}.pt"
    predictor = Predictor(path, choose_device(config.device), config.extractor_weights)
    _claim(config.out, {"run": str(config.run.resolve()), "checkpoint": config.checkpoint, "step": predictor.step,
                        "images": str(config.images.resolve()), "cases": [case.id for case in cohort.cases]}, config.overwrite)
    write_atomically(config.out / "dataset.json", json.dumps(
        {"labels": {name: value for value, name in enumerate(predictor.task["classes"])}}, indent=1))
    failed = {entry.id: entry.reason for entry in cohort.left_out}
    for case in tqdm(cohort.cases, desc="predict", unit="case", disable=None):
        out = config.out / f"{case.id}.nii.gz"
        try:
            predictor.predict(case.images, out, overlap=config.overlap, windows_per_batch=config.windows_per_batch)
        except (InputError, RuntimeError, MemoryError) as error:  # a case too large for the memory does not stop the others
            failed[case.id] = " ".join(str(error).split()) or type(error).__name__
            out.unlink(missing_ok=True)  # an earlier map of this case is not this run's
    total = len(cohort.cases) + len(cohort.left_out)
    print(f"{total - len(failed)} of {total} cases predicted into {config.out}")
    for case_id, reason in failed.items():
        print(f"  left out {case_id}: {reason}", file=sys.stderr)
    return failed


def _claim(out: Path, manifest: dict[str, Any], overwrite: bool) -> None:
    """Make `out` ours: a folder with the predictions of another run, or with other files, is not touched."""
    held = out / MANIFEST
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; name a folder")
    if held.exists():
        try:
            before = dict(json.loads(held.read_text()))
        except (ValueError, TypeError):
            before = {}
        if before != manifest:
            if not overwrite:
                raise InputError(f"--out {out} holds the predictions of another run; give another folder, or --overwrite")
            for case_id in before.get("cases", []):  # maps of two models side by side would be scored as one
                (out / f"{case_id}.nii.gz").unlink(missing_ok=True)
    elif out.exists() and any(out.iterdir()):
        raise InputError(f"--out {out} holds files that are no predictions of ours; give an empty or a new folder")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(held, json.dumps(manifest, indent=1))


def main(argv: Sequence[str]) -> int:
    """The command ``predict``; status 1 where a case could not be predicted."""
    return 1 if predict_all(tyro.cli(PredictConfig, args=argv, prog="dropgen-fast predict")) else 0


if __name__ == "__main__":
    sys.exit(run("predict", main, sys.argv[1:]))
