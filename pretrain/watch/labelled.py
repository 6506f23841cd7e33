"""The labelled patches of a probe: drawn once from scans by a seed, kept in memory, the same whatever the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from launch.settings import Settings
from pretrain.data.window import HuWindow
from pretrain.watch.pairs import Pair, ProbeError, groups, labelled_slices, read_pair
from pretrain.watch.patches import on_body, patch_classes, resize_hu, resize_image, resize_labels

__all__ = ["Drawn", "Labelled", "balanced", "input_size", "label_patches", "slice_patches"]

_AT_ONCE = 8  # slices of a forward pass


class Drawn(Settings):
    """Which patches of labelled scans are looked at."""

    volumes: int = Field(32, ge=2, description="scans at most, half of them to fit and half to score")
    slices: int = Field(4, ge=1, description="slices of a scan, spread over those that hold a label")
    size: int = Field(384, gt=0, description="pixels of a slice's longer side, rounded to whole patches")
    patches: int = Field(
        8000,
        ge=2,
        description="patches at most in each half, the background at most as many as all classes together; above that "
        "the larger classes are cut to equal shares",
    )
    seed: int = Field(0, ge=0, description="of the draws of scans, slices and patches")


@dataclass(frozen=True)
class Labelled:
    """Slices of labelled scans, the patches drawn from them, and the class of each."""

    images: tuple[Tensor, ...]  # float32 [b, 1, H, W] each, normalised; one forward pass each
    chosen: tuple[Tensor, ...]  # int64 of each: drawn patches, flat over b*N, ascending
    classes: Tensor  # int64 [n] of all drawn patches in this order, indices into `values`
    fit: Tensor  # bool [n]: of a patient who fits; the others score
    values: tuple[int, ...]  # the label of each class
    left_out: tuple[int, ...] = ()  # labels that do not occur in both halves

    @property
    def counts(self) -> tuple[int, int]:
        """Patches that fit, and patches that score."""
        return int(self.fit.sum()), int((~self.fit).sum())


def label_patches(pairs: Sequence[Pair], patch_size: int, window: HuWindow, settings: Drawn) -> Labelled:
    """Read the scans and draw their patches.

    Patients are put into an order by the seed and go to the two halves in turn. A patch has the class of most of its
    pixels, unlabelled ones being class 0. Patches are left out where less than half lies on the body, since air is told
    from tissue by any network, and where their class does not occur in both halves. Raises ProbeError.
    """
    half: list[list[Pair]] = [[], []]
    by_patient = list(groups(pairs).values())
    for turn, patient in enumerate(np.random.default_rng([settings.seed, 1]).permutation(len(by_patient)).tolist()):
        half[turn % 2] += by_patient[patient]
    images: list[Tensor] = []
    labels: list[NDArray[np.int64]] = []  # [b, N], -1 where a patch is not on the body
    fits: list[bool] = []
    for fit, side in ((True, half[0]), (False, half[1])):
        for pair in side[: settings.volumes // 2]:
            for image, label in _slices(pair, patch_size, window, settings):
                images.append(image)
                labels.append(label)
                fits.append(fit)
    return _drawn(images, labels, fits, settings, len(by_patient))


def _slices(pair: Pair, patch: int, window: HuWindow, settings: Drawn) -> list[tuple[Tensor, NDArray[np.int64]]]:
    """Some slices of a scan, in pieces of at most _AT_ONCE, with the class of each patch; none without a label."""
    hu, labels = read_pair(pair)
    picked = labelled_slices(labels, settings.slices, settings.seed, pair.group)
    size = input_size(hu.shape[1:], settings.size, patch)
    pieces = [picked[first : first + _AT_ONCE] for first in range(0, len(picked), _AT_ONCE)]
    return [slice_patches(hu[some], np.rint(labels[some]).astype(np.int64), size, patch, window) for some in pieces]


def input_size(shape: Sequence[int], longer: int, patch: int) -> tuple[int, int]:
    """Height and width of slices [Y, X] as the network sees them: about `longer` pixels at most, whole patches."""
    scale = longer / max(shape)
    height, width = (max(1, round(side * scale / patch)) * patch for side in shape)
    return height, width


def slice_patches(
    hu: NDArray[Any], labels: NDArray[np.int64], size: tuple[int, int], patch: int, window: HuWindow
) -> tuple[Tensor, NDArray[np.int64]]:
    """Slices and labels [b, Y, X] -> images [b, C, *size], and the class of each patch [b, N], -1 off the body."""
    pixels = torch.from_numpy(np.ascontiguousarray(hu, np.float32))
    image = resize_image(window.image(pixels), size)
    classes = patch_classes(resize_labels(labels, size), patch)
    return image, np.where(on_body(resize_hu(pixels, size), patch).numpy(), classes, -1)


def _drawn(
    images: list[Tensor], labels: list[NDArray[np.int64]], fits: list[bool], settings: Drawn, patients: int
) -> Labelled:
    whole = np.concatenate([part.ravel() for part in labels]) if labels else np.empty(0, np.int64)
    piece = np.repeat(np.arange(len(labels)), [part.size for part in labels])
    fit = np.array(fits, bool)[piece]
    sides = [set(np.unique(whole[side & (whole >= 0)]).tolist()) for side in (fit, ~fit)]
    values = sorted(sides[0] & sides[1])
    if len(values) < 2:
        raise ProbeError(
            f"the probe needs two classes that both halves of the patients have, and has {len(values)} (patients: "
            f"{patients}; labels to fit: {sorted(sides[0])}, to score: {sorted(sides[1])}); give more labelled scans "
            "to watch.probe, raise its slices, or its size where the labels are small against a patch"
        )
    rng = np.random.default_rng([settings.seed, 3])
    keep = np.zeros(len(whole), bool)
    for side in (fit, ~fit):
        among = np.flatnonzero(side & np.isin(whole, values))
        keep[among[balanced(whole[among], settings.patches, rng)]] = True
    chosen = tuple(torch.from_numpy(np.flatnonzero(part)) for part in np.split(keep, _ends(labels)))
    classes = torch.from_numpy(np.searchsorted(values, whole[keep]).astype(np.int64))
    return Labelled(
        tuple(images),
        chosen,
        classes,
        torch.from_numpy(fit[keep]),
        tuple(values),
        left_out=tuple(sorted(sides[0] ^ sides[1])),
    )


def _ends(labels: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.cumsum([part.size for part in labels], dtype=np.int64)[:-1]


def balanced(classes: NDArray[np.int64], most: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices of at most `most` of these classes [n]: each class gets an equal share, and what a small one leaves goes
    to the others. Class 0, the background, gets at most as many as all others together. Ascending."""
    left, found = most, []
    sizes = {int(value): int((classes == value).sum()) for value in np.unique(classes)}
    if 0 in sizes:
        sizes[0] = min(sizes[0], sum(sizes.values()) - sizes[0])
    for done, (value, size) in enumerate(sorted(sizes.items(), key=lambda entry: (entry[1], entry[0]))):
        take = min(size, left // (len(sizes) - done))
        found.append(rng.permutation(np.flatnonzero(classes == value))[:take])
        left -= take
    return np.sort(np.concatenate(found)) if found else np.empty(0, np.int64)
