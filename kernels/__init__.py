"""The kernels: custom ops for torch, each in a folder of its own. They know nothing of the engine around them.

    from dropgen_fast.kernels.fuse_streams import fuse_streams
"""
