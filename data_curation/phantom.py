"""Labelled CT phantoms, made from a seed: for the demo, for tests and benchmarks, wherever there are no scans at hand.

The anatomy is data_curation.phantom_anatomy; here it gets a grid, a field of view and noise, and goes to disk in the
layout of a public data set.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from data_curation.phantom_anatomy import paint_patient
from data_curation.phantom_canvas import Array
from data_curation.phantom_layouts import LAYOUTS
from data_curation.phantom_patient import ORGANS, PHASES, TISSUES, draw_patient

__all__ = ["ORGANS", "PHASES", "TISSUES", "Phantom", "make", "write"]

SLAB = 200_000  # voxels painted at a time, so that the painter's arrays stay in the processor's cache


@dataclass(frozen=True)
class Phantom:
    """One made-up patient; arrays are [Z, Y, X] in LPS (z foot to head, y front to back, x patient right to left)."""

    hu: NDArray[np.int16]
    labels: NDArray[np.uint8]
    spacing: tuple[float, float, float]  # (z, y, x) mm
    names: dict[int, str] = field(default_factory=lambda: dict(ORGANS))
    phase: str = "portal"


def make(
    seed: int,
    shape: tuple[int, int, int] = (32, 160, 160),
    spacing: tuple[float, float, float] = (5.0, 2.2, 2.2),
    noise_hu: float = 12.0,
    *,
    fov_mm: float | None = None,
    phase: str | None = None,
) -> Phantom:
    """The patient of this seed on a grid of `shape` and `spacing` (z, y, x).

    The anatomy depends on the seed alone and is laid out in mm, so another grid shows the same patient. `fov_mm` sets
    the in-plane spacing from the width of the field of view; `centre_mm` moves the middle slice to the head (0 is near
    the first lumbar vertebra); `phase` is native, arterial or portal, else drawn; `padding` is the HU outside the
    scanner's round field of view. Raises ValueError for a size or phase that cannot be.
    """
    if min(shape) < 1 or min(spacing) <= 0 or noise_hu < 0 or (fov_mm is not None and fov_mm <= 0):
        raise ValueError(
            f"a phantom needs a positive shape and spacing and noise_hu >= 0, "
            f"got shape {shape}, spacing {spacing}, noise_hu {noise_hu}, fov_mm {fov_mm}"
        )
    if fov_mm is not None:
        spacing = (spacing[0], fov_mm / shape[1], fov_mm / shape[2])
    patient = draw_patient(seed, phase)
    z, y, x = (((np.arange(n) - (n - 1) / 2) * step).astype(np.float32) for n, step in zip(shape, spacing, strict=True))
    hu, labels = np.empty(shape, np.float32), np.empty(shape, np.uint8)
    thick = max(8, SLAB // (shape[1] * shape[2]))
    for start in range(0, shape[0], thick):
        part = slice(start, start + thick)
        hu[part], labels[part] = paint_patient(patient, z[part], y, x)
    if noise_hu:
        hu += _noise(seed, shape, spacing, noise_hu)
    whole = np.clip(np.rint(hu), -1024, 3071).astype(np.int16)
    return Phantom(
        whole, labels, (float(spacing[0]), float(spacing[1]), float(spacing[2])), dict(ORGANS), patient.phase
    )


def _noise(seed: int, shape: tuple[int, int, int], spacing: tuple[float, float, float], sd: float) -> Array:
    """A scanner's noise: grains of about 2 mm with little power at low frequencies, stronger in the middle."""
    white = np.random.default_rng([seed, 2]).standard_normal(shape, np.float32)
    sigma = [0.0] + [max(0.45, 0.9 / step) for step in spacing[1:]]
    grain = ndimage.gaussian_filter(white, sigma, mode="wrap")
    grain -= 0.7 * ndimage.gaussian_filter(grain, [0.0, sigma[1] * 2, sigma[2] * 2], mode="wrap")
    middle = [np.linspace(-1, 1, n, dtype=np.float32) for n in shape[1:]]
    weight = 1.25 - 0.6 * np.minimum(1, np.hypot(middle[0][:, None], middle[1]))
    spread = grain.std() or 1.0  # a single voxel has none
    return np.asarray(grain * (weight * (sd / spread)), np.float32)


def write(
    layout: str,
    root: Path,
    seeds: Sequence[int],
    shape: tuple[int, int, int] = (32, 160, 160),
    spacing: tuple[float, float, float] | None = None,
    noise_hu: float = 12.0,
    **options: Any,
) -> list[Path]:
    """One phantom a seed below `root` as a public data set is downloaded; returns the images (DICOM: folders) in order.

    A layout is a name of the catalogue, or `nnunet`; `options` are its own (data_curation.phantom_layouts), `tests` in
    most. The seed is also the number of the case. Without `spacing` each seed draws its own, as scanners do. Raises
    ValueError for an unknown layout, option or organ.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"no layout {layout!r} to write phantoms in; there are {', '.join(LAYOUTS)}")
    known = inspect.signature(LAYOUTS[layout]).parameters
    wrong = [name for name in options if name not in known]
    if wrong:
        raise ValueError(f"layout {layout} has no {', '.join(wrong)}; it has {', '.join([*known][2:]) or 'no options'}")

    def cases() -> Iterable[tuple[int, Phantom]]:
        for seed in seeds:
            yield seed, make(seed, shape, spacing or _own_spacing(seed, shape), noise_hu)

    root.mkdir(parents=True, exist_ok=True)
    return LAYOUTS[layout](root, cases(), **options)


def _own_spacing(seed: int, shape: tuple[int, int, int]) -> tuple[float, float, float]:
    """A spacing that differs between seeds and shows about 160 mm by 360 mm of the patient on this grid."""
    rng = np.random.default_rng([seed, 3])
    inplane = rng.uniform(335, 385) / min(shape[1:])
    return (round(160 * rng.uniform(0.92, 1.08) / shape[0], 3), round(inplane, 4), round(inplane, 4))
