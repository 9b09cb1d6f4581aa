"""The processes of one attempt, on this machine or behind ssh: their output, their end, and the way to stop them."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO

from experiments.launch.supervise import NEVER_AGAIN, Outcome, StopRequests, describe, say

GRACE_SECONDS = 60.0  # for the other processes after one has failed; a lost peer is noticed after 30 s
KILL_SECONDS = 5.0  # for a worker to kill its program
POLL_SECONDS = 0.1
PEER_LOST = 75  # train/peer_watch.py: the process is a victim of another one

_print_lock = threading.Lock()


@dataclass(frozen=True)
class Start:
    """A process to start: the label of its output, its program, and its environment (None: that of this process)."""

    name: str
    words: Sequence[str]
    env: Mapping[str, str] | None = None


class Running:
    """A process whose output is printed with a label, and written to a log file if a folder is given."""

    def __init__(self, start: Start, logs: Path | None):
        self.name = start.name
        self.refused = False  # whether it printed an error that the user must fix
        self._process = subprocess.Popen(
            start.words, env=start.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches it once, from this process
        )  # fmt: skip
        assert self._process.stdout is not None and self._process.stderr is not None
        self._log = None if logs is None else (logs / f"{start.name}.log").open("ab")
        self._threads = [
            threading.Thread(target=self._copy, args=pair, daemon=True)
            for pair in ((self._process.stdout, sys.stdout), (self._process.stderr, sys.stderr))
        ]
        for thread in self._threads:
            thread.start()

    def _copy(self, source: BinaryIO, sink: TextIO) -> None:
        for line in source:
            self.refused |= source is self._process.stderr and line.startswith(b"error: ")
            with _print_lock:
                print(f"[{self.name}] {line.decode(errors='replace').rstrip()}", file=sink, flush=True)
                if self._log is not None:
                    self._log.write(line)
                    self._log.flush()

    def poll(self) -> int | None:
        """Return the exit code, 128 + signal for a signal; None while it runs."""
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def stop(self, word: bytes = b"stop") -> None:
        """Ask the worker (worker.py) at the other end to stop its program, or to "kill" it."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(word + b"\n")
            self._process.stdin.flush()

    def close(self) -> None:
        """End the process if it still runs, and wait for its output."""
        self.stop(b"kill")
        try:
            self._process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for thread in self._threads:
            thread.join(5.0)  # a grandchild may hold the pipe
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr, self._log):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def run_processes(
    starts: Sequence[Start],
    stop: StopRequests,
    logs: Path | None = None,
    grace_seconds: float = GRACE_SECONDS,
    log: Callable[[str], None] = say,
) -> Outcome:
    """Run the processes of one attempt to their end. Where one fails, the others are stopped.

    A stop request is passed to all, and so is the second, which makes a run exit at once; the third kills. The exit
    code is that of the first process that failed, because the others fail as its victims.
    """
    if logs is not None:
        logs.mkdir(parents=True, exist_ok=True)
    running: list[Running] = []
    failed: tuple[Running, int] | None = None
    deadline, passed_on = float("inf"), 0
    try:
        for start in starts:
            running.append(Running(start, logs))
        while True:
            codes = {each: each.poll() for each in running}
            bad = [(each, code) for each, code in codes.items() if code]
            if bad and failed is None:
                failed = min(bad, key=lambda pair: pair[1] == PEER_LOST)
                others = [each for each, code in codes.items() if code is None]
                if not stop.count:
                    if others:
                        names = ", ".join(each.name for each in others)
                        log(f"process {failed[0].name} ended with {describe(failed[1])}; stopping {names}")
                    for each in others:
                        each.stop()
                    deadline = time.monotonic() + grace_seconds
            if None not in codes.values() or time.monotonic() > deadline or stop.count > 2:
                break
            if passed_on < stop.count:
                passed_on += 1
                for each, code in codes.items():
                    if code is None:
                        each.stop()
            time.sleep(POLL_SECONDS)
    finally:
        for each in running:
            each.close()
    if stop.count:
        return Outcome(0 if all(code == 0 for code in codes.values()) else stop.code, reason="stopped by a signal")
    return Outcome(0) if failed is None else _outcome(*failed)


def _outcome(process: Running, code: int) -> Outcome:
    fixable = code == 1 and process.refused  # "error: ..." names something that the user must change
    return Outcome(code, code not in NEVER_AGAIN and not fixable, f"process {process.name}: {describe(code)}")
