"""What a training run says: one line a logged step on the console and in log.txt, metrics.jsonl, and TensorBoard."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch.progress import duration, rate
from launch.run import now, write_text

__all__ = ["Log", "step_line", "tell"]


class Log:
    """Writes into a run folder; with ``active=False`` (every rank but the first) it writes nothing.

    ``resume_step`` is the first step that will be logged again: lines of it and of later steps are dropped from
    metrics.jsonl, and TensorBoard is told to forget them, so that each step is there once. A disk that is full costs
    lines, which is said, but not the run.
    """

    def __init__(
        self, folder: Path, every: int = 10, tensorboard: bool = True, active: bool = True, resume_step: int = 0
    ) -> None:
        self.every, self.active = every, active
        self._metrics: _Lines | None = None
        self._text: _Lines | None = None
        self._board: _Board | None = None
        self._last = (max(resume_step - 1, 0), time.monotonic())
        if not active:
            return
        _drop_from(folder / "metrics.jsonl", resume_step)
        self._metrics, self._text = _Lines(folder / "metrics.jsonl"), _Lines(folder / "log.txt")
        self._board = _Board(folder / "tensorboard", resume_step) if tensorboard else None

    def due(self, step: int, total: int) -> bool:
        """Is this a step to log? Asking first saves the host from waiting for the device at all other steps."""
        return step % self.every == 0 or step == total

    def step(
        self,
        step: int,
        total: int,
        values: Mapping[str, float],
        *,
        terms: Mapping[str, float] | None = None,
        more: Mapping[str, float] | None = None,
        slices_per_step: int,
        wait: float | None = None,
        memory_gib: float | None = None,
        mfu: float | None = None,
    ) -> None:
        """Log one step. ``wait`` is the share of the time spent waiting for data and ``mfu`` that of the peak FLOP/s,
        both 0 to 1. ``more`` goes into the files alone, not onto the line.

        Speed and time left are those since the call before.
        """
        if not self.active:
            return
        assert self._metrics is not None
        (last, since), self._last = self._last, (step, time.monotonic())
        seconds = (self._last[1] - since) / (step - last) if step > last else math.nan
        speed = {
            "slices_per_s": slices_per_step / seconds if seconds > 0 else math.nan,
            "seconds_left": (total - step) * seconds,
            "wait": wait,
            "memory_gib": memory_gib,
            "mfu": mfu,
        }
        known = {name: value for name, value in speed.items() if value is not None and not math.isnan(value)}
        terms = dict(terms or {})
        row = {
            "step": step,
            "total": total,
            "at": now(),
            **values,
            **{f"term/{k}": v for k, v in terms.items()},
            **(more or {}),
            **known,
        }
        self._metrics.add(json.dumps({key: _plain(value) for key, value in row.items()}))
        if self._board is not None:
            numbers = {f"train/{name}": value for name, value in values.items()}
            numbers |= {f"term/{name}": value for name, value in terms.items()}
            numbers |= dict(more or {})
            self._board.add(step, numbers | {f"speed/{name}": value for name, value in known.items()})
        self.event(step_line(step, total, values, terms, known))

    def numbers(self, step: int, total: int, values: Mapping[str, float]) -> None:
        """Log numbers of a step that are not for its line: a row of their own in metrics.jsonl, and TensorBoard."""
        if not self.active:
            return
        assert self._metrics is not None
        row = {"step": step, "total": total, "at": now(), **values}
        self._metrics.add(json.dumps({key: _plain(value) for key, value in row.items()}))
        if self._board is not None:
            self._board.add(step, values)

    def image(self, step: int, tag: str, png: bytes, size: tuple[int, int]) -> None:
        """Show a picture of ``size`` (rows, columns) in TensorBoard."""
        if self._board is not None:
            self._board.add_image(step, tag, png, size)

    def event(self, text: str) -> None:
        """Say something that is not a step: a checkpoint, a validation, a bad sample."""
        if self.active:
            assert self._text is not None
            tell(text)
            self._text.add(f"{now()}  {text}")

    def close(self) -> None:
        """Flush and let go of the files; a second call does nothing."""
        for part in (self._metrics, self._text, self._board):
            if part is not None:
                part.close()
        self.active, self._metrics, self._text, self._board = False, None, None, None


def step_line(
    step: int, total: int, values: Mapping[str, float], terms: Mapping[str, float], speed: Mapping[str, float]
) -> str:
    """``step 1200/50000  loss 8.412 (dino 6.10 ibot 2.21)  grad 0.83  1,840 slices/s  14h left``: what is known."""
    parts = [f"step {step}/{total}"]
    for name, value in values.items():
        within = " ".join(f"{term} {_number(part, 2)}" for term, part in terms.items()) if name == "loss" else ""
        parts.append(f"{name} {_number(value, 3 if name == 'loss' else 2)}" + (f" ({within})" if within else ""))
    if "slices_per_s" in speed:
        parts.append(f"{rate(speed['slices_per_s'])} slices/s")
    if "wait" in speed:
        parts.append(f"wait {speed['wait']:.0%}")
    if "memory_gib" in speed:
        parts.append(f"{speed['memory_gib']:.1f} GiB")
    if "mfu" in speed:
        parts.append(f"mfu {speed['mfu']:.0%}")
    if speed.get("seconds_left"):
        parts.append(f"{duration(speed['seconds_left'])} left")
    return "  ".join(parts)


def tell(text: str) -> None:
    """To the console, which may be a file on a full disk. A pipe that nobody reads any more ends the run as ever."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        pass


def _number(value: float, digits: int) -> str:
    if value == 0 or 0.01 <= abs(value) < 1e5 or not math.isfinite(value):
        return f"{value:.{digits}f}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity; other readers than Python's stop at them."""
    if isinstance(value, str | int):
        return value
    return float(value) if math.isfinite(value) else None


def _drop_from(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # cut off when the process was killed
        if row.get("step", -1) < step:
            kept.append(line + "\n")
    write_text(path, "".join(kept))


class _Lines:
    """A file that lines are added to, each whole at once."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path.open("ab", buffering=0)
        self._lost, self._torn = False, False

    def add(self, line: str) -> None:
        """Add a line, or say that it is lost, once until there is room again."""
        data = b"\n" * self._torn + line.encode() + b"\n"  # the part of a lost line that is there stays on its own
        why = ""
        try:
            if (put := self._file.write(data)) < len(data):
                why, self._torn = "no room for all of a line", put > 0 or self._torn
            else:
                self._torn = False
        except OSError as error:
            why = str(error.strerror)
        if why and not self._lost:
            tell(f"warning: cannot write {self._path}: {why}; its lines are lost until there is room")
        self._lost = bool(why)

    def close(self) -> None:
        with suppress(OSError):
            self._file.close()


class _Board:
    """TensorBoard event files, written by its own package: torch's writer would bring torch in."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._events, self._summaries = event_pb2, summary_pb2
        self._writer, self._lost = EventFileWriter(str(folder)), False
        if resume_step:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._writer.add_event(event_pb2.Event(session_log=start, step=resume_step, wall_time=time.time()))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        self._write(step, [self._summaries.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])

    def add_image(self, step: int, tag: str, png: bytes, size: tuple[int, int]) -> None:
        image = self._summaries.Summary.Image(
            height=size[0], width=size[1], colorspace=3, encoded_image_string=png
        )  # 3: RGB
        self._write(step, [self._summaries.Summary.Value(tag=tag, image=image)])

    def _write(self, step: int, rows: list[Any]) -> None:
        if self._lost:
            return
        summary = self._summaries.Summary(value=rows)
        try:
            self._writer.add_event(self._events.Event(summary=summary, step=step, wall_time=time.time()))
        except OSError as error:  # of an earlier event, after which the writer takes no more
            self._lost = True
            tell(f"warning: TensorBoard's file cannot be written: {error.strerror}; metrics.jsonl goes on")

    def close(self) -> None:
        with suppress(OSError):
            self._writer.close()
