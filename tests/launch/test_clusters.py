"""The packaged cluster files: each is valid, says what it is for, and opens with a command that is one."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import launch.clusters
from launch.call import resolve
from launch.cli import _parse
from launch.executors import EXECUTORS, load_cluster
from launch.settings import find, load
from launch.verbs import VERBS

FOLDER = Path(next(iter(launch.clusters.__path__)))
FILES = sorted(FOLDER.glob("*.yaml"))


def commands(path: Path) -> list[str]:
    """What stands behind `# Command:`, lines that go on put together."""
    head = re.sub(r"\\\n#", " ", path.read_text())
    return re.findall(r"^# Command: (.*)$", head, re.MULTILINE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_is_valid_and_its_commands_are_commands(path: Path) -> None:
    assert type(load_cluster(path.name)) in EXECUTORS.values()
    assert path.read_text().startswith("# For ")
    assert commands(path)
    for text in commands(path):
        axial, *words = shlex.split(text)
        told = _parse(words)
        assert axial == "axial"
        assert told.cluster
        verb, first = VERBS[told.verb], [swept.partition(",")[0] for swept in told.swept]
        if verb.crew:  # its file is the user's own
            assert told.configs == ("corpus.yaml",)
            continue
        load(resolve(verb.settings), find(told.configs[0]) if told.configs else None, [*told.overrides, *first])


def test_the_page_names_them_all_and_no_others() -> None:
    page = (FOLDER.parent / "CLUSTERS.md").read_text()
    named = set(re.findall(r"`((?:here|two|slurm)\w*\.yaml)`", page)) | set(re.findall(r"--on (slurm\w*\.yaml)", page))
    assert named == {path.name for path in FILES}


def test_a_command_that_is_none_is_seen(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("# For x.\n# Command: axial a \\\n#   b=c --on x\n# Command: axial d\n")
    assert [shlex.split(text) for text in commands(tmp_path / "x.yaml")] == [
        ["axial", "a", "b=c", "--on", "x"], ["axial", "d"],
    ]  # fmt: skip
