"""What a job's batch script does when the job's processes have ended: note how, and say whether it is to go on.

``python -m launch.aftermath PLAN CODE [BLIND_NODE ...]``; PLAN is the file that `launch.slurm` wrote at submission,
CODE srun's exit code, $AXIAL_JOB what SLURM says of the job. Exit codes: 0 done, 75 back to the queue, 1 ended for now.
It runs on the job's first machine even where every process was killed, which is why it is no part of them.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from launch.attempts import Attempt, against_another, newest_checkpoint, note_attempt, read_attempts, step_of
from launch.call import Call, samples_of
from launch.run import Stopped, close_run, read_json
from launch.task import restarted

__all__ = ["main"]

AGAIN, ENDED = 75, 1
WARNING = "SIGUSR2"
EXITED = "Exited with exit code"  # what the error says better
OTHERS = "Terminating StepId|CANCELLED AT|Job step aborted"  # from here on processes are ended by SLURM
SHOWN = 16  # sample keys in the message; a file has all


def main(plan: str, code: str, *blind: str) -> int:
    """The exit code for the batch script."""
    asked = json.loads(Path(plan).read_text(encoding="utf-8"))
    element = int(os.environ.get("SLURM_ARRAY_TASK_ID") or 0)
    verb, model, folder = asked["calls"][element]
    call, array = Call(verb, model, Path(folder)), os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{element}" if array else os.environ["SLURM_JOB_ID"]
    if blind:
        where = f"{folder} is not there on {', '.join(blind)}, a machine of job {job}"
        close_run(call.folder, "failed", error=f"{where}; put it on a file system that all nodes see")
        return ENDED
    ended = read_json(call.folder / "outcome.json")
    state = (ended or {}).get("state")
    if state == "done":
        return 0
    said = _said(Path(plan).with_name(f"{job}_0_log.err"))
    died = _died(said)
    if ended is not None and state == "stopped" and (not died or Stopped(ended["error"]).signal == WARNING):
        return _stopped(call.folder, job, str(ended["error"]), asked["requeues"])
    return _failed(call, job, ended, _reason(ended, died, said, code), asked["restarts"])


def _stopped(folder: Path, job: str, text: str, requeues: int) -> int:
    """A job that was told to end stays so; one that was warned, or is pre-empted, goes back to the queue.

    Most clusters pre-empt by SIGTERM too, and take a job back only if it is still there when its grace is over.
    """
    preempted = re.search(r"\bPreemptTime=\d", os.environ.get("AXIAL_JOB", ""))
    if Stopped(text).signal != WARNING and not preempted:
        return ENDED
    step = newest_checkpoint(folder)
    note_attempt(folder, Attempt(job, restarted(), "warned", step, step, text))
    if restarted() >= requeues:
        close_run(folder, "stopped", error=f"{text}; it was in the queue {requeues + 1} times (requeues: {requeues})")
        return ENDED
    return AGAIN


def _failed(call: Call, job: str, ended: dict[str, Any] | None, reason: str, restarts: int) -> int:
    """A mistake stays one. Another error, or a process that died, sends the job back unless much speaks against."""
    folder, state = call.folder, (ended or {}).get("state")
    if ended is not None and state == "failed" and not ended.get("again"):
        return ENDED
    how: Literal["killed", "failed"] = "failed" if state == "failed" else "killed"
    first = re.match(r"rank (\d+)", reason)
    step = step_of(folder, int(first[1]) if first else None)
    attempt = Attempt(job, restarted(), how, step, newest_checkpoint(folder), reason)
    note_attempt(folder, attempt)
    if no := against_another(read_attempts(folder, job), restarts):
        close_run(folder, "failed", error=f"job {job} is not tried again: {no}: {reason}{_samples(call, attempt.step)}")
        return ENDED
    close_run(folder, "failed", error=f"{reason}; job {job} goes back to the queue", again=True)
    return AGAIN


def _said(errors: Path) -> str:
    """What was written of this start, until SLURM began to end its processes."""
    try:
        written = errors.read_text(errors="replace")
    except FileNotFoundError:
        return ""
    return re.split(OTHERS, "\n" + written.rpartition("\naxial: start ")[2], maxsplit=1)[0]


def _died(said: str) -> str:
    """The first process that died, ``rank 1 on node7: Killed``; empty where none did, but by a SIGTERM from outside."""
    found = re.search(r"^srun: error: (\S+): tasks? (\S+): (?!Terminated)(.+)$", said, re.MULTILINE)
    return f"rank {found[2]} on {found[1]}: {found[3]}" if found else ""


def _reason(ended: dict[str, Any] | None, died: str, said: str, code: str) -> str:
    """Why the processes ended: by the error of one, by what srun says of one, or by what it says of none."""
    if ended is not None and ended.get("state") == "failed":
        # It may be that of a process which lost its peer; or the process came to die of its error.
        return str(ended["error"]) + (f" ({died})" if died and EXITED not in died else "")
    told = re.findall(r"^srun: (?:error|fatal): (.+)$", said, re.MULTILINE)
    return died or (told[-1] if told else f"its processes ended with code {code}")


def _samples(call: Call, step: int | None) -> str:
    """The samples of the step, where the verb can tell them; all of them are written to a file."""
    if step is None:
        return ""
    try:
        keys: Sequence[str] = samples_of(call, step)
    except Exception as error:  # the failure itself must be told, whatever became of the corpus
        return f" (its samples cannot be told: {error})"
    if not keys:
        return ""
    path = call.folder / f"samples_of_step_{step}.txt"
    with suppress(OSError):  # a full disk, which may be why it failed
        path.write_text("\n".join(keys) + "\n", encoding="utf-8")
    more = f", ... ({len(keys)} in {path})" if len(keys) > SHOWN else ""
    return f". Samples of step {step}: {', '.join(keys[:SHOWN])}{more}. Look at these, or leave them out of the corpus"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
