"""Verb ``logs``: the last lines that the newest job of a run printed, over all its starts, and those to come."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Literal

from pydantic import Field

from launch.jobs import queue
from launch.run import Outcome, RunError, command
from launch.settings import Settings as Base
from launch.state import RunState, state_of
from launch.status import runs_beneath

__all__ = ["Settings", "main"]

POLL_S = 0.5
ASK_S = 10.0  # between two questions to the queue
NAMED = 20  # runs that are named at most
END = 65536  # bytes of a file's end that are looked at


class Settings(Base):
    """Whose lines, and which."""

    folder: Path = Field(Path(), description="a run folder, or a folder with one run somewhere beneath it")
    rank: int = Field(0, ge=0, description="process of the run")
    lines: int = Field(40, ge=1, description="how many of the last lines")
    follow: bool = Field(False, description="go on with what is printed, until the run ends or Ctrl-C")
    kind: Literal["out", "err"] = Field("out", description="err: what went to standard error")
    depth: int = Field(4, ge=0, description="how many folders deep a run is looked for")


def main(settings: Settings) -> Outcome:
    """Print lines of one run. Raises RunError where there is none, or several."""
    folder = _one(settings.folder, settings.depth)
    run = state_of(folder, queue())
    file, about = _file(folder, run, settings)
    if about:
        print(about, file=sys.stderr)
    at = _tail(file, settings.lines) if file is not None else 0
    if settings.follow and run.state in ("queued", "running"):
        try:
            _follow(folder, settings, file, at)
        except KeyboardInterrupt:
            return Outcome()
        run = state_of(folder, queue())
    if run.state in ("failed", "stopped"):
        print(f"{run.state}: {run.why}".rstrip(": "), file=sys.stderr)
    return Outcome(next=tuple(_errors(folder, run, settings)))


def _one(folder: Path, depth: int) -> Path:
    if not folder.is_dir():
        raise RunError(f"there is no folder {folder}")
    if (folder / "run.json").exists():  # its parts have words of their own
        return folder
    found = list(runs_beneath(folder, depth))
    if not found:
        raise RunError(f"no run in {folder} or {depth} folders beneath it (a run folder holds run.json)")
    if len(found) > 1:
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        raise RunError(f"{len(found)} runs in {folder}, name one: {', '.join(map(str, found[:NAMED]))}{more}")
    return found[0]


def _file(folder: Path, run: RunState, settings: Settings) -> tuple[Path | None, str]:
    """Where the lines are, None where there are none yet; and what to say of that."""
    if run.job is not None:
        path = run.job.log(settings.rank, settings.kind)
        if path.is_file():
            return path, f"{path}:"
        ranks = _ranks(run)
        if ranks and settings.rank not in ranks:
            raise RunError(f"job {run.job.id} has no rank {settings.rank}: it has {ranks[0]} to {ranks[-1]}")
        return None, f"job {run.job.id} ({run.state}) has printed nothing yet. {run.why}".rstrip()
    arrays = [path for path in (folder / "jobs").glob(f"array-*/*_log.{settings.kind}") if path.stat().st_size]
    if arrays:
        newest = max(arrays, key=lambda path: path.stat().st_mtime)
        return newest, f"{newest} (the newest of {len(arrays)} jobs of its tasks):"
    path = folder / "log.txt"
    where = f"process {run.start['pid']} on {run.start['host']}" if run.start.get("pid") else "no job"
    if path.is_file():
        return path, f"{where}: its output went to the terminal it was started in; {path}:"
    return None, f"{where}: its output went to the terminal it was started in, and it has written no log.txt"


def _ranks(run: RunState) -> list[int]:
    """Those processes of the job that have a file of output."""
    if run.job is None:
        return []
    files = Path(run.job.output).glob(f"{run.job.id}_*_log.*")
    found = (re.fullmatch(rf"{re.escape(run.job.id)}_(\d+)_log\.(?:out|err)", path.name) for path in files)
    return sorted({int(match[1]) for match in found if match})


def _errors(folder: Path, run: RunState, settings: Settings) -> list[str]:
    """Commands that show the tracebacks of a run that has failed, the rank its outcome names first."""
    if run.state != "failed" or run.job is None:
        return []
    ranks = [rank for rank in _ranks(run) if b"Traceback" in _end(run.job.log(rank, "err"))]
    named = re.match(r"rank (\d+)\b", run.why)
    first = int(named[1]) if named else 0
    ranks.sort(key=lambda rank: (rank != first, rank))
    shown = [] if settings.kind == "out" else [settings.rank]
    return [command("logs", str(folder), f"rank={rank}", "kind=err") for rank in ranks if rank not in shown][:4]


def _end(path: Path) -> bytes:
    """The last bytes of a file, none where it is not there."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - END))
            return file.read()
    except FileNotFoundError:
        return b""


def _tail(path: Path, lines: int) -> int:
    """Print the last lines; the place in the file behind them."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        start, data = size, b""
        while start and data.count(b"\n") <= lines:
            step = min(END, start)
            start -= step
            file.seek(start)
            data = file.read(step) + data
    _print(b"".join(data.splitlines(keepends=True)[-lines:]))
    return size


def _follow(folder: Path, settings: Settings, file: Path | None, at: int) -> None:
    """Print what comes until the run has ended and all it said is printed; its file may be yet to come."""
    asked, over, ended = time.monotonic(), False, _written(folder)
    while True:
        if file is not None:
            at = _more(file, at)
        if over:
            return
        time.sleep(POLL_S)
        if time.monotonic() - asked >= ASK_S or _written(folder) != ended:
            run, asked, ended = state_of(folder, queue()), time.monotonic(), _written(folder)
            over = run.state not in ("queued", "running")
        if file is None and (file := _file(folder, state_of(folder, None), settings)[0]) is not None:
            at = 0


def _written(folder: Path) -> int:
    """When the outcome was, which a job that starts again takes back; 0 without one."""
    try:
        return (folder / "outcome.json").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _more(path: Path, at: int) -> int:
    try:
        with path.open("rb") as file:
            if at > file.seek(0, 2):  # written anew
                at = 0
            file.seek(at)
            data = file.read()
    except FileNotFoundError:
        return at
    _print(data)
    return at + len(data)


def _print(data: bytes) -> None:
    sys.stdout.write(data.decode(errors="replace"))
    sys.stdout.flush()
