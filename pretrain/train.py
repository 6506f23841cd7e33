"""`axial pretrain`: settings -> parts -> loop."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fvcore.nn import parameter_count, parameter_count_table

from data_curation.corpus import Corpus, CorpusError
from data_curation.index import fingerprint, read_index
from launch.distributed import World, world
from launch.log import Log, tell
from launch.run import Outcome, Stopped, command
from launch.settings import SettingsError
from pretrain.checkpoint import Checkpoints, checkpoint_bytes
from pretrain.data.corpora import Corpora, order_of, overlaps
from pretrain.data.stream import Batches, batches, check
from pretrain.flops import flops_per_step, layer_table, peak_flops
from pretrain.loop import Ended, Guard, train
from pretrain.meter import LoopError
from pretrain.methods import Source, States, Trainable, build_method
from pretrain.optim import build_optimizer
from pretrain.parallel import compile_blocks, fill, make_mesh, place, place_constant, recompute_blocks, shard
from pretrain.precision import in_bf16
from pretrain.provenance import check_cache
from pretrain.settings import Settings
from pretrain.watch.pairs import find_pairs
from pretrain.watch.watch import Prepared, Watch, prepare

__all__ = ["build_method", "dry_run", "main", "place_method", "samples", "summary"]


def main(settings: Settings) -> Outcome:
    """Pretrain, or continue where the run folder's newest checkpoint stands."""
    settings.check_sources()
    # Not mapped: a storage that fails is then an error that names the shard, not the end of a process.
    corpora = [Corpus(source.path, settings.data.split, mapped=False) for source in settings.data.sources]
    check_cache(settings, corpora)
    flops = flops_per_step(settings)
    with world(settings.device) as here:
        say: Callable[[str], None] = tell if here.rank == 0 else _silent
        check(settings.data, here.size, settings.model.patch_size, settings.model.in_channels)
        for line in overlaps(settings.data) if here.rank == 0 else ():
            say(f"warning: {line}")
        _check_parts(settings, here.size)
        torch.set_float32_matmul_precision("high" if settings.precision == "bf16" else "highest")
        guard = Guard(here.device)
        method = build_method(settings, guard)
        views = method.views(settings.data.crops.shapes[0].global_size)
        seen = prepare(settings.watch, settings.data, settings.model.patch_size, Corpora(corpora), here, say, views)
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
        opened = partial(_stream, settings, method, here, corpora)
        _begin(method, settings, start, opened, say)
        stream = opened(start)
        log = Log(settings.folder, settings.log.every, settings.log.tensorboard, here.rank == 0, start and start + 1)
        schedules = settings.optim.schedules(settings.steps, settings.data.batch_size)
        share, peak = flops / here.size, peak_flops(here.device, settings.precision)
        try:
            watch = _watch(seen, method, settings, log, here, start)
            ended = train(
                method, stream, optimizer, schedules, checkpoints, log, here, settings.loop, watch,
                guard=guard, flops=share, peak=peak,
            )  # fmt: skip
            if watch is not None:
                watch.end(ended.step)
        finally:
            stream.close()
            log.close()
    return _outcome(settings, ended)


def _stream(
    settings: Settings, method: Trainable, here: World, corpora: Sequence[Corpus], start: int, whole: bool = False
) -> Batches:
    """This rank's batches from `start` on, with what the method's other networks see, `whole` or as in training."""
    model = settings.model
    views = method.views(settings.data.crops.shapes[0].global_size, whole)
    return batches(
        settings.data,
        world=here,
        patch_size=model.patch_size,
        in_channels=model.in_channels,
        start=start,
        corpus=corpora,
        views=views,
    )


def _begin(
    method: Trainable, settings: Settings, start: int, opened: Callable[..., Batches], say: Callable[[str], None]
) -> None:
    """Fill what the checkpoint did not; fit what a new run fits."""
    _fill(method, method.fixed(say))
    if not start:
        _fill(method, method.initial(settings.seed, settings.source, say))
        method.calibrate(lambda: closing(opened(0, whole=True)), say)


def _fill(method: Trainable, states: States) -> None:
    for name, parts in states.items():
        for part, state in parts.items():
            fill(method.networks[name][part], state)


def _watch(
    seen: Prepared | None, method: Trainable, settings: Settings, log: Log, here: World, start: int
) -> Watch | None:
    """Begin to watch a run that is new or goes on after `start` steps."""
    if seen is None:
        return None
    channels = settings.model.in_channels
    watch = Watch(seen, method, log, here, folder=settings.folder, in_channels=channels, steps=settings.steps)
    watch.begin(start)
    return watch


def _outcome(settings: Settings, ended: Ended) -> Outcome:
    """What was made; Stopped if a signal ended it."""
    if ended.stopped_by:
        raise Stopped(
            f"stopped by {ended.stopped_by} after step {ended.step} of {settings.steps}, saved; "
            "the same command continues"
        )
    made = (f"{settings.folder}/checkpoints/step_{ended.step:08d}", f"{settings.folder}/metrics.jsonl")
    return Outcome(made=made, next=(command("export", f"folder={settings.folder}"),))


def follow(settings: Settings, before: Settings) -> tuple[str, ...]:
    """The words by which a run of a chain starts from the run `before` it: student and EMA teacher, and as Gram teacher
    the EMA teacher that it had at its end, or at the step that the settings name where that checkpoint will be kept.

    Raises SettingsError for a run of another method, which can take nothing over.
    """
    kind, other = (one.method.kind for one in (settings, before))  # type: ignore[attr-defined]  # every plug-in has one
    if kind != other:
        raise SettingsError(
            f"a run of {kind} takes no weights over from one of {other} ({before.folder}); call it on its own, with "
            "the folders of the runs that it reads"
        )
    start = settings.source or Source(path=before.folder)
    read = {"init_from": start, **{f"method.{key}": source for key, source in settings.earlier.items()}}
    steps = {what: source.step if _will_be_kept(before, source.step) else None for what, source in read.items()}
    for what, source in read.items():
        if source.step != steps[what]:
            print(f"{what}.step: {before.folder} will keep no checkpoint of step {source.step}; its newest is read")
    first = start.model_copy(update={"path": before.folder, "where": "", "step": steps.pop("init_from")})
    taken = {"init_from": first.model_dump(mode="json")}
    taken |= {what: {"path": str(before.folder), "step": step} for what, step in steps.items()}
    return tuple(f"{what}={json.dumps(values, ensure_ascii=False)}" for what, values in taken.items())


def _will_be_kept(run: Settings, step: int | None) -> bool:
    """Will the checkpoint of this step be there when the run has ended?"""
    rules = run.checkpoint
    written = sorted({*range(rules.every, run.steps, rules.every), run.steps})
    for_good = rules.keep_every and step is not None and step % rules.keep_every == 0
    return step in written[-rules.keep :] or bool(for_good and step in written)


def dry_run(settings: Settings, coming: Collection[Path] = ()) -> str:
    """Say what a run would be, without making it: parameters, FLOPs by layer, the learning rate as it is applied.

    The run folders that are `coming`, of a chain, need not be there yet.
    Raises SourceError where weights that it would read are not there, StreamError or LoopError for settings that no
    number of ranks can make work. A corpus that cannot be read is warned of, as it may be elsewhere or still to come.
    """
    settings.check_sources(coming)
    check(settings.data, 1, settings.model.patch_size, settings.model.in_channels)
    _check_parts(settings, ranks=1)
    if (probe := settings.watch.probe) is not None:
        find_pairs(probe.images, probe.labels, probe.pairs)
    said = summary(settings, build_method(settings, Guard(torch.device("cpu"))), flops_per_step(settings))
    return f"{said}\n{_read(settings)}\n{layer_table(settings)}"


def _read(settings: Settings) -> str:
    """What the run would read, in words. Raises StreamError for weights of data sets that are not there."""
    try:
        corpora = [Corpus(source.path, settings.data.split, mapped=False) for source in settings.data.sources]
    except CorpusError as error:
        return f"warning: {error}"
    order_of(settings.data, corpora)
    check_cache(settings, corpora)
    slices = sum(map(len, corpora))
    rounds = settings.steps * settings.data.batch_size / slices
    return f"the corpus: {settings.data.place} has {slices:,} slices, each seen {rounds:,.2f} times on average"


def samples(settings: Settings, step: int) -> list[str]:
    """Keys of the slices that a step (the first is 1) sees, over all ranks in their order."""
    corpora = [Corpus(source.path, settings.data.split, mapped=False) for source in settings.data.sources]
    size, whole = settings.data.batch_size, Corpora(corpora)
    chosen = order_of(settings.data, corpora).at(np.arange((step - 1) * size, step * size)).tolist()
    return [part.key(i) for part, i in map(whole.of, chosen)]


def _check_parts(settings: Settings, ranks: int) -> None:
    """Refuse parts that are not equal."""
    images = settings.data.batch_size // ranks
    if images % settings.accumulate:
        raise LoopError(
            f"accumulate: {settings.accumulate} parts cannot be made of the {images} slices of a rank "
            f"(data.batch_size {settings.data.batch_size} over {ranks} ranks); take a divisor of {images}"
        )


def _silent(text: str) -> None:
    """Say nothing: every rank but the first."""


def place_method(method: Trainable, settings: Settings, here: World) -> None:
    """Wrap, shard and move every network, all NaN until filled; only the student keeps activations to recompute."""
    mesh = make_mesh(here, settings.parallel)
    for name, network in method.networks.items():
        if name in method.constant:
            place_constant(network, here, settings.parallel, settings.precision)
            continue
        trained = network is method.student
        for part in network.values():
            if settings.precision == "bf16":
                in_bf16(part, settings.residual, cast_parameters=mesh is None)
            recompute_blocks(part, settings.parallel.recompute if trained else "none")
            if settings.parallel.compile:
                compile_blocks(part)
        shard(network, here, settings.parallel, frozen=not trained, mesh=mesh, precision=settings.precision)
        place(network, here.device)
    method.placed()


def _fingerprint(settings: Settings) -> str:
    """Hash what a checkpoint's numbers mean: model, method, optimizer, order of samples. Speed and place may change."""
    kept = settings.model_dump(mode="json", include={"model", "method", "optim", "seed"})
    kept["method"].pop("cache", None)
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


def summary(settings: Settings, method: Trainable, flops: float) -> str:
    """Describe the run: parameters by part, the work of a step, and each derived number with its reason."""
    optim, batch = settings.optim, settings.data.batch_size
    schedules = optim.schedules(settings.steps, batch)
    lr, still = schedules.lr, schedules.freeze_backbone
    factor = f"{optim.lr.highest:.3g} x 4 sqrt({batch} / 1024)" if optim.lr_rule == "sqrt_wrt_1024" else "as given"
    frozen = [name for name, network in method.networks.items() if network is not method.student]
    counts = [f"{name} {parameter_count(method.networks[name])[''] / 1e6:.1f} M" for name in frozen]
    return "\n".join(
        [
            "student:",
            parameter_count_table(method.student, max_depth=2),
            *([f"frozen: {', '.join(counts)}"] if counts else []),
            f"a step: {batch} slices, {flops / 1e12:.3g} TFLOP ({flops / batch / 1e9:.3g} GFLOP a slice)",
            f"learning rate at its peak: {lr.highest:.3g} = {factor} (optim.lr_rule: {optim.lr_rule})",
            f"the run: {settings.steps} steps, {settings.steps * batch:,} slices seen",
            *([f"the backbone stands still for the first {still} steps (optim.freeze_backbone)"] if still else []),
            f"a checkpoint: {checkpoint_bytes(method) / 2**30:.2f} GiB on the disk"
            + (", and in host memory, shared by the ranks (checkpoint.background)" * settings.checkpoint.background),
        ]
    )
