"""Triton's kernels run in its interpreter, which has to be said before they are imported; `pytest -m gpu` runs them for real."""

import os
from collections.abc import Iterator

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Interpret, but for the suite that needs a GPU: one process can do only one of the two."""
    if config.option.markexpr != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # of pytest -n: each has its share of the cores
        share = max(1, len(os.sched_getaffinity(0)) // workers)
        torch.set_num_threads(share)
        os.environ["OMP_NUM_THREADS"] = str(share)  # of the processes that tests start


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
