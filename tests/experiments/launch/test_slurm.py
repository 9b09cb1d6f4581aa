"""The target `slurm`, with a fake sbatch, and on a cluster of one node where SLURM is installed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.experiments.launch.launching import PEER, ROOT, finish, install, start, until

MISSING = [name for name in ("munged", "slurmctld", "slurmd", "sbatch", "srun") if shutil.which(name) is None]
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
MailProg=/bin/true
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES State=UP MaxTime=INFINITE
"""


def test_the_script_goes_to_sbatch_and_the_job_is_named(tmp_path):
    env = install(tmp_path, "sbatch", f'#!/bin/sh\ncat > {tmp_path}/script\necho "$@" > {tmp_path}/options\necho 12;\n')
    code, out, err = finish(
        start("slurm", "--tasks", 2, "--", "train", "smoke", "--distributed", env=env, cwd=tmp_path)
    )
    assert (code, out) == (0, "12\n") and "submitted job 12; its output: logs/meshwork-12.log" in err, err
    assert "srun --kill-on-bad-exit=1" in (tmp_path / "script").read_text() and (tmp_path / "logs").is_dir()


@pytest.mark.parametrize(
    ("end", "restart", "requeued"), [(0, 0, 0), (1, 0, 0), (75, 0, 1), (76, 0, 0), (137, 2, 1), (75, 3, 0)]
)
def test_the_script_requeues_its_job_after_a_failure(tmp_path, end, restart, requeued):
    """By hand: the script runs with an srun that ends with a code."""
    install(tmp_path, "srun", f"#!/bin/sh\nexit {end}\n")
    env = install(tmp_path, "scontrol", f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    env |= install(tmp_path, "sbatch", f"#!/bin/sh\ncat > {tmp_path}/script\necho 1\n")
    assert finish(start("slurm", "--", "list", env=env, cwd=tmp_path))[0] == 0
    own = {"SLURM_RESTART_COUNT": str(restart)} if restart else {}
    done = subprocess.run(
        ["bash", str(tmp_path / "script")], env=os.environ | env | own | {"SLURM_JOB_ID": "1"}, check=False
    )
    assert done.returncode == end and (tmp_path / "requeued").exists() == bool(requeued)


class cluster:
    """A context manager: munged, slurmctld and slurmd as this user, with one node, this machine."""

    def __init__(self, folder: Path):
        self._folder, self._running = folder, []

    def __enter__(self) -> dict[str, str]:
        folder, sockets = self._folder, [socket.socket() for _ in range(2)]
        for each in sockets:
            each.bind(("", 0))
        ports = [each.getsockname()[1] for each in sockets]
        for each in sockets:
            each.close()
        for name in ("munge", "state", "spool"):
            (folder / name).mkdir(mode=0o700)
        (folder / "munge/key").write_bytes(os.urandom(1024))
        (folder / "munge/key").chmod(0o600)
        host = os.uname().nodename.partition(".")[0]
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        config = folder / "slurm.conf"
        config.write_text(CONFIG.format(folder=folder, host=host, ports=ports, user=user, cpus=os.cpu_count()))
        options = {"socket": "socket", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
        self._start("munged", "--foreground", "--force", *(f"--{k}={folder}/munge/{v}" for k, v in options.items()))
        until(lambda: (folder / "munge/socket").exists(), "munged")
        self._start("slurmctld", "-D", "-f", str(config))
        self._start("slurmd", "-D", "-f", str(config))
        env = {"SLURM_CONF": str(config)}
        until(lambda: "idle" in self._ask(env, "sinfo", "-h"), "the node")
        return env

    def _start(self, *words: str) -> None:
        with (self._folder / f"{words[0]}.out").open("w") as output:
            self._running.append(subprocess.Popen(words, stdout=output, stderr=output))

    def _ask(self, env: dict[str, str], *words: str) -> str:
        return subprocess.run(words, env=os.environ | env, capture_output=True, text=True, check=False).stdout

    def __exit__(self, *_: object) -> None:
        env = {"SLURM_CONF": str(self._folder / "slurm.conf")}
        self._ask(env, "scancel", "--full", "--state=RUNNING")
        self._ask(env, "scancel", "--state=PENDING")
        until(lambda: not self._ask(env, "squeue", "-h"), "the end of the jobs")
        for each in reversed(self._running):
            with each:
                each.terminate()
                try:
                    each.wait(20)
                except subprocess.TimeoutExpired:
                    each.kill()


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)} (apt-get install slurm-wlm munge)")
def test_tasks_join_under_slurm_and_a_failed_job_is_requeued(tmp_path):
    """JAX finds the processes from SLURM's variables. The second attempt succeeds."""
    with cluster(tmp_path) as env:
        options = ("--tasks", 2, "--env", "JAX_PLATFORMS=cpu", "--env", f"PYTHONPATH={ROOT}")
        line = f"{sys.executable} {' '.join(PEER[1:])} add . && test $MESHWORK_RESTART = 1 || exit 75"
        code, out, err = finish(start("slurm", *options, "--", line, env=env, cwd=tmp_path))
        assert code == 0, err
        log = tmp_path / f"logs/meshwork-{out.strip()}.log"
        until(lambda: log.exists() and "exit code 75: restart 1 of 3" in log.read_text(), "the first attempt", 120)
        begin_now = ["scontrol", "update", f"JobId={out.strip()}", "StartTime=now"]  # SLURM lets it wait for minutes

        def again() -> bool:
            subprocess.run(begin_now, env=os.environ | env, check=False, capture_output=True)
            time.sleep(0.5)
            return log.read_text().count("sum 3 of 2 processes, restart 1") == 2

        until(again, "the second attempt", 120)
        assert log.read_text().count("sum 3 of 2 processes, restart 0") == 2
