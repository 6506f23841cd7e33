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
from pretrain.settings import Settings

REPOSITORY = Path(__file__).resolve().parents[2]
HEAD = "{prototypes: 64, hidden: 64, bottleneck: 32}"
TINY = (
    "precision=fp32", "device=cpu", "data.corpus=made-up", "data.batch_size=4", "data.workers=0",
    "log.tensorboard=false",
    "model={size: custom, width: 32, depth: 2, heads: 2, in_channels: 1, drop_path: 0.3, rope: {rescale: 2}}",
    "data.crops={global_size: 64, local_size: 32, n_local: 2}", f"method.terms.dino.head={HEAD}",
    f"method.terms.ibot.head={HEAD}", "optim.lr={peak: 2e-3, warmup: 0.1}", "optim.lr_rule=none",
)  # fmt: skip


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


def settings(folder: Path, *more: str) -> Settings:
    return load(Settings, None, [f"folder={folder}", "steps=6", *TINY, *more])


@pytest.fixture
def slices(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch.setattr)


def stand_in(put: Any) -> None:
    put(train, "Corpus", Slices)
    put(train, "read_index", lambda *_: None)
    put(train, "fingerprint", lambda _: "made-up")


def run(folder: Path, *more: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    train.main(settings(folder, *more))


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
def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "steps=2")
    capsys.readouterr()
    run(tmp_path, "steps=2")
    assert "continuing from step_00000002" in (said := capsys.readouterr().out)
    assert not losses(said)


@pytest.mark.usefixtures("slices")
def test_a_signal_is_said_to_be_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slices, "key", lambda self, i: os.kill(os.getpid(), signal.SIGTERM) or f"slice{i}")
    with pytest.raises(Stopped, match=r"stopped by SIGTERM after step 1 of 6, saved; the same command continues"):
        run(tmp_path)
    assert newest(tmp_path) == tmp_path / "checkpoints" / "step_00000001"


def killed_at_half(folder: Path) -> int:
    """Start a run in another process and kill it, with no chance to react, once its third step is saved."""
    command = [sys.executable, "-P", __file__, str(folder)]
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
def test_six_steps_are_three_a_kill_and_three_bit_for_bit(tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run(whole, "checkpoint.every=3")
    assert killed_at_half(halves) == -signal.SIGKILL
    half = newest(halves)
    assert half is not None
    assert half.name == "step_00000003", "the run ended before it was killed"
    run(halves, "checkpoint.every=3")
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
    run(Path(sys.argv[1]), "checkpoint.every=3")


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
