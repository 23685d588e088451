"""A few steps of DropGen as a Chrome trace, the parts of each by name."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from dropgen_fast.bench.step import StepConfig, ready_batches, resolved, training_step
from dropgen_fast.step import PARTS

WARM, TRACED = 3, 3
"""Steps before the trace and within it."""


def write_trace(path: Path, config: StepConfig, device: torch.device) -> None:
    """Trace steps with extractor stride 1 and write them, for chrome://tracing or ui.perfetto.dev."""
    config = resolved(config, device)
    step, batches = training_step(config, device, "dropgen", 1), ready_batches(config, device)
    for number in range(WARM):
        step([batches[number % len(batches)]], number)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile, contextlib.ExitStack() as open_ranges:
        following = dict(zip(PARTS, (*PARTS[1:], None), strict=True))

        def begin(part: str | None) -> None:
            if part is not None:
                open_ranges.enter_context(torch.profiler.record_function(part))

        def ended(part: str) -> None:
            open_ranges.pop_all().close()
            begin(following[part])

        step.observe = ended
        for number in range(TRACED):
            begin(PARTS[0])
            step([batches[number % len(batches)]], WARM + number)
    profile.export_chrome_trace(str(path))
