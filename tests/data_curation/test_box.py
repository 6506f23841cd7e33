"""The box around the patient holds every part that is thicker than a couch's shell, whatever the grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_curation import phantom
from data_curation.box import BODY_HU, Box, body_box, outside
from data_curation.volumes import find, read


def disc(hu: NDArray[np.int16], y: float, x: float, radius: float, value: int = 40) -> None:
    rows, columns = np.ogrid[: hu.shape[0], : hu.shape[1]]
    hu[np.hypot(rows - y, columns - x) <= radius] = value


@settings(deadline=None, max_examples=200)
@given(
    st.integers(1, 90), st.integers(1, 90), st.floats(0.3, 6), st.floats(0.3, 6), st.floats(0, 20), st.integers(0, 999)
)
def test_a_box_lies_in_its_slice_and_what_is_outside_is_counted(
    height: int, width: int, down: float, across: float, margin: float, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    hu = np.full((height, width), -1000, np.int16)
    for _ in range(draw.integers(0, 4)):
        disc(hu, draw.uniform(0, height), draw.uniform(0, width), draw.uniform(0, 25))
    box, trunk = body_box(hu, (down, across), margin)
    assert 0 <= trunk.y < trunk.y + trunk.height <= height
    assert 0 <= trunk.x < trunk.x + trunk.width <= width
    assert 0 <= box.y < box.y + box.height <= height
    assert 0 <= box.x < box.x + box.width <= width
    inside = np.zeros(hu.shape, bool)
    inside[box.y : box.y + box.height, box.x : box.x + box.width] = True
    rest = hu[~inside]
    expected = (int(rest.max()), int(np.count_nonzero(rest > BODY_HU))) if rest.size else (-32768, 0)
    assert outside(hu, box) == expected
    np.testing.assert_array_equal(box.of(hu), hu[inside].reshape(box.height, box.width))


def test_arms_and_fingers_are_kept_but_not_the_couch() -> None:
    hu = np.full((512, 512), -1024, np.int16)
    disc(hu, 256, 256, 120)
    disc(hu, 300, 90, 25)  # an arm
    disc(hu, 310, 50, 10)  # a finger of 15 mm at 0.75 mm a pixel
    hu[400:402, 60:450] = -200  # the shell of a couch, 1.5 mm
    hu[430:433, 100:400] = 200
    box, trunk = body_box(hu, (0.75, 0.75), 6.0)
    assert trunk.x > 120  # neither arm nor finger
    assert box.x <= 40 < box.x + box.width
    assert box.y + box.height < 400
    assert outside(hu, box)[0] == 200


def test_the_whole_slice_where_no_part_is_found() -> None:
    whole = Box(0, 0, 40, 50)
    assert body_box(np.full((40, 50), -1000, np.int16), (1.0, 1.0), 5.0) == (whole, whole)


def test_a_phantom_lies_within_its_boxes() -> None:
    patient = phantom.make(3, (6, 128, 128), (20.0, 3.0, 3.0), 0.0)
    for plane, labels in zip(patient.hu, patient.labels, strict=True):
        box, _ = body_box(plane, (3.0, 3.0), 0.0)
        seen = np.zeros(plane.shape, bool)
        seen[box.y : box.y + box.height, box.x : box.x + box.width] = True
        assert not labels[~seen].any()


def test_a_real_chest_loses_nothing_of_the_patient(real_ct: Path) -> None:
    found = next(one for one in find(real_ct / "lidc0001_chest") if one.source == "ct.nii.gz")
    volume = read(found)
    boxes = [body_box(plane, volume.spacing[1:], 6.0)[0] for plane in volume.hu]
    stored = sum(box.height * box.width for box in boxes) / volume.hu.size
    missed = [outside(plane, box)[1] for plane, box in zip(volume.hu, boxes, strict=True)]
    assert 0.5 < stored < 0.7
    assert max(missed) < 3500  # pixels of the couch and of cables, of 262,144
