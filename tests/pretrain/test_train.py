"""`axial pretrain` as a whole, on slices made on the spot: the loss falls, a killed run goes on bit for bit."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from launch.run import Stopped
from launch.settings import load
from pretrain import flops, train
from pretrain.checkpoint_files import newest, read_tensors
from pretrain.export import Settings as ExportSettings
from pretrain.export import main as export
from pretrain.meter import LoopError
from pretrain.models.vit import VitSettings
from pretrain.settings import Settings
from tests.pretrain.teacher_files import write_export

REPOSITORY = Path(__file__).resolve().parents[2]
HEAD = "{prototypes: 64, hidden: 64, bottleneck: 32}"
COMMON = (
    "precision=fp32", "device=cpu", "data.corpus=made-up", "data.batch_size=4", "data.workers=0",
    "log.tensorboard=false", "optim.lr={peak: 2e-3, warmup: 0.1}", "optim.lr_rule=none",
    "model={size: custom, width: 32, depth: 2, heads: 2, in_channels: 1, drop_path: 0.3, rope: {rescale: 2}}",
)  # fmt: skip
TINY = (
    *COMMON, "data.crops={global_size: 64, local_size: 32, n_local: 2}", f"method.terms.dino.head={HEAD}",
    f"method.terms.ibot.head={HEAD}",
)  # fmt: skip
METHODS = ("self_distillation", "multi_teacher")


class Slices:
    """In the place of a corpus: smooth slices, the same each time, read as slowly as the test wants."""

    folder = Path("made-up")
    delay = 0.0

    def __init__(self, *_: Any, **__: Any) -> None:
        draw = np.random.default_rng(0)
        self.slices = [
            (draw.normal(0, 1, (80, 72)).cumsum(0).cumsum(1) * 4).clip(-1000, 1000).astype(np.int16) for _ in range(24)
        ]

    def __len__(self) -> int:
        return len(self.slices)

    def hu(self, i: int) -> NDArray[np.int16]:
        time.sleep(self.delay)
        return self.slices[i]

    def key(self, i: int) -> str:
        return f"slice{i}"


def made_up_teachers(folder: Path) -> tuple[str, ...]:
    """In the place of TINY: a student of two teachers, the same each time, written where other processes find them."""
    model = VitSettings(size="custom", width=32, depth=1, heads=2, in_channels=1, layerscale=None)
    sizes = {"one.safetensors": model, "two.safetensors": model.model_copy(update={"width": 48, "patch_size": 8})}
    for seed, (name, size) in enumerate(sizes.items()):
        if not (folder / name).exists():
            write_export(folder / name, size, seed)
    named = (f"method.teachers.t{n}={{kind: axial, weights: {folder / name}}}" for n, name in enumerate(sizes))
    crops = "data.crops={global_size: 64, n_global: 1, n_local: 0}"
    return (*COMMON, crops, "method.kind=multi_teacher", *named, "method.adapter={slices: 40, tokens: 8}")


def settings(folder: Path, *more: str, method: str = "self_distillation") -> Settings:
    tiny = TINY if method == "self_distillation" else made_up_teachers(folder.parent / "teachers")
    return load(Settings, None, [f"folder={folder}", "steps=6", *tiny, *more])


@pytest.fixture
def slices(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch.setattr)


def stand_in(put: Any) -> None:
    put(train, "Corpus", Slices)
    put(train, "read_index", lambda *_: None)
    put(train, "fingerprint", lambda _: "made-up")


def run(folder: Path, *more: str, method: str = "self_distillation") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    train.main(settings(folder, *more, method=method))


def everything(folder: Path) -> dict[str, torch.Tensor]:
    found = newest(folder)
    assert found is not None
    return read_tensors(found, "")


def losses(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"^step \d+/\d+  loss ([\d.]+)", text, re.MULTILINE)]


@pytest.mark.usefixtures("slices")
def test_the_loss_falls_and_the_summary_says_what_will_happen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "run", "steps=60", "log.every=15", "checkpoint.every=30")
    said = capsys.readouterr().out
    first, *_, last = losses(said)
    assert last < first - 0.2
    assert "backbone.blocks" in said
    assert "learning rate at its peak: 0.002 = as given" in said
    assert "frozen: teacher" in said
    assert "60 steps, 240 slices seen" in said
    assert re.search(r"slices/s +wait \d+%  \d+\.\d GiB", said)
    assert "mfu" not in said, "a processor has no peak that we know"


@pytest.mark.usefixtures("slices")
def test_a_student_of_two_teachers_gets_nearer_to_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "run", "steps=40", "log.every=10", method="multi_teacher")
    said = capsys.readouterr().out
    first, *_, last = losses(said)
    assert last < 0.9 * first
    assert "frozen: teachers" in said
    assert "teacher t1: axial: two.safetensors" in said
    assert "adapters: gcca, fitted on 40 slices" in said
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last_row = next(row for row in reversed(rows) if "gate/entropy" in row)
    assert last_row["gate/weight/t0"] + last_row["gate/weight/t1"] == pytest.approx(1, abs=1e-4)
    assert {"gate/cosine/t0-t1", "gate/target_std", "term/token", "term/spatial", "term/cls"} <= last_row.keys()
    export(ExportSettings(folder=tmp_path / "run"))
    assert "student of checkpoint of step 40" in capsys.readouterr().out


@pytest.mark.usefixtures("slices")
def test_models_of_transformers_teach_a_student_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the count of FLOPs on: a plain one and a pyramid, which cannot leave patches out, and see all of them."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    common = {"image_size": 64, "patch_size": 4}
    plain = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96, image_size=64
    )
    pyramid = transformers.SwinConfig(embed_dim=24, depths=[1, 1], num_heads=[2, 4], window_size=2, **common)
    transformers.ViTModel(plain).save_pretrained(tmp_path / "plain")
    transformers.SwinModel(pyramid).save_pretrained(tmp_path / "pyramid")
    words = [
        f"method.teachers.t{n}={{kind: hugging_face, weights: {tmp_path / name}}}"
        for n, name in enumerate(("plain", "pyramid"))
    ]
    run(tmp_path / "run", "steps=3", "log.every=1", *words, method="multi_teacher")
    said = capsys.readouterr().out
    assert "(vit, width 48, patches of 16)" in said
    assert "(swin, width 48, patches of 8)" in said
    assert len(losses(said)) == 3
    with pytest.raises(ValueError, match=r"method\.teachers\.t0\.mask: this network cannot leave out 0\.5"):
        run(tmp_path / "masked", *words, "method.teachers.t0.mask=0.5", method="multi_teacher")


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("method", METHODS)
def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str) -> None:
    run(tmp_path / "run", "steps=2", method=method)
    capsys.readouterr()
    run(tmp_path / "run", "steps=2", method=method)
    assert "continuing from step_00000002" in (said := capsys.readouterr().out)
    assert not losses(said)


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2"])  # SLURM's end of time, and the warning after which it requeues
def test_a_signal_is_said_to_be_no_failure_and_the_run_goes_on_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, name: str
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(whole, method=method)
    armed = False

    def ordered(self: Slices, i: int) -> str:
        if armed:
            os.kill(os.getpid(), getattr(signal, name))
        return f"slice{i}"

    monkeypatch.setattr(Slices, "key", ordered)
    begin = train.train

    def arm(*given: Any, **more: Any) -> Any:  # not before: what comes before the first step saves nothing
        nonlocal armed
        armed = True
        return begin(*given, **more)

    monkeypatch.setattr(train, "train", arm)
    with pytest.raises(Stopped, match=rf"stopped by {name} after step 1 of 6, saved; the same command continues"):
        run(stopped, method=method)
    assert newest(stopped) == stopped / "checkpoints" / "step_00000001"
    monkeypatch.undo()
    stand_in(monkeypatch.setattr)
    run(stopped, method=method)
    a, b = everything(whole), everything(stopped)
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


def killed_at_half(folder: Path, method: str) -> int:
    """Start a run in another process and kill it, with no chance to react, once its third step is saved."""
    command = [sys.executable, "-P", __file__, str(folder), method]
    ours = os.environ | {"PYTHONPATH": str(REPOSITORY)}  # not the code that happens to be installed
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=ours, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if "checkpoint step_00000003 written" in line:
                os.kill(child.pid, signal.SIGKILL)
                break
    return child.returncode


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("method", METHODS)
def test_six_steps_are_three_a_kill_and_three_bit_for_bit(tmp_path: Path, method: str) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run(whole, "checkpoint.every=3", method=method)
    assert killed_at_half(halves, method) == -signal.SIGKILL
    half = newest(halves)
    assert half is not None
    assert half.name == "step_00000003", "the run ended before it was killed"
    run(halves, "checkpoint.every=3", method=method)
    a, b = everything(whole), everything(halves)
    assert a.keys() == b.keys()
    assert any(name.startswith("optimizer.") for name in a)
    assert not [name for name in a if not torch.equal(a[name], b[name])]
    for folder in (whole, halves):
        export(ExportSettings(folder=folder))
    assert (whole / "export.safetensors").read_bytes() == (halves / "export.safetensors").read_bytes()


@pytest.mark.usefixtures("slices")
def test_a_run_goes_on_from_another_with_a_gram_term_by_settings_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    run(first, "steps=4", "checkpoint.every=2")
    gram = ("method.terms.gram.weight=2", "data.crops.gram_size=96", f"method.gram_teacher={{path: {first}, step: 2}}")
    run(second, "steps=2", f"init_from={first}", *gram)
    said = capsys.readouterr().out
    assert "gram " in said
    assert "checkpoint of step 4" in said
    assert "checkpoint of step 2" in said
    mix = "data.crops.mix=[{global_size: 64, local_size: 32, gram_size: 96, probability: 0.5}, {global_size: 96, local_size: 48, gram_size: 128, probability: 0.5}]"  # fmt: skip  # noqa: E501
    run(
        third,
        "steps=4",
        f"init_from={second}",
        "method.terms.gram.weight=1.5",
        f"method.gram_teacher.path={second}",
        mix,
    )
    start, end = everything(second), everything(third)
    assert all(torch.isfinite(tensor).all() for tensor in end.values() if tensor.is_floating_point())
    name = "method.gram_teacher.backbone.norm.weight"
    assert torch.equal(end[name], start["method.teacher.backbone.norm.weight"])


@pytest.mark.usefixtures("slices")
def test_a_source_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist; give a run folder"):
        run(tmp_path, f"init_from={tmp_path / 'nowhere'}")


@pytest.mark.usefixtures("slices")
def test_a_dry_run_reads_the_corpus_and_refuses_what_no_number_of_ranks_can_do(tmp_path: Path) -> None:
    assert "the corpus: made-up has 24 slices, each seen 1.00 times on average" in train.dry_run(settings(tmp_path))
    with pytest.raises(LoopError, match="accumulate: 3 parts cannot be made of the 4 slices"):
        train.dry_run(settings(tmp_path, "accumulate=3"))
    with pytest.raises(ValueError, match=r"data\.masks\.group: 3 does not divide"):
        train.dry_run(settings(tmp_path, "data.masks.group=3"))


def test_flops_are_those_of_the_blocks(tmp_path: Path) -> None:
    """By hand, for dino alone on two global crops: teacher once, student forward and backward, heads likewise."""
    one = settings(
        tmp_path, "model.drop_path=0", "data.crops.n_local=0", "method.terms.koleo=null", "method.terms.ibot=null"
    )
    tokens, width, crops = 16 + 5, 32, 2 * 4
    block = 2 * tokens * width * width * (3 + 1 + 4 + 4) + 4 * tokens * tokens * width
    embedding = 2 * 16 * 256 * width
    head = 2 * (width * 64 + 64 * 64 + 64 * 32 + 32 * 64)
    forward = crops * (2 * block + embedding + head)
    # The backward pass costs twice the forward one, but for the pixels, which need no gradient.
    assert flops.flops_per_step(one) == pytest.approx(4 * forward - crops * embedding, rel=1e-3)


def test_no_file_of_the_trainer_knows_of_phases() -> None:
    word = "".join(("st", "age"))
    assert not [path for path in (REPOSITORY / "pretrain").rglob("*.py") if word in path.read_text().lower()]


if __name__ == "__main__":
    stand_in(setattr)
    Slices.delay = 0.05
    run(Path(sys.argv[1]), "checkpoint.every=3", method=sys.argv[2])


def test_an_export_names_the_corpus_it_was_trained_on(tmp_path: Path) -> None:
    from data_curation import curate, phantom
    from data_curation.corpus import Corpus
    from launch.crew import Workers

    phantom.write("folder", tmp_path / "scans", [0], (4, 48, 48), (20.0, 8.0, 8.0))
    given = {"folder": tmp_path / "corpus", "datasets": [{"name": "folder", "root": tmp_path / "scans"}]}
    curate.main(curate.Settings.model_validate(given), Workers(0))
    known = json.loads((tmp_path / "corpus" / "corpus.json").read_text())
    about = train._about(settings(tmp_path / "run"), [Corpus(tmp_path / "corpus", None)])
    assert about["corpus"] == known["fingerprint"]


def test_parts_that_cannot_be_made_are_refused(tmp_path: Path, slices: None) -> None:
    with pytest.raises(LoopError, match=r"accumulate: 3 parts cannot be made of the 4 slices of a rank"):
        run(tmp_path, "accumulate=3")
