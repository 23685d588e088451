"""Settings of a training run."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from dropgen_fast.data.augment import ChainName
from dropgen_fast.data.augmentation import AugmentationConfig
from dropgen_fast.errors import InputError
from dropgen_fast.model import ModelConfig
from dropgen_fast.presets import Preset


@dataclass(frozen=True)
class TrainConfig:
    """Train a segmentation network on a prepared store: DropGen, or ERM to compare with."""

    store: Path
    """The prepared store (see prepare)."""
    out: Path
    """Folder of the run: settings, metrics, checkpoints, TensorBoard events."""
    preset: str | None = None
    """Name or YAML file of a preset; by default the one that the store was prepared with, else one derived from the store."""
    model: Annotated[ModelConfig, tyro.conf.arg(name="")] = field(default_factory=ModelConfig)
    """Method, extractor, fusion and network."""
    patch: tuple[int, int, int] | None = None
    """Training patch in voxels; default the preset's, else derived from the store."""
    num_subjects: int | None = None
    """Few-shot: train on this many subjects, drawn at random by the seed; default all."""
    subject_pattern: str = "sub-[0-9A-Za-z]+"
    """Regular expression for the part of a case's id that names its subject; an id without such a part is its own subject."""
    batch_size: int = 4
    """Patches per process that go through the network at once."""
    accumulate: int = 1
    """Batches whose gradients are averaged for one optimizer step."""
    steps: int = 250_000
    """Optimizer steps."""
    learning_rate: float = 2e-4
    """Of AdamW; falls to zero along a cosine over all steps."""
    warmup_steps: int = 0
    """Steps over which the learning rate first rises linearly."""
    weight_decay: float = 1e-5
    """Of AdamW."""
    clip_norm: float = 0.0
    """Gradients of a larger norm, over all weights, are scaled down to it; 0: none are."""
    ema_decay: float = 0.0
    """Validate, keep and predict with a moving average of the weights that keeps this share at each step; 0: without."""
    max_skipped: int = 20
    """A step whose gradients are not finite changes nothing; training stops after this many in a row."""
    loss: str = "dice_ce"
    """dice_ce (the paper's), or package.module:Name of any loss (scores, label) such as monai.losses:DiceFocalLoss."""
    loss_options: tuple[str, ...] = ()
    """Keyword arguments of the loss as name=value, for example gamma=2."""
    foreground_fraction: float = 0.0
    """Share of the patches that are placed on a foreground voxel of a random class; the others are uniform."""
    recipe: Literal["dropgen", "nnunet", "off"] | None = None
    """Where the augmentation's settings start from: the paper's, nnU-Net's, or none (off); default the preset's."""
    augmentation: Annotated[AugmentationConfig | None, tyro.conf.AvoidSubcommands] = None
    """Probabilities and ranges of the augmentations; what is not given comes from the preset, then from the recipe."""
    chain: ChainName = "fused"
    """What does the intensities: one op (fused), or one DALI operator after the other (dali); the same voxels."""
    validate_every: int = 1000
    """Steps between validations; last.pt is written then, and best.pt where the mean Dice has risen."""
    feature_cache: Path | None = None
    """Folder that keeps the features of validation volumes, so that each is extracted once and not at every validation; as whole
    volumes, which docs/prediction.md tells from windows."""
    feature_cache_training: bool = False
    """Take the features of training patches from --feature-cache too, cut out of those of their volumes, so that the extractor
    never runs in a step; for few subjects without augmentation (--recipe off)."""
    save_every: int = 1000
    """Steps between checkpoints; last.pt is written then, and at every validation."""
    log_every: int = 50
    """Steps between records of the loss, the throughput and the share of time that is spent waiting for data."""
    panels: int = 2
    """Validation cases shown as pictures (image, features, label, prediction) after each validation."""
    wandb: str | None = None
    """Weights & Biases project that is to get the numbers too; needs the package wandb."""
    seed: int = 0
    """Of the weights, the crops, the augmentations and the dropout."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:<n>."""
    loader_threads: int = 2
    """CPU threads of the data pipeline."""
    compile: bool | None = None
    """Compile network and loss with torch.compile; default: on a GPU."""
    cuda_graph: bool = False
    """Capture the whole step, extractor and fusion too, as one CUDA graph; needs a GPU and a single process."""
    sync_batchnorm: bool = False
    """Let BatchNorm see the patches of all processes, on GPUs; without it each process normalizes its own."""
    resume: bool = False
    """Go on with the run in --out from its last checkpoint; starts it where there is none."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "steps", "max_skipped", "validate_every", "save_every", "log_every",
                     "loader_threads"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InputError(f"learning_rate must be positive, got {self.learning_rate}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise InputError(f"weight_decay must not be negative, got {self.weight_decay}")
        if not (math.isfinite(self.clip_norm) and self.clip_norm >= 0):
            raise InputError(f"clip_norm must not be negative, got {self.clip_norm}")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if self.num_subjects is not None and self.num_subjects < 1:
            raise InputError(f"num_subjects must be at least 1, got {self.num_subjects}")
        try:
            re.compile(self.subject_pattern)
        except re.error as error:
            raise InputError(f"subject_pattern {self.subject_pattern!r} is no regular expression: {error}") from error
        if self.feature_cache_training and self.feature_cache is None:
            raise InputError("feature_cache_training needs a folder: give --feature-cache")
        if self.feature_cache_training and self.model.method == "erm":
            raise InputError("feature_cache_training needs features, and method erm has none: leave it out")
        if self.panels < 0:
            raise InputError(f"panels must not be negative, got {self.panels}")
        if not 0 <= self.warmup_steps < self.steps:
            raise InputError(f"warmup_steps must be at least 0 and less than steps = {self.steps}, got {self.warmup_steps}")
        if self.model.fusion.p_ramp_steps > self.steps:
            raise InputError(f"fusion.p_ramp_steps must be at most steps = {self.steps}, got {self.model.fusion.p_ramp_steps}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be a whole number from 0 to 2**63 - 1, got {self.seed}")
        if not 0 <= self.foreground_fraction <= 1:
            raise InputError(f"foreground_fraction must be in [0, 1], got {self.foreground_fraction}")


FREE = ("store", "preset", "device", "save_every", "log_every", "panels", "wandb", "loader_threads", "model.extractor_weights",
        "model.extractor_sha256", "model.extractor_revision")
"""Settings that a resumed run may change: store and weights are known by their content, the others decide no number but by
rounding."""



def completed(config: TrainConfig, preset: Preset) -> TrainConfig:
    """The settings with the patch and the augmentation that the preset decides where they say nothing.

    Raises:
        InputError: neither has a patch, or augmented patches are to have features of volumes.
    """
    patch = config.patch or preset.patch
    if patch is None:
        raise InputError("no patch: give --patch D H W, or a preset that has one")
    augmentation = config.augmentation or preset.augmentation_config(patch, config.recipe)
    if config.feature_cache_training and augmentation.active:
        name = augmentation.active[0]
        raise InputError(f"feature_cache_training needs patches as they are, and {name} is {getattr(augmentation, name)}: "
                         "give --recipe off, or leave it out")
    return dataclasses.replace(config, patch=patch, augmentation=augmentation)


def choose_subjects(cases: Sequence[str], count: int, seed: int, pattern: str) -> list[str]:
    """The cases of `count` subjects drawn at random, sorted.

    Of the same seed a smaller draw is part of a larger one.

    Args:
        cases: ids.
        count: of subjects.
        seed: of the draw.
        pattern: regular expression; what it finds in an id names the subject. An id without is a subject of its own.

    Raises:
        InputError: there are fewer subjects.
    """
    subjects: dict[str, list[str]] = {}
    for case in sorted(cases):
        found = re.search(pattern, case)
        subjects.setdefault(found.group() if found else case, []).append(case)
    if count > len(subjects):
        raise InputError(f"num_subjects is {count}, and the store has {len(subjects)} training subjects: give at most so many")
    names = list(subjects)
    chosen = np.random.default_rng(seed).permutation(len(names))[:count]
    return sorted(case for k in chosen for case in subjects[names[k]])


def plain(settings: Any) -> Any:
    """A dataclass as what YAML can hold: mappings, lists, strings, numbers."""
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        return {f.name: plain(getattr(settings, f.name)) for f in dataclasses.fields(settings)}
    if isinstance(settings, (list, tuple)):
        return [plain(v) for v in settings]
    return str(settings) if isinstance(settings, Path) else settings


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, whose keys are joined by dots."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return result
