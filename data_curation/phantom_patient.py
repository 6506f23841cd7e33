"""One made-up patient: organs, their Hounsfield values, and all that differs between patients, drawn from a seed.

The numbers are typical adult values of abdominal CT.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_curation.phantom_canvas import Waves

__all__ = ["ORGANS", "PHASES", "TISSUES", "Patient", "draw_patient"]

ORGANS: dict[int, str] = {
    1: "liver",
    2: "spleen",
    3: "kidney_right",
    4: "kidney_left",
    5: "stomach",
    6: "gallbladder",
    7: "pancreas",
    8: "aorta",
    9: "inferior_vena_cava",
    10: "spine",
    11: "lungs",
}

PHASES = ("native", "arterial", "portal")
# Mean HU in the native, arterial and portal venous phase.
TISSUES: dict[str, tuple[float, float, float]] = {
    "skin": (20, 25, 30),
    "fat": (-102, -102, -100),
    "visceral_fat": (-106, -104, -102),
    "muscle": (52, 58, 62),
    "liver": (58, 68, 108),
    "spleen": (50, 118, 122),
    "renal_cortex": (36, 182, 172),
    "renal_medulla": (32, 104, 150),
    "pancreas": (42, 108, 92),
    "gut_wall": (42, 78, 84),
    "gut_fluid": (16, 16, 18),
    "bile": (8, 8, 9),
    "aorta": (42, 250, 150),
    "vein": (42, 95, 136),
    "portal_vein": (44, 112, 168),
    "heart": (42, 210, 140),
    "disc": (88, 90, 92),
    "marrow": (170, 175, 180),
    "cortical_bone": (760, 760, 760),
    "cord": (36, 38, 38),
    "lung": (-855, -850, -848),
    "table": (-560, -560, -560),
    "foam": (-930, -930, -930),
    "air": (-1000, -1000, -1000),
}
FIXED = {
    "air",
    "table",
    "foam",
    "fat",
    "visceral_fat",
    "lung",
    "cortical_bone",
}  # tissues whose mean hardly differs between patients


@dataclass(frozen=True)
class Patient:
    """One draw of everything that differs between patients."""

    seed: int
    phase: str
    scale: tuple[float, float, float]  # (z, y, x) of the template
    fat: float  # mm under the skin at the flank
    wall: float  # mm of muscle around the cavity
    bend: Waves
    mottle: Waves  # parenchyma and lung texture
    hu: dict[str, float]

    def rng(self, organ: str) -> np.random.Generator:
        """The organ's own stream, so that adding an organ moves no other."""
        return np.random.default_rng([self.seed, *organ.encode()])


def draw_patient(seed: int, phase: str | None = None) -> Patient:
    """The patient of this seed; `phase` overrides the contrast phase that the seed would draw."""
    rng = np.random.default_rng([seed, 1])
    drawn = str(rng.choice(PHASES, p=(0.1, 0.25, 0.65)))
    phase = phase or drawn
    if phase not in PHASES:
        raise ValueError(f"phase {phase!r} is none of {', '.join(PHASES)}")
    column = PHASES.index(phase)
    spread = {name: float(rng.normal(0, 1.0 if name in FIXED else 4.0)) for name in TISSUES}
    return Patient(
        seed=seed,
        phase=phase,
        scale=(rng.uniform(0.94, 1.07), rng.uniform(0.92, 1.05), rng.uniform(0.94, 1.05)),
        fat=rng.uniform(5.0, 21.0),
        wall=rng.uniform(9.0, 14.0),
        bend=Waves.draw(rng, 8, (130.0, 320.0), 3, 3.8),
        mottle=Waves.draw(rng, 48, (6.0, 26.0), 1, 1.0),
        hu={name: means[column] + spread[name] for name, means in TISSUES.items()},
    )
