"""`axial curate` ends with the same bytes: for any workers, after any kill, a full disk, or the loss of any file."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

import data_curation.scan
from data_curation import curate
from data_curation.curate import CurateError
from launch.array import Array
from launch.slurm import ArrayRules, Slurm
from tests.data_curation.curated import main, settings, state


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, scans: Path) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("expected") / "corpus"
    assert main(settings(folder, scans)).ok
    return state(folder)


def test_a_second_run_changes_and_reads_nothing(
    tmp_path: Path, scans: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main(settings(tmp_path / "corpus", scans))
    assert state(tmp_path / "corpus") == expected
    read: list[str] = []
    honest = data_curation.scan.read
    monkeypatch.setattr(
        data_curation.scan, "read", lambda found, limits: (read.append(str(found.path)), honest(found, limits))[1]
    )
    main(settings(tmp_path / "corpus", scans))
    assert state(tmp_path / "corpus") == expected
    assert not [path for path in read if "Jane" in path or "Twin" in path]


def test_workers_do_not_change_the_bytes(tmp_path: Path, scans: Path, expected: dict[str, str]) -> None:
    main(settings(tmp_path / "corpus", scans, workers=2))
    assert state(tmp_path / "corpus") == expected


def test_nor_does_a_cluster(
    tmp_path: Path, scans: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    slurm = Slurm(cluster="local", cpus_per_process=2, hours=0.2, array=ArrayRules(parallel=1))
    curate.main(settings(tmp_path / "corpus", scans), Array(slurm, tmp_path / "corpus" / "jobs", poll_s=0.1))
    assert state(tmp_path / "corpus") == expected


@pytest.mark.parametrize("lost", ["a shard", "rows", "a short shard", "a scan", "the index", "everything but scans"])
def test_what_is_lost_comes_back(tmp_path: Path, scans: Path, expected: dict[str, str], lost: str) -> None:
    folder = tmp_path / "corpus"
    main(settings(folder, scans))
    shard = sorted((folder / "shards").iterdir())[1]
    match lost:
        case "a shard":
            shard.unlink()
        case "rows":
            (folder / "rows" / f"{shard.stem}.parquet").unlink()
        case "a short shard":
            os.truncate(shard, 1000)
        case "a scan":
            next((folder / "private" / "scan").iterdir()).unlink()
        case "the index":
            (folder / "index.parquet").unlink()
        case _:
            shutil.rmtree(folder / "shards")
            shutil.rmtree(folder / "rows")
    (folder / "shards").mkdir(exist_ok=True)
    (folder / "shards" / f".{shard.name}.99.part").write_bytes(b"left by a killed process")
    main(settings(folder, scans))
    assert state(folder) == expected


# In a fresh interpreter without threads: fork, run the curation, be killed at the n-th flush to the disk or rename.
DRIVER = """
import os, signal, sys
from pathlib import Path
import SimpleITK, webdataset, imagecodecs, scipy.sparse.csgraph  # once, not in each child
from data_curation.curate import Settings, main
from launch.crew import Workers
from launch.settings import load

folder, config = sys.argv[1:3]
for point in map(int, sys.argv[3:]):
    child = os.fork()
    if not child:
        left = point
        def fatal(name):
            honest = getattr(os, name)
            def call(*args, **more):
                global left
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
                return honest(*args, **more)
            setattr(os, name, call)
        if point:
            fatal("fsync"), fatal("replace"), fatal("unlink")
        main(load(Settings, Path(config)), Workers(0))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(point, os.WTERMSIG(status), flush=True)
    assert point or status == 0, status
"""


def test_kill_9_at_any_write_leads_to_the_same_bytes(tmp_path: Path, scans: Path, expected: dict[str, str]) -> None:
    folder = tmp_path / "corpus"
    config = tmp_path / "corpus.yaml"
    config.write_text(settings(folder, scans).model_dump_json())  # JSON is YAML
    points = [1, 2, 3, 4, 35, 36, 2, 3, 5, 4, 7, 8, 10, 12, 3, 4, 6]
    command = [sys.executable, "-c", DRIVER, str(folder), str(config), *map(str, points), "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    killed = Counter(
        line.split()[1] for line in done.stdout.splitlines() if len(line.split()) == 2 and line[0].isdigit()
    )
    assert killed["9"] >= 14
    assert state(folder) == expected


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_kill_9_at_any_time_with_workers(tmp_path: Path, scans: Path, expected: dict[str, str], workers: int) -> None:
    """Twenty-one kills in all, at moments drawn over the whole length of a run."""
    folder, config = tmp_path / "corpus", tmp_path / "corpus.yaml"
    config.write_text(settings(folder, scans, workers=workers).model_dump_json())
    code = (
        "import sys\nfrom data_curation.curate import Settings, main, Path\nfrom launch.settings import load\n"
        "if __name__ == '__main__':\n    main(load(Settings, Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(config)]
    start = time.monotonic()
    subprocess.run([*command[:-1], str(_aside(config, tmp_path))], check=True, capture_output=True)
    length = time.monotonic() - start
    draw = random.Random(workers)
    for _ in range(7):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(draw.uniform(0.1, 1.0) * length)
        process.kill()
        process.wait()
    subprocess.run(command, check=True, capture_output=True)
    assert state(folder) == expected


def _aside(config: Path, folder: Path) -> Path:
    """The same settings for another folder, to see how long a run takes."""
    other = folder / "other.yaml"
    other.write_text(config.read_text().replace(str(folder / "corpus"), str(folder / "undisturbed")))
    return other


def test_a_full_disk_is_one_clear_line_and_the_next_run_goes_on(
    tmp_path: Path, scans: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, left = os.fsync, 9

    def full(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        honest(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device; make room .*'.*/corpus/(shards|rows)/[\w-]+\.\w+'"):
        main(settings(tmp_path / "corpus", scans))
    monkeypatch.undo()
    main(settings(tmp_path / "corpus", scans))
    assert state(tmp_path / "corpus") == expected


def test_two_at_a_time_are_refused(tmp_path: Path, scans: Path) -> None:
    import fcntl

    folder = tmp_path / "corpus"
    (folder / "private").mkdir(parents=True)
    with open(folder / "private" / "lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(CurateError, match="another `axial curate` is at work"):
            main(settings(folder, scans))
