"""What teachers see: their images against torch's, in every way to make them; and one global crop of a slice."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from launch.settings import SettingsError, load
from pretrain.data.batch import Batch
from pretrain.data.corpora import Corpora
from pretrain.data.crops import CropDraws, Crops, CropSettings, CropShape, HuWindow, crop_batch, crop_slice, draw_crops
from pretrain.data.masks import MaskSettings, draw_masks, target_counts
from pretrain.data.stream import Batches, DataSettings, batches
from pretrain.data.views import TeacherView, TeacherViews
from pretrain.data.window import Distortions, RandomWindow
from pretrain.flops import layer_table
from pretrain.settings import Settings
from pretrain.watch.pictures import crops_picture
from pretrain.watch.reference import reference
from tests.pretrain.made_up import Phantoms, World, settings

WINDOW, SOFT = HuWindow(), HuWindow(low=-160, high=240, mean=40, std=100)
THREE = HuWindow.model_validate([{"low": -1350, "high": 150}, {"low": -160, "high": 240}, {"low": -500, "high": 1300}])
PLAIN = CropSettings(global_size=64, n_local=0)
OWN = TeacherView(WINDOW, 64, 4, 0.5)  # the student's own view
ALONE = World()
VIEWS = TeacherViews(
    (
        OWN,
        TeacherView(SOFT, 56, 4, 0.4),
        TeacherView(THREE, 80, 5, 0.3),
        TeacherView(SOFT, 56, 8, 0.0),
        TeacherView(WINDOW, 32, 2, 0.5),
        TeacherView(WINDOW, 64, 4, 0.3),
    ),
    hidden=0.75,
)
SAME = ((0, 5), (1, 3))  # teachers that see alike


@pytest.fixture(autouse=True)
def _enough_processors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("pretrain.data.loader._processors", lambda: 2)
    yield
    assert not multiprocessing.active_children()


def _slices(*shapes: tuple[int, int]) -> list[NDArray[np.int16]]:
    rng = np.random.default_rng(0)
    return [rng.normal(0, 700, shape).clip(-3024, 3071).astype(np.int16) for shape in shapes]


def _made(
    crops: CropSettings, views: TeacherViews | None, *slices: NDArray[np.int16]
) -> tuple[list[CropDraws], list[Crops], Crops]:
    """The draws of slices, their crops one by one, and as a batch."""
    draws = [draw_crops(crops, *hu.shape, seed=5, sample=i) for i, hu in enumerate(slices)]
    one_by_one = [crop_slice(hu, d, crops, crops.shapes[0], WINDOW, views) for hu, d in zip(slices, draws, strict=True)]
    padded = torch.full((len(slices), max(s.shape[0] for s in slices), max(s.shape[1] for s in slices)), 32767).short()
    for out, hu in zip(padded, slices, strict=True):
        out[: hu.shape[0], : hu.shape[1]] = torch.from_numpy(hu)
    return draws, one_by_one, crop_batch(padded, CropDraws.stack(draws), crops, crops.shapes[0], WINDOW, views)


def stream(data: DataSettings, start: int = 0, world: World = ALONE, channels: int = 1) -> Batches:
    made = Phantoms(30)
    return batches(data, world=world, patch_size=16, in_channels=channels, start=start, corpus=made, views=VIEWS)


def take(data: DataSettings, n: int, start: int = 0, world: World = ALONE, channels: int = 1) -> list[Batch]:
    made = stream(data, start, world, channels)
    try:
        return [next(made) for _ in range(n)]
    finally:
        made.close()


def same(first: Batch, second: Batch) -> bool:
    a, b = first.tensors(), second.tensors()
    return (first.keys, first.masked) == (second.keys, second.masked) and all(a[k].equal(b[k]) for k in a | b)


def shared(views: tuple[Any, ...]) -> bool:
    """Exactly the teachers that see alike have one tensor."""
    return {(i, j) for j in range(len(views)) for i in range(j) if views[i] is views[j]} == set(SAME)


def check_layout(batch: Batch, n_global: int) -> None:
    rows = n_global * batch.images
    sizes = [(1, 64), (1, 56), (3, 80), (1, 56), (1, 32), (1, 64)]
    assert [tuple(view.shape) for view in batch.views] == [(rows, c, s, s) for c, s in sizes]
    assert {view.dtype for view in batch.views} == {torch.float32}
    assert shared(batch.views)
    assert [None if k is None else tuple(k.shape) for k in batch.kept] == [
        None if teacher.mask == 0 else (rows, teacher.kept) for teacher in VIEWS.of
    ]
    assert {k.dtype for k in batch.kept if k is not None} == {torch.int64}
    assert batch.masks.shape == (rows, 16)
    assert batch.masked == (12,) * rows == tuple(batch.masks.sum(1).tolist())
    assert batch.mask_indices.equal(batch.masks.flatten().nonzero().flatten())
    assert batch.mask_weights.equal(torch.full((12 * rows,), 1 / 12))


def data_of(**changes: object) -> DataSettings:
    return settings(crops=PLAIN, **changes)


@pytest.mark.parametrize("n_global", [1, 2])
def test_a_view_is_torchs_resize_of_the_box_in_the_teachers_window(n_global: int) -> None:
    crops = PLAIN.model_copy(update={"n_global": n_global})
    slices = _slices((90, 120), (64, 50), (40, 100))
    draws, one_by_one, _ = _made(crops, VIEWS, *slices)
    assert 0 < sum(int(d.flips.sum()) for d in draws) < 3 * n_global
    for hu, drawn, made in zip(slices, draws, one_by_one, strict=True):
        for teacher, view in zip(VIEWS.of, made.views, strict=True):
            assert view.shape == (n_global, teacher.window.channels, teacher.size, teacher.size)
            for k, ((top, left, height, width), flip) in enumerate(
                zip(drawn.boxes.tolist(), drawn.flips.tolist(), strict=True)
            ):
                for channel, part in enumerate(teacher.window.parts):
                    ends, raw = (part.low, part.high), torch.from_numpy(hu).double()
                    image = (raw.clamp(*ends) - part.mean) / part.std
                    box = image[None, None, top : top + height, left : left + width]
                    side = (teacher.size, teacher.size)
                    expected = F.interpolate(box, size=side, mode="bicubic", antialias=True)[0, 0]
                    got = view[k, channel]
                    assert (got - (expected.flip(-1) if flip else expected)).abs().max() < 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_global": 1},
        {"distortions": Distortions(blur=(1, 1, 1), noise=1, contrast=1, brightness=1)},
        {"random_window": RandomWindow()},
        {"gram_size": 96},
    ],
    ids=["plain", "one", "distorted", "windows", "gram"],
)
def test_both_ways_to_crop_agree_and_leave_the_views_alone(
    changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever happens to the student's crops, a view is what it is without that; only a plain student shares it."""
    monkeypatch.setattr("pretrain.data.crops.CHUNK_BYTES", 2**17)  # a chunk is less than the batch
    crops = PLAIN.model_copy(update=changes)
    slices = _slices((90, 120), (64, 50), (40, 100))
    _, one_by_one, batch = _made(crops, VIEWS, *slices)
    _, plain, _ = _made(PLAIN.model_copy(update={"n_global": crops.n_global}), VIEWS, *slices)
    _, alone, without = _made(crops, None, *slices)
    for number, view in enumerate(batch.views):
        expected = torch.stack([made.views[number] for made in one_by_one], 1).flatten(0, 1)
        assert (view - expected).abs().max() < 1e-4
        for number_, made in enumerate(one_by_one):
            assert made.views[number].equal(plain[number_].views[number])
    for made in (batch, *one_by_one):
        assert shared(made.views)
        assert (made.views[0] is made.globals_) == (changes.keys() <= {"n_global"})
    assert batch.globals_.equal(without.globals_)
    assert all(a.globals_.equal(b.globals_) for a, b in zip(one_by_one, alone, strict=True))
    assert without.views == alone[0].views == ()


@pytest.mark.parametrize("place", ["workers", "device"])
@pytest.mark.parametrize("n_global", [1, 2])
def test_a_batch_has_the_agreed_layout(place: str, n_global: int) -> None:
    crops = PLAIN.model_copy(update={"n_global": n_global})
    data = settings(crops=crops, crop_on=place)
    batch = take(data, 1)[0]
    check_layout(batch, n_global)
    assert batch.views[0] is batch.global_crops
    assert {f"views.{i}" for i in range(6)} | {f"kept.{i}" for i in (0, 1, 2, 4, 5)} <= batch.tensors().keys()
    three = take(data, 1, channels=3)[0]
    check_layout(three, n_global)
    assert three.global_crops.shape[1] == 3
    assert three.views[0].equal(batch.global_crops)
    for rows in (batch.to("cpu"), batch.each(Tensor.clone), pickle.loads(pickle.dumps(batch))):
        assert same(rows, batch)
        check_layout(rows, n_global)
        assert rows.views[0] is rows.global_crops
    without = batches(data, world=World(), patch_size=16, in_channels=1, start=0, corpus=Phantoms(30))
    assert next(without).global_crops.equal(batch.global_crops)
    moved = batch.to("meta")
    assert {t.device.type for t in moved.tensors().values()} == {"meta"}
    assert shared(moved.views)


@pytest.mark.parametrize("place", ["workers", "device"])
def test_workers_change_nothing_and_send_what_is_shared_once(place: str) -> None:
    expected = take(data_of(crop_on=place), 4)
    got = take(data_of(crop_on=place, workers=2, start_method="fork"), 4)
    assert all(same(a, b) for a, b in zip(got, expected, strict=True))
    for batch in got:
        check_layout(batch, 2)
        assert batch.views[0] is batch.global_crops


def test_both_places_make_the_same_batch() -> None:
    workers, device = (take(data_of(crop_on=place), 2) for place in ("workers", "device"))
    for a, b in zip(workers, device, strict=True):
        assert a.tensors().keys() == b.tensors().keys()
        for name, tensor in a.tensors().items():
            assert torch.allclose(tensor.float(), b.tensors()[name].float(), rtol=0, atol=1e-4), name


def test_resume_at_any_step() -> None:
    whole = take(data_of(), 5)
    for start in (1, 4):
        assert all(same(a, b) for a, b in zip(take(data_of(), 5 - start, start), whole[start:], strict=True))
    assert not whole[0].masks.equal(whole[1].masks)


def test_two_ranks_make_the_batch_of_one_and_so_do_parts() -> None:
    """Whatever `masks.group` says: what is drawn for the regions is drawn for each sample."""
    data = data_of(batch_size=8)
    whole = take(data, 1, 3)[0]
    ranks = [take(data, 1, 3, World(rank, 2))[0] for rank in range(2)]
    for halves in (ranks, whole.parts(2)):
        assert whole.keys == tuple(key for half in halves for key in half.keys)
        for half in halves:
            check_layout(half, 2)
        for name, tensor in whole.tensors().items():
            if name not in ("mask_indices", "mask_weights", "local_crops"):
                rows = torch.cat([half.tensors()[name].unflatten(0, (2, 4)) for half in halves], 1)
                assert tensor.equal(rows.flatten(0, 1)), name
    assert all(part.views[0] is part.global_crops for part in whole.parts(4))


@pytest.mark.parametrize("wrong", [{"n_local": 1}, {"gram_size": 64}, {"mix": (CropShape(global_size=64),)}])
def test_views_go_with_global_crops_alone(wrong: dict[str, object]) -> None:
    with pytest.raises(AssertionError, match="views go with global crops alone"):
        stream(settings(crops=PLAIN.model_copy(update=wrong)))


@pytest.mark.parametrize("place", ["workers", "device"])
def test_one_global_crop_of_a_slice(place: str) -> None:
    """Global, local and Gram crops, block masks and their parts, without teachers."""
    crops = CropSettings(global_size=32, local_size=16, gram_size=48, n_global=1, n_local=3)
    crops = crops.model_copy(update={"distortions": Distortions(blur=(1, 0, 0), noise=0.5)})
    data = settings(crops=crops, crop_on=place, masks=MaskSettings(group=2))
    made = batches(data, world=World(), patch_size=16, in_channels=1, start=0, corpus=Phantoms(30))
    batch = next(made)
    assert batch.gram_crops is not None
    assert [len(c) for c in (batch.global_crops, batch.local_crops, batch.gram_crops, batch.masks)] == [4, 12, 4, 4]
    assert len(batch.masked) == 4
    assert batch.views == batch.kept == ()
    for number, part in enumerate(batch.parts(2)):
        rows = slice(2 * number, 2 * number + 2)
        assert part.global_crops.equal(batch.global_crops[rows])
        assert part.local_crops.equal(batch.local_crops.unflatten(0, (3, 4))[:, rows].flatten(0, 1))
        assert part.masks.equal(batch.masks[rows])
        assert part.masked == batch.masked[rows]
        assert part.mask_indices.equal(part.masks.flatten().nonzero().flatten())
        assert len(part.mask_weights) == sum(part.masked)


def test_what_is_drawn_for_one_global_crop() -> None:
    crops = CropSettings(n_global=1, global_scale=(0.9, 1), local_scale=(0.05, 0.1), n_local=4)
    crops = crops.model_copy(update={"distortions": Distortions(blur=(1, 0, 1))})
    drawn = draw_crops(crops, 200, 200, seed=0, sample=0)
    share = drawn.boxes[:, 2] * drawn.boxes[:, 3] / 200**2
    assert len(share) == 5
    assert share[0] > 0.85 and share[1:].max() < 0.12
    assert (drawn.amounts[:, 0] > 0).tolist() == [True] * 5  # no crop has the second global one's
    assert target_counts(MaskSettings(), (14, 14), 4, n_global=1) == target_counts(MaskSettings(), (14, 14), 2)
    masks = draw_masks(MaskSettings(), (14, 14), 6, seed=0, step=0, rank=0, n_global=1)
    assert sorted(masks.counts) == target_counts(MaskSettings(), (14, 14), 6, n_global=1)
    assert masks.masks.shape == (6, 196)


def test_a_run_with_one_global_crop_is_watched_and_counted() -> None:
    crops = CropSettings(global_size=32, local_size=16, n_global=1, n_local=2)
    seen = reference(Corpora([Phantoms(30)]), settings(crops=crops), 16, 6, 0, print)
    assert seen.batch.global_crops.shape == (6, 1, 32, 32)
    assert seen.batch.masks.shape == (6, 4)
    panels = (1 + 1 + 2, 2)  # a line: the slice, one global crop, two local ones
    height, width, _ = crops_picture(seen, 2, WINDOW).shape
    assert width / height == pytest.approx(panels[0] / panels[1], rel=0.02)
    given = load(Settings, None, ["folder=f", "steps=2", "data.corpus=made-up", "data.batch_size=2", "model.size=s"])
    data = given.data.model_copy(update={"crops": crops})
    assert "one slice (1 x 32 + 2 x 16)" in layer_table(given.model_copy(update={"data": data}))


@pytest.mark.parametrize("wrong", ["0", "3"])
def test_other_numbers_of_global_crops_are_refused(wrong: str) -> None:
    assert load(CropSettings, None, ["n_global=1"]).n_global == 1
    with pytest.raises(SettingsError, match="n_global"):
        load(CropSettings, None, [f"n_global={wrong}"])
