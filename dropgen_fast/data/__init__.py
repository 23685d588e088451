"""From a cohort's files to training batches: cohort (which files) → prepare (resample, store) → pipeline (DALI)."""

from dropgen_fast.data.cohort import Case, Cohort, read_cohort, read_images
from dropgen_fast.data.geometry import GridMap, load_volume, save_like
from dropgen_fast.data.pipeline import AugmentationConfig, Batch, TrainingPipeline
from dropgen_fast.data.prepare import PreparedImage, minmax, prepare_image
from dropgen_fast.data.store import Store, StoredCase

__all__ = [
    "AugmentationConfig", "Batch", "Case", "Cohort", "GridMap", "PreparedImage", "Store", "StoredCase", "TrainingPipeline",
    "load_volume", "minmax", "prepare_image", "read_cohort", "read_images", "save_like",
]
