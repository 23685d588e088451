"""Which backend of an op takes a call."""

from __future__ import annotations

from collections.abc import Mapping


def choose(wanted: str, refusals: Mapping[str, str]) -> str:
    """The backend for a call: "auto" is the first that can, a name is that one or an error.

    Args:
        wanted: "auto" or the name of a backend.
        refusals: each backend, the best first, and "" or the reason why it cannot take this call.

    Raises:
        ValueError: no backend has the name.
        RuntimeError: the one that was asked for cannot take the call, with its reason and those that can.
    """
    if wanted == "auto":
        return next(name for name, reason in refusals.items() if not reason)
    if wanted not in refusals:
        raise ValueError(f"backend must be one of {', '.join(['auto', *refusals])}, got {wanted!r}")
    if refusals[wanted]:
        fits = [name for name, reason in refusals.items() if not reason]
        raise RuntimeError(f"backend {wanted!r} cannot take this call: {refusals[wanted]}; what can: {', '.join(fits)}")
    return wanted
