"""Several processes of one run on this machine, with the environment torchrun would give them, watched to their end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from launch.run import USER_ERRORS, Outcome, Stopped, say

__all__ = ["RankFailed", "run_ranks"]

KILL_AFTER_S = 5.0


class RankFailed(Exception):
    """One of several processes failed; ``trace`` is its traceback, empty for a mistake of the user's."""

    def __init__(self, rank: int, size: int, text: str, trace: str = "") -> None:
        super().__init__(f"rank {rank} of {size}: {text}" if size > 1 else text)
        self.rank, self.trace = rank, trace


def run_ranks(call: Sequence[str], size: int, grace_s: float) -> Outcome:
    """Run ``launch.call.Call(main, model, folder)`` in ``size`` processes; the outcome of rank 0.

    When one fails the others are ended and RankFailed tells of the one that failed first: the others mostly fail
    because it went away. SIGINT and SIGTERM are passed on; those still there after ``grace_s`` are killed. Should
    this process die, they are told by SIGTERM.
    """
    with tempfile.TemporaryDirectory(prefix="axial-ranks-") as scratch, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        ranks: list[subprocess.Popen[bytes]] = []
        with _passed_on(ranks) as signals:
            try:
                for rank in range(size):
                    ranks.append(_start(call, rank, size, port, Path(scratch)))  # noqa: PERF401 (seen by the handler one by one)
                seen = _watch(ranks, signals, grace_s)
            finally:
                for process in ranks:
                    _end(process)
        return _outcome(ranks, Path(scratch), signals, seen)


def _start(call: Sequence[str], rank: int, size: int, port: int, scratch: Path) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // size)))
    environment |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    # -P keeps the user's folder off the import path. Only rank 0 speaks; the others are heard when they fail.
    command = [sys.executable, "-P", "-m", "launch.ranks", *call, str(scratch / str(rank))]
    if rank == 0:
        return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, start_new_session=True)
    with (scratch / f"{rank}.log").open("wb") as log:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@contextmanager
def _passed_on(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Send SIGINT and SIGTERM on to the processes while the block runs; yields the list of those that came."""
    came: list[int] = []

    def send(number: int, frame: FrameType | None) -> None:
        came.append(number)
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    old = {number: signal.signal(number, send) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _watch(ranks: Sequence[subprocess.Popen[bytes]], signals: Sequence[int], grace_s: float) -> dict[int, float]:
    """Until all have ended, or one has failed and the others had a moment, or a signal came and the grace is over.

    Returns when each of those that failed by itself was seen to.
    """
    deadline = float("inf")
    seen: dict[int, float] = {}
    while any(process.poll() is None for process in ranks) and time.monotonic() < deadline:
        if signals and deadline == float("inf"):
            deadline = time.monotonic() + grace_s
        for rank, process in enumerate(ranks):
            if process.poll() and not signals:
                seen.setdefault(rank, time.time())
                deadline = min(deadline, time.monotonic() + KILL_AFTER_S / 2)
        time.sleep(0.05)
    return seen | {rank: time.time() for rank, process in enumerate(ranks) if process.poll() and rank not in seen}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and what it started, such as data workers: kindly, then not."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(KILL_AFTER_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _outcome(
    ranks: Sequence[subprocess.Popen[bytes]], scratch: Path, signals: Sequence[int], seen: dict[int, float]
) -> Outcome:
    said = {rank: _said(scratch / str(rank)) for rank in range(len(ranks))}
    failed = sorted(
        (said[rank].get("when", seen.get(rank, float("inf"))), rank)
        for rank, process in enumerate(ranks)
        if process.returncode != 0 and not (signals and "trace" not in said[rank])
    )
    first = said[0]
    if failed:
        rank = failed[0][1]
        code = ranks[rank].returncode
        died = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        log = scratch / f"{rank}.log"
        last = log.read_text(errors="replace")[-4000:] if log.exists() else ""
        raise RankFailed(rank, len(ranks), said[rank].get("text", died), said[rank].get("trace", last))
    if "stopped" in first:
        raise Stopped(first["stopped"])
    if "made" in first:
        return Outcome(tuple(first["made"]), tuple(first["next"]), first["ok"])
    raise KeyboardInterrupt if signal.SIGINT in signals else Stopped("ended by SIGTERM; the same command goes on")


def _said(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _main(main: str, model: str, folder: str, answer: str) -> int:
    """One rank: call, and leave in ``answer`` what came of it."""
    from launch.call import Call

    threading.Thread(target=_mourn, daemon=True).start()
    said: dict[str, Any]
    try:
        outcome = Call(main, model, Path(folder)).execute()
        said, code = {"made": outcome.made, "next": outcome.next, "ok": outcome.ok}, 0
    except Stopped as stop:
        said, code = {"stopped": str(stop)}, 0
    except KeyboardInterrupt:
        said, code = {}, 130
    except USER_ERRORS as error:
        traceback.print_exc()
        said, code = {"text": say(error), "trace": ""}, 2
    except BaseException as error:
        said, code = {"text": say(error), "trace": traceback.format_exc()}, 1
    aside = Path(f"{answer}.aside")
    aside.write_text(json.dumps(said | {"when": time.time()}))
    aside.rename(answer)
    return code


def _mourn() -> None:
    """The pipe ends when the process that started this one dies: then nobody is left to stop us."""
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    # Not sys.exit: a process group whose peer is gone can hang in its destructors.
    code = _main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
