"""A real SLURM on this machine, for tests: munge, a controller and some nodes, each a process of its own, as root.

No accounting (squeue alone is asked), no cgroups, no systemd; everything lies in one folder and ends with the block.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

NODES = 2
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel")
START_S = 30.0

CONF = """
ClusterName=axialtest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0,requeue_delay=1
SlurmctldParameters=preempt_send_user_signal
SlurmdTimeout=10
ReturnToService=1
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=2000 State=UNKNOWN\n"


def missing() -> str:
    """Why there can be no SLURM here; empty where there can."""
    os.environ["PATH"] = os.pathsep.join(dict.fromkeys([*os.environ["PATH"].split(os.pathsep), "/usr/sbin", "/sbin"]))
    absent = [name for name in NEEDED if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: slurm-wlm munge)"
    return "" if os.getuid() == 0 else "its daemons want to be started by root"


@dataclass
class Machine:
    """The running daemons: slurm.conf, for SLURM_CONF, and the processes by name (munged, slurmctld, node0, ...)."""

    folder: Path
    environment: dict[str, str]
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def conf(self) -> Path:
        return self.folder / "slurm.conf"

    def start(self, name: str, *around: str) -> None:
        """Start a daemon; ``around`` are words before its command."""
        words = {"munged": ["munged", "--foreground", *_munge(self.folder)], "slurmctld": ["slurmctld", "-D"]}
        command = [*around, *words.get(name, ["slurmd", "-D", "-N", name])]
        with (self.folder / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )

    def kill(self, name: str, kind: signal.Signals = signal.SIGKILL) -> None:
        """End a daemon, by default as a power cut would; jobs that it started stay."""
        self.daemons[name].send_signal(kind)
        self.daemons[name].wait(30)

    def until_idle(self, nodes: int = NODES) -> None:
        """Wait until so many nodes are ready. Raises RuntimeError with the logs where they do not come up."""
        _until(self.folder, lambda: _idle(self.environment) == nodes)


@contextmanager
def slurm() -> Iterator[Machine]:
    """A SLURM for the time of the block. Raises RuntimeError with the logs where it does not come up."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: sockets lie in it, whose paths may have 107 characters
    folder.chmod(0o755)  # munge wants others to reach its socket, and nobody else to write here
    # Neither another cluster's nor a job's.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
    environment["SLURM_CONF"] = str(folder / "slurm.conf")
    machine = Machine(folder, environment)
    try:
        _configure(folder)
        machine.start("munged")
        _until(folder, lambda: (folder / "munge.socket").exists())
        for name in ("slurmctld", *(f"node{number}" for number in range(NODES))):
            machine.start(name)
        machine.until_idle()
        yield machine
    finally:
        _end(folder, list(machine.daemons.values()), environment)


def _configure(folder: Path) -> None:
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o600)
    host = socket.gethostname().partition(".")[0]
    controller, *nodes = _free_ports(NODES + 1)
    text = CONF.format(host=host, folder=folder, controller=controller)
    for number, port in enumerate(nodes):
        (folder / f"spool.node{number}").mkdir()
        text += NODE.format(name=f"node{number}", host=host, port=port)
    (folder / "slurm.conf").write_text(text)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _munge(folder: Path) -> list[str]:
    places = {"key": "key", "socket": "socket", "pid": "pid", "log": "log", "seed": "seed"}
    names = {"socket": "--socket"}
    return [f"{names.get(one, f'--{one}-file')}={folder}/munge.{place}" for one, place in places.items()]


def _idle(environment: dict[str, str]) -> int:
    """Nodes that are ready."""
    asked = subprocess.run(
        ["sinfo", "-h", "-N", "-p", "main", "-o", "%T"], env=environment, capture_output=True, text=True
    )
    return asked.stdout.split().count("idle")


def _until(folder: Path, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_S
    while not ready():
        if time.monotonic() > deadline:
            logs = [*folder.glob("*.out"), *folder.glob("*.log")]
            raise RuntimeError("\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in logs))
        time.sleep(0.1)


def _end(folder: Path, started: list[subprocess.Popen[bytes]], environment: dict[str, str]) -> None:
    """Cancel what runs, end the daemons, then whatever still knows our slurm.conf."""
    with suppress(OSError, subprocess.SubprocessError):
        subprocess.run(["scancel", "-u", "root"], env=environment, capture_output=True, timeout=10)
        deadline = time.monotonic() + 10
        asked = ["squeue", "-h"]
        while time.monotonic() < deadline and subprocess.check_output(asked, env=environment, timeout=10):
            time.sleep(0.2)
    for process in reversed(started):
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    mark = f"SLURM_CONF={folder}/slurm.conf".encode()
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark in (path / "environ").read_bytes().split(b"\0"):
                os.kill(int(path.name), signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)
