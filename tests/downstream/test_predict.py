"""Every image below a folder gets a label map of its own, whatever the files are called."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from downstream.predict import ending, named


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_a_number_given_to_one_of_two_like_names_takes_no_other_images_name(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("a.nii.gz", "a.nrrd", "a_1.nii.gz", "b_0000.nii.gz", "deep/b.mha")))
    found = named(tmp_path)
    assert {name: image.path.name for name, image in found.items()} == {
        "a_2": "a.nii.gz",
        "a_3": "a.nrrd",
        "a_1": "a_1.nii.gz",
        "b": "b_0000.nii.gz",
        "deep_b": "b.mha",
    }


parts = st.sampled_from(["a", "a_1", "a_1_1", "a_2", "b"])
files = st.tuples(
    st.sampled_from(["", "a/", "b/"]), parts, st.sampled_from(["", "_0000"]), st.sampled_from([".nii", ".mha"])
)


@given(st.sets(files, min_size=1, max_size=12))
def test_no_image_is_lost(tmp_path_factory: pytest.TempPathFactory, chosen: set[tuple[str, ...]]) -> None:
    root = tmp_path_factory.mktemp("images")
    touch(*(root / "".join(name) for name in chosen))
    found = named(root)
    assert {image.path for image in found.values()} == {root / "".join(name) for name in chosen}
    assert len({name + ending(image) for name, image in found.items()}) == len(chosen)
    assert named(root) == found, "the same names every time, so that a stopped run goes on"
