"""Helpers that start the launcher as a program, in a folder of the test."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[3]
FLAGS = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"  # speed is not tested
PEER = ("python", "-m", "tests.experiments.launch.peer")


def start(*arguments: object, env: dict[str, str] | None = None, cwd: Path = ROOT) -> subprocess.Popen:
    """Start `python -m experiments launch ARGUMENTS`."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_NUM", "JAX_PROCESS", "JAX_COORD", "SLURM"))}
    return subprocess.Popen(
        [sys.executable, "-m", "experiments", "launch", *map(str, arguments)], cwd=cwd, text=True,
        env=clean | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": FLAGS} | (env or {}),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen, seconds: float = 120.0) -> tuple[int, str, str]:
    """Return (exit code, stdout, stderr); kill the launcher if it does not end."""
    with process:
        try:
            out, err = process.communicate(timeout=seconds)
        finally:
            process.kill()
    return process.returncode, out, err


def until(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    """Wait until the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:g} s for {what}"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return done.stdout.strip()[:1] not in ("", "Z")


def install(folder: Path, name: str, text: str) -> dict[str, str]:
    """Write a program to FOLDER/bin, and return the environment that finds it first."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return {"PATH": f"{path.parent}{os.pathsep}{os.environ['PATH']}"}
