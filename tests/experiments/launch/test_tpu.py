"""The target `tpu` against a gcloud that plays a script: waiting, preemption, failures, stops, deletion."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.launch.tpu import Code, Commands
from experiments.launch.tpu_types import find_slice
from tests.experiments.launch.launching import finish, install, start, until

SLICE = ("tpu", "--name", "one", "--accelerator", "v6e-16", "--zone", "us-east5-b", "--repo", "URL", "--commit", "abc")
QUICK = ("--poll", "0.05", "--backoff", "0.05")
TRAIN = ("--", "train", "smoke", "--distributed", "--run", "gs://b/one")
CREATE, DESCRIBE, DELETE = (f"queued-resources {verb} one" for verb in ("create", "describe", "delete"))


def begin(folder: Path, script: list[str], *options: str) -> subprocess.Popen:
    text = f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("fake_gcloud.py")} {folder} "$@"\n'
    (folder / "script").write_text("\n".join(script))
    return start(*SLICE, *QUICK, *options, *TRAIN, env=install(folder, "gcloud", text))


def calls(folder: Path) -> list[str]:
    """Return the calls of gcloud, those of describe left out."""
    return [call for call in (folder / "calls").read_text().splitlines() if call != DESCRIBE]


def test_a_slice_is_created_awaited_used_and_deleted(tmp_path):
    states = ["ABSENT", "CREATING", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "run 0"]
    code, _, err = finish(begin(tmp_path, states, "--delete"))
    assert code == 0, err
    assert calls(tmp_path) == [CREATE, "install", "run", DELETE]
    shown = [line.partition("one: ")[2] for line in err.splitlines() if line.startswith("launch: one: ")]
    assert shown == states[:-1] and "16 chips on 4 hosts" in err


def test_a_preempted_slice_is_asked_for_again_and_the_job_resumes(tmp_path):
    """The hosts vanish while ssh waits for them; the queued resource becomes SUSPENDED."""
    script = ["ABSENT", "PROVISIONING", "ACTIVE", "run forever", "ACTIVE", "SUSPENDING", "SUSPENDED", "ABSENT"]
    script += ["CREATING", "ACTIVE", "run 0"]
    code, _, err = finish(begin(tmp_path, script))
    assert code == 0, err
    assert calls(tmp_path) == [CREATE, "install", "run", DELETE, CREATE, "install", "run"]
    assert "the slice was lost (SUSPENDING); restart 1 of 3" in err
    assert "MESHWORK_RESTART=1" in (tmp_path / "command").read_text()
    assert "to delete it: gcloud compute tpus queued-resources delete one --zone=us-east5-b" in err


def test_a_failure_on_a_slice_that_stays_is_a_restart_without_another_setup(tmp_path):
    code, _, err = finish(begin(tmp_path, ["ACTIVE", "run 75", "ACTIVE", "ACTIVE", "run 0"]))
    assert code == 0 and calls(tmp_path) == ["install", "run", "run"], err
    assert "a step hangs, or another process is lost); restart 1 of 3" in err


def test_a_request_that_failed_is_deleted_and_made_again(tmp_path):
    code, _, err = finish(begin(tmp_path, ["FAILED", "ABSENT", "ACTIVE", "run 0"]))
    assert code == 0 and calls(tmp_path) == [DELETE, CREATE, "install", "run"], err


@pytest.mark.parametrize(("code", "restarts"), [(2, 0), (1, 1)])
def test_the_slice_is_deleted_although_the_job_fails(tmp_path, code, restarts):
    """Arguments that cannot be parsed are not tried again."""
    script = ["ACTIVE", f"run {code}", "ACTIVE", "ACTIVE", f"run {code}", "ACTIVE"]
    got, _, err = finish(begin(tmp_path, script, "--delete", "--restarts", "1"))
    assert got == code and calls(tmp_path) == ["install", *["run"] * (1 + restarts), DELETE], err


def test_a_signal_stops_the_job_on_the_hosts(tmp_path):
    process = begin(tmp_path, ["ACTIVE", "run forever", "ACTIVE"])
    until(lambda: (tmp_path / "command").exists(), "the job")
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 143 and calls(tmp_path) == ["install", "run", "stop"], err
    assert "restart" not in err


def test_a_signal_in_the_queue_leaves_the_request_there(tmp_path):
    process = begin(tmp_path, ["WAITING_FOR_RESOURCES"])
    until(lambda: (tmp_path / "calls").exists(), "the queue")
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130 and calls(tmp_path) == [] and "to delete it: gcloud" in err, err


def test_an_error_of_gcloud_is_reported_once(tmp_path):
    code, _, err = finish(begin(tmp_path, ["DENIED"]))
    assert code == 1 and calls(tmp_path) == [], err
    assert "error: gcloud cannot describe one: ERROR: (gcloud) PERMISSION_DENIED" in err and "Traceback" not in err


def test_a_network_that_fails_for_a_while_does_not_end_the_job(tmp_path):
    """gcloud cannot answer while the launcher waits, and while the job runs."""
    script = ["PROVISIONING", "DENIED", "ACTIVE", "run forever", "DENIED", "DENIED", "SUSPENDED", "ACTIVE", "run 0"]
    code, _, err = finish(begin(tmp_path, script))
    assert code == 0 and calls(tmp_path) == ["install", "run", "run"], err
    assert err.count("warning: gcloud cannot describe one") == 3 and "the slice was lost (SUSPENDED)" in err


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcloud") is None, reason="needs gcloud (https://cloud.google.com/sdk/docs/install)")
def test_gcloud_has_every_flag_that_is_used():
    """Its help is compared; nothing is sent to Google."""
    from argparse import Namespace

    args = Namespace(
        name="one", zone="us-east5-b", project="p", spot=True, queue_for="6h", runtime=None, setup=None, repo=None
    )
    commands = Commands(args, find_slice("v6e-16"), Code(None, "abc"))
    used = [commands.create(), commands.describe(), commands.delete(), *commands.install()[1:], commands.stop()]
    for words in used:
        verb = words[:5]
        done = subprocess.run([*verb, "--help"], capture_output=True, text=True, check=True)
        text = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
        for flag in {word.partition("=")[0] for word in words if word.startswith("--")}:
            assert f"{flag} " in text or f"{flag}=" in text or f"{flag}," in text or f"{flag}]" in text, (verb, flag)
