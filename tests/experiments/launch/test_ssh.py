"""The target `ssh`, with a fake ssh that runs the command here, and with a real server where there is one."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.experiments.launch.launching import PEER, ROOT, finish, install, start, until

# Runs the last argument as a login shell would, with a clean environment, and without a terminal.
FAKE = """#!/bin/bash
echo "$@" >> "{folder}/calls"
exec env -i PATH="$PATH" PYTHONPATH="{root}" XLA_FLAGS="$XLA_FLAGS" JAX_PLATFORMS=cpu bash -c "${{@: -1}}"
"""


@pytest.fixture
def fake(tmp_path) -> dict[str, str]:
    return install(tmp_path, "ssh", FAKE.format(folder=tmp_path, root=ROOT))


def test_hosts_are_restarted_at_another_port(tmp_path, fake):
    (tmp_path / "hosts.txt").write_text("localhost  # the coordinator\n\n127.0.0.1\n")
    options = ("--hosts", tmp_path / "hosts.txt", "--port", 9000, "--backoff", 0.1)
    code, out, err = finish(start("ssh", *options, "--", *PEER, "say", tmp_path, env=fake))
    assert code == 0, err
    assert {"[localhost] process 0 of 2, restart 1", "[127.0.0.1] process 1 of 2, restart 1"} <= set(out.splitlines())
    assert "process 127.0.0.1: exit code 137" in err and "restart 1 of 3" in err
    calls = (tmp_path / "calls").read_text().splitlines()
    for port, call in zip((9000, 9000, 9001, 9001), calls, strict=True):
        assert f"JAX_COORDINATOR_ADDRESS=localhost:{port} " in call


def test_a_signal_and_a_lost_launcher_stop_the_hosts(tmp_path, fake):
    for way in ("signal", "kill"):
        folder = tmp_path / way
        folder.mkdir()
        process = start("ssh", "--hosts", "a,b", "--", *PEER, "wait", folder, env=fake)
        until(lambda folder=folder: len(list(folder.glob("waiting-*"))) == 2, "two hosts")
        process.send_signal(signal.SIGTERM if way == "signal" else signal.SIGKILL)
        code, _, err = finish(process)
        until(lambda folder=folder: len(list(folder.glob("stopped-*"))) == 2, "their end")
        assert way == "kill" or (code == 143 and "restart" not in err)


def test_a_host_that_cannot_be_reached_stops_the_others(tmp_path):
    text = FAKE.replace("exec env", 'case "$*" in *" b cd "*) echo "no route to host" >&2; exit 255;; esac; exec env')
    fake = install(tmp_path, "ssh", text.format(folder=tmp_path, root=ROOT))
    process = start("ssh", "--hosts", "a,b", "--restarts", 0, "--", *PEER, "wait", tmp_path, env=fake)
    code, _, err = finish(process)
    assert code == 255 and "[b] no route to host" in err and "process b: exit code 255" in err, err


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("sshd") is None, reason="needs sshd (apt-get install openssh-server)")
def test_over_a_real_ssh_server(tmp_path):
    """Two names of this machine: processes add up; a signal to the launcher reaches them; so does its loss."""
    with server(tmp_path) as env:
        options = ("--hosts", "localhost,127.0.0.1", "--env", "JAX_PLATFORMS=cpu", "--env", f"PYTHONPATH={ROOT}")
        code, out, err = finish(start("ssh", *options, "--", *PEER, "add", tmp_path, env=env))
        assert code == 0 and out.count("sum 3 of 2 processes, restart 0") == 2, err
        for way in (signal.SIGTERM, signal.SIGKILL):
            folder = tmp_path / way.name
            folder.mkdir()
            process = start("ssh", *options, "--", *PEER, "wait", folder, env=env)
            until(lambda folder=folder: len(list(folder.glob("waiting-*"))) == 2, "two hosts")
            process.send_signal(way)
            code, _, err = finish(process)
            until(lambda folder=folder: len(list(folder.glob("stopped-*"))) == 2, "their end")
            assert way == signal.SIGKILL or code == 143, err


class server:
    """A context manager: sshd on a free port with keys of the test, and the environment in which `ssh` reaches it."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __enter__(self) -> dict[str, str]:
        folder = self._folder
        for name in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        with socket.socket() as found:
            found.bind(("", 0))
            port = found.getsockname()[1]
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # sshd of root demands it
        lines = {
            "Port": port, "ListenAddress": "127.0.0.1", "HostKey": folder / "host", "PidFile": folder / "sshd.pid",
            "AuthorizedKeysFile": folder / "user.pub", "StrictModes": "no", "UsePAM": "no", "PermitRootLogin": "yes",
        }  # fmt: skip
        (folder / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in lines.items()))
        with (folder / "sshd.log").open("w") as log:
            self._process = subprocess.Popen(
                [str(shutil.which("sshd")), "-D", "-e", "-f", str(folder / "sshd_config")], stderr=log
            )
        until(lambda: "listening" in (folder / "sshd.log").read_text(), "sshd")
        options = f"-F none -p {port} -i {folder}/user -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
        real = shutil.which("ssh")
        text = f'#!/bin/bash\nexec {real} {options} -o LogLevel=ERROR "$@"\n'
        return install(folder, "ssh", text)

    def __exit__(self, *_: object) -> None:
        with self._process:
            self._process.terminate()


def test_the_interpreter_and_the_folder_of_the_hosts_can_be_chosen(tmp_path, fake):
    (tmp_path / "elsewhere").mkdir()
    options = ("--hosts", "a", "--folder", tmp_path / "elsewhere", "--python", sys.executable)
    code, out, err = finish(start("ssh", *options, "--", "pwd", env=fake))
    assert (code, out) == (0, f"[a] {tmp_path}/elsewhere\n"), err
