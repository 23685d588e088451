"""dropgen_fast: a training engine for DropGen, domain-general 3D biomedical segmentation."""

from dropgen_fast.features import load_extractor
from dropgen_fast.fusion import StreamFusion
from dropgen_fast.kernels.fuse_streams import Window, ZScore, fuse_streams
from dropgen_fast.model import DropGen

__version__ = "0.1.0"
__all__ = ["DropGen", "StreamFusion", "Window", "ZScore", "fuse_streams", "load_extractor"]
