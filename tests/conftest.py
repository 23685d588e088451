"""Triton's kernels run in its interpreter, which has to be said before they are imported; `pytest -m gpu` runs them for real."""

import os
import types
from collections.abc import Iterator

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Interpret, but for the suite that needs a GPU: one process can do only one of the two."""
    if config.option.markexpr != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"
        patch_triton_once_a_launch()
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # of pytest -n: each has its share of the cores
        share = max(1, len(os.sched_getaffinity(0)) // workers)
        torch.set_num_threads(share)
        os.environ["OMP_NUM_THREADS"] = str(share)  # of the processes that tests start


def patch_triton_once_a_launch() -> None:
    """Let Triton's interpreter put its functions in place once a launch, and not at each call of a function within a kernel.

    That is what two fifths of its time go to. A Triton that does it in another way is left as it is.
    """
    try:
        import triton.language as tl
        from triton.runtime import interpreter

        patch, scope_type = interpreter._patch_lang, interpreter._LangPatchScope
    except (ImportError, AttributeError):
        return
    both = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})  # functions of Triton's own see only the second
    launched = False

    class Launch(scope_type):  # type: ignore[misc, valid-type]
        """What a launch puts in place."""

        def restore(self) -> None:
            nonlocal launched
            super().restore()
            launched = False

    def once(function: object) -> object:
        nonlocal launched
        if launched:
            return scope_type()
        launched, scope = True, Launch()
        scope._changes = patch(both)._changes
        return scope

    interpreter._patch_lang = once


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, or where the kernels are interpreted."""
    if torch.cuda.is_available() and config.option.markexpr == "gpu":
        return
    reason = "run pytest -m gpu" if torch.cuda.is_available() else "no CUDA device"
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch with a single thread: sums have the same order on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=("reference", "native", "triton"))
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend of `fuse_streams` by name."""
    from dropgen_fast.kernels.fuse_streams import available_backends  # not at the top: Triton reads TRITON_INTERPRET at import

    if reason := available_backends()[request.param]:
        pytest.fail(f"{request.param} must be here for the tests: {reason}")
    return str(request.param)
