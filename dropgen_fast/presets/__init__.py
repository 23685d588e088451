"""Presets are data: one YAML file per data set (see `dropgen_fast.config.Preset`)."""
