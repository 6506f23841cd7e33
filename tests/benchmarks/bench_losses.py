"""The cross-entropy of DINO over 65,536 prototypes against the plain one through log_softmax: time and peak memory.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.bench_losses [images] [rounds]

8 student crops meet 2 teacher crops, forward and backward. Each way runs in a process of its own, whose peak memory is
counted above what its inputs take. The two losses must agree.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch import Tensor

from pretrain.losses.dino import dino_loss

__all__ = ["main"]

PROTOTYPES = 65536


def plain_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Every pair of crops against the log-probabilities, as one would write it down."""
    logs = (student.float() / temperature).log_softmax(-1)
    pairs = [-(target * log).sum(-1).mean() for log in logs for target in teacher]
    return torch.stack(pairs).mean()


def run_one(name: str, images: int, rounds: int) -> None:
    """Prints loss, median CPU seconds and peak bytes of one way as JSON."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(8, images, PROTOTYPES, generator=generator).requires_grad_()
    teacher = torch.randn(2, images, PROTOTYPES, generator=generator).mul_(4).softmax(-1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(rounds):
        student.grad = None
        start = time.process_time()
        loss = dino_loss(student, teacher, 0.1) if name == "ours" else plain_loss(student, teacher, 0.1)
        loss.backward()  # type: ignore[no-untyped-call]
        times.append(time.process_time() - start)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(
        json.dumps({"loss": loss.item(), "seconds": statistics.median(times), "bytes": peak, "input": student.nbytes})
    )


def main() -> None:
    """Runs both ways and prints their ratios."""
    if len(sys.argv) == 4:
        return run_one(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    images, rounds = [*sys.argv[1:], *["16", "5"][len(sys.argv) - 1 :]]
    found = {}
    for name in ("plain", "ours"):
        command = [sys.executable, "-m", "tests.benchmarks.bench_losses", name, images, rounds]
        found[name] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        seconds, size = found[name]["seconds"], found[name]["bytes"]
        print(
            f"{name:5}  loss {found[name]['loss']:.5f}  {seconds * 1e3:.0f} ms  peak {size / 2**20:.0f} MiB", end="  "
        )
        print(f"({size / found[name]['input']:.1f} x the logits)")
    plain, ours = found["plain"], found["ours"]
    assert abs(plain["loss"] - ours["loss"]) < 1e-4 * plain["loss"]
    faster, smaller = plain["seconds"] / ours["seconds"], plain["bytes"] / ours["bytes"]
    print(f"ratio plain / ours: time {faster:.2f}, memory {smaller:.2f}")
    return None


if __name__ == "__main__":
    main()
