"""The backends of `fuse_streams`: which there are, what each can take, and which one takes a call.

On the CPU "auto" is native, on a GPU Triton and without it native; what they refuse the definition takes. On a GPU that has
both, ``torch.backends.cudnn.benchmark = True`` has the faster one found, as for cuDNN's algorithms: see `measured`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from . import native, triton

BACKENDS = ("auto", "native", "triton", "reference")
IMAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int16, torch.uint8)
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def available_backends() -> dict[str, str]:
    """Each backend's name and "" where it can be had here, else the reason why not."""
    return {"native": native.MISSING, "triton": triton.MISSING, "reference": ""}


def choose(backend: str, image: Tensor, features: Tensor | None) -> str:
    """The backend for this call; an explicit request that cannot be met raises with the reason."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    tensors = [image] if features is None else [image, features]
    if backend == "reference":
        return backend
    reasons = {name: module.MISSING or module.refuses(tensors)
               for name, module in (("triton", triton), ("native", native))}
    if backend == "auto":
        # The fast kernels hold int32 coordinates, float32 statistics; what they refuse the definition takes.
        for name in ("triton", "native") if image.is_cuda else ("native",):
            if not reasons[name]:
                return name
        check_dtypes(image, features)
        return "reference"
    if reasons[backend]:
        fits = [name for name, why in reasons.items() if not why]
        raise RuntimeError(f"backend {backend!r} cannot take this call: {reasons[backend]}; "
                           f"what can: {', '.join([*fits, 'reference'])}")
    return backend


def measured(
    chosen: str, image: Tensor, features: Tensor | None, settings: tuple[Hashable, ...], run: Callable[[str], object],
) -> str:
    """The faster of Triton and native for a call that "auto" gave to `chosen`, where the user asked for measurements.

    That is with ``torch.backends.cudnn.benchmark``, in eager mode, on a GPU that both can serve, and never while a graph is
    captured or deterministic algorithms are asked for: there the answer is `chosen`. The first call of a kind times both
    and is slower for it; later ones of the process take the winner. The two differ in the last bits.

    Args:
        chosen: what `choose` said.
        image: see `fuse_streams`.
        features: see `fuse_streams`.
        settings: what else decides the speed of the call: norms, dtype and layout of the result.
        run: makes the call with the backend of a name.
    """
    if torch.compiler.is_compiling() or not image.is_cuda or not torch.backends.cudnn.benchmark:
        return chosen
    if torch.are_deterministic_algorithms_enabled() or torch.cuda.is_current_stream_capturing():
        return chosen
    if type(image) is not Tensor:  # a fake one: nothing runs
        return chosen
    tensors = [image] if features is None else [image, features]
    if any(module.MISSING or module.refuses(tensors) for module in (triton, native)):
        return chosen
    with torch.cuda.device(image.device), torch.no_grad():
        return fastest(kind_of(image, features, settings), {name: partial(run, name) for name in ("triton", "native")},
                       milliseconds_on_gpu)


FASTEST: dict[Hashable, str] = {}
"""What `fastest` found, for each kind of call of this process."""


def fastest(kind: Hashable, candidates: dict[str, Callable[[], object]], clock: Callable[[Callable[[], object]], float]) -> str:
    """The name of the candidate that takes the least by `clock`; measured once a kind, the first named wins a tie."""
    if kind not in FASTEST:
        FASTEST[kind] = min(candidates, key=lambda name: clock(candidates[name]))
    return FASTEST[kind]


def milliseconds_on_gpu(run: Callable[[], object], repeats: int = 5) -> float:
    """The least of a few runs by CUDA events on the current stream, after two that compile and allocate."""
    run()
    run()
    times = []
    for _ in range(repeats):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        run()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after))
    return min(times)


def kind_of(image: Tensor, features: Tensor | None, settings: tuple[Hashable, ...]) -> Hashable:
    """What calls of one speed ranking have in common: device, dtypes, layouts, size to a power of two, ratio, settings."""
    tensors = [image] if features is None else [image, features]
    ratio = None
    if features is not None:
        ratio = tuple(round(big / small) for big, small in zip(image.shape[2:], features.shape[2:], strict=True))
    return (image.device, ratio, settings,
            *((t.dtype, t.shape[1], t.numel().bit_length(), t.is_contiguous(),
               t.is_contiguous(memory_format=torch.channels_last_3d)) for t in tensors))


def check_dtypes(image: Tensor, features: Tensor | None) -> None:
    if image.dtype not in IMAGE_DTYPES:
        raise ValueError(f"image must be one of {names(IMAGE_DTYPES)}, got {image.dtype}")
    if features is not None and features.dtype not in FLOAT_DTYPES:
        raise ValueError(f"features must be one of {names(FLOAT_DTYPES)}, got {features.dtype}")


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def module_of(backend: str) -> ModuleType:
    """The module of a backend with kernels: `forward`, `backward`, `refuses`."""
    return {"native": native, "triton": triton}[backend]
