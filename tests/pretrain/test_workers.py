"""Worker processes that are signalled, killed or broken, and shards that cannot be read."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Iterator

import pytest
import torch

from pretrain.data.batch import Batch
from pretrain.data.stream import StreamError
from tests.pretrain.made_up import Phantoms, settings, stream, take


def same(first: Batch, second: Batch) -> bool:
    a, b = first.tensors(), second.tensors()
    return first.keys == second.keys and a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


@pytest.fixture(autouse=True)
def _enough_processors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("pretrain.data.loader._processors", lambda: 2)
    yield
    assert not multiprocessing.active_children()


def victim() -> int:
    worker = multiprocessing.active_children()[0]
    assert worker.pid
    return worker.pid


@pytest.mark.parametrize("waiting", [False, True], ids=["while the trainer computes", "while it waits"])
def test_a_killed_worker_changes_nothing(waiting: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The death is named and the batches are those of a run without it, byte for byte."""
    expected = take(Phantoms(30), settings(), 12)
    made = stream(Phantoms(30), settings(workers=2))
    got = [next(made) for _ in range(3)]
    pid = victim()
    if waiting:  # it stands still and dies when the trainer has begun to wait for it
        os.kill(pid, signal.SIGSTOP)
        threading.Timer(1.0, os.kill, (pid, signal.SIGKILL)).start()
    else:
        os.kill(pid, signal.SIGKILL)
    got += [next(made) for _ in range(9)]
    made.close()
    assert all(same(a, b) for a, b in zip(got, expected, strict=True))
    assert len(made.deaths) == 1
    assert re.fullmatch(rf"pid {pid} at step [3-9] by SIGKILL: most likely memory ran out .*", made.deaths[0])
    assert f"a reading process died: {made.deaths[0]}" in caplog.text
    assert "1 reading processes died" in made.summary()


def test_a_worker_that_dies_while_it_reads(caplog: pytest.LogCaptureFixture) -> None:
    """A slice that kills who reads it is tried again, until the deaths are too many; the run stops with the remedy."""
    data = settings(workers=1, max_worker_deaths=1)
    with pytest.raises(
        StreamError, match=r"2 reading processes died within 1000 steps.*SIGKILL.*Lower data\.workers=1"
    ):
        take(Phantoms(30, deadly=7), data, 10)
    assert caplog.text.count("begun again at that step") == 2


def test_deaths_of_long_ago_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.data.loader.RECENT", 2)
    expected = take(Phantoms(30), settings(), 9)
    made = stream(Phantoms(30), settings(workers=1, max_worker_deaths=1))
    got = []
    for _ in range(3):
        got += [next(made) for _ in range(3)]
        os.kill(victim(), signal.SIGKILL)
    made.close()
    assert len(made.deaths) == 2
    assert all(same(a, b) for a, b in zip(got, expected, strict=True))


def test_signals_for_the_trainer_do_not_kill_workers() -> None:
    made = stream(Phantoms(30), settings(workers=2))
    first = [next(made), next(made)]  # one of each worker, so that both have started
    for worker in multiprocessing.active_children():
        assert worker.pid
        for name in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            os.kill(worker.pid, name)
    first += [next(made) for _ in range(8)]
    made.close()
    assert all(same(a, b) for a, b in zip(first, take(Phantoms(30), settings(), 10), strict=True))


def test_an_error_of_a_living_worker_is_told_as_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Phantoms, "hu", lambda self, i: torch.zeros(2).view(3))
    with pytest.raises(RuntimeError, match=r"DataLoader worker process 0(.|\n)*shape '\[3\]' is invalid"):
        take(Phantoms(30), settings(workers=1, start_method="fork"), 1)


def test_a_corpus_that_is_half_gone_stops_the_run(caplog: pytest.LogCaptureFixture) -> None:
    corpus = Phantoms(400, bad=frozenset(range(0, 400, 20)))
    data = settings(max_unreadable_share=0.02)
    made = stream(corpus, data)
    with pytest.raises(
        StreamError, match=r"17 of [\d,]+ slices could not be .*max_unreadable_share=0.02.*shard-"
    ) as at:
        deque(made, maxlen=0)
    made.close()
    assert made.unreadable.total() == 17  # more than max_unreadable
    assert all(shard in str(at.value) for shard in made.unreadable)
    assert "slices were replaced" in caplog.text
    assert "17 of" in made.summary()


def test_a_share_of_unreadable_slices_is_lived_with() -> None:
    corpus = Phantoms(400, bad=frozenset(range(0, 400, 20)))
    made = stream(corpus, settings(max_unreadable_share=0.1))
    for _ in range(200):
        next(made)
    made.close()
    assert made.unreadable.total() > 30
