"""One side of the comparison of steps: `python -m tests.benchmarks.step_side ours|official ... key=value ...`.

Started by `bench_step --peer`, which reads its answers. Builds a step from the settings and makes it on one batch of
noise for each request; says how long it took, what it held in memory, and the losses.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from launch.settings import load as load_settings
from pretrain.data.batch import Batch
from pretrain.loop import Guard
from pretrain.optim import build_optimizer, clip_gradients
from pretrain.settings import Settings
from tests.benchmarks import peer
from tests.benchmarks.bench_step import make_batch, make_method
from tests.benchmarks.peer import Step
from tests.benchmarks.turns import peak_rss, reset_peak, serve

__all__ = ["our_step"]


def our_step(settings: Settings, device: torch.device) -> Step:
    """One step of ours as the loop makes it, from the batch to the moving average, as a function of the batch."""
    guard = Guard(device)
    method = make_method(settings, guard, device)
    optimizer = build_optimizer(method.student, settings.optim)
    schedules = settings.optim.schedules(settings.steps, settings.data.batch_size)

    def step(batch: Batch) -> dict[str, float]:
        schedules.apply(optimizer, 0)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.loop.precision == "bf16"):
            terms = method.loss(batch, 0)
        losses = torch.stack([term.float() for term in terms.values()])
        losses.sum().backward()
        norms = torch.stack(list(clip_gradients(method.student, settings.clip).values()))
        guard.judge(torch.cat([losses.detach(), norms]))
        guard.step(optimizer)
        method.after_step(0)
        return {**dict(zip(terms, losses.tolist(), strict=True)), "norm": norms.norm().item()}

    return step


def _answer(step: Step, settings: Settings, device: torch.device, state: dict[str, Any]) -> dict[str, Any]:
    """Make the steps of one turn; on a GPU one more before them, since another side had its memory meanwhile."""
    cuda = device.type == "cuda"
    if cuda:
        _seeded(step, state)
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    else:
        reset_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    losses = [_seeded(step, state) for _ in range(state["repeats"])]
    if cuda:
        torch.cuda.synchronize()
    wall, cpu = (time.perf_counter() - wall) / len(losses), (time.process_time() - cpu) / len(losses)
    memory = torch.cuda.max_memory_allocated() if cuda else peak_rss() - state["before"]
    if cuda:
        torch.cuda.empty_cache()
    return {"wall": wall, "cpu": cpu, "memory": memory, "losses": losses}


def _seeded(step: Step, state: dict[str, Any]) -> dict[str, float]:
    state["made"] += 1
    torch.manual_seed(state["made"])
    return step(state["batch"])


def main() -> None:
    """Build, then answer."""
    words = argparse.ArgumentParser()
    words.add_argument("side", choices=("ours", "official"))
    words.add_argument("--peer", type=Path)
    words.add_argument("--peer-site", type=Path)
    words.add_argument("--eager", action="store_true")
    words.add_argument("--repeats", type=int, default=1)
    given, rest = words.parse_known_args()
    settings = load_settings(Settings, None, rest)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high" if settings.precision == "bf16" else "highest")
    if given.side == "official":
        peer.load(given.peer, given.peer_site)
    torch.nn.Linear(2, 2)(torch.ones(1, 2)).sum().backward()  # torch's own threads and buffers are nobody's
    state: dict[str, Any] = {"made": 0, "repeats": given.repeats}
    state["before"] = reset_peak() if device.type == "cpu" else 0
    torch.manual_seed(0)
    state["batch"] = make_batch(settings, device)
    if given.side == "ours":
        step = our_step(settings, device)
    else:
        step = peer.build_step(settings, _our_weights(settings), device, compiled=not given.eager)
    start = time.perf_counter()
    first = [_seeded(step, state) for _ in range(3)]
    ready = {"losses": first, "warming": time.perf_counter() - start, "masked": len(state["batch"].mask_indices)}
    serve(ready, lambda: _answer(step, settings, device, state))


def _our_weights(settings: Settings) -> Any:
    from pretrain.methods import build_method

    method = build_method(settings, Guard(torch.device("cpu")))
    return method.initial(0, None, lambda text: None)


if __name__ == "__main__":
    main()
