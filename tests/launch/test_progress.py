"""Progress on a terminal and elsewhere."""

from __future__ import annotations

import sys

import pytest

from launch.progress import Progress, duration, progress, rate


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_plain_lines_come_now_and_then(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for item in progress(range(40), what="curate", unit="shards"):
        assert item == round(clock[0])
        clock[0] += 1.0
    assert capsys.readouterr().err.splitlines() == [
        "curate: 2/40 shards  5%  1 shards/s  38s left",
        "curate: 12/40 shards  30%  1 shards/s  28s left",
        "curate: 22/40 shards  55%  1 shards/s  18s left",
        "curate: 32/40 shards  80%  1 shards/s  8s left",
        "curate: 40 shards in 40s  1 shards/s",
    ]


def test_a_total_may_be_unknown(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for _ in progress(iter(range(3)), what="read", unit="files"):
        clock[0] += 1.0
    assert capsys.readouterr().err.splitlines() == ["read: 2 files  1 files/s", "read: 3 files in 3s  1 files/s"]


def test_an_error_is_not_a_finish(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with Progress(10, "curate", "shards") as bar:
            bar.advance(3)
            clock[0] += 1.0
            raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        fail()
    assert capsys.readouterr().err == "curate: 3/10 shards  30%  3 shards/s  2s left  stopped\n"


def test_nothing_to_do_and_nobody_to_tell(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress([], what="a", active=False)) == []
    assert list(progress([], what="a")) == []
    assert capsys.readouterr().err == "a: 0 items in 0s\n"


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(progress(range(5), what="curate", unit="shards")) == [0, 1, 2, 3, 4]
    shown = capsys.readouterr().err
    assert "curate" in shown
    assert "5/5" in shown
    assert " in 0s" not in shown


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (89, "89s"), (90, "2m"), (3600, "60m"), (14.2 * 3600, "14h"), (200 * 3600, "8d")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("per_second", "text"), [(1840.4, "1,840"), (100, "100"), (3.217, "3.22"), (0.0213, "0.0213")])
def test_rates(per_second: float, text: str) -> None:
    assert rate(per_second) == text
