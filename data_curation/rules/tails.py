"""Values beyond 12 bits: metal up to 30,000 HU on an extended scale, and what bad reconstructions leave (-10,522 in
LiTS, 14,420 in CT-ORG, 27,572 in LiTS). They are kept as stored and told; a loader clips them.
"""

from __future__ import annotations

from data_curation.grid import Volume

__all__ = ["apply"]

TOP = 3071  # highest HU that 12 bits hold with the usual intercept


def apply(volume: Volume, _: object) -> Volume:
    """The volume, with a note where values lie above 3071 HU."""
    high = volume.values.high
    return volume.noted(f"values up to {high} HU, beyond 12 bits, kept") if high > TOP else volume
