"""The verbs as they are, on a real SLURM of two nodes: the bytes and weights of one machine, through any trouble."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from launch.attempts import read_attempts
from launch.call import Call
from launch.executors import Processes
from launch.run import open_run
from launch.settings import load
from launch.slurm import Slurm
from pretrain.checkpoint_files import newest, read_tensors
from pretrain.settings import Settings
from tests.data_curation import conftest
from tests.data_curation.curated import main as curate
from tests.data_curation.curated import settings as curation
from tests.data_curation.curated import state
from tests.pretrain.test_train import HEAD
from tests.slurm.conftest import Cluster, tail
from tests.slurm.test_survival import beaten, processes

write_scan, scans, corpus = conftest.write_scan, conftest.scans, conftest.corpus  # fixtures

STEPS = 120


def call(folder: Path, data: Path) -> Call:
    words = (
        f"folder={folder}", f"steps={STEPS}", "precision=fp32", "device=cpu", f"data.corpus={data}",
        "data.batch_size=4", "data.workers=0", "data.crops={global_size: 64, local_size: 32, n_local: 2}",
        f"method.terms.dino.head={HEAD}", f"method.terms.ibot.head={HEAD}", "optim.lr={peak: 2e-3, warmup: 0.1}",
        "optim.lr_rule=none", "checkpoint.every=30", "log.tensorboard=false", "watch.every=0",
        "model={size: custom, width: 32, depth: 2, heads: 2, in_channels: 1}", "parallel.sharding=replicate",
    )  # fmt: skip
    open_run(folder, load(Settings, None, words), ["axial", "pretrain"])
    return Call("held_verb:main", "pretrain.settings:Settings", folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = newest(folder)
    assert found is not None
    assert found.name == f"step_{STEPS:08d}"
    return read_tensors(found, "")


def test_pretraining_over_two_nodes_ends_with_the_same_weights(cluster: Cluster, tmp_path: Path, corpus: Path) -> None:
    """As two processes of one machine, though sent back by hand, and out of time while one rank is held back."""
    local, run = tmp_path / "local", tmp_path / "run"
    slurm = Slurm(nodes=2, hours=0.2, signal_delay_s=100)
    [job] = slurm.submit([call(run, corpus)], run / "jobs", "run")
    cluster.until(lambda: beaten(run) > 20, 90, f"the first steps {tail(run)}")
    cluster.ask("scontrol", "requeue", job.id)
    cluster.until(lambda: [one.how for one in read_attempts(run)] == ["warned"], 60, "a second start")
    cluster.until(lambda: beaten(run) > 40, 90, f"more steps {tail(run)}")
    (run / "hold").touch()
    cluster.ask("scontrol", "update", f"jobid={job.id}", "timelimit=1")
    assert Processes(processes=2).run(call(local, corpus)).ok  # SLURM looks at time limits twice a minute
    cluster.until((run / "heard").exists, 60, "the warning")
    time.sleep(2)
    assert len(read_attempts(run)) == 1, "no rank may leave while one is held back"
    assert len(processes(run)) >= 2
    (run / "hold").unlink()
    cluster.until(lambda: [one.how for one in read_attempts(run)] == ["warned", "warned"], 60, f"the save {tail(run)}")
    cluster.ask("scontrol", "update", f"jobid={job.id}", "timelimit=12")
    ended = cluster.ended(run)
    assert ended["state"] == "done", tail(run)
    ours, theirs = weights(run), weights(local)
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


def test_an_array_of_three_curates_the_same_bytes_though_one_is_killed(
    cluster: Cluster, tmp_path: Path, scans: Path
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    assert curate(curation(here, scans)).ok
    expected = state(here)
    code = (
        "import sys; from pathlib import Path; from data_curation import curate; from launch.array import Array\n"
        "from launch.slurm import *; from tests.data_curation.curated import settings\n"
        "folder, scans = map(Path, sys.argv[1:]); rules = ArrayRules(elements=3)\n"
        "array = Array(Slurm(hours=0.2, array=rules), folder / 'jobs', poll_s=0.2, settle_s=1.0)\n"
        "assert curate.main(settings(folder, scans), array).ok"
    )
    command = [sys.executable, "-c", code, str(there), str(scans)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        cluster.until(lambda: running(there), 60, "an element at work")
        os.kill(running(there)[0], signal.SIGKILL)
        _, told = process.communicate(timeout=180)
    assert process.returncode == 0, told
    assert told.count("jobs for") == 3, f"scans twice, as a job was killed, and shards: {told}"
    assert state(there) == expected


def running(corpus: Path) -> list[int]:
    """Elements of an array that curates it; srun, whose command has the same words, is none."""
    command = ["pgrep", "-f", f"submitit.core._submit {corpus}/jobs/array-"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return [pid for pid in map(int, found.stdout.split()) if _name(pid).startswith("python")]


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""
