"""What does learning from teachers cost beyond the teachers? python -m tests.benchmarks.bench_distil [key=value ...]

Four sides make their part of the same step by turns, each in a process of its own: the teachers alone on the patches
that they are shown (what no implementation can avoid), the student alone (forward, backward and optimizer against a
target that is there), the whole step, and the whole step with all teachers on all patches, which are hidden only from
the target. Random weights in the sizes of the published models; noise for images. Of the times that of the processor
is compared on a CPU, which other jobs on the machine lengthen less.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from launch.distributed import World
from launch.settings import load
from pretrain.data.batch import Batch
from pretrain.data.views import batch_regions
from pretrain.loop import Guard
from pretrain.losses._consensus import channel_kl
from pretrain.methods import build_method
from pretrain.methods.multi_teacher import MultiTeacher
from pretrain.models.vit import VitSettings
from pretrain.optim import build_optimizer, clip_gradients
from pretrain.parallel import fill
from pretrain.settings import Settings
from pretrain.train import place_method
from tests.benchmarks.bench_step import Row
from tests.benchmarks.turns import peak_rss, reset_peak, serve, take_turns
from tests.pretrain.teacher_files import write_export

SIDES = ("teachers alone", "student alone", "step", "step, all patches")
SAME = (
    "folder=unused", "steps=100", "data.corpus=unused", "method.kind=multi_teacher", "optim.lr=1e-4",
    "data.crops={global_size: 224, n_global: 1, n_local: 0}", "model.in_channels=1",
)  # fmt: skip
ON_CPU = ("precision=fp32", "data.batch_size=4", "model.size=ti")
ON_GPU = ("precision=bf16", "data.batch_size=128", "model.size=s", "parallel.compile=true")


def make_batch(settings: Settings, method: MultiTeacher, device: torch.device) -> Batch:
    """Noise in the shapes of the settings, with masks as a run draws them."""
    images, side = settings.data.batch_size, settings.data.crops.global_size
    grid = side // settings.model.patch_size
    views = method.views(side)
    masks, kept = batch_regions(views, grid, 1, seed=0, samples=range(images))
    seen = tuple(torch.randn(images, view.window.channels, view.size, view.size) for view in views.of)
    crops = torch.randn(images, settings.model.in_channels, side, side)
    hidden = (masks.masks, masks.indices, masks.weights)
    return Batch(crops, torch.empty(0), None, *hidden, ("",) * images, masked=masks.counts, views=seen, kept=kept).to(
        device
    )


def make_method(settings: Settings, device: torch.device) -> MultiTeacher:
    """Student and teachers on the device; the maps are noise, which cost what fitted ones do."""
    method = build_method(settings, Guard(device))
    assert isinstance(method, MultiTeacher)
    place_method(method, settings, World(0, 1, 0, device))
    for states in (method.fixed(lambda text: None), method.initial(0, None, lambda text: None)):
        for name, parts in states.items():
            for part, state in parts.items():
                fill(method.networks[name][part], state)
    for maps in method.state()["adapters"].values():
        for tensors in maps.values():
            tensors["weight"].normal_(0, 0.05)
            tensors["bias"].zero_()
    return method


def part_of_step(side: str, settings: Settings, device: torch.device) -> Callable[[], object]:
    """What one side does again and again."""
    guard, method = Guard(device), make_method(settings, device)
    batch = make_batch(settings, method, device)
    optimizer = build_optimizer(method.student, settings.optim)
    schedules = settings.optim.schedules(settings.steps, settings.data.batch_size)
    target = torch.randn(1, 1, settings.model.shape[0], device=device)

    def student_loss() -> list[torch.Tensor]:
        made = method.student["backbone"](batch.global_crops, batch.masks)
        return [channel_kl(made.patches, target, 1.0).mean() + channel_kl(made.cls[:, None], target, 1.0).mean()]

    def step() -> None:
        schedules.apply(optimizer, 0)
        optimizer.zero_grad(set_to_none=True)
        losses = student_loss() if side == "student alone" else list(method.loss(batch, 0).values())
        torch.stack(losses).sum().backward()
        norms = torch.stack(list(clip_gradients(method.student, settings.clip).values()))
        guard.judge(torch.cat([torch.stack(losses).detach(), norms]))
        guard.step(optimizer)
        if side != "student alone":
            method.numbers()

    def teachers() -> None:
        with torch.no_grad():
            for (name, network), images, kept in zip(
                method.networks["teachers"].items(), batch.views, batch.kept, strict=True
            ):
                del name
                network(images.expand(-1, 3, -1, -1), None, kept)

    return teachers if side == "teachers alone" else step


def answer(work: Callable[[], object], device: torch.device, before: int) -> dict[str, Any]:
    """Do the work once; on a GPU once more before, since another side had its memory meanwhile."""
    cuda = device.type == "cuda"
    if cuda:
        work()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    else:
        reset_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(10 if cuda else 1):
        work()
    if cuda:
        torch.cuda.synchronize()
    times = 10 if cuda else 1
    wall, cpu = (time.perf_counter() - wall) / times, (time.process_time() - cpu) / times
    memory = torch.cuda.max_memory_allocated() if cuda else peak_rss() - before
    if cuda:
        torch.cuda.empty_cache()
    return {"wall": wall, "cpu": cpu, "memory": memory}


def serve_side(side: str, words: list[str]) -> None:
    """One side: build, then answer."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = load(Settings, None, words)
    torch.nn.Linear(2, 2)(torch.ones(1, 2)).sum().backward()  # torch's own threads and buffers are nobody's
    before = reset_peak() if device.type == "cpu" else 0
    work = part_of_step(side, settings, device)
    for _ in range(2):
        work()
    serve({}, lambda: answer(work, device, before))


def main(words: list[str]) -> float:
    """Print the table; the whole step over the teachers and the student, each alone."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--side", choices=SIDES)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--size", default="b", choices=("ti", "s", "b", "l"), help="of each of the three teachers")
    given, words = options.parse_known_args(words)
    if given.side:
        serve_side(given.side, words)
        return 0.0
    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as scratch:
        size = VitSettings(size=given.size, registers=0, layerscale=None)
        teacher = write_export(Path(scratch, "teacher.safetensors"), size, 0)
        common = [*SAME, *(ON_GPU if cuda else ON_CPU), *words]
        named = {side: [f"method.teachers.t{n}={{kind: axial, weights: {teacher}, mask: {mask}}}"
                 for n, mask in enumerate((0, 0, 0) if side == "step, all patches" else (0.5, 0.4, 0.3))]
                 for side in SIDES}  # fmt: skip
        command = [sys.executable, "-m", "tests.benchmarks.bench_distil"]
        sides = {side: [*command, f"--side={side}", *common, *named[side]] for side in SIDES}
        _, answers = take_turns(sides, given.rounds)
    settings = load(Settings, None, [*common, *named["step"]])
    rows = {side: Row.of(settings.data.batch_size, answers[side]) for side in SIDES}
    took = {side: row.wall if cuda else row.cpu for side, row in rows.items()}
    crops, students = settings.data.crops.global_size, f"ViT-{settings.model.size}"
    print(f"{'GPU' if cuda else 'CPU'}, {settings.precision}: three ViT-{given.size} teach a {students}")
    print(f"{settings.data.batch_size} slices of {crops} pixels; {given.rounds} rounds by turns, medians")
    print(f"  {'':<20}{'s':>9}{'slices/s':>10}{'CPU s':>9}{'GiB':>8}")
    for side, row in rows.items():
        print(f"  {side:<20}{row.wall:9.3f}{row.batch / row.wall:10.2f}{row.cpu:9.3f}{row.memory / 2**30:8.2f}")
    ratio = took["step"] / (took["teachers alone"] + took["student alone"])
    print(f"step / (teachers alone + student alone) = {ratio:.2f}")
    print(f"step / teachers alone = {took['step'] / took['teachers alone']:.2f}")
    print(f"step with all patches / step = {took['step, all patches'] / took['step']:.2f}")
    return ratio


if __name__ == "__main__":
    main(sys.argv[1:])
