"""The process on a host: it passes stops on, ends with its launcher, and replaces the job of a lost one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.launch import worker
from tests.experiments.launch.launching import ROOT, alive, until

PEER = [sys.executable, "-m", "tests.experiments.launch.peer"]


def begin(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.launch.worker", *map(str, arguments)], cwd=ROOT, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def pid_of(folder: Path) -> int:
    until(lambda: (folder / "waiting-0").exists() and (folder / "waiting-0").read_text() != "", "the program")
    return int((folder / "waiting-0").read_text())


@pytest.mark.parametrize("how", ["line", "end", "signal"])
def test_a_program_is_stopped_by_a_line_the_end_of_stdin_or_a_signal(tmp_path, how):
    with begin("--watch-stdin", "--", *PEER, "wait", tmp_path) as process:
        pid = pid_of(tmp_path)
        if how == "line":
            process.stdin.write("stop\n")
            process.stdin.flush()
        elif how == "signal":
            process.terminate()
        else:
            process.stdin.close()
        assert process.wait(30) == 143 and (tmp_path / "stopped-0").exists() and not alive(pid)
        process.stdin.close()


def test_a_shell_line_is_stopped_with_what_it_runs(tmp_path):
    with begin("--watch-stdin", "--", "bash", "-c", f"{' '.join(PEER)} wait {tmp_path}; exit 5") as process:
        pid = pid_of(tmp_path)
        process.communicate("stop\n", timeout=30)
        assert process.returncode == 143 and (tmp_path / "stopped-0").exists() and not alive(pid)


def test_a_program_that_ignores_stops_is_killed(tmp_path):
    line = f"trap '' TERM; echo $$ > {tmp_path}/waiting-0; while :; do sleep 0.1; done"
    with begin("--watch-stdin", "--", "bash", "-c", line) as process:
        pid = pid_of(tmp_path)
        process.stdin.write("stop\n")
        process.stdin.flush()
        assert alive(pid)
        process.communicate("kill\n", timeout=30)
        assert process.returncode == 128 + signal.SIGKILL and not alive(pid)


def test_lines_begin_with_the_name_of_the_host_and_the_exit_code_is_kept(tmp_path):
    (tmp_path / "fail").write_text("7 to stderr")
    done = begin("--hostname", "--", *PEER, "fail", tmp_path)
    out, _ = done.communicate(timeout=30)
    assert done.returncode == 7 and out == f"[{os.uname().nodename}] to stderr\n"
    missing = begin("--", "no-such-program")
    assert "no-such-program: cannot be started" in missing.communicate(timeout=30)[1] and missing.returncode == 127


def test_a_job_continues_without_a_reader_of_its_output(tmp_path):
    """As on a TPU VM whose ssh connection breaks."""
    line = f"echo one; sleep 0.5; echo two; sleep 0.5; echo three; touch {tmp_path}/end"
    with begin("--hostname", "--", "bash", "-c", line) as process:
        assert process.stdout.readline().endswith("] one\n")
        process.stdout.close()
        assert process.wait(30) == 0 and (tmp_path / "end").exists()


def test_a_job_of_a_lost_launcher_is_replaced_and_can_be_stopped(tmp_path):
    lock = tmp_path / "job.lock"
    with begin("--lock", lock, "--", *PEER, "wait", tmp_path) as first:
        pid = pid_of(tmp_path)
        (tmp_path / "second").mkdir()
        with begin("--lock", lock, "--", *PEER, "wait", tmp_path / "second") as second:
            pid_of(tmp_path / "second")
            assert first.wait(30) == 143 and not alive(pid)
            assert worker.main(["--stop", str(lock)]) == 0
            _, err = second.communicate(timeout=30)
    assert second.returncode == 143 and (tmp_path / "second/stopped-0").exists()
    assert "stopped an earlier job" in err


def test_a_lock_of_another_program_is_not_touched(tmp_path, capsys):
    lock = tmp_path / "job.lock"
    with subprocess.Popen(["sleep", "60"]) as other:
        lock.write_text(f"{other.pid} {other.pid}\n")  # a number that the system has given to another program
        assert worker.main(["--stop", str(lock)]) == 0 and "no job" in capsys.readouterr().out
        assert other.poll() is None
        other.kill()
