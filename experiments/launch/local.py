"""The target `local`: N processes on this machine, which find each other at a free port."""

from __future__ import annotations

import os
import socket
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.launch.job import RESTART, shown
from experiments.launch.processes import Start, run_processes
from experiments.launch.supervise import Outcome, StopRequests, keep_running

WORKER = "experiments.launch.worker"


def free_port() -> int:
    """Return a TCP port that is free on this machine."""
    with socket.socket() as found:
        found.bind(("", 0))
        return found.getsockname()[1]


def process_variables(index: int, count: int, coordinator: str, restart: int) -> dict[str, str]:
    """Return what `--distributed` reads (commands.join_processes), and how often the job was started again."""
    return {
        "JAX_COORDINATOR_ADDRESS": coordinator,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
        RESTART: str(restart),
    }


def command_lines(
    words: Sequence[str], variables: Mapping[str, str], count: int, port: str, restart: int
) -> list[tuple[list[str], dict[str, str]]]:
    """Return the program of each process and the variables that it adds to this environment.

    MESHWORK_WORKER gives the workers of a study cores that no other uses (study/launch.take_cores).
    """
    worker = [sys.executable, "-m", WORKER, "--watch-stdin", "--", *words]
    found = []
    for index in range(count):
        own = process_variables(index, count, f"localhost:{port}", restart) if count > 1 else {RESTART: str(restart)}
        found.append((worker, {**own, "MESHWORK_WORKER": f"{index}/{count}", **variables}))
    return found


def launch(args: Namespace, words: Sequence[str], variables: Mapping[str, str]) -> int:
    """Run the job on this machine, or print its commands. Return its exit code."""
    if args.dry_run:
        for line, own in command_lines(words, variables, args.processes, "PORT", 0):
            print(shown(line, own))
        return 0

    def attempt(restart: int) -> Outcome:
        lines = command_lines(words, variables, args.processes, str(free_port()), restart)
        starts = [Start(str(i), line, {**os.environ, **own}) for i, (line, own) in enumerate(lines)]
        return run_processes(starts, stop, logs)

    logs = None if args.logs is None else Path(args.logs)
    with StopRequests() as stop:
        return keep_running(attempt, stop, args.restarts, args.backoff)
