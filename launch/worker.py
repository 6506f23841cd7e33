"""The other side of `launch.crew`: what a worker process does from its start to its end."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import pickle
import resource
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection, wait
from typing import Any

__all__ = ["SIGNALS", "work"]

# Ctrl-C, a closed terminal, a warned job: all processes are told, but it is the parent that decides what ends.
SIGNALS = frozenset({signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2})


def work(pipe: Connection[bytes, bytes], memory_gib: float | None) -> None:
    """Take over a function, then do tasks, until the pipe closes; a message is (kind, call, pickled value)."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _end_with_parent()
    if memory_gib is not None:
        limit = int(memory_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    function: Any = None
    while True:
        try:
            kind, call, packed = pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionError):
            return
        try:
            if kind == "function":
                function, answer = pickle.loads(packed), pickle.dumps(("ready", call, None))
            else:
                answer = pickle.dumps(("result", call, function(pickle.loads(packed))))
        except BaseException as error:  # it is raised in the parent
            answer = _packed(error, call)
        try:
            pipe.send_bytes(answer)
        except ConnectionError:  # nobody waits for it any more
            return


def _packed(error: BaseException, call: int) -> bytes:
    trace = traceback.format_exc()
    try:
        packed = pickle.dumps(("error", call, (error, trace)))
        pickle.loads(packed)
    except Exception:  # whatever its class does when it is copied: then its text must do
        told = RuntimeError(f"{type(error).__name__}: {error}")
        packed = pickle.dumps(("error", call, (told, trace)))
    return packed


def _end_with_parent() -> None:
    """An end as soon as the parent has ended, however it did, and whatever this process is doing then."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    if sys.platform == "linux":
        # The kernel does it when the pipe from the parent closes: a thread would wait for C++ code that hangs.
        fcntl.fcntl(parent.sentinel, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(parent.sentinel, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(parent.sentinel, fcntl.F_SETFL, fcntl.fcntl(parent.sentinel, fcntl.F_GETFL) | os.O_ASYNC)
        if wait([parent.sentinel], 0):
            os._exit(1)
    else:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
