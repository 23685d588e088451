"""Cases side by side: processes, and a Dask cluster of two worker processes, with what can go wrong there."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import distributed
import pytest
from nifti_factory import write_cohort

from dropgen_fast import __version__
from dropgen_fast.cli import run
from dropgen_fast.data import parallel
from dropgen_fast.data.parallel import OnSharedFolder, in_processes, on_cluster, one_by_one
from dropgen_fast.data.store import Store
from dropgen_fast.errors import InputError
from dropgen_fast.prepare import main


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    """Dask sets OMP_NUM_THREADS and its like to 1 for its workers, in this process's environment: later tests keep theirs."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two worker processes; a task whose worker dies twice is given up."""
    import dask

    with dask.config.set({"distributed.scheduler.allowed-failures": 1}), distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", host="127.0.0.1") as cluster:
        yield cluster


def which_process(item: int) -> tuple[int, int]:
    time.sleep(0.05)
    return item, os.getpid()


def mark(item: int, folder: Path) -> int:
    """Leave a file behind, slowly."""
    (folder / str(item)).touch()
    time.sleep(0.3)
    return item


def die(item: int, folder: Path) -> str:
    """Item 1 takes its process with it the first time, item 2 always."""
    if item == 2 or (item == 1 and not (folder / "died").exists()):
        (folder / "died").touch()
        os._exit(1)
    return f"done {item}"


def lost(item: int, reason: str) -> Any:
    return f"lost {item}: {reason}"


def never(item: Any, reason: str) -> Any:
    pytest.fail(f"{item}: {reason}")


def test_every_way_does_every_item_once(cluster: Any) -> None:
    items = list(range(12))
    assert dict(one_by_one(which_process, items)) == dict.fromkeys(items, os.getpid())
    for results in (in_processes(which_process, items, 2),
                    on_cluster(which_process, items, cluster.scheduler_address, lost=never, warn=pytest.fail)):
        found = list(results)
        assert sorted(item for item, _ in found) == items
        processes = {process for _, process in found}
        assert len(processes) == 2
        assert os.getpid() not in processes


def test_a_store_from_a_cluster_is_the_same(tmp_path: Path, cluster: Any, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_cohort(tmp_path / "cohort", {"train": 4, "val": 1})
    bad = source / "imagesTr/train_2_0000.nii.gz"
    bad.write_bytes(bad.read_bytes()[:-2000])
    options = ["--source", str(source), "--spacing-mm", "1", "1", "1"]
    assert main([*options, "--store", str(tmp_path / "one"), "--workers", "1"]) == 1
    alone = capsys.readouterr()
    assert main([*options, "--store", str(tmp_path / "two"), "--scheduler", cluster.scheduler_address]) == 1
    together = capsys.readouterr()
    left_out = [line for line in together.err.splitlines() if line.startswith("left out: ")]
    assert len(left_out) == 1
    assert "case train_2: " in left_out[0]
    assert left_out == [line for line in alone.err.splitlines() if line.startswith("left out: ")]
    assert together.out == alone.out.replace(str(tmp_path / "one"), str(tmp_path / "two"))
    one, two = (Store.open(tmp_path / name) for name in ("one", "two"))
    assert one.identity() == two.identity()
    assert dict(two.index.left_out) == dict(one.index.left_out)
    assert [(c.volume.read_bytes(), c.foreground.read_bytes()) for c in one.cases("train")] == [
        (c.volume.read_bytes(), c.foreground.read_bytes()) for c in two.cases("train")]


def test_closing_stops_what_has_not_begun(tmp_path: Path, cluster: Any) -> None:
    results = on_cluster(partial(mark, folder=tmp_path), list(range(40)), cluster.scheduler_address, lost=never, warn=pytest.fail)
    next(results)
    results.close()
    time.sleep(0.7)  # what was running has ended
    begun = len(list(tmp_path.iterdir()))
    assert begun < 10
    time.sleep(0.5)
    assert len(list(tmp_path.iterdir())) == begun


def test_workers_that_die_are_told_of_and_stop_nothing(tmp_path: Path, cluster: Any) -> None:
    warnings: list[str] = []
    found = list(on_cluster(partial(die, folder=tmp_path), list(range(6)), cluster.scheduler_address, lost=lost,
                            warn=warnings.append))
    assert sorted(found) == ["done 0", "done 1", "done 3", "done 4", "done 5",
                             "lost 2: every worker that took it died, most likely for want of memory"]
    assert warnings
    assert all("was lost" in w for w in warnings)


def test_a_cluster_without_workers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "NO_WORKER_S", 0.3)
    monkeypatch.setattr(parallel, "LOOK_S", 0.1)
    with (distributed.LocalCluster(n_workers=0, processes=False, protocol="tcp", dashboard_address=":0") as empty,
          pytest.raises(InputError, match=r"has had no worker for 0\.3 s")):
        list(on_cluster(which_process, [1], empty.scheduler_address, lost=never, warn=pytest.fail))


def test_a_scheduler_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "NO_WORKER_S", 1e9)
    gone = distributed.LocalCluster(n_workers=0, processes=False, protocol="tcp", dashboard_address=":0")
    threading.Timer(0.5, gone.close).start()
    with pytest.raises(InputError, match="went away"):
        list(on_cluster(which_process, [1, 2], gone.scheduler_address, lost=never, warn=pytest.fail))


NO_ADDRESS = "scheduler must be an address like tcp://host:8786"
NO_ANSWER = "no Dask scheduler answers at"


@pytest.mark.parametrize(("address", "message"), [
    ("tcp://127.0.0.1:1", NO_ANSWER), ("tls://127.0.0.1:1", NO_ANSWER), ("tcp://[::1]:1", NO_ANSWER), ("", NO_ADDRESS),
    ("nonsense", NO_ADDRESS), ("no-such-host.invalid:8786", NO_ADDRESS), ("inproc://x", NO_ADDRESS), ("tcp://host", NO_ADDRESS)])
def test_no_scheduler_is_one_line(tmp_path: Path, address: str, message: str, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(parallel, "CONNECT_S", 0.5)
    source = write_cohort(tmp_path / "cohort", {"train": 1})
    assert run("prepare", main, ["--source", str(source), "--store", str(tmp_path / "store"), "--scheduler", address]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "prepare: " in line and "error" in line]
    assert len(error) == 1
    assert message in error[0]
    assert address in error[0]


SLOW = """
import os, sys, time
from dropgen_fast.data.parallel import in_processes

def sleep(folder):
    open(os.path.join(folder, str(os.getpid())), "w").close()
    time.sleep(60)

if __name__ == "__main__":
    list(in_processes(sleep, [sys.argv[1]] * 2, 2))
"""


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "workers").mkdir()
    parent = subprocess.Popen([sys.executable, str(tmp_path / "slow.py"), str(tmp_path / "workers")])
    begun = time.monotonic()
    while len(workers := os.listdir(tmp_path / "workers")) < 2:
        assert time.monotonic() - begun < 60
        assert parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    while any(is_running(int(worker)) for worker in workers):
        assert time.monotonic() - begun < 60, "workers outlived their parent"
        time.sleep(0.05)


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # one that nobody waits for


def test_without_distributed_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(InputError, match=r"pip install 'dropgen_fast\[cluster\]'"):
        list(on_cluster(which_process, [1], "tcp://127.0.0.1:1", lost=never, warn=pytest.fail))


def test_another_machine_must_see_the_same_folder_and_run_the_same_version(tmp_path: Path) -> None:
    (tmp_path / "marker").write_text("this run")
    assert OnSharedFolder(str, tmp_path / "marker", "this run", __version__)(7) == "7"
    for marker, content in (("marker", "another run"), ("absent", "this run")):
        with pytest.raises(InputError, match=f"does not see {tmp_path}.*shared file system"):
            OnSharedFolder(str, tmp_path / marker, content, __version__)(7)
    with pytest.raises(InputError, match=f"has dropgen_fast {__version__}, this one 0.0.0"):
        OnSharedFolder(str, tmp_path / "marker", "this run", "0.0.0")(7)
