"""Names of label maps: which image gets which, that it keeps it, and that a changed image is predicted anew."""

from __future__ import annotations

import csv
import errno
import os
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from data_curation.volumes import Found
from downstream import finetune, predict
from downstream.cases import CaseError
from downstream.naming import cases, ending, one_image
from downstream.record import read_record
from launch.distributed import WAIT_S, World
from tests.data_curation.test_dicom import slice_at, write
from tests.data_curation.test_dicom_frames import PLACES, enhanced
from tests.downstream.random_models import saved
from tests.gloo import run_ranks

SCOUT = ["ORIGINAL", "PRIMARY", "LOCALIZER"]


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def series(folder: Path, uid: str, places: Sequence[float] = (0, 2, 4), **changes: Any) -> None:
    write(folder, *(slice_at(z, SeriesInstanceUID=uid, **changes) for z in places), names=f"{uid}_{{}}.dcm")


def stub(ensemble: object, founds: Sequence[Found], path: Path, *others: object) -> Path:
    """A label map that says of which files it is."""
    path.write_text(" ".join(f"{file.name} {file.stat().st_size}" for found in founds for file in found.files))
    return path


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(predict, "predict_image", stub)
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def run(images: Path, folder: Path | None = None, **changes: Any) -> dict[str, str]:
    """Predict; what each label map says it is of."""
    folder = folder or images.parent / "out"
    model = images.parent / "m.safetensors"
    given = {"folder": folder, "model": model if model.is_file() else saved(model), "images": images, "device": "cpu"}
    predict.main(predict.Settings.model_validate(given | changes))
    return {path.name: path.read_text() for path in folder.iterdir() if path.name.endswith((".nii.gz", ".nrrd"))}


def refused(folder: Path) -> list[list[str]]:
    with (folder / "refused.csv").open(newline="") as file:
        return list(csv.reader(file))[1:]


def test_a_number_given_to_one_of_two_like_names_takes_no_other_images_name(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("a.nii.gz", "a.nrrd", "a_1.nii.gz", "b_0000.nii.gz", "deep/b.mha")))
    found, _ = cases(tmp_path)
    assert {name: image.path.name for name, (image,) in found.items()} == {
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
    found, _ = cases(root)
    assert {image.path for (image,) in found.values()} == {root / "".join(name) for name in chosen}
    assert len({name + ending(image) for name, (image,) in found.items()}) == len(chosen)
    assert cases(root)[0] == found, "the same names every time, so that a stopped run goes on"


def test_files_of_several_channels_are_one_case(tmp_path: Path) -> None:
    names = ("a_0000.nii.gz", "a_0001.nii.gz", "deep/a_0001.mha", "deep/a_0000.nrrd")
    odd = ("lone_0000.nii.gz", "plain.nii.gz", "a_0007.nii.gz", "twice_0000.mha", "twice_0000.nrrd", "twice_0001.mha")
    touch(*(tmp_path / name for name in names + odd))
    found, left = cases(tmp_path, ["CT", "PET"])
    assert {name: [image.path.name for image in several] for name, several in found.items()} == {
        "a": ["a_0000.nii.gz", "a_0001.nii.gz"],
        "deep_a": ["a_0000.nrrd", "a_0001.mha"],
    }
    told = {name: detail for name, _, detail in left}
    assert told["lone"].startswith("lone_0001 (PET) not there")
    assert "CASE_0000 (CT), CASE_0001 (PET)" in told["plain.nii.gz"]
    assert "rename it" in told["a_0007.nii.gz"]
    assert "twice_0000 is there twice" in told["twice"]
    one, _ = cases(tmp_path / "a_0000.nii.gz", ["CT", "PET"])
    assert [image.path.name for image in one["a"]] == ["a_0000.nii.gz", "a_0001.nii.gz"]


def test_images_keep_their_names_when_others_come(inside: Path) -> None:
    series(inside / "p", "1.2")
    series(inside / "p", "1.3")
    first = run(inside)
    assert sorted(first) == ["p_1.nii.gz", "p_2.nii.gz"]
    series(inside / "p", "1.1")
    again = run(inside)
    assert first.items() < again.items()
    assert again["p_3.nii.gz"].startswith("1.1_0.dcm")
    entries = {
        name: (entry.image, entry.folder, entry.series) for name, entry in read_record(inside / "../out").items()
    }
    assert entries == {f"p_{n}": (f"p/1.{m}_0.dcm", "p", f"1.{m}") for n, m in ((1, 2), (2, 3), (3, 1))}
    for file in (inside / "p").glob("1.2_*"):
        file.unlink()
    series(inside / "p", "1.0")
    assert run(inside)["p_4.nii.gz"].startswith("1.0_0.dcm"), "no number of an image that is gone is given again"
    again = run(inside)
    shutil.rmtree(inside / "p")
    touch(inside / "other.nii.gz")
    assert run(inside).items() > again.items(), "the maps of images that are gone stay"
    assert len(read_record(inside.parent / "out")) == 5
    series(inside, "2.1")  # and a name is given over to the image that comes in their place
    (inside / "p_2.nii.gz").write_text("new")
    assert run(inside)["p_2.nii.gz"] == "p_2.nii.gz 3"


@pytest.mark.parametrize("change", ["size", "time", "one slice of a series"])
def test_a_changed_image_is_predicted_again_and_no_other(inside: Path, change: str) -> None:
    touch(inside / "a.nii.gz", inside / "b.nii.gz")
    series(inside / "p", "1.2")
    run(inside)
    made = inside.parent / "out"
    for name in ("a", "b", "p"):
        (made / f"{name}.nii.gz").write_text("old")
    if change == "size":
        (inside / "a.nii.gz").write_text("longer")
    elif change == "time":
        os.utime(inside / "a.nii.gz", ns=(0, 0))
    else:
        os.utime(inside / "p/1.2_1.dcm", ns=(0, 0))
    new = "p.nii.gz" if change.startswith("one") else "a.nii.gz"
    assert [name for name, text in run(inside).items() if text != "old"] == [new]


def test_a_label_map_of_an_unknown_image_is_neither_kept_nor_overwritten(inside: Path) -> None:
    touch(inside / "a.nii.gz")
    (inside.parent / "out").mkdir()
    (inside.parent / "out" / "a.nii.gz").write_text("somebody's")
    with pytest.raises(CaseError, match=r"out/a\.nii\.gz is there and .*predicted\.csv does not say"):
        run(inside)
    assert (inside.parent / "out" / "a.nii.gz").read_text() == "somebody's"
    (inside.parent / "out" / "predicted.csv").write_text("case\na\n")
    with pytest.raises(CaseError, match="its columns are not case, image"):
        run(inside)


def test_what_the_headers_rule_out_takes_no_name(inside: Path) -> None:
    series(inside / "p", "1.1", places=(0,), ImageType=SCOUT)
    series(inside / "p", "1.2")
    series(inside / "q", "1.3", Modality="MR")
    assert sorted(run(inside)) == ["p.nii.gz"]
    assert [row[:2] for row in refused(inside.parent / "out")] == [["p/1.1_0.dcm", "localizer"], ["q", "not_ct"]]
    found, left = cases(inside, ["MR"])
    assert (set(found), [row[1] for row in left]) == ({"p", "q"}, ["localizer"])


def test_files_that_are_an_image_each_give_it_their_name(inside: Path) -> None:
    for name, uid in (("alice", "1.1"), ("bob", "1.2")):
        data = enhanced(PLACES, (0, 1, 2, 3))
        data.SeriesInstanceUID = uid
        write(inside / "mf", data, names=f"{name}.dcm")
    data.SeriesInstanceUID = "1.3"
    write(inside / "lone", data, names="IM1.dcm")
    series(inside / "slices", "1.4", places=(0,))
    series(inside / "slices", "1.5")
    found, _ = cases(inside)
    assert set(found) == {"mf_alice", "mf_bob", "lone", "slices_1.4_0", "slices"}
    assert found["mf_bob"][0].files == (inside / "mf" / "bob.dcm",)


@pytest.mark.parametrize("frames", [True, False])
def test_one_dicom_file_is_an_image(inside: Path, frames: bool) -> None:
    if frames:
        write(inside, enhanced(PLACES, (0, 1, 2, 3)), names="mf.dcm")
    else:
        series(inside, "1.1")
        (inside / "1.1_1.dcm").rename(inside / "mf.dcm")
    assert run(inside / "mf.dcm", inside.parent / "out", model=saved(inside / "m.safetensors")).keys() == {"mf.nii.gz"}
    assert one_image(inside / "mf.dcm").files == (inside / "mf.dcm",)
    assert one_image(inside / "mf.dcm").reason == ("" if frames else "single_slice")
    (inside / "notes.txt").write_text("none")
    with pytest.raises(CaseError, match=r"notes\.txt is no image; \.nii\.gz, .* and DICOM are read"):
        run(inside / "notes.txt", inside.parent / "out", model=inside / "m.safetensors")


def test_label_maps_are_no_images(inside: Path) -> None:
    touch(inside / "a.nii.gz", inside / "b_0000.nii.gz")
    with pytest.raises(ValidationError, match="folder and images are both"):
        run(inside, inside / "../in")
    for _ in range(2):
        assert sorted(run(inside, inside / "out")) == ["a.nii.gz", "b.nii.gz"]
    touch(inside / "out" / "deep" / "c.nii.gz")
    run(inside, inside / "out")
    ((name, reason, detail),) = refused(inside / "out")
    assert (name, reason) == ("out/deep/c.nii.gz", "in_folder")
    assert "move it elsewhere" in detail
    assert sorted(run(inside / "out/deep", inside / "out", model=saved(inside / "m.safetensors"))) == [
        "a.nii.gz",
        "b.nii.gz",
        "c.nii.gz",
    ], "images may lie below the folder"


@pytest.mark.parametrize(
    ("fault", "row"),
    [
        (AttributeError("no attribute\nSOPInstanceUID"), ["AttributeError", "no attribute SOPInstanceUID"]),
        (MemoryError(), ["MemoryError", ""]),
        (
            PermissionError(errno.EACCES, "Permission denied", "a"),
            ["PermissionError", "[Errno 13] Permission denied: 'a'"],
        ),
    ],
)
def test_one_bad_image_costs_no_other(
    inside: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception, row: list[str]
) -> None:
    def bad(ensemble: object, founds: Sequence[Found], path: Path, *others: object) -> Path:
        if path.name == "a.nii.gz":
            raise fault
        return stub(ensemble, founds, path)

    monkeypatch.setattr(predict, "predict_image", bad)
    touch(inside / "a.nii.gz", inside / "b.nii.gz")
    assert sorted(run(inside)) == ["b.nii.gz"]
    assert refused(inside.parent / "out") == [["a.nii.gz", *row]]


def test_a_full_disk_ends_the_run(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(predict, "predict_image", full)
    touch(inside / "a.nii.gz")
    with pytest.raises(OSError, match="No space"):
        run(inside)


@pytest.mark.parametrize("verb", [predict, finetune])
def test_ranks_wait_for_those_with_the_longer_share(inside: Path, monkeypatch: pytest.MonkeyPatch, verb: Any) -> None:
    waited: list[float] = []

    def joined(device: str, timeout_s: float = 0.0) -> AbstractContextManager[World]:
        waited.append(timeout_s)
        return nullcontext(World(0, 3, 0, torch.device("cpu")))

    monkeypatch.setattr(verb, "world", joined)
    if verb is finetune:
        monkeypatch.setattr(finetune, "open_dataset", lambda folder: None)
    with pytest.raises((ValueError, AttributeError)):
        verb.main(
            predict.Settings(folder=inside, model=saved(inside / "m.safetensors"), images=inside / "none")
            if verb is predict
            else finetune.Settings(folder=inside, dataset=inside)
        )
    assert waited == [WAIT_S]


def shares(rank: int, size: int, images: Path) -> list[str]:
    """What a rank predicts, or the error that it tells."""
    mine: list[str] = []

    def noted(ensemble: object, founds: Sequence[Found], path: Path, *others: object) -> Path:
        mine.append(path.name)
        return stub(ensemble, founds, path)

    predict.predict_image = noted
    try:
        run(images)
    except CaseError as fault:
        return [str(fault)]
    return mine


def test_only_what_is_not_done_is_shared_out(inside: Path) -> None:
    touch(inside / "b.nii.gz", inside / "d.nii.gz")
    run(inside)
    touch(*(inside / f"{name}.nii.gz" for name in "ac"))
    assert run_ranks(f"{__file__}:shares", 2, inside.parent, time_limit=500, images=inside) == [
        ["a.nii.gz"],
        ["c.nii.gz"],
    ]
    assert {path.name for path in (inside.parent / "out").iterdir()} >= {f"{name}.nii.gz" for name in "abcd"}
    (inside.parent / "out" / "predicted.csv").write_text("")
    told = run_ranks(f"{__file__}:shares", 2, inside.parent, time_limit=500, images=inside)
    assert told[0] == told[1], "each rank ends by itself"
    assert "predicted.csv cannot be read" in told[0][0]
