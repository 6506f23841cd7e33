"""Run a test's function in several fresh Python processes that can form a process group, and collect what each returns.

    results = run_ranks(f"{__file__}:sums", 2, tmp_path, start=3)     # [what rank 0 returned, what rank 1 returned]

    def sums(rank: int, size: int, start: int) -> float:              # top level of the test file
        with world("cpu"): ...

Each process has RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torchrun sets them;
the function opens the process group itself. Arguments and results travel as pickles, so they must be plain data,
arrays or CPU tensors: a class defined in the test file would be another class over there.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent

__all__ = ["RankFailed", "run_ranks"]


class RankFailed(AssertionError):
    """One rank raised, died or did not end in time; the text holds its traceback, or what it printed last."""


def run_ranks(function: str, processes: int, tmp_path: Path, *, time_limit: float = 120.0, **kwargs: Any) -> list[Any]:
    """Call ``test_file.py:function`` as ``function(rank, size, **kwargs)`` everywhere; results in rank order.

    The rank that failed first is the one reported: the others usually fail only because it went away. Nothing
    outlives the call.
    """
    folder = tmp_path / f"ranks_{time.time_ns()}"
    folder.mkdir(parents=True)
    (folder / "call.pickle").write_bytes(pickle.dumps((function, kwargs)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [_start(rank, processes, port, folder) for rank in range(processes)]
    try:
        _wait(ranks, time.monotonic() + time_limit)
    finally:
        for process in ranks:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    results = [_result(folder, rank, process.returncode) for rank, process in enumerate(ranks)]
    failures = sorted((when, rank) for rank, (ok, when, _) in enumerate(results) if not ok)
    if failures:
        rank = failures[0][1]
        raise RankFailed(f"rank {rank} of {processes} failed in {function}\n{results[rank][2]}")
    return [value for _, _, value in results]


def _start(rank: int, size: int, port: int, folder: Path) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SUBMITIT_"))}
    environment |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    with (folder / f"{rank}.log").open("wb") as log:
        return subprocess.Popen(
            # -P: without it tests/launch would hide the package launch.
            [sys.executable, "-P", __file__, str(folder), str(rank), str(size)],
            cwd=REPOSITORY,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait(ranks: list[subprocess.Popen[bytes]], deadline: float) -> None:
    """Until all have ended; two seconds more once one has failed, so that the others can say their part."""
    while any(process.poll() is None for process in ranks) and time.monotonic() < deadline:
        if any(process.poll() for process in ranks):
            deadline = min(deadline, time.monotonic() + 2)
        time.sleep(0.02)


def _result(folder: Path, rank: int, code: int) -> tuple[bool, float, Any]:
    """(returned?, when, what it returned or the text of its failure)."""
    answer = folder / f"{rank}.pickle"
    if answer.exists():
        found: tuple[bool, float, Any] = pickle.loads(answer.read_bytes())
        return found
    log = folder / f"{rank}.log"
    ended = (
        "was stopped: another rank failed, or time ran out" if code == -signal.SIGKILL else f"ended with code {code}"
    )
    # A process that died by itself comes before those we had to kill.
    when = float("inf") if code == -signal.SIGKILL else log.stat().st_mtime
    return False, when, f"{ended}; it printed:\n{log.read_text(errors='replace')[-8000:]}"


def _child(folder: Path, rank: int, size: int) -> None:
    sys.path.insert(0, str(REPOSITORY))
    function, kwargs = pickle.loads((folder / "call.pickle").read_bytes())
    path, _, name = function.rpartition(":")
    ok, value = True, None
    try:
        spec = importlib.util.spec_from_file_location("ranks_target", path)
        assert spec is not None, path
        assert spec.loader is not None, path
        module = importlib.util.module_from_spec(spec)
        sys.modules["ranks_target"] = module
        spec.loader.exec_module(module)
        target: Callable[..., Any] = getattr(module, name)
        value = target(rank, size, **kwargs)
    except BaseException:
        ok, value = False, traceback.format_exc()
        print(value)
    aside = folder / f"{rank}.aside"
    aside.write_bytes(pickle.dumps((ok, time.time(), value)))
    aside.rename(folder / f"{rank}.pickle")
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    _child(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
