"""The process on a host that runs COMMAND for a launcher: it passes signals on, and it never outlives the launcher.

    python -m experiments.launch.worker [--watch-stdin] [--hostname] [--lock FILE] -- PROGRAM [ARGUMENTS]
    python -m experiments.launch.worker --stop FILE

With --watch-stdin, each line on stdin asks the program to stop (SIGTERM), and so does the end of stdin; the line "kill"
kills it. That reaches a host over ssh without a terminal, and also when the launcher or the network is lost. With
--lock, a job of the same lock that a lost launcher has left is stopped first, because it would hold the accelerator.
Exit code: that of the program, or 128 + the number of the signal that ended it. Only the standard library is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import BinaryIO

GRACE_SECONDS = 120.0  # to save after the launcher is lost, or for a job that another replaces; then SIGKILL


class Program:
    """A program in a session of processes that is signalled as one if a shell leads it, and killed as one."""

    def __init__(self, words: list[str], hostname: bool):
        # A terminal's Ctrl-C must reach the program once, from the launcher: hence a new session.
        output = subprocess.PIPE if hostname else None
        self._process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT if hostname else None,
            start_new_session=True,
        )  # fmt: skip
        self.pid = self._process.pid
        self._shell = words[:2] == ["bash", "-c"]

    def stop(self, *_: object) -> None:
        """Ask the program to stop. The second request makes a run exit at once."""
        with contextlib.suppress(ProcessLookupError):
            if self._shell:
                os.killpg(self.pid, signal.SIGTERM)
            else:
                self._process.terminate()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Copy the output, if it is labelled, and return the exit code."""
        if self._process.stdout is not None:
            label = f"[{socket.gethostname()}] ".encode()
            for line in self._process.stdout:
                with contextlib.suppress(OSError):  # the connection to the launcher is lost, and the job continues
                    sys.stdout.buffer.write(label + line)
                    sys.stdout.buffer.flush()
        code = self._process.wait()
        self.kill()  # what it has left behind
        return code if code >= 0 else 128 - code


def watch(stdin: BinaryIO, program: Program, grace_seconds: float = GRACE_SECONDS) -> None:
    """Stop the program at each line of `stdin`, and at its end; a line "kill" kills it."""
    with contextlib.suppress(OSError):
        while line := stdin.readline():
            program.kill() if line.strip() == b"kill" else program.stop()
    program.stop()
    time.sleep(grace_seconds)
    program.kill()


def stop_job(lock: Path, grace_seconds: float | None) -> bool:
    """Stop the job of a lock, and wait for its end up to `grace_seconds` (None: do not wait). Return whether it runs.

    The lock holds the numbers of the worker and of its program.
    """
    try:
        worker, program = map(int, lock.read_text().split())
        if b"experiments.launch.worker" not in Path(f"/proc/{worker}/cmdline").read_bytes():
            return False
        os.kill(worker, signal.SIGTERM)
    except (OSError, ValueError):
        return False
    if grace_seconds is None:
        return True
    end = time.monotonic() + grace_seconds
    while _runs(worker):
        if time.monotonic() > end:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program, signal.SIGKILL)
            end = float("inf")
        time.sleep(0.1)
    return True


def _runs(pid: int) -> bool:
    """Return whether a process runs. One that has ended stays in /proc until its parent has read its exit code."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def main(arguments: list[str]) -> int:
    """Run the program and return its exit code; 127 if it cannot be started."""
    parser = argparse.ArgumentParser(prog="python -m experiments.launch.worker", allow_abbrev=False)
    parser.add_argument("--watch-stdin", action="store_true")
    parser.add_argument("--hostname", action="store_true", help="begin each line of output with this machine's name")
    parser.add_argument("--lock", type=Path, metavar="FILE")
    parser.add_argument("--stop", type=Path, metavar="FILE")
    split = arguments.index("--") if "--" in arguments else len(arguments)
    args, words = parser.parse_args(arguments[:split]), arguments[split + 1 :]
    if args.stop is not None:
        print("asked the job to stop" if stop_job(args.stop, None) else "there is no job to stop", flush=True)
        return 0
    if not words:
        parser.error("no program after --")
    if args.lock is not None and stop_job(args.lock, GRACE_SECONDS):
        print(f"stopped an earlier job of {args.lock}, whose launcher was lost", file=sys.stderr, flush=True)
    try:
        program = Program(words, args.hostname)
    except OSError as error:
        print(f"error: {words[0]}: cannot be started ({error.strerror}) in {os.getcwd()}", file=sys.stderr)
        return 127
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, program.stop)
    if args.lock is not None:
        args.lock.write_text(f"{os.getpid()} {program.pid}\n")
    if args.watch_stdin:
        threading.Thread(target=watch, args=(sys.stdin.buffer, program), daemon=True).start()
    return program.wait()


if __name__ == "__main__":
    code = main(sys.argv[1:])
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)  # an orderly exit would wait for the thread that reads stdin
