"""A real Slurm of two virtual nodes on this machine; Debian: slurmctld slurmd slurm-client munge."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from helpers import complete

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=15
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
KillWait=30
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=16 RealMemory=1000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=16 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""  # a requeued job waits for cred_expire seconds, 120 unless told otherwise


def missing() -> str | None:
    """Why there can be no Slurm here, or None."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    absent = [
        name for name in ("slurmctld", "slurmd", "sbatch", "munged", "mungekey") if not shutil.which(name, path=path)
    ]
    if absent:
        return f"no {', '.join(absent)} (apt-get install slurmctld slurmd slurm-client munge)"
    return None if os.geteuid() == 0 else "Slurm's daemons need root"


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [s.getsockname()[1] for s in sockets]


class Slurm:
    """The cluster, from start() to stop(); everything it writes goes to `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin",
        }
        self._daemons: list[subprocess.Popen] = []

    def start(self) -> None:
        """Start munged, the controller and two nodes; wait until both are idle. Raises TimeoutError."""
        (self.folder / "state").mkdir(parents=True)
        ports = free_ports(3)
        host = socket.gethostname().split(".")[0]
        (self.folder / "slurm.conf").write_text(CONF.format(folder=self.folder, host=host, ports=ports))
        key = self.folder / "munge.key"
        self.call("mungekey", "--create", f"--keyfile={key}")
        files = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self._daemon("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *files)
        self._wait(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._daemon("slurmctld", "-D")
        for node in ("n1", "n2"):
            self._daemon("slurmd", "-D", "-N", node)
        self._wait(lambda: self.call("sinfo", "-h", "-t", "idle", "-o", "%D", check=False).strip() == "2", "slurmd")

    def _daemon(self, *words: str) -> None:
        with (self.folder / f"{words[0]}.out").open("a") as out:
            process = subprocess.Popen(words, env=self.environment, stdout=out, stderr=out, start_new_session=True)
        self._daemons.append(process)

    def _wait(self, condition, what: str) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: see {self.folder}")
            time.sleep(0.2)

    def stop(self) -> None:
        """Cancel what runs, end the daemons."""
        if self.environment.get("SLURM_CONF") and self._daemons:
            self.call("scancel", "--user=root", check=False)
            deadline = time.monotonic() + 40
            while self.call("squeue", "-h", check=False).strip() and time.monotonic() < deadline:
                time.sleep(0.5)
        for process in reversed(self._daemons):
            process.terminate()
        for process in self._daemons:
            process.wait(30)

    def call(self, *words: object, check: bool = True, **environment: object) -> str:
        """Output of a command with this cluster in its environment, at the repository's root.

        A job submitted by it meets on a port of its own: other clusters on this machine have the same job numbers.
        """
        env = (
            self.environment
            | {"RDZV_PORT": str(free_ports(1)[0])}
            | {name: str(value) for name, value in environment.items()}
        )
        done = complete(words, env=env, timeout=600)
        assert done.returncode == 0 or not check, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What scontrol knows of a job: JobState, Restarts, ExitCode, NodeList, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "--oneliner", "show", "job", number)))

    def until(self, number: str, condition, seconds: float = 300) -> dict[str, str]:
        """Wait until condition(job) of a job; return it."""
        deadline = time.monotonic() + seconds
        while not condition(job := self.job(number)):
            assert time.monotonic() < deadline, json.dumps(job, indent=1)
            time.sleep(0.5)
        return job

    def end(self, number: str) -> dict[str, str]:
        """Wait for the end of a job that is not requeued again; return what scontrol knows."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
        return self.until(number, lambda job: job["JobState"] in over)
