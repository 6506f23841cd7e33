"""Looks at a run from time to time: features, targets, pictures, a probe. The loop only calls it.

Every rank takes part in the forward passes, as sharded networks need; rank 0 alone computes, says and writes. Nothing
is drawn and nothing in the networks changes, so a watched run is the unwatched one bit for bit. A disk that is full
costs pictures, which is said, but not the run. Forward passes are in the training's precision and never compiled: few
shapes more would mean further compilations.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from launch.distributed import World, agree
from launch.log import Log
from pretrain.data.corpora import Corpora
from pretrain.data.settings import DataSettings
from pretrain.data.views import TeacherViews
from pretrain.data.window import HuWindow
from pretrain.losses.gram import gram_loss
from pretrain.methods import Trainable
from pretrain.models.vit import Features
from pretrain.parallel import is_compiled
from pretrain.watch import pictures
from pretrain.watch.labelled import Labelled, label_patches
from pretrain.watch.measures import patch_cosine, rankme, spread
from pretrain.watch.memory import First, earlier_colours, keep_colours, read_first, write_first
from pretrain.watch.pairs import ProbeError, find_pairs
from pretrain.watch.probe import patch_features, score
from pretrain.watch.reference import Reference, reference
from pretrain.watch.settings import RunProbe, WatchSettings
from pretrain.watch.targets import Tokens, masked_rows, of_terms

__all__ = ["Prepared", "Watch", "looking", "prepare"]

_AT_ONCE = 8  # images of a forward pass


@dataclass(frozen=True)
class Prepared:
    """What a run is watched on, read before its first step."""

    settings: WatchSettings
    seen: Reference
    window: HuWindow
    labelled: Labelled | None  # rank 0's alone
    passes: int  # forward passes of a probe, the same number on all ranks


def prepare(
    settings: WatchSettings,
    data: DataSettings,
    patch_size: int,
    corpora: Corpora,
    here: World,
    say: Callable[[str], None],
    views: TeacherViews | None = None,
) -> Prepared | None:
    """Read everything that will be looked at (a collective); None where nothing is to be. `views` are the method's.

    Raises CorpusError, or ProbeError on every rank for what rank 0 could not use.
    """
    if not settings.period:
        return None
    seen = reference(corpora, data, patch_size, settings.slices, settings.seed, say, views)
    labelled, passes = None, 0
    if settings.probe is not None:
        labelled, passes = _labelled(settings.probe, data.window, patch_size, here)
    if labelled is not None:
        say(_told(labelled))
    return Prepared(settings, seen, data.window, labelled, passes)


def _labelled(probe: RunProbe, window: HuWindow, patch_size: int, here: World) -> tuple[Labelled | None, int]:
    labelled, fault = None, ""
    if here.rank == 0:
        try:
            labelled = label_patches(find_pairs(probe.images, probe.labels, probe.pairs), patch_size, window, probe)
        except ProbeError as error:
            fault = str(error)
    told: list[object] = [fault, len(labelled.images) if labelled is not None else 0]
    if here.size > 1:
        dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
    if told[0]:
        raise ProbeError(f"watch.probe: {told[0]}")
    return labelled, int(str(told[1]))


def _told(labelled: Labelled) -> str:
    fit, asked = labelled.counts
    classes, rare = len(labelled.values), ", ".join(map(str, labelled.left_out))
    return (
        f"watch: probe of {classes} classes on {fit} patches to fit and {asked} of other patients to score; by chance "
        f"recall is {1 / classes:.2f}" + (f"; left out, as they are not in both halves: labels {rare}" if rare else "")
    )


@contextmanager
def looking(*networks: nn.Module) -> Iterator[None]:
    """The networks as they are looked at: in evaluation mode, without gradients, not compiled; then as they were.

    A sharded network that is trained would keep its gathered copy until the next backward pass: it is given back.
    """
    modules = [module for network in networks for module in network.modules()]
    training = [module.training for module in modules]
    stance = torch.compiler.set_stance("force_eager") if any(map(is_compiled, modules)) else nullcontext()
    try:
        with torch.no_grad(), stance:
            for network in networks:
                network.eval()
            yield
    finally:
        for module, was in zip(modules, training, strict=True):
            module.training = was
            if isinstance(module, FSDPModule):
                module.reshard()


class Watch:
    """The hook of a run: call `begin`, then the watch itself with the step after each `settings.period`, then `end`."""

    def __init__(
        self,
        prepared: Prepared,
        method: Trainable,
        log: Log,
        here: World,
        *,
        folder: Path,
        in_channels: int,
        steps: int,
    ) -> None:
        """`folder` is the run's; `steps` its length. Files go to `folder`/watch."""
        self._given, self._method, self._log, self._here = prepared, method, log, here
        self._folder, self._channels, self._steps = folder / "watch", in_channels, steps
        self._first: First | None = None
        self._last = -1
        self._queries = pictures.queries(prepared.seen.body[: self._drawn], prepared.seen.side, prepared.settings.seed)

    @property
    def _drawn(self) -> int:
        return min(self._given.settings.pictures, len(self._given.seen.whole))

    def begin(self, start: int) -> None:
        """Look at a new run before its first step; a continued one finds what it is compared with in its folder."""
        if start == 0:
            self._look(0, every=1)
            return
        self._last = start
        if not self._given.settings.every:
            return
        seen, model = self._given.seen, self._method.exported()
        if self._here.rank == 0:
            shape = (self._drawn, seen.body.shape[1], int(model.dim))  # type: ignore[arg-type]  # of every backbone
            self._first = read_first(self._folder, seen.keys[: self._drawn], shape)
        if agree(self._here.rank == 0 and self._first is None):
            self._look(start, every=1)

    def __call__(self, step: int) -> Mapping[str, float]:
        """Look at whatever is due after `step` steps (a collective). It logs by itself and returns nothing to log."""
        self._look(step, every=int(step == self._steps))
        return {}

    def end(self, step: int) -> None:
        """Look at the finished run, unless that was just done."""
        if step != self._last and step == self._steps:
            self._look(step, every=1)

    def _look(self, step: int, every: int = 0) -> None:
        """Do what is due; all that is wanted at all with `every` 1."""
        settings, began = self._given.settings, time.perf_counter()
        numbers_due, pictures_due, probe_due = (
            bool(period) and step % (every or period) == 0
            for period in (settings.every, settings.images_every, settings.probe.every if settings.probe else 0)
        )
        if not (numbers_due or pictures_due or probe_due):
            return
        self._last = step
        networks = list(self._method.networks.values())
        values: dict[str, float] = {}
        with looking(*networks, self._method.exported()):
            if numbers_due or pictures_due:
                whole = self._see(self._method.exported(), self._given.seen.whole)
            if numbers_due:
                values |= {f"watch/{name}": value for name, value in self._numbers(step, whole).items()}
            if probe_due:
                values |= {f"probe/{name}": value for name, value in self._probe().items()}
        if self._here.rank:
            return
        if pictures_due:
            with self._surviving(f"pictures of step {step}"):
                self._draw(step, whole.patches[: self._drawn])
        if values:
            self._log.numbers(step, self._steps, values)
        self._log.event(_line(step, self._steps, values, time.perf_counter() - began))

    @contextmanager
    def _surviving(self, what: str) -> Iterator[None]:
        """Say what the disk did not take. The other ranks would not know of an error here, and wait."""
        try:
            yield
        except OSError as error:
            self._log.event(
                f"warning: watch: {what} cannot be written: {os.strerror(error.errno or 0)}; the run goes on"
            )

    def _see(self, backbone: nn.Module, images: Tensor, masks: Tensor | None = None) -> Features:
        """The features of images [B, 1, H, W], a few at a time, float32 on the CPU."""
        parts: list[Features] = []
        for first in range(0, len(images), _AT_ONCE):
            some = images[first : first + _AT_ONCE].to(self._here.device).expand(-1, self._channels, -1, -1)
            hidden = None if masks is None else masks[first : first + _AT_ONCE].to(self._here.device)
            made: Features = backbone(some, hidden)
            parts.append(Features(*(x.float().cpu() for x in (made.cls, made.registers, made.patches))))
        return Features(*(torch.cat(x) for x in zip(*((p.cls, p.registers, p.patches) for p in parts), strict=True)))

    def _numbers(self, step: int, whole: Features) -> dict[str, float]:
        """Features of the whole slices and targets of their crops; empty on all ranks but the first."""
        seen, method = self._given.seen, self._method
        found: dict[str, float] = {}
        gram = method.networks.get("gram_teacher")
        anchor = None if gram is None else self._see(gram["backbone"], seen.whole[: self._drawn]).patches
        if {"student", "teacher"} <= method.networks.keys():
            rows = masked_rows(seen.batch.mask_indices)
            tokens = []
            for name, masks in (("teacher", None), ("student", seen.batch.masks)):
                features = self._see(method.networks[name]["backbone"], seen.batch.global_crops, masks)
                masked = features.patches.flatten(0, 1)[rows]
                tokens.append(Tokens(features.cls.to(self._here.device), masked.to(self._here.device)))
            found = of_terms(method, tokens[0], tokens[1], step)
        if self._here.rank:
            return {}
        now = whole.patches[: self._drawn].clone()
        if self._first is None:
            self._first = First(step, seen.keys[: self._drawn], now)
            with self._surviving("first.safetensors"):
                write_first(self._folder, self._first)
        inside = whole.patches[seen.body] if bool(seen.body.any()) else whole.patches.flatten(0, 1)
        drift = {"first": self._first.patches} | ({} if anchor is None else {"gram_teacher": anchor})
        return {
            "patch/cosine": patch_cosine(whole.patches, seen.body),
            "patch/rank": rankme(inside),
            "patch/spread": spread(inside),
            "cls/rank": rankme(whole.cls),
            "cls/spread": spread(whole.cls),
            **{f"drift/{name}": float(gram_loss(now, other)) for name, other in drift.items()},
            **found,
        }

    def _probe(self) -> dict[str, float]:
        """The scores; empty on all ranks but the first, which only take part in as many forward passes."""
        backbone, probe, device = self._method.exported(), self._given.settings.probe, self._here.device
        if self._given.labelled is not None and probe is not None:
            features = patch_features(backbone, self._given.labelled, self._channels, device)
            return score(features, self._given.labelled, probe)
        side = int(backbone.patch_size)  # type: ignore[arg-type]  # of every backbone
        for _ in range(self._given.passes):
            backbone(torch.zeros(1, self._channels, side, side, device=device))
        return {}

    def _draw(self, step: int, patches: Tensor) -> None:
        """Write the pictures, to TensorBoard too."""
        seen, window, folder = self._given.seen, self._given.window, self._folder
        body = seen.body[: self._drawn]
        scores = pictures.colour_scores(patches, body)
        earlier = earlier_colours(folder, step, scores)
        if earlier is not None:
            scores = pictures.aligned(scores, earlier, body)
        keep_colours(folder, step, scores)
        made = {
            "patches_pca": pictures.pca_picture(seen, pictures.colours(scores, body)),
            "patches_likeness": pictures.likeness_picture(seen, patches, self._queries),
        }
        if earlier is None:  # they never change
            made["crops"] = pictures.crops_picture(seen, self._drawn, window)
        for name, image in made.items():
            encoded = pictures.png(image)
            (folder / f"{name}_{step:08d}.png").write_bytes(encoded)
            self._log.image(step, f"watch/{name}", encoded, (image.shape[0], image.shape[1]))


_SAID = (  # number, its name on the line, what it can be at most
    ("watch/patch/cosine", "patch cosine", ""),
    ("watch/patch/rank", "rank", ""),
    ("watch/drift/first", "drift", ""),
    ("watch/dino/entropy", "dino entropy", "watch/dino/uniform"),
    ("watch/ibot/entropy", "ibot entropy", "watch/ibot/uniform"),
    ("probe/knn/recall", "knn recall", ""),
    ("probe/linear/recall", "linear recall", ""),
)


def _line(step: int, steps: int, values: Mapping[str, float], seconds: float) -> str:
    """``watch 500/20000  patch cosine 0.41  rank 213  dino entropy 5.1 of 11.1  knn recall 0.62  (1.3 s)``."""
    parts = [f"watch {step}/{steps}"]
    for name, said, most in _SAID:
        if name in values:
            parts.append(f"{said} {values[name]:.3g}" + (f" of {values[most]:.3g}" if most in values else ""))
    return "  ".join([*parts, f"({seconds:.1f} s)"])
