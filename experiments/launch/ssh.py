"""The target `ssh`: one process on each host of a list, in the same folder everywhere.

The hosts must share the folder or hold the same code, and the user must log in without a password (an agent or a key).
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.launch.job import LaunchError, placeholders, require, shown
from experiments.launch.local import WORKER, process_variables
from experiments.launch.processes import Start, run_processes
from experiments.launch.supervise import Outcome, StopRequests, keep_running

# No password prompt; and a host that does not answer for a minute is lost.
OPTIONS = ("-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4")
HOST = re.compile(r"(\w[\w.-]*@)?[A-Za-z0-9][\w.:-]*")  # never an option of ssh


def read_hosts(text: str) -> list[str]:
    """Return the hosts of `--hosts`: names with commas between them, or a file with one on each line.

    Raises LaunchError.
    """
    path = Path(text)
    if path.is_file():
        lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    elif "/" in text:
        raise LaunchError(f"--hosts {text}: there is no such file; give host names with commas between them, or a file")
    else:
        lines = [name.strip() for name in text.split(",")]
    hosts = [line for line in lines if line]
    if not hosts:
        raise LaunchError(f"--hosts {text}: names no host; write --hosts a,b or one host on each line of a file")
    for host in hosts:
        if not HOST.fullmatch(host):
            raise LaunchError(f"--hosts: {host!r} is not the name of a host, such as node1 or user@node1")
        if hosts.count(host) > 1:
            raise LaunchError(f"--hosts: {host} is named {hosts.count(host)} times; a host gets one process")
    return hosts


def remote_command(folder: str, python: str, words: Sequence[str], variables: Mapping[str, str]) -> str:
    """Return the line that a host's shell runs."""
    settings = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    worker = [python, "-m", WORKER, "--watch-stdin", "--", *words]
    return f"cd {shlex.quote(folder)} && exec env {' '.join(settings)} {shlex.join(worker)}"


def command_lines(
    args: Namespace, hosts: Sequence[str], words: Sequence[str], variables: Mapping[str, str], restart: int
) -> list[list[str]]:
    """Return the ssh command of each host. Each attempt has a new port: the last one may still be taken."""
    coordinator = f"{args.coordinator or hosts[0].rpartition('@')[2]}:{args.port + restart}"
    lines = []
    for index, host in enumerate(hosts):
        own = {**process_variables(index, len(hosts), coordinator, restart), **variables}
        lines.append(["ssh", *OPTIONS, host, remote_command(args.folder or os.getcwd(), python(args), words, own)])
    return lines


def python(args: Namespace) -> str:
    """Return the interpreter that the hosts use."""
    return args.python or sys.executable


def launch(args: Namespace, words: Sequence[str], variables: Mapping[str, str]) -> int:
    """Run the job on the hosts, or print its commands. Return its exit code."""
    hosts = read_hosts(args.hosts)
    if args.dry_run:
        for line in command_lines(args, hosts, words, placeholders(variables), 0):
            print(shown(line))
        return 0
    require("ssh")

    def attempt(restart: int) -> Outcome:
        lines = command_lines(args, hosts, words, variables, restart)
        return run_processes([Start(host, line) for host, line in zip(hosts, lines, strict=True)], stop, logs)

    logs = None if args.logs is None else Path(args.logs)
    with StopRequests() as stop:
        return keep_running(attempt, stop, args.restarts, args.backoff)
