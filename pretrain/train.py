"""`axial pretrain`: settings -> parts -> loop."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fvcore.nn import parameter_count, parameter_count_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_curation.corpus import Corpus
from data_curation.index import fingerprint, read_index
from launch.distributed import World, world
from launch.log import Log
from launch.run import Outcome, Stopped
from launch.settings import plugins
from pretrain.checkpoint import Checkpoints
from pretrain.data.batch import Batch
from pretrain.data.corpora import overlaps
from pretrain.data.crops import CropShape
from pretrain.data.masks import target_counts
from pretrain.data.stream import batches, check
from pretrain.loop import Guard, train
from pretrain.methods import Trainable
from pretrain.optim import build_optimizer
from pretrain.parallel import compile_blocks, fill, make_mesh, place, recompute_blocks, shard
from pretrain.settings import Settings

__all__ = ["build_method", "dry_run", "flops_per_step", "main", "place_method", "summary"]

# Dense bfloat16 FLOP/s by a word of the device's name, from the makers' data sheets. Without an entry no MFU is shown.
_PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}


def main(settings: Settings) -> Outcome:
    """Pretrain, or continue where the run folder's newest checkpoint stands."""
    # Not mapped: a storage that fails is then an error that names the shard, not the end of a process.
    corpora = [Corpus(source.path, settings.data.split, mapped=False) for source in settings.data.sources]
    flops = flops_per_step(settings)
    with world(settings.device) as here:
        say: Callable[[str], None] = print if here.rank == 0 else _silent
        check(settings.data, here.size, settings.model.patch_size, settings.model.in_channels)
        for line in overlaps(settings.data) if here.rank == 0 else ():
            say(f"warning: {line}")
        torch.set_float32_matmul_precision("high" if settings.precision == "bf16" else "highest")
        guard = Guard(here.device)
        method = build_method(settings, guard)
        say(summary(settings, method, flops))
        place_method(method, settings, here)
        optimizer = build_optimizer(method.student, settings.optim)
        checkpoints = Checkpoints(
            settings.folder,
            method,
            optimizer,
            here,
            settings.checkpoint,
            samples_per_step=settings.data.batch_size,
            fingerprint=_fingerprint(settings),
            about=_about(settings, corpora),
            say=say,
        )
        start = checkpoints.restore()
        if not start:
            for name, parts in method.initial(settings.seed, settings.init_from, say).items():
                for part, state in parts.items():
                    fill(method.networks[name][part], state)
        stream = batches(
            settings.data,
            world=here,
            patch_size=settings.model.patch_size,
            in_channels=settings.model.in_channels,
            start=start,
            corpus=corpora,
        )
        log = Log(settings.folder, settings.log.every, settings.log.tensorboard, here.rank == 0, start and start + 1)
        schedules = settings.optim.schedules(settings.steps, settings.data.batch_size)
        share, peak = flops / here.size, _peak(here, settings)
        try:
            ended = train(
                method, stream, optimizer, schedules, checkpoints, log, here, settings.loop,
                guard=guard, flops=share, peak=peak,
            )  # fmt: skip
        finally:
            stream.close()
            log.close()
    if ended.stopped_by:
        raise Stopped(
            f"stopped by {ended.stopped_by} after step {ended.step} of {settings.steps}, saved; "
            "the same command continues"
        )
    made = (f"{settings.folder}/checkpoints/step_{ended.step:08d}", f"{settings.folder}/metrics.jsonl")
    return Outcome(made=made, next=(f"axial export folder={settings.folder}",))


def dry_run(settings: Settings) -> str:
    """Say what a run would be, without making it: parameters, FLOPs, the learning rate as it is applied."""
    return summary(settings, build_method(settings, Guard(torch.device("cpu"))), flops_per_step(settings))


def _silent(text: str) -> None:
    """Say nothing: every rank but the first."""


def build_method(settings: Settings, guard: Guard, device: str = "meta") -> Trainable:
    """The method of the settings with its networks on `device`; on the meta device they hold no numbers yet."""
    family = plugins("pretrain.methods")
    kind: str = settings.method.kind  # type: ignore[attr-defined]  # every plug-in's settings have one
    with torch.device(device):
        built: Trainable = family[kind].build(settings.method, model=settings.model, steps=settings.steps, guard=guard)
    return built


def place_method(method: Trainable, settings: Settings, here: World) -> None:
    """Wrap, shard and move every network, all NaN until filled; only the student keeps activations to recompute."""
    mesh = make_mesh(here, settings.parallel)
    for network in method.networks.values():
        trained = network is method.student
        for part in network.values():
            if settings.parallel.recompute and trained:
                recompute_blocks(part)
            if settings.parallel.compile:
                compile_blocks(part)
        shard(network, here, settings.parallel, frozen=not trained, mesh=mesh)
        place(network, here.device)
    method.placed()


def _fingerprint(settings: Settings) -> str:
    """Hash what a checkpoint's numbers mean: model, method, optimizer, order of samples. Speed and place may change."""
    kept = settings.model_dump(mode="json", include={"model", "method", "optim", "seed"})
    kept["batches"] = [settings.data.batch_size, settings.data.seed]
    if len(settings.data.sources) > 1 or settings.data.weights:
        kept["shares"] = [[source.weight for source in settings.data.sources], settings.data.weights]
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _about(settings: Settings, corpora: Sequence[Corpus]) -> dict[str, Any]:
    """What a reader of the weights alone must know."""
    return {
        "model": settings.model.model_dump(mode="json"),
        "window": settings.data.window.model_dump(mode="json"),
        "corpus": fingerprint(read_index(corpus.folder, ["key", "sha256"]) for corpus in corpora),
    }


def _peak(here: World, settings: Settings) -> float:
    """FLOP/s of the device in the run's precision; 0 where it is not known."""
    if here.device.type != "cuda" or settings.precision != "bf16":
        return 0.0
    name = torch.cuda.get_device_name(here.device)
    return next((peak for word, peak in _PEAKS.items() if all(part in name for part in word.split())), 0.0)


def summary(settings: Settings, method: Trainable, flops: float) -> str:
    """Describe the run: parameters by part, the work of a step, and each derived number with its reason."""
    optim, batch = settings.optim, settings.data.batch_size
    lr = optim.schedules(settings.steps, batch).lr
    factor = f"{optim.lr.peak:.3g} x 4 sqrt({batch} / 1024)" if optim.lr_rule == "sqrt_wrt_1024" else "as given"
    frozen = [name for name, network in method.networks.items() if network is not method.student]
    counts = [f"{name} {parameter_count(method.networks[name])[''] / 1e6:.1f} M" for name in frozen]
    return "\n".join(
        [
            "student:",
            parameter_count_table(method.student, max_depth=2),
            *([f"frozen: {', '.join(counts)}"] if counts else []),
            f"a step: {batch} slices, {flops / 1e12:.3g} TFLOP ({flops / batch / 1e9:.3g} GFLOP a slice)",
            f"learning rate at its peak: {lr.peak:.3g} = {factor} (optim.lr_rule: {optim.lr_rule})",
            f"the run: {settings.steps} steps, {settings.steps * batch:,} slices seen",
        ]
    )


def flops_per_step(settings: Settings) -> float:
    """Count the FLOPs of one step of all ranks together, forward and backward, the mean over the mix of crop sizes.

    Counted on tensors without numbers, with attention written out, since the counter takes the CPU's fused kernel for
    nothing. All blocks cost the same and so do all images (but for KoLeo's B x B products, which are nothing beside
    them): models of one and of two blocks on a few images tell the rest. To be called outside of a process group, which
    would wait for the other ranks.
    """
    width, depth, heads = settings.model.shape
    batch = settings.data.batch_size
    few = min(batch, 10)
    total = 0.0
    for shape in settings.data.crops.shapes:
        first, second = (_flops(settings, shape, (width, blocks, heads), few) for blocks in (1, 2))
        total += shape.probability * (first + (depth - 1) * (second - first))
    return total * batch / few


def _flops(settings: Settings, shape: CropShape, size: tuple[int, int, int], images: int) -> int:
    """Count one step of `images` with a backbone of this width, depth and heads."""
    custom = {"size": "custom", **dict(zip(("width", "depth", "heads"), size, strict=True))}
    resized = settings.model_copy(update={"model": settings.model.model_copy(update=custom)})
    side = shape.global_size // settings.model.patch_size
    batch = settings.data.batch_size
    masked = round(sum(target_counts(settings.data.masks, (side, side), batch)) * images / batch)
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        method = build_method(resized, Guard(torch.device("cpu")), "cpu")
        terms = method.loss(_shapes_only(settings, shape, images, masked), 0)
        torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
        return int(counter.get_total_flops())


def _shapes_only(settings: Settings, shape: CropShape, images: int, masked: int) -> Batch:
    """A batch with sizes only."""
    channels, patch = settings.model.in_channels, settings.model.patch_size
    side = shape.global_size // patch
    empty = torch.empty
    return Batch(
        global_crops=empty(2 * images, channels, shape.global_size, shape.global_size),
        local_crops=empty(settings.data.crops.n_local * images, channels, shape.local_size, shape.local_size),
        gram_crops=empty(2 * images, channels, shape.gram_size, shape.gram_size) if shape.gram_size else None,
        masks=empty(2 * images, side * side, dtype=torch.bool),
        mask_indices=empty(masked, dtype=torch.long),
        mask_weights=empty(masked),
        keys=("",) * images,
    )
