"""When a job that failed is tried again."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.attempts import Attempt, against_another, newest_checkpoint, note_attempt, read_attempts, step_of
from launch.beats import Beat, write_beat
from launch.run import note_start, open_run
from tests.launch.steps_verb import Settings


def tried(*ends: tuple[str, int | None, int | None]) -> list[Attempt]:
    return [Attempt("7", n, how, step, kept, "") for n, (how, step, kept) in enumerate(ends)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ends", "told"),
    [
        ([], ""),
        ([("failed", 8, 5)], ""),
        ([("failed", 8, 5), ("failed", 8, 5)], "it failed twice in step 8"),
        ([("killed", 8, 5), ("failed", 8, 5)], "it failed twice in step 8"),
        ([("failed", 8, 5), ("failed", 9, 5)], ""),
        ([("failed", 8, 5), ("warned", 7, 7), ("failed", 8, 5)], "it failed twice in step 8"),
        ([("failed", 8, 5), ("failed", 12, 10), ("failed", 8, 5)], ""),
        ([("lost", 8, 5), ("lost", 8, 5)], ""),
        ([("failed", 8, 5), ("lost", 8, 5)], ""),
        ([("killed", None, None)] * 3, ""),
        ([("killed", None, None)] * 4, "it failed 4 times in a row without a new checkpoint (restarts: 3)"),
        ([("lost", 8, 5)] * 4, "it failed 4 times in a row without a new checkpoint (restarts: 3)"),
        ([("lost", 8, 5)] * 3 + [("lost", 12, 10)], ""),
        ([("warned", 8, 5)] * 100, ""),
        ([("lost", 8, 5)] * 3 + [("warned", 8, 5)] * 2 + [("lost", 8, 5)], "it failed 4 times in a row"),
    ],
)
def test_what_speaks_against_one_more_try(ends: list[tuple[str, int | None, int | None]], told: str) -> None:
    said = against_another(tried(*ends), restarts=3)
    assert said.startswith(told) if told else not said


@given(st.lists(st.sampled_from(["warned", "failed", "killed", "lost"]), max_size=30), st.integers(0, 5))
def test_a_run_that_gets_on_is_never_given_up(hows: list[str], restarts: int) -> None:
    ends = [(how, 10 * n + 3, 10 * n) for n, how in enumerate(hows)]
    assert restarts == 0 or not against_another(tried(*ends), restarts)


@given(st.lists(st.sampled_from(["failed", "killed", "lost"]), min_size=1, max_size=30), st.integers(0, 5))
def test_a_run_that_does_not_get_on_is_given_up_after_so_many(hows: list[str], restarts: int) -> None:
    ends = [(how, n, 0) for n, how in enumerate(hows)]
    assert bool(against_another(tried(*ends), restarts)) == (len(hows) > restarts)


def test_what_was_noted_is_read_even_behind_a_torn_line(tmp_path: Path) -> None:
    first, second = tried(("failed", 3, None), ("warned", 4, 4))
    note_attempt(tmp_path, first)
    with (tmp_path / "attempts.jsonl").open("a") as file:
        file.write('{"job": "7", "resta\n')
    note_attempt(tmp_path, second)
    assert [one.how for one in read_attempts(tmp_path)] == ["failed", "warned"]
    assert read_attempts(tmp_path, "8") == []
    assert read_attempts(tmp_path / "none") == []
    assert read_attempts(tmp_path)[0].at


def test_the_step_is_that_of_the_last_start_alone(tmp_path: Path) -> None:
    assert step_of(tmp_path) is None
    open_run(tmp_path, Settings(folder=tmp_path), ["axial", "steps"])
    write_beat(tmp_path, Beat(0, 2, "n", 1, 90, 0, "data", 1, 0.0, time.time() - 3600))
    note_start(tmp_path, job="7")
    assert step_of(tmp_path) is None
    write_beat(tmp_path, Beat(1, 2, "n", 1, 12, 0, "data", 1, 0.0, time.time()))
    assert step_of(tmp_path) == 12
    write_beat(tmp_path, Beat(0, 2, "n", 1, 13, 0, "data", 1, 0.0, time.time()))
    assert (step_of(tmp_path), step_of(tmp_path, 1), step_of(tmp_path, 7)) == (13, 12, 13)


def test_the_newest_checkpoint_is_a_whole_one(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for name in ("step_00000009", "step_00000010", ".step_00000011", "step_x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_checkpoint(tmp_path) == 10
