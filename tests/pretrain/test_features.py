"""Training from kept features: the same losses as with live teachers, refused where they are not those of the run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
from torch import Tensor

from launch.run import Stopped
from launch.settings import SettingsError, load
from pretrain import features
from pretrain.checkpoint_files import newest, read_tensors
from pretrain.data.cached import FeaturesError, Kept
from pretrain.methods import SourceError
from pretrain.methods.multi_teacher import MultiTeacher
from pretrain.settings import Settings
from tests.pretrain.feature_runs import NAMES, SLICES, copied, make, run, settings, vit, write_all
from tests.pretrain.made_up import CROPS, Phantoms, take
from tests.pretrain.made_up import settings as data_settings
from tests.pretrain.teacher_files import write_export


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def live(root: Path) -> list[dict[str, float]]:
    return run(root, root / "live")


@pytest.mark.parametrize(
    ("more", "close"),
    [(["data.workers=0"], 1e-6), (["data.workers=2"], 1e-6), (["accumulate=2"], 1e-5), (["data.crop_on=device"], 1e-4)],
    ids=lambda given: "".join(given) if isinstance(given, list) else "",
)
def test_training_from_the_cache_is_training_with_the_teachers(
    tmp_path: Path, root: Path, live: list[dict[str, float]], more: list[str], close: float, capfd: Any
) -> None:
    """Over more than one round of the slices, maps fitted from the cache too."""
    read = run(root, tmp_path, f"method.cache={root / 'cache'}", *more)
    for ours, theirs in zip(read, live, strict=True):
        if more == ["accumulate=2"]:  # a deviation over the tokens of a part is not that of the whole
            del ours["gate/target_std"]
        assert ours == pytest.approx({name: theirs[name] for name in ours}, abs=close)
    said = capfd.readouterr().out
    assert "frozen:" not in said
    assert f"teacher two: features of width 48 on 4 x 4, read from {root / 'cache'}" in said
    assert "warning: method.cache" not in said


def test_two_global_crops_and_bf16(tmp_path: Path, root: Path) -> None:
    """bf16 is stored as such; what is left is that teachers see batches of other sizes."""
    more = ("data.crops.n_global=2", "data.crops.fixed=3", "precision=bf16")
    cache = make(root, tmp_path / "cache", *more)
    (features,) = Kept(cache, ["two"]).read([7], [None])
    assert features.dtype == torch.bfloat16
    assert json.loads((cache / "features.json").read_text())["entries"] == SLICES * 3 * 2
    found = [run(root, tmp_path / n, *more, *w) for n, w in (("live", ()), ("read", (f"method.cache={cache}",)))]
    for ours, theirs in zip(*found, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-2, abs=2e-2)


def test_some_of_the_teachers_and_another_student(tmp_path: Path, root: Path, live: list[dict[str, float]]) -> None:
    """A cache serves any student and any choice of its teachers; distortions are the student's alone."""
    more = ("method.teachers.one=null", "model.width=48", "data.crops.distortions.noise_hu=[0, 20]", "data.seed=0")
    found = [
        run(root, tmp_path / n, *more, *w) for n, w in (("live", ()), ("read", (f"method.cache={root / 'cache'}",)))
    ]
    for ours, theirs in zip(*found, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-6)
    assert found[0] != live


def test_hidden_patches_are_taken_away_afterwards_and_that_is_said(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = Kept(root / "cache", NAMES)
    whole = kept.read([3, 29], [None, None, None])
    places = torch.tensor([[0, 5, 7], [2, 3, 15]])
    some = kept.read([3, 29], [None, places, None])
    assert torch.equal(some[0], whole[0])
    for row in range(2):
        assert torch.equal(some[1][row], whole[1][row][[0, *(places[row] + 1).tolist()]])
    run(
        root,
        tmp_path,
        f"method.cache={root / 'cache'}",
        "method.teachers.two.mask=0.5",
        "method.teachers.three.mask=0.4",
    )
    said = capsys.readouterr().out
    assert said.count("warning: method.cache") == 1
    assert "set method.teachers.two.mask=0.5 to 0 (and 1 more)" in said


def test_a_teacher_whose_file_is_elsewhere_is_believed(
    tmp_path: Path, root: Path, live: list[dict[str, float]]
) -> None:
    words = ["method.teachers.two.weights=elsewhere", f"method.cache={root / 'cache'}"]
    for ours, theirs in zip(run(root, tmp_path / "run", *words), live, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)
    with pytest.raises(FeaturesError, match=r"teachers.two.size: 64 there, 32 here"):
        run(root, tmp_path / "other", *words, "method.teachers.two.size=32")
    with pytest.raises(SourceError, match="elsewhere does not exist"):
        make(root, tmp_path / "cache", words[0])


def tensors(folder: Path) -> dict[str, Tensor]:
    found = newest(folder)
    assert found is not None
    return read_tensors(found, "")


def test_a_run_goes_on_bit_for_bit_from_a_cache_that_was_moved(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, halves, cache = tmp_path / "whole", tmp_path / "halves", copied(root, tmp_path)
    run(root, whole, f"method.cache={root / 'cache'}")

    def stop(self: MultiTeacher, step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(MultiTeacher, "after_step", stop)
        with pytest.raises(Stopped, match="after step 3"):
            run(root, halves, f"method.cache={root / 'cache'}")
    run(root, halves, f"method.cache={cache}")
    a, b = tensors(whole), tensors(halves)
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


def test_a_run_goes_on_with_no_other_teachers(tmp_path: Path, root: Path) -> None:
    """Live or not: the checkpoint knows the digests."""
    for name in NAMES:
        shutil.copy(root / f"{name}.safetensors", tmp_path)
    shutil.copytree(root / "corpus", tmp_path / "corpus")
    run(tmp_path, tmp_path / "run")
    write_export(tmp_path / "two.safetensors", vit(48), 7)
    cache = make(tmp_path, tmp_path / "cache")
    words = [f"method.teachers.two.weights={tmp_path / 'two.safetensors'}", f"method.cache={cache}"]
    with pytest.raises(SourceError, match=r"method.teachers.two: .*holds features of other weights than when this run"):
        run(tmp_path, tmp_path / "run", *words)


def test_settings_that_make_no_sense_are_refused(tmp_path: Path, root: Path) -> None:
    cache = f"method.cache={root / 'cache'}"
    with pytest.raises(
        SettingsError, match=r"crops.fixed: method.cache holds features of fixed crops; give the number"
    ):
        settings(root, tmp_path, cache, "data.crops.fixed=null")
    with pytest.raises(SettingsError, match=r"masks.replace: a cache holds what teachers make of whole images"):
        settings(root, tmp_path, cache, "method.masks.replace=true")
    with pytest.raises(FeaturesError, match=r"data.crops.fixed: features are kept of fixed crops only"):
        make(root, tmp_path, "data.crops.fixed=null")
    other = load(Settings, None, ["folder=x", "steps=1", "data.corpus=x", "data.batch_size=1", "data.crops.fixed=2"])
    with pytest.raises(FeaturesError, match=r"method.kind: self_distillation has no teachers"):
        features.main(other)


def boxes(fixed: int | None, steps: int, **more: object) -> Iterator[tuple[str, bytes, bytes]]:
    """Name, crop and masks of every image of the first steps over 10 slices."""
    data = data_settings(crops=CROPS.model_copy(update={"fixed": fixed}), **more)
    for batch in take(Phantoms(10), data, steps):
        for image, key in enumerate(batch.keys):
            yield key, batch.global_crops[image].numpy().tobytes(), batch.masks[image].numpy().tobytes()


@pytest.mark.parametrize("more", [{}, {"crop_on": "device"}])
def test_fixed_crops_come_in_turn(more: dict[str, object]) -> None:
    """Each time that a slice is seen it shows the next of its crops; order and masks are what they were."""
    seen = defaultdict(list)
    fixed, free = list(boxes(3, 15, **more)), list(boxes(None, 15, **more))
    for key, crop, _ in fixed:
        seen[key].append(hashlib.sha256(crop).hexdigest())
    assert len(seen) == 10
    for crops in seen.values():
        assert len(crops) == 6
        assert len(set(crops)) == 3
        assert crops[:3] == crops[3:]
    assert [(key, mask) for key, _, mask in fixed] == [(key, mask) for key, _, mask in free]
    assert len({crop for _, crop, _ in free}) == 60


def test_fixed_crops_are_those_of_the_slice_whatever_its_place() -> None:
    """Another seed's order, another batch size: the crops of a slice follow from its name and the seed alone."""
    one = {(key, crop) for key, crop, _ in boxes(1, 5)}
    assert len(one) == 10
    assert {(key, crop) for key, crop, _ in boxes(1, 4, batch_size=5)} == one
    assert not {(key, crop) for key, crop, _ in boxes(1, 5, seed=4)} & one


def test_fixed_needs_a_number() -> None:
    with pytest.raises(pydantic.ValidationError, match="fixed"):
        data_settings(crops={"fixed": 0})
