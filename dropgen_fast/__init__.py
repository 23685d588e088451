"""dropgen_fast: a training engine for DropGen, domain-general 3D biomedical segmentation."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dropgen_fast.features import load_extractor
    from dropgen_fast.fusion import StreamFusion
    from dropgen_fast.kernels.fuse_streams import RateSchedule, Window, ZScore, fuse_streams
    from dropgen_fast.model import DropGen

__version__ = "0.1.0"
__all__ = ["DropGen", "RateSchedule", "StreamFusion", "Window", "ZScore", "fuse_streams", "load_extractor"]

_HOMES = {
    "DropGen": "model",
    "RateSchedule": "kernels.fuse_streams",
    "StreamFusion": "fusion",
    "Window": "kernels.fuse_streams",
    "ZScore": "kernels.fuse_streams",
    "fuse_streams": "kernels.fuse_streams",
    "load_extractor": "features",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: `prepare`'s worker processes need no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
