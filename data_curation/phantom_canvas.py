"""A grid of voxels to paint an anatomy on, and the shapes to paint with.

Coordinates are in mm and LPS: x to the patient's left, y to the back, z to the head. A shape is a function f that is
negative inside. A voxel's coverage is taken from f and its differences to the neighbouring voxels, which is the partial
volume of a flat surface: edges blur as a scanner blurs them, more so across thick slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "Box", "Canvas", "Chain", "Point", "Waves", "melt", "rotation"]

Array = NDArray[np.float32]
Box = tuple[slice, slice, slice]
Point = Sequence[float] | NDArray[np.float64]  # (x, y, z) mm
Chain = Sequence[Sequence[float]] | NDArray[np.float64]  # (x, y, z, radius) mm of each joint


@dataclass(frozen=True)
class Waves:
    """A smooth random field: a sum of plane waves, so that its value at a point in mm does not depend on the grid."""

    k: NDArray[np.float64]  # [N, 3] over (z, y, x), 1/mm
    phase: NDArray[np.float64]  # [N]
    amplitude: NDArray[np.float64]  # [C, N]

    @classmethod
    def draw(
        cls, rng: np.random.Generator, count: int, wavelength: tuple[float, float], fields: int, rms: float
    ) -> Waves:
        direction = rng.normal(size=(count, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        length = rng.uniform(*wavelength, size=(count, 1))
        amplitude = rng.normal(size=(fields, count))
        amplitude *= rms * np.sqrt(2.0) / np.linalg.norm(amplitude, axis=1, keepdims=True)
        return cls(2 * np.pi * direction / length, rng.uniform(0, 2 * np.pi, count), amplitude)

    def on(self, z: Array, y: Array, x: Array) -> Array:
        """Values [C, Z, Y, X] on the grid of the axes; sin(a + b) is a matrix product of a (z, y) and an x part."""
        zy = z[:, None, None] * self.k[:, 0] + y[None, :, None] * self.k[:, 1] + self.phase  # [Z, Y, N]
        along = x[None, :] * self.k[:, 2:3]  # [N, X]
        right = np.concatenate([np.cos(along), np.sin(along)]).astype(np.float32)
        left = np.concatenate([np.sin(zy), np.cos(zy)], axis=-1)
        weights = np.concatenate([self.amplitude, self.amplitude], axis=1)
        return np.stack([(left * w).astype(np.float32) @ right for w in weights])


class Canvas:
    """A slab of voxels being painted: HU, labels, and every voxel's position in the template."""

    def __init__(self, axes: tuple[Array, Array, Array], bend: Waves, mottle: Waves, background: float) -> None:
        """`axes` are the voxel centres' z, y and x; `bend` moves them; `mottle` is the texture of tissue."""
        self.axes = axes
        z, y, x = axes
        uz, uy, ux = bend.on(z, y, x)
        self.z = uz + self.axes[0][:, None, None]
        self.y = uy + self.axes[1][None, :, None]
        self.x = ux + self.axes[2][None, None, :]
        self.mottle = mottle.on(z, y, x)[0]
        self.hu = np.full(self.x.shape, background, np.float32)
        self.labels = np.zeros(self.x.shape, np.uint8)
        self.all: Box = (slice(0, len(z)), slice(0, len(y)), slice(0, len(x)))

    def box(self, low: Point, high: Point, slack: float = 16.0) -> Box:
        """The voxels between two template corners (x, y, z), with room for the bend; empty if outside the slab."""
        cuts = []
        for axis, a, b in zip(self.axes, reversed(low), reversed(high), strict=True):
            cuts.append(slice(int(np.searchsorted(axis, a - slack)), int(np.searchsorted(axis, b + slack))))
        return (cuts[0], cuts[1], cuts[2])

    def paint(self, box: Box, f: Array, value: float | Array, label: int | None = 0) -> None:
        """Blend `value` in where f < 0 and set the label there; None leaves the labels (a vessel within an organ)."""
        if not f.size:
            return
        f = np.minimum(f, 9.0)  # a cut far outside a shape must not look like an edge
        slope = np.zeros_like(f)
        for axis, count in enumerate(f.shape):
            if count > 1:
                slope += np.square(np.gradient(f, axis=axis))
        coverage = np.clip(0.5 - f / (1.5 * np.sqrt(slope) + 1e-3), 0, 1)
        here = self.hu[box]
        here += coverage * (value - here)
        if label is not None:
            self.labels[box][f < 0] = label

    def tube(self, points: Chain) -> tuple[Box, Array]:
        """Distance to a chain of (x, y, z, radius) in mm, cut off at 9 mm, and the box that holds it."""
        chain = np.asarray(points, np.float32)
        reach = chain[:, 3:] + 9.0
        whole = self.box((chain[:, :3] - reach).min(0), (chain[:, :3] + reach).max(0))
        f = np.full([max(0, s.stop - s.start) for s in whole], 9.0, np.float32)
        for a, b in pairwise(chain):
            r = max(a[3], b[3]) + 9.0
            near = self.box(np.minimum(a, b)[:3] - r, np.maximum(a, b)[:3] + r)
            part = tuple(slice(max(n.start, w.start), min(n.stop, w.stop)) for n, w in zip(near, whole, strict=True))
            if any(s.stop <= s.start for s in part):
                continue
            x, y, z = self.x[part] - a[0], self.y[part] - a[1], self.z[part] - a[2]
            d = b - a
            t = np.clip((x * d[0] + y * d[1] + z * d[2]) / max(float(d[:3] @ d[:3]), 1e-3), 0, 1)
            away = np.sqrt((x - t * d[0]) ** 2 + (y - t * d[1]) ** 2 + (z - t * d[2]) ** 2) - (a[3] + t * d[3])
            inner = tuple(slice(p.start - w.start, p.stop - w.start) for p, w in zip(part, whole, strict=True))
            np.minimum(f[inner], away, out=f[inner])
        return whole, f

    def blob(self, box: Box, centre: Point, radii: Point, turn: NDArray[np.float64] | None = None) -> Array:
        """About the distance to an ellipsoid; `turn` is a rotation whose rows are its axes. x, y, z order."""
        rows = (np.eye(3) if turn is None else turn) / np.asarray(radii, float)[:, None]
        x, y, z = (a[box] - float(c) for a, c in zip((self.x, self.y, self.z), centre, strict=True))
        total = np.zeros_like(x)
        for row in rows.astype(np.float32):
            total += np.square(row[0] * x + row[1] * y + row[2] * z)
        return np.asarray((np.sqrt(total) - 1) * np.float32(np.prod(radii) ** (1 / 3)), np.float32)

    def ball(self, centre: Point, radii: Point, turn: NDArray[np.float64] | None = None) -> tuple[Box, Array]:
        """As `blob`, with its own box."""
        reach = max(radii) if turn is not None else np.asarray(radii)
        box = self.box(np.asarray(centre) - reach, np.asarray(centre) + reach)
        return box, self.blob(box, centre, radii, turn)


def rotation(rng: np.random.Generator, degrees: tuple[float, float, float], spread: float) -> NDArray[np.float64]:
    """Rotation about x, then y, then z by these angles, each with a normal spread, in degrees."""
    ax, ay, az = np.radians(np.asarray(degrees) + rng.normal(0, spread, 3))
    cx, sx, cy, sy, cz, sz = np.cos(ax), np.sin(ax), np.cos(ay), np.sin(ay), np.cos(az), np.sin(az)
    about_x = np.array([[1, 0, 0], [0, cx, sx], [0, -sx, cx]])
    about_y = np.array([[cy, 0, -sy], [0, 1, 0], [sy, 0, cy]])
    about_z = np.array([[cz, sz, 0], [-sz, cz, 0], [0, 0, 1]])
    return np.asarray(about_x @ about_y @ about_z)


def melt(a: Array, b: Array, radius: float) -> Array:
    """Union of two shapes with a fillet of this radius."""
    blend = np.clip(0.5 + (b - a) / (2 * radius), 0, 1)
    return np.asarray(b + (a - b) * blend - radius * blend * (1 - blend), np.float32)
