"""The picture of a run: windows, overlays, principal components, and a file that is really drawn."""

from __future__ import annotations

from pathlib import Path

import imagecodecs
import numpy as np
import pytest

from downstream.picture import Row, draw, overlay, pca_colours, windowed


def test_the_window_is_where_it_says() -> None:
    grey = windowed(np.array([[-500, -160, 40, 240, 3000]], np.int16))
    np.testing.assert_allclose(grey, [[0, 0, 0.5, 1, 1]])


def test_labels_colour_only_themselves() -> None:
    grey = np.full((2, 2), 0.5)
    seen = overlay(grey, np.array([[0, 1], [2, 1]]))
    assert (seen[0, 0] == 0.5).all()
    np.testing.assert_array_equal(seen[0, 1], seen[1, 1])
    assert not np.allclose(seen[0, 1], seen[1, 0])


def test_one_tissue_has_one_colour_in_every_map() -> None:
    """Two maps of three well-separated kinds of patches: equal kinds get equal colours, different ones different."""
    rng = np.random.default_rng(0)
    kinds = rng.standard_normal((3, 16)) * 10
    grids = [rng.integers(0, 3, (5, 6)) for _ in range(2)]
    bodies = [np.ones((5, 6), bool), np.ones((5, 6), bool)]
    bodies[0][0] = False
    colours = pca_colours([kinds[grid] for grid in grids], bodies)
    assert (colours[0][0] == 0).all()
    centres = []
    for kind in range(3):
        patches = np.concatenate(
            [c[(grid == kind) & body] for c, grid, body in zip(colours, grids, bodies, strict=True)]
        )
        assert np.ptp(patches, axis=0).max() < 1e-6
        centres.append(patches[0])
    assert min(np.abs(centres[i] - centres[j]).max() for i, j in ((0, 1), (0, 2), (1, 2))) > 0.2


def test_components_do_not_depend_on_the_sign_of_an_axis() -> None:
    features = np.random.default_rng(1).standard_normal((4, 4, 8))
    body = [np.ones((4, 4), bool)]
    np.testing.assert_allclose(pca_colours([features], body)[0], pca_colours([features.copy()], body)[0])


def test_too_few_patches_are_black_and_no_error() -> None:
    (colours,) = pca_colours([np.ones((2, 2, 4))], [np.zeros((2, 2), bool)])
    assert colours.shape == (2, 2, 3)
    assert not colours.any()


@pytest.mark.parametrize("empty", [False, True])
def test_a_picture_is_drawn(tmp_path: Path, empty: bool) -> None:
    hu = np.full((32, 40), -1000, np.int16)
    if not empty:
        hu[8:24, 10:30] = 40
    labels = (hu > 0).astype(np.uint8)
    row = Row("case", hu, (2.0, 1.0), np.zeros((4, 5, 3)), labels, labels)
    path = draw(tmp_path / "picture.png", [row, row], {0: "background", 1: "liver"}, "title")
    pixels = imagecodecs.png_decode(path.read_bytes())
    assert pixels.shape[0] > 300
    assert np.ptp(pixels[..., :3]) > 100
