"""The run folder: what was asked (settings.yaml), every start of it (run.json) and how it ended (outcome.json).

All three files appear by rename, so a reader never sees half of one. A folder belongs to one set of settings: the
same settings go on with it, others are refused with the difference.
"""

from __future__ import annotations

import difflib
import fcntl
import glob
import hashlib
import json
import os
import re
import shlex
import socket
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from shutil import which
from typing import Any

from launch.documents import parse, write
from launch.jobs import held, last_job, queue
from launch.origin import origin
from launch.settings import Settings, SettingsError, dump, load

__all__ = [
    "USER_ERRORS",
    "Outcome",
    "RunError",
    "Stopped",
    "alive",
    "close_run",
    "command",
    "may_pass",
    "note_start",
    "now",
    "open_run",
    "read_json",
    "refuse_others",
    "say",
    "without",
    "write_text",
]

OWN = ("settings.yaml", "run.json", "outcome.json", "attempts.jsonl")
# What a user can cause; the command says these in one line.
USER_ERRORS = (ValueError, OSError, MemoryError)


@dataclass(frozen=True)
class Outcome:
    """What a command made and what one can do with it; ``ok=False`` makes the command end with exit code 1."""

    made: tuple[str, ...] = ()
    next: tuple[str, ...] = ()
    ok: bool = True


class RunError(ValueError):
    """The run folder cannot be used: what stands against it and what to do."""


class Stopped(Exception):
    """The work was saved before its end because a signal asked for it; the same command goes on. Not a failure.

    The text names the signal: "stopped by SIGUSR2 after step 120".
    """

    @property
    def signal(self) -> str:
        """Name of the signal, empty where the text has none."""
        found = re.search(r"\bSIG[A-Z0-9]+", str(self))
        return found.group() if found else ""


def command(verb: str, *words: str) -> str:
    """A line that can be pasted into a shell, whatever stands in the paths."""
    return shlex.join(["axial", verb, *words])


def say(error: BaseException) -> str:
    """An error as the line a user reads; the name of the class only where the text does not say what is wrong."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return f"out of memory. {error}".rstrip(". ")
    if isinstance(error, USER_ERRORS) and str(error):
        return str(error)
    name = "" if isinstance(error, Stopped) or hasattr(error, "trace") else f"{type(error).__name__}: "
    return f"{name}{error}".rstrip(": ")


def may_pass(error: BaseException) -> bool:
    """May the same command succeed where it failed so? A mistake stays one; a machine or its network may recover."""
    return not isinstance(error, (ValueError, ImportError, FileNotFoundError, PermissionError, NotADirectoryError))


def open_run(
    folder: Path, settings: Settings, command: Sequence[str], free: Collection[str] = (), remedy: str = ""
) -> Path:
    """Make ``folder`` the home of a run with these settings and note this start in it.

    ``free`` are dotted keys that may differ from the folder's own settings, such as "steps"; ``folder`` always may.
    ``remedy`` is what else one can do about other settings.
    Raises RunError where the folder holds other settings or is being worked in, and where it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        file = next(path for path in (folder, *folder.parents) if path.exists())
        raise RunError(f"{file} is a file, so {folder} cannot be the run folder; choose another folder=") from None
    except OSError as error:
        raise RunError(f"cannot make the run folder {folder}: {error.strerror}") from None
    begun = {**_here(), **origin(), "seeds": _seeds(settings.model_dump(mode="json"))}
    with _alone(folder):
        refuse_others(folder, settings, free, remedy)
        record = _record(folder)
        _refuse_busy(folder, record["starts"][-1] if record["starts"] else {})
        record["starts"].append({"at": now(), "command": list(command), **begun})
        write_text(folder / "settings.yaml", dump(settings))
        (folder / "outcome.json").unlink(missing_ok=True)
        write_text(folder / "run.json", json.dumps(record, indent=1) + "\n")
    return folder


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two commands at once for one folder come one after the other; on one machine, whatever its file systems can."""
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"axial-{os.getuid()}-{name}.lock"
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError:  # a machine without room for it: then without
        yield
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def close_run(
    folder: Path, state: str, outcome: Outcome | None = None, error: str = "", *, again: bool = False
) -> None:
    """Note how the last start ended: ``state`` is done, failed or stopped; ``again``: another try may well succeed.

    A full disk must not hide a failure.
    """
    made = outcome or Outcome()
    ended = {"state": state, "at": now(), "made": made.made, "next": made.next, "error": error, "again": again}
    text = json.dumps(ended, indent=1)
    try:
        write_text(folder / "outcome.json", text + "\n")
    except RunError:
        if state == "done":
            raise


def note_start(folder: Path, job: str | None = None, waiting: bool = False) -> None:
    """Say of the last start that it now runs in this process, as ``job`` of a cluster, or that the job waits there."""
    record = _record(folder)
    if not record["starts"]:
        raise RunError(f"{folder / 'run.json'} holds no start to note job {job} in; start the run again")
    here = _here() if not waiting else {"host": None, "pid": None, "ticks": None}
    record["starts"][-1] |= {"job": job, "begun": now(), **here}
    (folder / "outcome.json").unlink(missing_ok=True)
    write_text(folder / "run.json", json.dumps(record, indent=1) + "\n")


def alive(start: dict[str, Any]) -> bool | None:
    """Does the process of an entry of run.json still run? None where it is another machine's or not started yet."""
    if start.get("host") != socket.gethostname() or not start.get("pid"):
        return None
    return _ticks(start["pid"]) == start.get("ticks") is not None


def _ticks(pid: int) -> int | None:
    """When a process began, in ticks since boot: tells it from a later one with its number. None when it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else int(fields[18])
    except FileNotFoundError:
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return 0


def _here() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "ticks": _ticks(os.getpid())}


def now() -> str:
    """Local time with its offset, to the second."""
    return datetime.now(UTC).astimezone().isoformat(timespec="seconds")


def _refuse_busy(folder: Path, last: dict[str, Any]) -> None:
    """Two writers would spoil each other's files, so the last start must have ended, here or elsewhere."""
    if not last or last.get("pid") == os.getpid():
        return
    outcome = read_json(folder / "outcome.json") or {}
    ended, job = outcome.get("state"), last_job(folder)
    jobs = queue() if job is not None and job.told else None
    # A job that has failed, or was stopped, may be about to start again; one that is done is only being put away.
    waits = held(job, jobs) if ended != "done" else None
    again = outcome.get("again") or Stopped(outcome.get("error", "")).signal == "SIGUSR2"
    if again and jobs is None and job is not None and job.told and which("squeue"):
        raise RunError(
            f"squeue does not answer, so nobody can tell whether job {job.id} of {folder} waits to start again; try "
            "again in a moment"
        )
    living = waits is not None or alive(last)
    if living is None and ended is None:  # where nobody can tell it is believed to live; else its job has gone
        living = jobs is None or job is None or not job.since(last["at"])
    if not living:
        return
    who = f"process {last['pid']} on {last['host']}" if last.get("pid") else "a job in the queue"
    if waits is not None and job is not None:
        who = f"job {job.id} ({waits.state} in the queue)"
    raise RunError(
        f"{folder} is being worked in by {who} since {last['at']}; wait for it, stop it (axial cancel), or choose "
        f"another folder= (if it is gone, remove {folder / 'run.json'})"
    )


def refuse_others(folder: Path, settings: Settings, free: Collection[str] = (), remedy: str = "") -> None:
    """Raise RunError, with the difference, where the folder holds what was made with other settings; see `open_run`."""
    free = {"folder", *free}
    path = folder / "settings.yaml"
    if not path.exists():
        return
    old, new = (write(without(data, free)) for data in (_held(path, settings), parse(dump(settings), "", []).data))
    if old == new or not _has_work(folder):
        return
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), str(path), "settings given now", lineterm="", n=2)
    raise RunError(
        f"{folder} holds a run with other settings; choose another folder=, {remedy}or put these back:\n"
        + "\n".join(lines)
    )


def _has_work(folder: Path) -> bool:
    """Is there more than the record, and a cluster's, of a start that failed before it made anything?

    A cache is nothing made: what is in it says what it is of, and serves other settings as well.
    """
    made = (path for path in folder.rglob("*") if path.relative_to(folder).parts[0] not in ("jobs", "cache"))
    return any(path.name not in OWN and path.is_file() and path.stat().st_size for path in made)


def _held(path: Path, settings: Settings) -> Any:
    """What a folder's settings.yaml says, plain. A setting that there was none of when it was written has its default;
    a file that can no longer be read as such settings counts as it stands."""
    text = _read(path)
    with suppress(SettingsError):
        text = dump(load(type(settings), path))
    return parse(text, "", []).data


def without(data: Any, free: Collection[str], key: str = "") -> Any:
    """Plain settings without those at the dotted keys in ``free``."""
    if not isinstance(data, dict):
        return data
    inner = {name: f"{key}.{name}".lstrip(".") for name in data}
    return {name: without(value, free, inner[name]) for name, value in data.items() if inner[name] not in free}


def _record(folder: Path) -> dict[str, Any]:
    record = read_json(folder / "run.json")
    if record is None:
        return {"starts": []}
    if not isinstance(record.get("starts"), list):
        raise RunError(f"{folder / 'run.json'} is not a record of starts; move it away to use the folder")
    return record


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in ``path``; None without the file. Raises RunError where it holds something else."""
    if not path.exists():
        return None
    try:
        found = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise RunError(
            f"{path} is not JSON (line {error.lineno}: {error.msg}); move it away to use the folder"
        ) from None
    if not isinstance(found, dict):
        raise RunError(f"{path} does not hold a JSON object; move it away to use the folder")
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RunError(f"{path} is not UTF-8 text; move it away to use the folder") from None
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from None


def write_text(path: Path, text: str) -> None:
    """Write ``path`` whole or not at all. Raises RunError with the reason, such as a full disk."""
    host = socket.gethostname().partition(".")[0]
    aside = path.with_name(f".{path.name}.{host}.{os.getpid()}")
    for left in path.parent.glob(f"{glob.escape(f'.{path.name}.{host}.')}*"):  # by a process that was killed
        if left.suffix[1:].isdigit() and _ticks(int(left.suffix[1:])) is None:
            left.unlink(missing_ok=True)
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {error.strerror}") from None


def _seeds(data: Any, key: str = "") -> dict[str, Any]:
    """Every setting called seed, by its dotted key."""
    if not isinstance(data, dict):
        return {key: data} if key.rpartition(".")[2] == "seed" else {}
    return {
        found: seed
        for name, value in data.items()
        for found, seed in _seeds(value, f"{key}.{name}".lstrip(".")).items()
    }
