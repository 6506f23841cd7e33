"""An endless, resumable stream of batches from corpora.

The whole state is one number. Step s reads the samples s*batch_size ... of a global order that the seed fixes, and
everything drawn for a sample or a step is keyed by its number, so any step can be made again on its own: by any number
of workers, after a restart, or on another number of ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from data_curation.corpus import Corpus
from pretrain.data.corpora import Corpora, Slices, order_of
from pretrain.data.loader import Batches, WorldLike
from pretrain.data.order import Samples
from pretrain.data.settings import DataSettings, StreamError, check
from pretrain.data.steps import Steps
from pretrain.data.views import TeacherViews

__all__ = ["Batches", "DataSettings", "Slices", "StreamError", "WorldLike", "batches", "check"]

LOG = logging.getLogger(__name__)


def batches(
    settings: DataSettings,
    *,
    world: WorldLike,
    patch_size: int,
    in_channels: int,
    start: int,
    corpus: Slices | Sequence[Slices] | None = None,
    views: TeacherViews | None = None,
    samples: Samples | None = None,
) -> Batches:
    """This rank's batches, without end; element k is that of step start + k and lies on the rank's device.

    `corpus` replaces the one, or all of those, that the settings name. With another world size the global order goes on
    where it was; the masks are the same too when `masks.group` is set. A corpus smaller than a batch repeats slices
    within the batch. With `views` the batches hold what each teacher sees, and the masks are those of its regions; the
    settings then have one shape of global crops and no other crops. `samples` replaces the order that the settings and
    their seed say.

    Raises StreamError for settings that do not fit each other, the world or the corpora.
    """
    check(settings, world.size, patch_size, in_channels)
    if corpus is None:
        corpus = [Corpus(source.path, settings.split, mapped=False) for source in settings.sources]
    parts = corpus if isinstance(corpus, Sequence) else [corpus]
    if samples is None:
        samples = order = order_of(settings, parts)
        _warn_of_repeats(settings, sum(map(len, order.sources)), world)
    on_device = settings.crop_on == "device" or (settings.crop_on == "auto" and world.device.type == "cuda")
    steps = Steps(settings, Corpora(parts), samples, world.rank, world.size, patch_size, on_device, views)
    return Batches(settings, steps, world, in_channels, start)


def _warn_of_repeats(settings: DataSettings, seen: int, world: WorldLike) -> None:
    if seen < settings.batch_size and world.rank == 0:
        LOG.warning(
            "%s has %d slices, fewer than the %d of a batch: batches repeat slices (other crops of them)",
            settings.place,
            seen,
            settings.batch_size,
        )
