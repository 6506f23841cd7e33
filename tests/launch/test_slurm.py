"""What sbatch is told, and what is said when it refuses."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.array import Array
from launch.call import Call
from launch.jobs import Job, held, last_job, note_job, queue
from launch.run import RunError, Stopped, close_run, open_run, read_json
from launch.settings import SettingsError, load
from launch.slurm import Slurm
from tests.launch.steps_verb import Settings

Program = Callable[[str, str], None]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """program(name, shell lines) puts a program of SLURM before all others."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)

    def write(name: str, lines: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{lines}\n")
        (folder / name).chmod(0o755)

    write("srun", "exit 1")
    return write


def call(folder: Path) -> Call:
    open_run(folder, Settings(folder=folder), ["axial", "steps"])
    return Call("tests.launch.steps_verb:main", "tests.launch.steps_verb:Settings", folder)


def test_what_sbatch_is_told() -> None:
    told = Slurm(partition="gpu", nodes=2, gpus_per_node=8, hours=1.5, extra={"exclusive": True}).parameters("stage1")
    assert told == {
        "name": "axial-stage1", "nodes": 2, "gpus_per_node": 8, "tasks_per_node": 8, "cpus_per_task": 1,
        "timeout_min": 90, "slurm_signal_delay_s": 300, "slurm_partition": "gpu",
        "slurm_additional_parameters": {"exclusive": True},
        "slurm_srun_args": ["--kill-on-bad-exit=1", "--cpus-per-task=1"],
    }  # fmt: skip


def test_the_script_says_all_that_was_asked(tmp_path: Path) -> None:
    slurm = Slurm(
        partition="gpu", account="ct", qos="long", constraint="h100", nodes=2, gpus_per_node=4, cpus_per_process=12,
        memory_gib=480, hours=2, signal_delay_s=200, setup=("module load cuda",), environment={"A B": "it's"},
        python="apptainer exec --nv axial.sif python", srun=("--container-image=x",), extra={"reservation": "ours"},
    )  # fmt: skip
    script = slurm.script("stage1", 1, tmp_path, after=("7", "8"))
    for line in (
        "#SBATCH --partition=gpu", "#SBATCH --account=ct", "#SBATCH --qos=long", "#SBATCH --constraint=h100",
        "#SBATCH --nodes=2", "#SBATCH --gpus-per-node=4", "#SBATCH --ntasks-per-node=4", "#SBATCH --cpus-per-task=12",
        "#SBATCH --mem=480GB", "#SBATCH --time=120", "#SBATCH --signal=USR2@200", "#SBATCH --job-name=axial-stage1",
        "#SBATCH --requeue", "#SBATCH --dependency=afterok:7:8", "#SBATCH --kill-on-invalid-dep=yes",
        "#SBATCH --reservation=ours", "module load cuda", "export A B='it'\"'\"'s'", "axial_ended $?",
    ):  # fmt: skip
        assert line in script.splitlines(), line
    [start] = [line for line in script.splitlines() if line.startswith("srun ")]
    assert "--kill-on-bad-exit=1 --cpus-per-task=12 --container-image=x" in start
    assert " apptainer exec --nv axial.sif python -P -u -m submitit.core._submit " in start
    assert "apptainer exec --nv axial.sif python -P -m launch.aftermath" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False).stderr == ""


def test_an_array_is_throttled(tmp_path: Path) -> None:
    slurm = load(Slurm, None, ["array.parallel=3"])
    assert "#SBATCH --array=0-9%3" in slurm.script("sweep", 10, tmp_path).splitlines()
    assert "--array" not in slurm.script("one", 1, tmp_path)
    assert "srun --ntasks" not in slurm.script("one", 1, tmp_path), "one node needs not be asked what others see"


def test_an_option_of_the_users_own_wins(tmp_path: Path) -> None:
    script = Slurm(extra={"no_requeue": True}).script("x", 1, tmp_path)
    assert "#SBATCH --no-requeue" in script
    assert "#SBATCH --requeue" not in script

    script = Slurm(extra={"no-requeue": True, "mail-type": "END"}).script("x", 1, tmp_path)
    assert "#SBATCH --mail-type=END" in script
    assert "#SBATCH --requeue" not in script


def run_script(tmp_path: Path, program: Program, slurm: Slurm, **environment: str) -> tuple[int, list[str]]:
    """Exit code of the batch script where the work fails and is to be tried again, and what its programs were asked."""
    asked = tmp_path / "asked"
    program("srun", f'echo "srun $*" >> {asked}; exit 3')
    program("python", f'echo "python $*" >> {asked}; exit 75')
    program("sleep", f'echo "sleep $*" >> {asked}')
    given = {"SLURM_JOB_ID": "21", "SLURM_JOB_NODELIST": "a", **environment}
    script = slurm.script("it's", 2 if "SLURM_ARRAY_JOB_ID" in given else 1, tmp_path / "a b'c")
    found = subprocess.run(["bash"], input=script, text=True, env={**os.environ, **given}, check=False)
    return found.returncode, asked.read_text().splitlines()


def test_the_script_sees_to_the_end_of_the_work(tmp_path: Path, program: Program) -> None:
    program("scontrol", f'echo "scontrol $*" >> {tmp_path}/asked')
    slurm = Slurm(python="python", setup=("set -euo pipefail",))
    code, [work, asked, after, *requeued] = run_script(tmp_path, program, slurm)
    assert work.startswith("srun ")
    assert work.endswith(f"python -P -u -m submitit.core._submit {tmp_path}/a b'c")
    assert after == f"python -P -m launch.aftermath {tmp_path}/a b'c/PLAN.json 3"
    assert asked == "scontrol show job -o 21"
    assert requeued[:2] == ["scontrol requeue 21", "sleep 120"]
    assert code == 75


def test_the_last_element_of_an_array_does_not_send_the_others_back(tmp_path: Path, program: Program) -> None:
    """Its job number is that of the array."""
    program("scontrol", f'echo "scontrol $*" >> {tmp_path}/asked')
    place = {"SLURM_ARRAY_JOB_ID": "21", "SLURM_ARRAY_TASK_ID": "1"}
    asked = run_script(tmp_path, program, Slurm(python="python"), **place)[1]
    assert "scontrol requeue 21_1" in asked
    assert "scontrol show job -o 21_1" in asked
    assert "scontrol requeue 21" not in asked


def test_a_controller_that_is_away_for_a_moment_is_asked_again(tmp_path: Path, program: Program) -> None:
    program("scontrol", f'echo "scontrol $*" >> {tmp_path}/asked; exit 1')
    code, asked = run_script(tmp_path, program, Slurm(python="python"))
    assert asked[3:] == ["scontrol requeue 21", "sleep 10"] * 3
    assert code == 75


def test_only_nodes_that_say_so_do_not_see_the_folder(tmp_path: Path, program: Program) -> None:
    """A cluster's prologue may print, too."""
    script = Slurm(nodes=2, python="python").script("x", 1, tmp_path)
    program("srun", 'echo Welcome; case "$*" in *axial_blind*) echo "axial_blind n2";; esac')
    program("python", f'echo "$*" >> {tmp_path}/asked; exit 1')
    environment = {**os.environ, "SLURM_JOB_ID": "21"}
    subprocess.run(["bash"], input=script, text=True, env=environment, capture_output=True, check=False)
    assert (tmp_path / "asked").read_text() == f"-P -m launch.aftermath {tmp_path}/PLAN.json 1 n2\n"


def test_the_tasks_of_a_verb_are_begun_by_the_same_words(tmp_path: Path, program: Program) -> None:
    program("sbatch", f"cp $1 {tmp_path}/script; echo no >&2; exit 1")
    slurm = Slurm(python="apptainer exec axial.sif python", extra={"no-requeue": True, "nice": 5})
    with Array(slurm, tmp_path / "jobs").open() as each, pytest.raises(RunError, match="sbatch refused the array: no"):
        next(each(abs, [1, 2], str))
    script = (tmp_path / "script").read_text()
    assert " apptainer exec axial.sif python -P -u -m submitit.core._submit " in script
    assert f"#SBATCH --job-name=axial-{tmp_path.name}" in script.splitlines()
    assert script.count("requeue") == 1
    assert "#SBATCH --nice=5" in script


@pytest.mark.parametrize(
    "said",
    [
        "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
        "sbatch: error: Batch job submission failed: Invalid partition name specified",
        "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
    ],
)
def test_a_refusal_is_one_line_and_the_run_can_be_submitted_again(
    tmp_path: Path, program: Program, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    program("sbatch", f"echo '{said}' >&2; exit 1")
    folder = tmp_path / "run"
    with pytest.raises(RunError, match=r"^sbatch refused the job: ") as caught:
        Slurm().submit([call(folder)], folder / "jobs", "run")
    assert said.removeprefix("sbatch: error: ") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", ""), "nor is it printed beside the error"
    assert last_job(folder) is None
    assert (read_json(folder / "outcome.json") or {})["state"] == "failed"
    program("sbatch", "echo Submitted batch job 17")
    program("squeue", "")
    [job] = Slurm().submit([call(folder)], folder / "jobs", "run")
    assert last_job(folder) == job == Job("17", "axial-run", "slurm", str(folder / "jobs"), job.at)
    assert job.log() == folder / "jobs" / "17_0_log.out"


def test_the_jobs_of_an_array_know_their_runs(tmp_path: Path, program: Program) -> None:
    program("sbatch", f"cp $1 {tmp_path}/script; echo Submitted batch job 21")
    folders = [tmp_path / "sweep" / name for name in "abc"]
    jobs = Slurm().submit([call(folder) for folder in folders], tmp_path / "sweep" / "jobs", "sweep", after=["9"])
    assert [job.id for job in jobs] == ["21_0", "21_1", "21_2"]
    assert [last_job(folder) for folder in folders] == jobs
    script = (tmp_path / "script").read_text()
    assert "#SBATCH --array=0-2%3" in script
    assert "#SBATCH --dependency=afterok:9" in script
    plan = next((tmp_path / "sweep/jobs").glob("*.json"))
    assert str(plan) in script
    assert [one[2] for one in (read_json(plan) or {})["calls"]] == [str(folder) for folder in folders]


def test_the_queue_is_read_by_number_and_name(tmp_path: Path, program: Program) -> None:
    program("squeue", "printf '17|PENDING|BeginTime|axial-run\\n18_3|RUNNING|None|axial-a|b\\n'")
    found = queue()
    assert found is not None
    job = Job("17", "axial-run", "slurm", "", "")
    assert (queued := held(job, found)) is not None
    assert queued.waits
    assert held(Job("17", "axial-other", "slurm", "", ""), found) is None, "another cluster's number 17"
    assert not found["18_3", "axial-a|b"].waits
    program("squeue", "exit 1")
    assert queue() is None
    assert held(job, None) is None
    note_job(tmp_path, job)
    with (tmp_path / "jobs/submitted.jsonl").open("a") as file:
        file.write('{"id": "1')
    assert last_job(tmp_path) == job


def test_who_waits_is_told_the_end(tmp_path: Path, program: Program) -> None:
    program("sbatch", "echo Submitted batch job 17")
    program("squeue", "")
    folder, slurm = tmp_path / "run", Slurm(wait=True)
    [job] = slurm.submit([call(folder)], folder / "jobs", "run")
    with pytest.raises(RunError, match=r"job 17 left the queue without a word; is .* seen by its machine\?"):
        slurm.wait_for(folder, job)
    job.log(kind="err").write_text("no python\n")
    with pytest.raises(RunError, match=rf"job 17 left the queue without a word; see {job.log(kind='err')}"):
        slurm.wait_for(folder, job)
    close_run(folder, "stopped", error="stopped by SIGTERM after step 3")
    with pytest.raises(Stopped, match="after step 3"):
        slurm.wait_for(folder, job)
    close_run(folder, "done")
    assert slurm.wait_for(folder, job).ok


def test_a_wrong_cluster_setting_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("kind: slurm\nnodes: 0\nrestart: 3\nhours: soon\n")
    with pytest.raises(SettingsError, match=r"(?s)3 wrong.*nodes.*c.yaml:2.*hours.*restart: .*did you mean 'restarts'"):
        load(Slurm, tmp_path / "c.yaml")


def test_a_job_is_not_warned_as_it_begins(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"signal_delay_s \(300\) must be less than the 180 s of hours"):
        load(Slurm, None, ["hours=0.05"])
