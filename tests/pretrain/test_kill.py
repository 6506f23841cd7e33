"""Kill -9 at any moment of a save: the same command goes on, and ends with the same numbers. With a Gram term."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from launch.settings import load
from pretrain import train
from pretrain.checkpoint_files import newest, read_tensors
from pretrain.settings import Settings
from tests.gloo import RankFailed, run_ranks
from tests.pretrain.test_train import METHODS, REPOSITORY, TINY, made_up_teachers, stand_in

STEPS = 8
CALLS = ("mkdir", "write", "fsync", "rename", "unlink", "rmdir")
MODEL = "model={size: custom, width: 32, depth: 2, heads: 2, in_channels: 1, drop_path: 0, rope: {rescale: null}}"
# Without draws and groups that hang on the rank, so that other numbers of ranks make the same steps.
SAME = (MODEL, "data.masks.group=2", "method.terms.koleo.group=4")


def given(first: Path, method: str) -> tuple[str, ...]:
    """A second run, as the recipe's: from the weights of a first with a Gram term; or one with teachers."""
    common = (f"steps={STEPS}", "log.every=1", "checkpoint={every: 2, keep: 2}", "parallel.sharding=full")
    if method == "multi_teacher":
        return (*made_up_teachers(first / "teachers"), MODEL, *common, "parallel.teachers=full")
    return (
        *TINY,
        *SAME, *common, f"init_from={first}", "method.terms.gram.weight=2", "data.crops.gram_size=96",
        f"method.gram_teacher={{path: {first}, step: 2}}",
    )  # fmt: skip


def run(folder: Path, *words: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    train.main(load(Settings, None, [f"folder={folder}", *words]))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch.setattr)
        run(folder, "steps=2", *TINY, *SAME)
    return folder


def state(folder: Path) -> dict[str, torch.Tensor]:
    found = newest(folder)
    assert found is not None
    return read_tensors(found, "")


def same(one: Path, other: Path) -> None:
    a, b = state(one), state(other)
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]
    names = [sorted(path.name for path in (folder / "checkpoints").iterdir()) for folder in (one, other)]
    assert names[0] == names[1] == [f"step_{STEPS - 2:08d}", f"step_{STEPS:08d}"]


# Each child of a fresh interpreter runs, and is killed at its n-th call of what changes the disk.
DRIVER = """
import os, signal, sys
from pathlib import Path
from pretrain import checkpoint_writer, train
from tests.pretrain.test_kill import fatal, given, run
from tests.pretrain.test_train import stand_in

stand_in(setattr)
folder, first, method, *points = sys.argv[1:]
for name, _, point in (text.partition(":") for text in points):
    child = os.fork()
    if not child:
        fatal(int(point), name)
        run(Path(folder), *given(Path(first), method))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert name or status == 0, status
"""


def fatal(point: int, only: str = "", each: int = 50) -> None:
    """Kill this process before its `point`-th change of the disk (0: never); of the writes each 50th counts.

    `only` is the name of the call to count where it is not all of them.
    """
    from pretrain import checkpoint_writer

    calls, writes = [0], [0]

    def count(name: str) -> None:
        calls[0] += only in ("", name)
        if calls[0] == point:
            os.write(1, f"\nbefore {name}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(place: object, name: str) -> None:
        honest = getattr(place, name)

        def call(*args: object, **more: object) -> object:
            writes[0] += name == "write"
            if name != "write" or writes[0] % each == 0:
                count(name)
            return honest(*args, **more)

        setattr(place, name, call)

    for name in CALLS:
        counted(checkpoint_writer._Stream if name == "write" else os, name)


def drive(folder: Path, first: Path, method: str, points: list[str]) -> list[list[str]]:
    command = [sys.executable, "-P", "-c", DRIVER, str(folder), str(first), method, *points, ":0"]
    ours = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=ours, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split() for line in done.stdout.splitlines() if line.startswith("before ")]


@pytest.mark.parametrize(
    "points",
    [
        ["mkdir:2", "write:3", "fsync:2", "rename:1", "fsync:4", "rename:2", "fsync:6", "rename:3", "unlink:2"],
        *(  # a run deletes two checkpoints
            pytest.param([f"{name}:{n}" for n in range(1, 3 if name == "rmdir" else 8)], marks=pytest.mark.slow)
            for name in CALLS
        ),
    ],
    ids=["some", *CALLS],
)
@pytest.mark.parametrize("method", METHODS)
def test_killed_at_a_change_of_the_disk(tmp_path: Path, first: Path, points: list[str], method: str) -> None:
    """One kill after the other in one folder: before, amid and after writes and renames, and among the deletions.

    Each start gets on a little, so that the last kills may find a run that is done.
    """
    drive(tmp_path / "whole", first, method, [])
    told = drive(tmp_path / "killed", first, method, points)
    assert len(told) >= 0.5 * len(points), f"the run ended before it was killed: {told}"
    assert {name for _, name in told} == {point.split(":")[0] for point in points}
    same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_at_any_time(tmp_path: Path, first: Path, method: str) -> None:
    drive(tmp_path / "whole", first, method, [])
    draw = random.Random(0)
    folder = tmp_path / "killed"
    code = (
        "import sys\nfrom pathlib import Path\nfrom tests.pretrain.test_kill import given, run\n"
        "from tests.pretrain.test_train import stand_in\nstand_in(setattr)\n"
        "print('begins', flush=True)\nrun(Path(sys.argv[1]), *given(Path(sys.argv[2]), sys.argv[3]))"
    )
    command = [sys.executable, "-P", "-c", code, str(folder), str(first), method]
    ours = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    for _ in range(20):
        with subprocess.Popen(command, cwd=REPOSITORY, env=ours, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(draw.uniform(0.2, 4.0))
            process.kill()
    subprocess.run(command, cwd=REPOSITORY, env=ours, check=True)
    same(tmp_path / "whole", folder)


def ranks(rank: int, size: int, folder: Path, first: Path, method: str, killed: int, point: int, only: str) -> None:
    """The run on `size` ranks, of which rank `killed` is killed before its `point`-th call of `only`."""
    if rank == killed:
        fatal(point, only)
    stand_in(setattr)
    run(folder, *given(first, method))


def losses(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]  # the others are looks at the features
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), "each step once"
    return [{name: value for name, value in row.items() if name.startswith(("loss", "term/"))} for row in rows]


def go_on(folder: Path, first: Path, method: str, size: int, killed: int = -1, point: int = 0, only: str = "") -> None:
    kill = {"killed": killed, "point": point, "only": only}
    run_ranks(f"{__file__}:ranks", size, folder.parent, folder=folder, first=first, method=method, **kill)


def newest_step(folder: Path) -> int:
    found = newest(folder)
    return int(found.name.removeprefix("step_")) if found is not None else 0


@pytest.fixture(scope="module", params=METHODS)
def two_whole(tmp_path_factory: pytest.TempPathFactory, first: Path, request: pytest.FixtureRequest) -> Path:
    """An undisturbed run on two ranks; its name is the method."""
    folder = tmp_path_factory.mktemp("two") / str(request.param)
    go_on(folder, first, folder.name, 2)
    return folder


def test_two_ranks_with_sharding_one_of_them_killed_go_on_bit_for_bit(
    tmp_path: Path, first: Path, two_whole: Path
) -> None:
    folder = tmp_path / "killed"
    with pytest.raises(RankFailed):
        go_on(folder, first, two_whole.name, 2, killed=1, point=2, only="fsync")  # its part of the second checkpoint
    assert newest_step(folder) == 2
    go_on(folder, first, two_whole.name, 2)
    same(two_whole, folder)


def test_two_ranks_then_one_then_two_make_the_same_losses(tmp_path: Path, first: Path, two_whole: Path) -> None:
    folder = tmp_path / "mixed"
    for size, last in ((2, 2), (1, 4)):
        with pytest.raises(RankFailed):
            # when the second checkpoint gets its name
            go_on(folder, first, two_whole.name, size, killed=0, point=4, only="rename")
        assert newest_step(folder) == last
    go_on(folder, first, two_whole.name, 2)
    for ours, theirs in zip(losses(folder), losses(two_whole), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
