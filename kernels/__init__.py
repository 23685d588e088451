"""The kernels: custom ops for torch, each in a folder of its own. They know nothing of the engine around them."""

from .fuse_streams import Window, ZScore, fuse_streams

__all__ = ["Window", "ZScore", "fuse_streams"]
