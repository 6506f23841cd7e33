"""The slices that a run is watched on: the same from its first step to its last, whole and as training crops."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_curation.box import BODY_HU
from data_curation.corpus import CorpusError
from pretrain.data.batch import Batch
from pretrain.data.corpora import Corpora
from pretrain.data.crops import crop_slice, draw_crops
from pretrain.data.masks import draw_masks
from pretrain.data.settings import DataSettings
from pretrain.data.views import TeacherViews, batch_regions
from pretrain.watch.patches import on_body, resize_hu, resize_image

__all__ = ["Reference", "reference"]

_BODY = 0.1  # share of a slice that must show a body, where the corpus has enough of such
_TRIES = 8  # slices looked at for each that is needed


@dataclass(frozen=True)
class Reference:
    """Chosen slices on the CPU. The shape of the crops is that of the run, the first of a mix."""

    whole: Tensor  # float32 [S, C, H, H], normalised: the largest central square, neither flipped nor distorted
    hu: Tensor  # float32 [S, 1, H, H], the same from -1000 to 1000 HU, to be looked at
    body: Tensor  # bool [S, N]: patches on the body
    batch: Batch  # the slices as training crops, a channel for each HU window
    side: int  # patches a side of `whole`, and of the batch's global crops

    @property
    def keys(self) -> tuple[str, ...]:
        """The checksum of each slice's pixels: what was watched, whatever its place in the corpus."""
        return self.batch.keys


def reference(
    corpora: Corpora,
    data: DataSettings,
    patch_size: int,
    count: int,
    seed: int,
    say: Callable[[str], None],
    views: TeacherViews | None = None,
) -> Reference:
    """Choose `count` slices of the corpus by `seed`, the same on every rank and after every restart.

    The masks are those of `views`, where there are any.

    Slices that show little body are passed over while there are others; unreadable ones are passed over and told.
    Raises CorpusError where none can be read.
    """
    chosen = _chosen(corpora, data.crops.unit == "mm", min(count, len(corpora)), seed, say)
    shape, settings, window = data.crops.shapes[0], data.crops, data.window
    size = (shape.global_size, shape.global_size)
    whole, pixels, crops = [], [], []
    for number, (hu, spacing) in enumerate(chosen):
        side = min(hu.shape)
        top, left = ((n - side) // 2 for n in hu.shape)
        square = torch.from_numpy(hu[top : top + side, left : left + side].copy())[None]
        whole.append(resize_image(window.image(square), size))
        pixels.append(resize_hu(square, size))
        draws = draw_crops(settings, *hu.shape, seed=seed, sample=number, spacing=spacing)
        crops.append(crop_slice(hu, draws, settings, shape, window))
    looked_at, grid = torch.cat(pixels), shape.global_size // patch_size
    n_global, masking = settings.n_global, data.masks.model_copy(update={"group": None})
    if views is not None:
        masks, _ = batch_regions(views, grid, n_global, seed=seed, samples=range(len(chosen)))
    else:
        masks = draw_masks(masking, (grid, grid), len(chosen), seed=seed, step=0, rank=0, n_global=n_global)
    batch = Batch(
        torch.stack([crop.globals_ for crop in crops], 1).flatten(0, 1),
        torch.stack([crop.locals_ for crop in crops], 1).flatten(0, 1),
        None,
        masks.masks,
        masks.indices,
        masks.weights,
        tuple(f"{zlib.crc32(hu.tobytes()):08x}" for hu, _ in chosen),
    )
    return Reference(torch.cat(whole), looked_at, on_body(looked_at, patch_size), batch, grid)


Chosen = tuple[NDArray[np.int16], tuple[float, float] | None]  # pixels in HU, and their spacing where it is needed


def _chosen(corpora: Corpora, spaced: bool, count: int, seed: int, say: Callable[[str], None]) -> list[Chosen]:
    good: list[Chosen] = []
    other: list[Chosen] = []
    fault: CorpusError | None = None
    rng = np.random.default_rng([seed, 0])
    candidates = rng.choice(len(corpora), size=min(len(corpora), _TRIES * count), replace=False)
    for index in candidates.tolist():
        corpus, i = corpora.of(index)
        try:
            hu = corpus.hu(i)
        except CorpusError as error:
            say(f"watch: {error}; another slice is watched in its place")
            fault = error
            continue
        shows = float((hu > BODY_HU).mean()) >= _BODY
        (good if shows else other).append((hu, corpus.spacing(i) if spaced else None))
        if len(good) == count:
            break
    if not good and not other and fault is not None:
        raise fault
    return (good + other)[:count]
