"""Looking after runs on a real SLURM: what status, logs and cancel say and do."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import launch.cancel
import launch.logs
import launch.status
from launch.call import Call, resolve
from launch.jobs import last_job, queue
from launch.run import _ticks, open_run
from launch.slurm import Slurm
from launch.status import status_of, told
from tests.launch.crew_tasks import Noted
from tests.launch.slurm_programs import run_of
from tests.slurm.conftest import Cluster


def run(folder: Path, **settings: object) -> Call:
    open_run(folder, resolve("steps_verb:Settings")(folder=folder, **settings), ["axial", "steps"])
    return Call("steps_verb:main", "steps_verb:Settings", folder)


def states(folder: Path) -> dict[str, tuple[str, str]]:
    jobs = queue()
    found = (status_of(path, jobs) for path in launch.status.runs_beneath(folder, 2))
    return {status.folder.name: (status.state, status.error) for status in found}


def test_a_chain_is_told_shown_and_cancelled(
    tmp_path: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm = Slurm(hours=0.2)
    first, second, third = (run(tmp_path / name, steps=4000) for name in ("z_first", "second", "third"))
    [one] = slurm.submit([first], tmp_path / "jobs", "chain")
    [two] = slurm.submit([second], tmp_path / "jobs", "chain", after=[one.id])
    slurm.submit([third], tmp_path / "jobs", "chain", after=[two.id])
    cluster.until(lambda: (tmp_path / "z_first/checkpoints").exists(), what="the first run at work")
    assert states(tmp_path) == {
        "z_first": ("running", ""),
        "second": ("queued", "waits for an earlier job to be done (Dependency)"),
        "third": ("queued", "waits for an earlier job to be done (Dependency)"),
    }
    launch.status.main(launch.status.Settings(folder=tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 runs: 2 queued, 1 running"
    assert [line.split()[0].rpartition("/")[2] for line in lines[1:] if line[0] != " "] == [
        "z_first",
        "second",
        "third",
    ]
    launch.logs.main(launch.logs.Settings(folder=tmp_path / "z_first", kind="err"))
    assert f"{one.log(kind='err')}:" in capsys.readouterr().err
    subprocess.run(["scancel", last_job(tmp_path / "third").id], check=True)  # type: ignore[union-attr]
    cluster.until(lambda: states(tmp_path)["third"][0] == "stopped", what="the third gone")
    assert "left the queue before it began" in states(tmp_path)["third"][1]
    launch.cancel.main(launch.cancel.Settings(folder=tmp_path))
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/second  job {two.id} cancelled before it began",
        f"{tmp_path}/z_first  job {one.id} is told to end; it saves first",
    ]
    cluster.until(lambda: not cluster.queued(), what="an empty queue")
    found = states(tmp_path)
    assert found["second"] == ("stopped", "cancelled before it began; the same command submits it again")
    assert found["z_first"][0] == "stopped"
    assert found["z_first"][1].startswith("stopped by SIGTERM after step ")


def test_shared_out_tasks_are_counted_and_cancelled_with_who_collects_them(
    tmp_path: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "corpus"
    code = "import sys; from tests.launch.crew_tasks import main; main(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(folder), "slurm"]
    folder.mkdir()
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            run_of(folder, pid=process.pid, ticks=_ticks(process.pid))
            begun = folder / "started"
            cluster.until(lambda: begun.exists() and len(Noted(folder).starts()) == 2, what="tasks at work")
            status = status_of(folder, queue())
            assert "\n  Noted: 0/" in told(status)
            assert " tasks done, " in told(status)
            launch.cancel.main(launch.cancel.Settings(folder=folder))
            assert process.wait(20) == -signal.SIGTERM
        finally:
            process.kill()
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{folder}  process {process.pid} is told to end; it saves first"
    assert second.startswith(f"{folder}  jobs ")
    assert second.endswith(" of its tasks cancelled")
    cluster.until(lambda: not cluster.queued(), what="an empty queue")
    assert told(status_of(folder, queue())).splitlines()[0].split()[2] == "stopped"
