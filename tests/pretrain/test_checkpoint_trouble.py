"""Saves in the background: what is written, what a full disk does, who hears of a failure, how a stop ends them."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pretrain.checkpoint_writer
from launch.distributed import world
from pretrain.checkpoint import Checkpoints, CheckpointSettings
from pretrain.checkpoint_files import CheckpointError, newest, read_tensors
from tests.gloo import run_ranks
from tests.pretrain import test_loop
from tests.pretrain.test_checkpoint import Two, names


class Gate:
    """Holds back the writing of tensors until it is opened, or makes it fail with an errno."""

    def __init__(self, put: Any) -> None:
        self.open, self.code, self.honest = threading.Event(), 0, pretrain.checkpoint_writer._Stream.write
        self.open.set()
        put(pretrain.checkpoint_writer._Stream, "write", lambda stream, data: self.write(stream, data))

    def write(self, stream: Any, data: Any) -> int:
        assert self.open.wait(60)
        if self.code:
            with stream._files.noted():
                raise OSError(self.code, os.strerror(self.code))
        return self.honest(stream, data)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch.setattr)
    yield gate
    gate.open.set()


def made(folder: Path, two: Two, said: list[str], **settings: Any) -> Checkpoints:
    return Checkpoints(folder, two, two.optimizer, two.here, CheckpointSettings(**settings), say=said.append)


def test_training_goes_on_and_the_checkpoint_is_that_of_its_step(tmp_path: Path, gate: Gate) -> None:
    two, said = Two(), list[str]()
    checkpoints = made(tmp_path / "a", two, said, every=2)
    two.step(0), two.step(1)
    gate.open.clear()
    assert checkpoints.maybe_save(2)
    expected = two.weights()
    two.step(2)
    assert not checkpoints.maybe_save(3)
    assert newest(tmp_path / "a") is None, "it has its name before its bytes are there"
    assert two.weights() != expected
    gate.open.set()
    checkpoints.wait()
    assert said == ["checkpoint step_00000002 written"]
    other = Two()
    assert made(tmp_path / "a", other, []).restore() == 2
    assert other.weights() == expected
    # In the background or not, the same tensors.
    plain = Two()
    plain.step(0), plain.step(1)
    assert made(tmp_path / "b", plain, [], every=2, background=False).maybe_save(2)
    a, b = (read_tensors(tmp_path / name / "checkpoints" / "step_00000002", "") for name in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_name_comes_at_the_first_boundary_after_the_bytes(tmp_path: Path) -> None:
    two, said = Two(), list[str]()
    checkpoints = made(tmp_path, two, said, every=2)
    checkpoints.maybe_save(2)
    deadline = time.monotonic() + 60
    while not said and time.monotonic() < deadline:
        time.sleep(0.01)
        assert not checkpoints.maybe_save(3)
    assert newest(tmp_path) == tmp_path / "checkpoints" / "step_00000002"


def test_a_second_save_waits_for_the_first_and_says_how_long(tmp_path: Path, gate: Gate) -> None:
    two, said = Two(), list[str]()
    checkpoints = made(tmp_path, two, said, every=2)
    gate.open.clear()
    checkpoints.maybe_save(2)
    threading.Timer(0.3, gate.open.set).start()
    assert checkpoints.maybe_save(4)
    assert "a checkpoint is due, the one of step 2 still being written: waited 0." in said[0]
    assert checkpoints.maybe_save(5, last=True)
    assert names(tmp_path) == [f"step_0000000{n}" for n in (2, 4, 5)]
    gate.open.clear()
    assert checkpoints.maybe_save(6)
    threading.Timer(0.2, gate.open.set).start()
    assert not checkpoints.maybe_save(6, last=True), "the last step's own save in flight is waited for, not repeated"
    assert newest(tmp_path) == tmp_path / "checkpoints" / "step_00000006"


def test_a_waiting_save_marks_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two, ticks = Two(), list[int]()
    checkpoints = made(tmp_path, two, [])
    checkpoints.tick = lambda: ticks.append(1)
    honest = pretrain.checkpoint_writer._Stream.write
    monkeypatch.setattr(
        pretrain.checkpoint_writer._Stream, "write", lambda *given: (time.sleep(0.005), honest(*given))[1]
    )
    checkpoints.save(1)
    assert len(ticks) >= 2


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_is_said_and_tried_again(tmp_path: Path, gate: Gate, code: int, background: bool) -> None:
    two, said = Two(), list[str]()
    checkpoints = made(tmp_path, two, said, every=1, max_failures=3, background=background)

    def step(number: int) -> None:
        checkpoints.maybe_save(number)
        checkpoints.wait()

    step(1), step(2)
    gate.code = code
    step(3), step(4)
    gate.code = 0
    step(5), step(6)
    text = "\n".join(said)
    assert text.count("warning: cannot write") == 2
    assert os.strerror(code) in text
    assert "failure 1 of 3 in a row" in text
    assert "failure 2 of 3 in a row" in text
    assert "the newest checkpoint is that of step 2; training goes on and tries again at step" in text
    assert "step_00000005" in names(tmp_path)
    assert not [name for name in names(tmp_path) if name.endswith(("step_00000003", "step_00000004"))]
    gate.code = code
    step(7), step(8)
    with pytest.raises(CheckpointError, match=rf"{os.strerror(code)} \(3 in a row\).*make room in .*same command"):
        step(9)
    assert newest(tmp_path) == tmp_path / "checkpoints" / "step_00000006"


def test_a_save_that_is_due_when_one_fails_is_the_next_try(tmp_path: Path, gate: Gate) -> None:
    said = list[str]()
    checkpoints = made(tmp_path, Two(), said, every=2)
    gate.code = errno.ENOSPC
    assert checkpoints.maybe_save(2)
    assert checkpoints._writing is not None
    checkpoints._writing.wait(lambda: None)
    gate.code = 0
    assert checkpoints.maybe_save(4)
    assert "training goes on and tries again at step 4 (" in "".join(said)
    checkpoints.wait()
    assert names(tmp_path) == ["step_00000004"]


def test_the_last_save_must_succeed(tmp_path: Path, gate: Gate) -> None:
    checkpoints = made(tmp_path, Two(), [], every=1)
    gate.code = errno.ENOSPC
    with pytest.raises(CheckpointError, match=r"step_00000003.*No space left on device.*there is no checkpoint"):
        checkpoints.maybe_save(3, last=True)


@pytest.mark.parametrize("background", [True, False])
def test_other_errors_are_raised_at_once(tmp_path: Path, gate: Gate, background: bool) -> None:
    checkpoints = made(tmp_path, Two(), [], every=1, background=background)
    gate.code = errno.EACCES
    with pytest.raises(CheckpointError, match=r"rank 0 on .*Permission denied.*put this right"):
        checkpoints.maybe_save(1) and checkpoints.wait()


def test_too_little_memory_for_the_copy_is_an_error_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise MemoryError("no more memory")

    monkeypatch.setattr(pretrain.checkpoint_writer.HostCopy, "_buffer", refuse)
    checkpoints = made(tmp_path, Two(), [], every=1)
    with pytest.raises(CheckpointError, match=r"MemoryError: no more memory.*checkpoint\.background=false"):
        checkpoints.maybe_save(1) and checkpoints.wait()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    given = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(given, capture_output=True, check=False).returncode:
        pytest.skip("a file system can be mounted by root only")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    two, said = Two(), list[str]()
    checkpoints = made(small_disk, two, said, every=1, keep=1)
    checkpoints.save(1)
    fill = small_disk / "fill"
    fill.write_bytes(b"\0" * (os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize))
    for step in (2, 3):
        assert checkpoints.maybe_save(step)
        checkpoints.wait()
    assert said.count("checkpoint step_00000001 written") == 1
    assert "No space left on device" in said[1], "not torch's own word for it"
    assert names(small_disk) == ["step_00000001"]
    fill.unlink()
    assert checkpoints.maybe_save(4, last=True)
    checkpoints.wait()
    assert names(small_disk) == ["step_00000004"]
    assert made(small_disk, Two(), []).restore() == 4


def test_an_old_one_that_cannot_be_deleted_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    checkpoints = made(tmp_path, Two(), said, keep=1)
    checkpoints.save(1)

    def refuse(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    monkeypatch.setattr("pretrain.checkpoint.shutil.rmtree", refuse)
    for step in (2, 3):
        checkpoints.save(step)
        checkpoints.wait()
        assert "warning: cannot delete" in said[-1]
        assert newest(tmp_path) == tmp_path / "checkpoints" / f"step_0000000{step}"


def one_fails(rank: int, size: int, folder: Path, code: int) -> list[str]:
    """Rank 1's disk refuses the second checkpoint."""
    said: list[str] = []
    gate = Gate(setattr)
    with world("cpu") as here:
        two = Two(here, "full")
        checkpoints = Checkpoints(
            folder, two, two.optimizer, here, CheckpointSettings(every=1, max_failures=2), say=said.append
        )
        try:
            for step in range(1, 4):
                two.step(step - 1)
                gate.code = code if rank == 1 and step == 2 else 0
                checkpoints.maybe_save(step)
                if checkpoints._writing is not None:
                    checkpoints._writing.wait(lambda: None)
            checkpoints.maybe_save(4, last=True)
            return said
        except CheckpointError as error:
            return [f"raised: {error}"]


def test_all_ranks_hear_of_one_rank_s_failure(tmp_path: Path) -> None:
    zero, one = run_ranks(f"{__file__}:one_fails", 2, tmp_path, folder=tmp_path / "full", code=errno.ENOSPC)
    assert [line.split(":")[0] for line in zero] == [
        "checkpoint step_00000001 written",
        "warning",
        "checkpoint step_00000003 written",
        "checkpoint step_00000004 written",
    ]
    assert "rank 1 on" in zero[1]
    assert not one, "rank 0 speaks for all"
    zero, one = run_ranks(f"{__file__}:one_fails", 2, tmp_path, folder=tmp_path / "denied", code=errno.EACCES)
    assert zero == one
    assert "rank 1 on" in zero[0]
    assert "Permission denied" in zero[0]


@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_during_a_save_in_the_background(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch, signals: int
) -> None:
    """The save in flight is finished, the step at hand is saved too, and a second signal changes neither."""

    class Asked(test_loop.Line):
        def after_step(self, step: int) -> None:
            super().after_step(step)
            if step == 1:
                gate.open.clear()  # the save after the second step hangs
            if step == 2:
                for number in (signal.SIGUSR2, signal.SIGTERM)[:signals]:
                    os.kill(os.getpid(), number)
                threading.Timer(0.3, gate.open.set).start()

    monkeypatch.setitem(test_loop.run.__globals__, "Line", Asked)
    ended = test_loop.run(tmp_path, every=2).ended
    assert (ended.step, ended.stopped_by) == (3, "SIGUSR2")
    assert names(tmp_path) == ["step_00000002", "step_00000003"]


@pytest.mark.parametrize(("spoilt", "code"), [(frozenset({5, 6, 7}), 0), (frozenset(), 0), (frozenset(), errno.EIO)])
def test_a_run_that_ends_by_an_error_keeps_the_save_in_flight(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch, spoilt: frozenset[int], code: int
) -> None:
    class Held(test_loop.Line):
        def after_step(self, step: int) -> None:
            super().after_step(step)
            if step == 4:
                gate.open.clear()
                gate.code = code
                threading.Timer(0.5, gate.open.set).start()
            if step == 7 and not spoilt:
                raise ValueError("a shard is torn")

    monkeypatch.setitem(test_loop.run.__globals__, "Line", Held)
    with pytest.raises(ValueError, match="3 steps in a row" if spoilt else "a shard is torn"):
        test_loop.run(tmp_path, every=5, steps=20, log_every=1, max_bad=3, spoilt=spoilt)
    assert names(tmp_path) == ([] if code else ["step_00000005"])


def test_a_plan_that_fails_is_heard_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no plan")

    monkeypatch.setattr(pretrain.checkpoint_writer._Planner, "create_local_plan", refuse)
    with pytest.raises(CheckpointError, match=r"rank 0 on .*: RuntimeError: no plan"):
        made(tmp_path, Two(), []).save(1)


def signalled_waiting(rank: int, size: int, folder: Path) -> tuple[int, str]:
    """Rank 1 is told to stop while it waits for the first step's data; rank 0 never is."""

    def slow(start: int, spoilt: frozenset[int], rank: int) -> Iterator[test_loop.Numbers]:
        for step, batch in enumerate(honest(start, spoilt, rank)):
            if step == 0 and rank == 1:
                threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR2)).start()
                time.sleep(1.0)
            yield batch

    honest = test_loop.numbers
    vars(test_loop).update(numbers=slow)
    with world("cpu") as here:
        ended = test_loop.run(folder, here, steps=50).ended
        return ended.step, ended.stopped_by


def test_a_signal_while_the_first_data_are_waited_for(tmp_path: Path) -> None:
    assert run_ranks(f"{__file__}:signalled_waiting", 2, tmp_path, folder=tmp_path) == [(1, "SIGUSR2")] * 2
    assert names(tmp_path) == ["step_00000001"]
