"""Several runs by one command on a real SLURM of two nodes: a chain, a sweep, parts; the same command mends them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from data_curation import phantom
from launch.cli import main
from launch.verbs import VERBS, Verb
from tests.downstream.random_models import saved
from tests.slurm.conftest import Cluster, tail


@pytest.fixture(autouse=True)
def _linked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(VERBS, "linked", Verb("linked", "linked_verb:main", "linked_verb:Settings", run=True))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.chdir(tmp_path)
    Path("slurm.yaml").write_text("kind: slurm\nhours: 0.2\narray: {parallel: 3, parts: 9}\n")


def states(*folders: str) -> list[str]:
    found = []
    for folder in folders:
        path = Path(folder, "outcome.json")
        found.append(json.loads(path.read_text())["state"] if path.exists() else "")
    return found


def starts(*folders: str) -> list[int]:
    files = [Path(folder, "starts") for folder in folders]
    return [len(path.read_text().splitlines()) if path.exists() else 0 for path in files]


def status(capsys: pytest.CaptureFixture[str], folder: str) -> dict[str, str]:
    """What `axial status` says of each run, the line with its state."""
    capsys.readouterr()
    assert main(["status", f"folder={folder}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line.split("  ")[0]: line for line in lines if line.startswith(folder)}


def done(cluster: Cluster, words: Sequence[str], *folders: str, seconds: float = 120) -> None:
    """Call, and wait until the queue is empty."""
    assert main(words) == 0
    logs = [Path(folder) for folder in folders]
    cluster.until(lambda: not cluster.queued(), seconds, f"the end of {words}\n" + "\n".join(map(tail, logs)))


def test_a_chain_whose_second_link_fails_is_mended_by_the_same_command(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abc":
        Path(f"{name}.yaml").write_text("steps: 1\n")
    links = ("r/a", "r/b", "r/c")
    words = ["linked", "a.yaml", "b.yaml", "c.yaml", "folder=r", "b.mode=mistake", "b.mend=mended"]
    words += ["--on", "slurm.yaml"]
    done(cluster, words, *links)
    assert states(*links[:2]) == ["done", "failed"], "\n".join(map(tail, map(Path, links)))
    assert starts(*links) == [1, 1, 0]
    said = status(capsys, "r")
    assert "  done  " in said["r/a"]
    assert "  failed  " in said["r/b"]
    assert "  stopped  " in said["r/c"]  # its job has left the queue without a start
    Path("mended").touch()
    done(cluster, words, *links)
    assert states(*links) == ["done"] * 3, "\n".join(map(tail, map(Path, links)))
    assert starts(*links) == [1, 2, 1]
    assert Path("r/c/starts").read_text() == "r/b 1\n"
    assert all("  done  " in line for line in status(capsys, "r").values())


def test_of_a_sweep_only_the_point_that_failed_is_done_again(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    points = [f"r/mode={mode},steps={steps}" for mode in ("fine", "mistake") for steps in (1, 2)]
    words = ["linked", "folder=r", "mend=mended", "--sweep", "mode=fine,mistake", "--sweep", "steps=1,2"]
    words += ["--on", "slurm.yaml"]
    done(cluster, words, "r")
    assert states(*points) == ["done", "done", "failed", "failed"], tail(Path("r"))
    said = status(capsys, "r")
    assert ["  done  " in said[point] for point in points] == [True, True, False, False]
    assert ["  failed  " in said[point] for point in points] == [False, False, True, True]
    Path("mended").touch()
    done(cluster, words, "r")
    assert states(*points) == ["done"] * 4, tail(Path("r"))
    assert starts(*points) == [1, 1, 2, 2]


def test_a_part_that_was_killed_is_done_again_and_then_the_whole(cluster: Cluster) -> None:
    words = ["linked", "folder=r", "cut=3", "wait_for=go", "--on", "slurm.yaml"]
    parts = ["r/part_0", "r/part_1", "r/part_2"]
    assert main(words) == 0
    cluster.until(lambda: starts(*parts) == [1, 1, 1], 60, f"the start of all parts\n{tail(Path('r'))}")
    element = next(line.split()[0] for line in cluster.queued() if "_1 " in line)
    cluster.ask("scancel", element)
    cluster.until(lambda: all(line.split()[0] != element for line in cluster.queued()), 60, "the end of one part")
    Path("go").touch()
    cluster.until(lambda: not cluster.queued(), 120, f"the end of the others\n{tail(Path('r'))}")
    assert states(*parts)[::2] == ["done", "done"]
    assert starts("r") == [0], "the whole waits for every part"
    done(cluster, words, "r")
    assert states("r", *parts) == ["done"] * 4, tail(Path("r"))
    assert starts("r", *parts) == [1, 1, 2, 1]
    assert Path("r/missing").read_text() == ""


def test_groups_of_images_get_the_label_maps_that_one_run_makes(cluster: Cluster) -> None:
    phantom.write("nnunet", Path("data"), range(4), shape=(4, 40, 40), spacing=(30.0, 8.0, 8.0), organs=["liver"])
    words = ["predict", f"model={saved(Path('m.safetensors'))}", "images=data/imagesTr", "device=cpu"]
    Path("parts.yaml").write_text("kind: slurm\nhours: 0.2\narray: {parts: 2}\n")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the jobs: the order of a sum is that of the threads
    try:
        assert main([*words, "folder=here"]) == 0
    finally:
        torch.set_num_threads(threads)
    done(cluster, [*words, "folder=there", "--on", "parts.yaml"], "there")
    parts = [Path(f"there/parts/00{number}") for number in range(2)]
    assert states("there", *map(str, parts)) == ["done"] * 3, "\n".join(map(tail, [Path("there"), *parts]))
    maps = sorted(path.name for path in Path("here").glob("*.nii.gz"))
    assert len(maps) == 4
    for name in maps:
        made = Path("there", name)
        assert made.read_bytes() == Path("here", name).read_bytes(), name
        assert [(part / name).exists() and made.samefile(part / name) for part in parts].count(True) == 1, name
