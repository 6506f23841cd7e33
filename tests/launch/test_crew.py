"""Tasks over processes that crash, hang, run out of memory or are killed: the others go on, and nobody is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.crew import CrewError, Lost, Workers, workers_for
from tests.launch.crew_tasks import (
    Noted,
    allocate,
    allocate_or_say,
    call,
    end,
    environment,
    fail,
    hang,
    hear,
    itk_threads,
    name,
    process,
    square,
    unpicklable,
)

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_every_task_has_its_result(count: int) -> None:
    with Workers(count).open() as each:
        assert sorted(each(square, range(40), name)) == [(number, number**2) for number in range(40)]
        assert list(each(square, [], name)) == []
        assert list(each(square, [3], name)) == [(3, 9)]


def test_a_short_task_does_not_wait_for_a_long_one() -> None:
    tasks: list[tuple[Callable[..., Any], Any]] = [(time.sleep, 2.0), (square, 3), (square, 4)]
    with Workers(2).open() as each:
        assert [result for _, result in each(call, tasks, name)] == [9, 16, None]


def test_equal_tasks_are_all_done() -> None:
    with Workers(2).open() as each:
        assert list(each(square, [7] * 5, name)) == [(7, 49)] * 5


def test_workers_live_on_from_call_to_call_and_end_with_the_block() -> None:
    with Workers(2).open() as each:
        first = {pid for _, pid in each(process, range(50), name)}
        second = {pid for _, pid in each(process, range(50), name)}
        assert first & second  # one of the two may be so quick that the other gets no task
        assert len(first | second) <= 2
        assert os.getpid() not in first
    assert not any(Path(f"/proc/{pid}").exists() for pid in first)


def test_no_process_is_started_for_nothing() -> None:
    with Workers(8).open() as each:
        assert len({pid for _, pid in each(process, [1, 2], name)}) <= 2


def test_the_libraries_of_a_worker_keep_to_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    with Workers(1).open() as each:
        assert dict(each(environment, ["OMP_NUM_THREADS", "MKL_NUM_THREADS"], name)) == {
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
        }
        assert list(each(itk_threads, [0], name)) == [(0, 1)]
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "MKL_NUM_THREADS" not in os.environ


@pytest.mark.parametrize(
    ("trouble", "detail"),
    [
        ((signal.raise_signal, signal.SIGSEGV), "ended by signal SIGSEGV twice"),
        ((signal.raise_signal, signal.SIGKILL), "ended by signal SIGKILL twice (most likely memory ran out)"),
        ((end, 3), "ended with code 3 twice"),
        ((end, 0), "ended with code 0 twice"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("count", [1, 2])
def test_a_crash_costs_its_task_alone(count: int, trouble: tuple[Callable[..., Any], Any], detail: str) -> None:
    tasks = [(square, 1), (square, 2), trouble, (square, 3), (square, 4)]
    with Workers(count).open() as each:
        found = dict(each(call, tasks, name))
        assert found == {task: Lost("crashed", detail) if task is trouble else task[1] ** 2 for task in tasks}
        assert dict(each(square, [5], name)) == {5: 25}


def test_a_task_that_crashes_once_is_done_in_a_fresh_process(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    noted = Noted(tmp_path, "crash", at=4)
    with Workers(2).open() as each:
        assert dict(each(noted, range(6), name)) == {number: number**2 for number in range(6)}
    lines = [line.split() for line in (tmp_path / "started").read_text().splitlines()]
    [again] = [place for place, line in enumerate(lines) if line[0] == "4"][1:]
    assert lines[again][1] not in {line[1] for line in lines[:again]}
    assert capfd.readouterr().err == "task 4: ended by signal SIGSEGV; it is tried once more\n"


def test_many_crashes_at_once() -> None:
    tasks = [(end, 1), (square, 2)] * 6
    with Workers(3).open() as each:
        found = [result for _, result in each(call, tasks, name)]
    assert found.count(4) == 6
    assert found.count(Lost("crashed", "ended with code 1 twice")) == 6


@pytest.mark.parametrize("count", [1, 2])
def test_a_task_that_hangs_is_ended(count: int) -> None:
    tasks: list[tuple[Callable[..., Any], Any]] = [(square, 1), (hang, None), (square, 2), (square, 3)]
    with Workers(count, timeout_s=0.7).open() as each:
        found = dict(each(call, tasks, name))
    assert found == {
        tasks[0]: 1, tasks[1]: Lost("timeout", "took longer than 0.7 s and was ended"), tasks[2]: 4, tasks[3]: 9,
    }  # fmt: skip


def test_time_counts_from_the_start_of_the_task_not_of_the_worker(tmp_path: Path) -> None:
    code = (
        "import sys; from launch.crew import Workers\n"
        "from slow_to_import import quick_function\n"
        "if __name__ == '__main__':\n"
        "    with Workers(1, timeout_s=1.0).open() as each: print(list(each(quick_function, [-3], str)))"
    )
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(1.5)\ndef quick_function(x): return -x\n")
    (tmp_path / "command.py").write_text(code)
    paths = os.pathsep.join([str(REPOSITORY), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, str(tmp_path / "command.py")],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[(-3, 3)]\n"


def test_what_needs_too_much_memory_is_lost_or_handled_by_the_function() -> None:
    with Workers(2, memory_gib=0.5).open() as each:
        found = dict(each(allocate, [0.1, 4.0, 0.2], name))
        assert found == {
            0.1: int(0.1 * 2**30),
            4.0: Lost("memory", "needs more than memory_gib=0.5"),
            0.2: int(0.2 * 2**30),
        }
        assert dict(each(allocate_or_say, [4.0], name)) == {4.0: "too large"}


def test_without_a_limit_want_of_memory_is_an_error() -> None:
    with Workers(1).open() as each, pytest.raises(MemoryError):
        list(each(allocate, [2.0**20], name))


def test_a_limit_that_nothing_fits_into_is_refused() -> None:
    with (
        Workers(1, memory_gib=0.002).open() as each,
        pytest.raises(CrewError, match=r"memory_gib=0\.002 may be too little for the libraries alone"),
    ):
        list(each(square, [1], name))


def test_a_worker_killed_from_outside_at_work_or_idle() -> None:
    with Workers(1).open() as each:
        [(_, pid)] = each(process, [0], name)
        assert isinstance(pid, int)
        os.kill(pid, signal.SIGKILL)
        assert list(each(square, [4], name)) == [(4, 16)]
    with Workers(2).open() as each:
        found = each(process, range(3), name)
        _, first = next(found)
        assert isinstance(first, int)
        os.kill(first, signal.SIGKILL)
        assert all(isinstance(pid, int) for _, pid in found)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_an_error_ends_the_others_and_is_raised_as_it_was(count: int) -> None:
    tasks: list[tuple[Callable[..., Any], Any]] = [(fail, "/no/such/file"), *[(time.sleep, 60.0)] * (count == 2)]
    start = time.monotonic()
    with Workers(count).open() as each:
        with pytest.raises(FileNotFoundError) as caught:
            list(each(call, tasks, lambda task: f"task {task[1]}"))
        assert dict(each(square, range(9), name)) == {number: number**2 for number in range(9)}
    assert time.monotonic() - start < 30
    assert caught.value.filename == "/no/such/file"
    if count:
        assert "in fail\n    raise FileNotFoundError" in caught.value.__notes__[0]
        assert caught.value.__notes__[1] == "at task /no/such/file"


def test_what_cannot_be_copied_is_told_all_the_same() -> None:
    with Workers(1).open() as each:
        with pytest.raises(RuntimeError, match="OddError: 1 is odd, 3 too"):
            list(each(fail, ["odd"], name))
        with pytest.raises((AttributeError, TypeError), match=r"lambda|local object"):
            list(each(unpicklable, [1], name))


def test_a_caller_that_stops_early_leaves_nobody_at_work() -> None:
    tasks: list[tuple[Callable[..., Any], Any]] = [(process, None), (time.sleep, 1000.0), (square, 2)]
    with Workers(2).open() as each:
        found = each(call, tasks, name)
        next(found)
        found.close()  # type: ignore[attr-defined]
        assert dict(each(square, [3], name)) == {3: 9}


def test_zero_workers_wanted_means_every_core() -> None:
    assert workers_for(0) >= 1
    assert workers_for(3) == 3


def _hanging(folder: Path, kind: str) -> tuple[subprocess.Popen[str], Noted]:
    code = "import sys; from tests.launch.crew_tasks import main; main(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(folder), kind]
    started = subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hear,
    )
    noted = Noted(folder)
    for _ in range(600):
        if (folder / "started").exists() and len(noted.starts()) == 2:
            break
        time.sleep(0.05)
    else:
        started.kill()
        pytest.fail(f"no tasks were started: {started.communicate()}")
    return started, noted


def _gone(pids: set[int]) -> bool:
    def here(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        except OSError:
            return False

    for _ in range(200):
        if not any(map(here, pids)):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("kind", ["workers", "jobs"])
def test_ctrl_c_ends_all_and_only_the_first_process_speaks(tmp_path: Path, kind: str) -> None:
    process, noted = _hanging(tmp_path, kind)
    with process:
        # A terminal tells every process of the group; jobs elsewhere hear nothing.
        os.killpg(process.pid, signal.SIGINT) if kind == "workers" else process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGINT
    if kind == "workers":
        assert err.count("KeyboardInterrupt") == 1
    assert _gone(noted.processes())


def test_nobody_is_left_when_the_first_process_is_killed(tmp_path: Path) -> None:
    process, noted = _hanging(tmp_path, "workers")
    with process:
        process.kill()
        process.communicate(timeout=60)
    assert _gone(noted.processes())
