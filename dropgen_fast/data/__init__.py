"""From a cohort's files to training batches: cohort (which files) → prepare (resample, store) → pipeline (DALI)."""
