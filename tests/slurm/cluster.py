"""A real Slurm of two virtual nodes on this machine, for tests: munged, slurmctld and one slurmd a node, all of it under one directory."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from contextlib import closing
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "srun")
NODES = ("n1", "n2")
CONF = """\
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MailProg=/bin/true
SchedulerParameters=sched_interval=2,bf_interval=2
InactiveLimit=0
KillWait=30
MinJobAge=7200
ReturnToService=2
OverTimeLimit=0
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=2 RealMemory=8000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=2 RealMemory=8000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=60 State=UP
"""


def missing_programs() -> list[str]:
    """Those of Slurm's and Munge's programs that this machine lacks, or all of them for who is not root."""
    found = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    return found if os.geteuid() == 0 else list(PROGRAMS)


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def _free_port() -> int:
    with closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Cluster:
    """`with Cluster(directory) as cluster:` its daemons run, and `cluster.environment` makes Slurm's commands speak to it."""

    def __init__(self, root: Path):
        self.root, self.daemons = root, []
        self.environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(root / "slurm.conf")}

    def __enter__(self):
        try:
            self._begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _begin(self) -> None:
        for part in ("munge", "state", *(f"spool-{node}" for node in NODES)):
            (self.root / part).mkdir(parents=True)
        (self.root / "munge").chmod(0o711)
        key = self.root / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        ports = {name: _free_port() for name in ("ctld", *NODES)}
        (self.root / "slurm.conf").write_text(CONF.format(host=socket.gethostname(), root=self.root, **ports))
        own = [f"--{what}={self.root}/munge/{what}" for what in ("pid-file", "log-file", "seed-file")]
        self._start(
            ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self.root}/munge/socket", *own]
        )
        _until(lambda: (self.root / "munge" / "socket").exists(), "munged does not listen", self.root)
        self._start(["slurmctld", "-D"])
        for node in NODES:
            self._start(["slurmd", "-D", "-N", node])
        _until(lambda: self.said("sinfo", "-h", "-o", "%T %D").strip() == "idle 2", "nodes are not idle", self.root)

    def __exit__(self, *_error):
        subprocess.run(["scancel", "--user=root"], env=self.environment, capture_output=True)
        limit = time.monotonic() + 60
        while self.said("squeue", "-h") and time.monotonic() < limit:
            time.sleep(0.2)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(timeout=30)
            except subprocess.TimeoutExpired:  # a job that does not end holds its slurmd
                daemon.kill()

    def _start(self, words: list[str]) -> None:
        log = (self.root / f"{words[0]}.out").open("a")
        self.daemons.append(subprocess.Popen(words, env=self.environment, stdout=log, stderr=log, cwd=self.root))

    def ran(self, *words: str) -> bool:
        """Whether a command of Slurm's went well."""
        return subprocess.run(words, env=self.environment, capture_output=True).returncode == 0

    def said(self, *words: str) -> str:
        """What a command of Slurm's prints; empty where it fails."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True)
        return done.stdout if done.returncode == 0 else ""


def _until(condition, otherwise: str, root: Path, seconds: float = 60.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            logs = "\n".join(
                f"{path}:\n{path.read_text(errors='replace')[-2000:]}" for path in sorted(root.rglob("*.log"))
            )
            raise RuntimeError(f"the virtual cluster did not start: {otherwise}\n{logs}")
        time.sleep(0.2)
