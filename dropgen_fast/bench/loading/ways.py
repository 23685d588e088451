"""The ways of loading and augmenting that are compared, each set up as its own users do. All run in a process of their own.

  ours      `TrainingPipeline`, one thread of DALI and of torch for each core
  MONAI     `CacheDataset` (volumes in memory, not copied again) and `DataLoader`: a worker process for each core, with one
            thread of torch as `DataLoader` gives it, or no worker and torch's threads. Plain tensors, no metadata to track. On a
            GPU the workers augment on the CPU and batches are pinned and copied; without workers the volumes lie on the GPU and
            are augmented there
  nnU-Net   its data set (compressed with blosc2 as its `preprocess` writes it), its data loader, its transforms and its
            `NonDetMultiThreadedAugmenter`, a process for each core. No deep supervision: ours makes none
  batchaug  crops from MONAI's `CacheDataset` and `DataLoader`, then batchaug's transforms on the whole batch

MONAI's samplers draw with replacement and without end, so that no way waits at the end of an epoch of a few volumes.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import monai.transforms as mt
import numpy as np
import torch
from monai.data import CacheDataset, DataLoader, set_track_meta
from torch import Tensor
from torch.utils.data import RandomSampler

from dropgen_fast.bench.loading.processes import Place, Source, Unavailable, check_augments, check_batch
from dropgen_fast.bench.loading.recipes import BOTH, IMAGE, PAPER, batchaug_transforms, monai_transforms
from dropgen_fast.bench.loading.volumes import load_volumes, ready_batch
from dropgen_fast.data.augmentation import AugmentationConfig
from dropgen_fast.data.pipeline import TrainingPipeline
from dropgen_fast.data.store import Store
from dropgen_fast.errors import InputError

ENDLESS = 2**40
NNUNET_FOREGROUND = 0.33
"""Share of nnU-Net's patches that are placed on foreground."""
DEMO_NETWORK = ("base_channels=8", "downsamplings=3")
"""The network of the demo, for CPUs."""


def other(module: str) -> Any:
    """A module of another library; raises `Unavailable` where it cannot be imported."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"{module.split('.')[0]} cannot be imported ({error})") from error


def ours(place: Place, *, augmentation: AugmentationConfig, foreground_fraction: float = 0.0, chain: Any = "fused") -> Source:
    """`TrainingPipeline`."""
    pipeline = TrainingPipeline(
        Store.open(place.store), patch=place.patch, batch_size=place.batch_size, seed=place.seed, augmentation=augmentation,
        chain=chain, foreground_fraction=foreground_fraction, num_threads=place.threads, device=place.gpu)

    def batch() -> tuple[Tensor, Tensor]:
        drawn = next(pipeline)
        return drawn.image, drawn.label

    check_augments(batch, place)
    return Source(batch, place.batch_size, stock=3)  # DALI reads two batches ahead


def monai(place: Place, *, workers: int, names: tuple[str, ...] = PAPER) -> Source:
    """MONAI with transforms of these names, with the paper's probabilities and ranges."""
    recipe = [*monai_transforms(AugmentationConfig(), place.patch, names), mt.ScaleIntensityd(IMAGE)]
    batches = _monai_batches(place, recipe, workers)
    check_augments(lambda: next(batches), place)
    return Source(lambda: next(batches), place.batch_size, stock=3 * workers, burst=max(1, workers))


def batchaug(place: Place) -> Source:
    """Crops from workers, the paper's augmentations by batchaug."""
    library = import_batchaug(place)
    recipe = [*batchaug_transforms(library, AugmentationConfig(), PAPER), library.ScaleIntensityd(IMAGE)]
    augment = library.Compose(recipe, lazy=True, mode={"image": "bilinear", "label": "nearest"})
    workers = 1 if place.gpu is None else place.threads  # on the CPU cropping is little beside what the cores do here
    crops = _monai_batches(place, [], workers)

    def batch() -> tuple[Tensor, Tensor]:
        image, label = next(crops)
        done = augment({"image": image, "label": label})
        return done["image"], done["label"]

    check_augments(batch, place)
    return Source(batch, place.batch_size, stock=3 * workers)


def import_batchaug(place: Place) -> Any:
    """The library; on the CPU with its torch backend, Triton's needs a GPU."""
    library = other("batchaug")
    if place.gpu is None:
        library.set_backend("pytorch")
    return library


def _monai_batches(place: Place, transforms: list[Any], workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random crops, then `transforms`, as endless batches on the device."""
    set_track_meta(False)
    on_gpu = place.gpu is not None and workers == 0
    volumes = [{key: volume.to(place.device) for key, volume in case.items()} if on_gpu else case
               for case in load_volumes(place.store)]
    recipe = mt.Compose([
        mt.SpatialPadd(BOTH, spatial_size=place.patch), mt.RandSpatialCropd(BOTH, roi_size=place.patch, random_size=False),
        *transforms])
    recipe.set_random_state(place.seed)
    data = CacheDataset(volumes, recipe, num_workers=1, progress=False, copy_cache=False)
    sampler = RandomSampler(data, replacement=True, num_samples=ENDLESS)
    loader = DataLoader(data, batch_size=place.batch_size, sampler=sampler, num_workers=workers, persistent_workers=workers > 0,
                        pin_memory=place.gpu is not None and not on_gpu)
    for batch in loader:
        yield batch["image"].to(place.device, non_blocking=True), batch["label"].to(place.device, non_blocking=True)


def monai_operator(place: Place, *, name: str) -> Source:
    """One of MONAI's transforms, always applied, on each crop of a batch that lies ready."""
    set_track_meta(False)
    image, label = (part.to(place.device) for part in ready_batch(place.store, place.patch, place.batch_size))
    transform = mt.Compose(monai_transforms(AugmentationConfig(), place.patch, (name,), probability=1.0))
    transform.set_random_state(place.seed)

    def batch() -> tuple[Tensor, Tensor]:
        done = [transform({"image": image[n], "label": label[n]}) for n in range(len(image))]
        return torch.stack([d["image"] for d in done]), torch.stack([d["label"] for d in done])

    made, made_label = batch()
    check_batch(made, made_label, place)
    if torch.equal(made, image):
        raise Unavailable("gave back its input")
    return Source(batch, place.batch_size)


def training_step(place: Place, *, network_options: tuple[str, ...]) -> Source:
    """The optimizer step of `train` on a batch that lies ready: ERM, the network without an extractor, the fastest consumer."""
    from dropgen_fast.model import ModelConfig
    from dropgen_fast.train import TrainConfig, Trainer

    try:
        trainer = Trainer(TrainConfig(
            store=place.store, out=place.scratch / "run", model=ModelConfig(method="erm", network_options=network_options),
            patch=place.patch, batch_size=place.batch_size, device=place.device))
    except InputError as error:  # a store without validation cases, a patch that the network cannot halve: the loaders don't mind
        raise Unavailable(str(error)) from error
    trainer.model.train()
    batch = next(trainer.data)
    step: Callable[[], Tensor] = functools.partial(trainer.train_step, [batch])
    if not bool(step().isfinite()):
        raise Unavailable("the loss is not finite")
    return Source(step, place.batch_size)


# ---- nnU-Net --------------------------------------------------------------------------------------------------------


def nnunet(place: Place) -> Source:
    """nnU-Net's own loading and augmentation, as its trainer puts them together."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ[variable] = str(place.scratch)
    trainer = other("nnunetv2.training.nnUNetTrainer.nnUNetTrainer")
    folder = place.scratch / "nnunet"
    classes = _write_nnunet_cases(folder, place)
    settings = SimpleNamespace(configuration_manager=SimpleNamespace(patch_size=place.patch), print_to_log_file=lambda text: None)
    rotation, flat, first_patch, mirror_axes = (
        trainer.nnUNetTrainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size(settings))
    transforms = trainer.nnUNetTrainer.get_training_transforms(place.patch, rotation, None, mirror_axes, flat)
    loader = trainer.nnUNetDataLoader(
        trainer.infer_dataset_class(str(folder))(str(folder)), place.batch_size, first_patch, place.patch,
        SimpleNamespace(all_labels=list(classes), has_ignore_label=False), oversample_foreground_percent=NNUNET_FOREGROUND,
        transforms=transforms)
    waiting = max(6, place.threads // 2)
    batches = trainer.NonDetMultiThreadedAugmenter(
        loader, None, place.threads, num_cached=waiting, pin_memory=place.gpu is not None, wait_time=0.002)

    def batch() -> tuple[Tensor, Tensor]:
        drawn = next(batches)
        return drawn["data"].to(place.device, non_blocking=True), drawn["target"].to(place.device, non_blocking=True)

    check_augments(batch, place)
    # Two queues of `waiting` batches, one batch between them, and one in the hands of each worker.
    return Source(batch, place.batch_size, stock=2 * waiting + 1 + place.threads, burst=place.threads)


def _write_nnunet_cases(folder: Path, place: Place) -> range:
    """The volumes as nnU-Net's preprocessing leaves them: mean 0, standard deviation 1, blosc2; the classes."""
    dataset = other("nnunetv2.training.dataloading.nnunet_dataset")
    folder.mkdir()
    classes = range(len(Store.open(place.store).classes))
    rng = np.random.default_rng(place.seed)
    for number, case in enumerate(load_volumes(place.store)):
        image, label = case["image"].numpy(), case["label"].numpy().astype(np.int16)
        image = (image - image.mean()) / image.std()
        blocks, chunks = dataset.comp_blosc2_params(image.shape, place.patch, bytes_per_pixel=4)
        seg_blocks, seg_chunks = dataset.comp_blosc2_params(label.shape, place.patch, bytes_per_pixel=2)
        found = {value: np.argwhere(label == value) for value in classes[1:]}
        locations = {value: voxels[rng.permutation(len(voxels))[:10_000]] for value, voxels in found.items()}
        dataset.nnUNetDatasetBlosc2.save_case(
            image, label, {"class_locations": locations}, str(folder / f"case{number}"), chunks=chunks, blocks=blocks,
            chunks_seg=seg_chunks, blocks_seg=seg_blocks)
    return classes
