"""A watched run: what it writes, that it stays the same run, that it goes on, and that two ranks see what one sees."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from data_curation import phantom
from launch.distributed import World, world
from launch.log import Log
from launch.run import Stopped
from launch.settings import load
from pretrain import train
from pretrain.checkpoint_files import newest, read_tensors
from pretrain.data.corpora import Corpora
from pretrain.data.stream import DataSettings
from pretrain.loop import Guard
from pretrain.methods.self_distillation import GramTeacher, build
from pretrain.methods.self_distillation import Settings as MethodSettings
from pretrain.models.vit import VitSettings
from pretrain.models.vit import build as build_vit
from pretrain.parallel import ParallelSettings, compile_blocks, fill, initialised, make_mesh, place, shard
from pretrain.settings import Settings
from pretrain.watch.pairs import ProbeError
from pretrain.watch.reference import reference
from pretrain.watch.settings import WatchSettings
from pretrain.watch.watch import Watch, looking, prepare
from tests.gloo import run_ranks
from tests.pretrain.test_train import TINY, Slices, stand_in

HEAD = {"prototypes": 24, "hidden": 32, "bottleneck": 16}
VIT = VitSettings(size="custom", width=32, depth=2, heads=2, in_channels=1, drop_path=0.5, layerscale=0.5)
CROPS = {"global_size": 64, "local_size": 32, "n_local": 2}
DATA = DataSettings.model_validate({"corpus": "made-up", "batch_size": 4, "crops": CROPS})
WATCH = "watch={every: 2, images_every: 4, slices: 6, pictures: 2}"


@pytest.fixture(autouse=True)
def _slices(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch.setattr)


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scans")
    phantom.write("nnunet", root, range(4), (10, 64, 64), organs=["liver"])
    return root


def run(folder: Path, *more: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    train.main(load(Settings, None, [f"folder={folder}", "steps=4", *TINY, *more]))


def seen(folder: Path) -> dict[int, dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = {
        row["step"]: {k: v for k, v in row.items() if k[:6] in ("watch/", "probe/")}
        for row in rows
        if "loss" not in row
    }
    assert all(isinstance(value, float) for row in kept.values() for value in row.values())
    return kept


def test_a_run_is_looked_at_in_numbers_and_pictures(
    tmp_path: Path, scans: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    probe = f"watch.probe={{every: 3, images: {scans}/imagesTr, labels: {scans}/labelsTr, size: 64, slices: 2}}"
    run(tmp_path, WATCH, probe, "log.tensorboard=true")
    rows = seen(tmp_path)
    assert list(rows) == [0, 2, 3, 4]  # the start and the end in any case
    assert {"watch/patch/cosine", "watch/cls/rank", "watch/dino/kl", "watch/ibot/plain_used"} < rows[2].keys()
    assert {name.split("/")[0] for name in rows[3]} == {"probe"}
    assert {"probe/knn/recall", "watch/patch/rank"} < rows[4].keys()
    assert rows[0]["watch/drift/first"] == 0 < rows[2]["watch/drift/first"] < rows[4]["watch/drift/first"]
    assert rows[0]["watch/dino/uniform"] == pytest.approx(np.log(64))
    assert 0 < rows[4]["watch/dino/entropy"] <= rows[4]["watch/dino/uniform"] + 1e-5
    said = capsys.readouterr().out
    assert "watch: probe of 2 classes on" in said
    assert "watch 4/4  patch cosine" in said
    names = {path.name for path in (tmp_path / "watch").glob("*.png")}
    assert names == {
        "crops_00000000.png",
        *(f"patches_{w}_0000000{n}.png" for w in ("pca", "likeness") for n in (0, 4)),
    }
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("probe/linear/dice")] == [0, 3, 4]
    shown = events.Images("watch/patches_pca")
    assert [event.step for event in shown] == [0, 4]
    assert shown[1].encoded_image_string == (tmp_path / "watch/patches_pca_00000004.png").read_bytes()
    import imagecodecs

    for event in (*shown, *events.Images("watch/crops")):
        picture = imagecodecs.png_decode(event.encoded_image_string)
        assert picture.shape == (event.height, event.width, 3)
        assert picture.std() > 10


def test_a_watched_run_is_the_unwatched_one(tmp_path: Path) -> None:
    run(tmp_path / "seen", WATCH)
    run(tmp_path / "unseen", "watch={every: 0, images_every: 0}")
    assert not (tmp_path / "unseen/watch").exists()
    folders = [newest(tmp_path / name) for name in ("seen", "unseen")]
    one, other = (read_tensors(folder, "") for folder in folders if folder is not None)
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def test_a_disk_that_takes_no_picture_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "watch").write_text("a file, so that nothing can be written below it")
    run(tmp_path, WATCH)
    said = capsys.readouterr().out
    for lost in ("first.safetensors", "pictures of step 0", "pictures of step 4"):
        assert said.count(f"watch: {lost} cannot be written: ") == 1
    assert "watch/drift/first" in seen(tmp_path)[4]  # from memory


def test_a_run_that_goes_on_is_compared_with_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, WATCH)
    with monkeypatch.context() as patch:
        patch.setattr(Slices, "key", lambda self, i: os.kill(os.getpid(), signal.SIGTERM) or f"slice{i}")
        with pytest.raises(Stopped):
            run(parts, WATCH)
    kept = (parts / "watch/first.safetensors").read_bytes()
    run(parts, WATCH)
    assert (parts / "watch/first.safetensors").read_bytes() == kept == (whole / "watch/first.safetensors").read_bytes()
    assert seen(parts) == seen(whole)
    assert (parts / "watch/patches_pca_00000004.png").read_bytes() == (
        whole / "watch/patches_pca_00000004.png"
    ).read_bytes()
    run(parts, WATCH)  # nothing left to do, nothing to look at
    assert seen(parts) == seen(whole)
    # A reference that is lost or of other slices is taken anew, where the run stands.
    (parts / "watch/first.safetensors").write_bytes(kept[:-100])
    run(parts, WATCH)
    assert seen(parts)[4]["watch/drift/first"] == 0


def test_a_probe_that_cannot_be_read_ends_the_run_before_its_first_step(tmp_path: Path, scans: Path) -> None:
    pair = {"image": f"{scans}/imagesTr/phantom_0000_0000.nii.gz", "label": "cut.nii.gz"}
    (tmp_path / "cut.nii.gz").write_bytes((scans / "labelsTr/phantom_0000.nii.gz").read_bytes()[:-30])
    (tmp_path / "list.json").write_text(json.dumps([pair]))
    with pytest.raises(ProbeError, match=r"watch\.probe: .*cut\.nii\.gz cannot be used .*leave the pair out"):
        run(tmp_path / "run", f"watch.probe.pairs={tmp_path}/list.json")
    assert not list((tmp_path / "run").iterdir())
    with pytest.raises(ProbeError, match="is not a folder"):
        train.dry_run(load(Settings, None, ["folder=r", "steps=4", *TINY, "watch.probe={images: no, labels: no}"]))
    with pytest.raises(ValueError, match="two folders images and labels, or the list pairs"):
        load(Settings, None, ["folder=r", "steps=4", *TINY, "watch.probe={images: no}"])


def test_the_same_slices_are_chosen_again_and_dull_ones_last() -> None:
    class Mixed(Slices):
        def hu(self, i: int) -> Any:
            return np.full((80, 72), -1000, np.int16) if i % 3 else super().hu(i)

    one, other = (reference(Corpora([Mixed()]), DATA, 16, 8, 0, print) for _ in range(2))
    assert one.keys == other.keys
    assert torch.equal(one.batch.global_crops, other.batch.global_crops)
    assert torch.equal(one.batch.masks, other.batch.masks)
    assert one.whole.shape == (8, 1, 64, 64)
    assert one.batch.global_crops.shape == (16, 1, 64, 64)
    dull = (one.whole.flatten(1).std(1) == 0).sum()
    assert dull == 0
    assert len(set(one.keys)) == 8
    assert reference(Corpora([Mixed()]), DATA, 16, 8, 1, print).keys != one.keys
    assert len(reference(Corpora([Slices()]), DATA, 16, 99, 0, print).keys) == 24


class Scaled(nn.Module):
    """Something that the compiler does not take for a part of torch, as it does nn.Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def test_networks_are_left_as_they_were_found_and_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def compiler(graph: Any, given: Any) -> Any:
        calls.append(graph)
        return graph

    torch._dynamo.reset()
    block = Scaled()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiler))
    compile_blocks(block)
    network = nn.ModuleDict({"block": block, "rest": nn.Dropout()})
    network["rest"].eval()
    with looking(network):
        assert not network.training
        assert not network["block"](torch.ones(1, 2)).requires_grad
    assert not calls
    network["block"](torch.ones(1, 2))
    assert len(calls) == 1
    assert [network.training, block.training, network["rest"].training] == [True, True, False]


def watched(rank: int, size: int, folder: Path, scans: Path) -> dict[int, dict[str, float]]:
    """Two looks at networks of fixed weights, with a Gram teacher; the teacher is moved in between."""

    def looks(here: World) -> dict[int, dict[str, float]]:
        probe = {"images": scans / "imagesTr", "labels": scans / "labelsTr", "size": 64, "slices": 2, "every": 2}
        settings = WatchSettings.model_validate({"every": 1, "slices": 6, "pictures": 2, "probe": probe})
        prepared = prepare(settings, DATA, 16, Corpora([Slices()]), here, lambda text: None)
        assert prepared is not None
        assert (prepared.labelled is None) == (rank > 0)
        terms = {"dino": {"head": HEAD}, "ibot": {"head": HEAD}, "gram": {}}
        given = MethodSettings.model_validate({"terms": terms, "gram_teacher": GramTeacher(path=Path("none"))})
        with torch.device("meta"):
            method = build(given, model=VIT, steps=10, guard=Guard(here.device))
        parallel = ParallelSettings.model_validate({"sharding": "full"})
        mesh = make_mesh(here, parallel)
        fresh = method.initial.__func__(_without_gram(given), 0, None)  # type: ignore[attr-defined]
        for name, network in method.networks.items():
            shard(network, here, parallel, frozen=name != "student", mesh=mesh)
            place(network, here.device)
            for part, module in network.items():
                fill(module, fresh["teacher"][part])
        method.placed()
        log = Log(folder, 1, False, here.rank == 0)
        watch = Watch(prepared, method, log, here, folder=folder, in_channels=1, steps=2)
        watch.begin(0)
        with torch.no_grad():
            for parameter in method.teacher.parameters():
                parameter.mul_(1.5)
        assert not watch(2)
        assert method.student.training
        log.close()
        return seen(folder) if here.rank == 0 else {}

    if size == 1:
        return looks(World(0, 1, 0, torch.device("cpu")))
    with world("cpu") as here:
        return looks(here)


def _without_gram(given: MethodSettings) -> Any:
    terms = {name: term for name, term in given.terms.items() if name != "gram"}
    plain = MethodSettings.model_validate({"terms": terms})
    with torch.device("meta"):
        return build(plain, model=VIT, steps=10, guard=Guard(torch.device("cpu")))


def test_two_ranks_see_what_one_sees(tmp_path: Path, scans: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    alone = watched(0, 1, one, scans)
    pair = run_ranks(f"{__file__}:watched", 2, tmp_path, folder=two, scans=scans)
    assert pair[1] == {}
    assert pair[0].keys() == alone.keys() == {0, 2}
    for step, row in alone.items():
        assert row.keys() == pair[0][step].keys()
        assert {"probe/knn/recall", "watch/drift/gram_teacher", "watch/dino/kl"} < row.keys()
        for name, value in row.items():
            assert pair[0][step][name] == pytest.approx(value, rel=1e-4, abs=1e-6), (step, name)
    assert alone[0]["watch/drift/gram_teacher"] == 0 < alone[2]["watch/drift/gram_teacher"]
    assert alone[2]["watch/drift/gram_teacher"] == pytest.approx(alone[2]["watch/drift/first"])


def given_back(rank: int, size: int) -> bool:
    """Whether a network that is trained on two ranks has its shards again after it was looked at."""
    with world("cpu") as here:
        with torch.device("meta"):
            network = nn.ModuleDict({"backbone": build_vit(VIT)})
            fresh = build_vit(VIT)
        shard(network, here, ParallelSettings(sharding="replicate"))
        place(network, here.device)
        fill(network["backbone"], initialised(fresh, 0))
        with looking(network):
            network["backbone"](torch.ones(1, 1, 32, 32))
        return all(isinstance(parameter, DTensor) for parameter in network.parameters())


def test_a_sharded_network_has_its_shards_again(tmp_path: Path) -> None:
    assert run_ranks(f"{__file__}:given_back", 2, tmp_path) == [True, True]


def refused(rank: int, size: int, folder: Path) -> str:
    """What each rank is told of a probe that rank 0 cannot use."""
    settings = WatchSettings.model_validate({"probe": {"images": folder, "labels": folder}})
    with world("cpu") as here:
        try:
            prepare(settings, DATA, 16, Corpora([Slices()]), here, lambda text: None)
        except ProbeError as error:
            return str(error)
    return ""


def test_all_ranks_are_told_of_a_probe_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    said = run_ranks(f"{__file__}:refused", 2, tmp_path, folder=tmp_path / "empty")
    assert said[0] == said[1]
    assert "watch.probe: no label map in" in said[0]
