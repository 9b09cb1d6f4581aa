"""The target `tpu`: a Cloud TPU slice as a queued resource, which is asked for again after each preemption.

The state of the job is that of the queued resource, which `gcloud` reports; this process keeps none, so that the same
command continues after it was stopped. Flags are those of Google Cloud SDK 528 (`gcloud compute tpus ... --help`).
States: https://cloud.google.com/tpu/docs/queued-resources.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from experiments.launch.job import RESTART, ROOT, LaunchError, check_name, placeholders, require, shown
from experiments.launch.local import WORKER
from experiments.launch.supervise import NEVER_AGAIN, Outcome, StopRequests, describe, keep_running, say
from experiments.launch.tpu_types import Slice, check_zone, find_slice

PYTHON = ".venv/bin/python"  # on the hosts, below the folder of the code
LOST = ("SUSPENDING", "SUSPENDED", "FAILED", "DELETING")  # the slice is gone, or will be
RETRIES = 10  # of a question about the state that gcloud could not answer
ABSENT = "ABSENT"  # our name for a queued resource that does not exist
# gcloud repeats a command whose connection breaks, up to ten times: the worker's lock stops the job that it left.
KEEP_ALIVE = ("--ssh-flag=-oServerAliveInterval=30", "--ssh-flag=-oServerAliveCountMax=4")
# Meshwork needs Python 3.11; Ubuntu 22.04, the base of the software versions, has 3.10. uv brings another one.
SETUP = (
    "python3 -m pip install --quiet --user uv && ~/.local/bin/uv venv --quiet --allow-existing --python 3.12 .venv && "
    "~/.local/bin/uv pip install --quiet --python .venv/bin/python --constraints constraints.txt "
    "--editable '.[tpu,gcs,study]' 'psycopg[binary]'"
)


class Code(NamedTuple):
    """The code that the hosts run: a commit of the repository at `url`, or of this folder where that is None."""

    url: str | None
    commit: str

    @property
    def folder(self) -> str:
        return f"meshwork-{self.commit[:12]}"


@dataclass(frozen=True)
class Commands:
    """The commands of a slice. `python -m experiments launch tpu --dry-run` prints them."""

    args: Namespace
    slice: Slice
    code: Code

    def _gcloud(self, *words: str) -> list[str]:
        project = [] if self.args.project is None else [f"--project={self.args.project}"]
        return ["gcloud", "compute", "tpus", *words, f"--zone={self.args.zone}", *project]

    def create(self) -> list[str]:
        more = ["--spot"] if self.args.spot else []
        if self.args.queue_for is not None:
            more.append(f"--valid-until-duration={self.args.queue_for}")
        return [
            *self._gcloud("queued-resources", "create", self.args.name), f"--node-id={self.args.name}",
            f"--accelerator-type={self.slice.name}", f"--runtime-version={self.args.runtime or self.slice.runtime}",
            *more,
        ]  # fmt: skip

    def describe(self) -> list[str]:
        return [*self._gcloud("queued-resources", "describe", self.args.name), "--format=value(state.state)"]

    def delete(self) -> list[str]:
        return [*self._gcloud("queued-resources", "delete", self.args.name), "--force", "--quiet"]

    def ssh(self, line: str) -> list[str]:
        where = self._gcloud("tpu-vm", "ssh", self.args.name)
        return [*where, "--worker=all", *KEEP_ALIVE, f"--command={line}"]

    def install(self) -> list[list[str]]:
        """Return the commands that bring the code to all hosts and install what it needs."""
        folder, setup = self.code.folder, self.args.setup or SETUP
        if self.code.url is not None:
            clone = f"{{ test -d {folder} || git clone --quiet {shlex.quote(self.code.url)} {folder}; }}"
            bring = f"{clone} && git -C {folder} checkout --quiet {self.code.commit}"
            return [self.ssh(f"{bring} && cd {folder} && {setup}")]
        archive = f"{folder}.tar.gz"
        unpack = f"mkdir -p {folder} && tar --extract --gzip --file={archive} --directory={folder}"
        return [
            ["git", "-C", str(ROOT), "archive", "--format=tar.gz", f"--output=/tmp/{archive}", self.code.commit],
            [*self._gcloud("tpu-vm", "scp", f"/tmp/{archive}", f"{self.args.name}:"), "--worker=all"],
            self.ssh(f"{unpack} && cd {folder} && {setup}"),
        ]

    def run(self, words: Sequence[str], variables: Mapping[str, str], restart: int) -> list[str]:
        settings = {RESTART: str(restart), **variables}
        worker = [PYTHON, "-m", WORKER, "--lock", "../job.lock", "--hostname", "--", *words]
        written = " ".join(f"{name}={shlex.quote(value)}" for name, value in settings.items())
        return self.ssh(f"cd {self.code.folder} && exec env {written} {shlex.join(worker)}")

    def stop(self) -> list[str]:
        return self.ssh(f"cd {self.code.folder} && {PYTHON} -m {WORKER} --stop ../job.lock")


class SliceJob:
    """One job on one slice. `poll_seconds` passes between two looks at the state of the queued resource."""

    def __init__(self, commands: Commands, words: Sequence[str], variables: Mapping[str, str], stop: StopRequests,
                 poll_seconds: float):  # fmt: skip
        self._commands, self._words, self._variables = commands, words, variables
        self._stop, self._poll_seconds = stop, poll_seconds
        self._installed = False

    def state(self) -> str:
        """Return the state of the queued resource, or ABSENT. Raises LaunchError if gcloud cannot be asked."""
        done = subprocess.run(self._commands.describe(), capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
        if "NOT_FOUND" in done.stderr or "not found" in done.stderr:
            return ABSENT
        raise LaunchError(f"gcloud cannot describe {self._commands.args.name}: {' '.join(done.stderr.split())[-600:]}")

    def attempt(self, restart: int) -> Outcome:
        """Get the slice, install the code unless it is there, and run COMMAND once."""
        if not self._wait_until_active():
            return Outcome(self._stop.code, reason="stopped by a signal")
        if not self._installed:
            for command in self._commands.install():
                if (code := self._call(command)) != 0:
                    if self._stop.count:
                        return Outcome(self._stop.code, reason="stopped by a signal")
                    return Outcome(code, True, f"the setup of the hosts failed with {describe(code)}")
            self._installed = True
        say(f"running on {self._commands.slice.hosts} hosts")
        return self._run(restart)

    def _wait_until_active(self) -> bool:
        """Create the queued resource if it does not exist or is lost, and wait. Return whether it is active."""
        shown_state = None
        while not self._stop.count:
            state = self._steady_state(RETRIES if shown_state else 0)
            if state != shown_state:
                say(f"{self._commands.args.name}: {state}")
                shown_state = state
            if state == "ACTIVE":
                return True
            if state in LOST and state != "DELETING":
                self._checked(self._commands.delete())
                continue
            if state == ABSENT:
                self._installed = False
                self._checked(self._commands.create())
                continue
            self._stop.wait(self._poll_seconds)
        return False

    def _steady_state(self, retries: int) -> str:
        """Return the state. Asks again where gcloud fails, `retries` times, because networks do."""
        while True:
            try:
                return self.state()
            except LaunchError as error:
                if not retries or self._stop.wait(self._poll_seconds):
                    raise
                retries -= 1
                say(f"warning: {error}; asking again")

    def _state_while_running(self) -> str:
        """Return the state, or ACTIVE where gcloud fails: a job is not given up because of the launcher's network."""
        try:
            return self.state()
        except LaunchError as error:
            say(f"warning: {error}")
            return "ACTIVE"

    def _checked(self, command: list[str]) -> None:
        code = self._call(command)
        if code and not self._stop.count:
            raise LaunchError(
                f"gcloud failed with {describe(code)}; its message is above. The command: {shown(command)}"
            )

    def _call(self, command: list[str]) -> int:
        # A new session: Ctrl-C reaches the launcher alone, which lets gcloud end what it does, up to the third.
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True) as running:
            while True:
                try:
                    return running.wait(0.2)
                except subprocess.TimeoutExpired:
                    if self._stop.count > 2:
                        running.kill()

    def _run(self, restart: int) -> Outcome:
        command = self._commands.run(self._words, self._variables, restart)
        running = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        passed_on, lost = 0, None
        while (code := self._ended(running)) is None:
            if self._stop.count > 2:
                running.kill()
            elif passed_on < self._stop.count:
                passed_on += 1
                self._call(self._commands.stop())
            elif not self._stop.count and (state := self._state_while_running()) in (*LOST, ABSENT):
                lost = state
                running.kill()  # its hosts are gone, and ssh may wait for them
        if self._stop.count:
            return Outcome(0 if code == 0 else self._stop.code, reason="stopped by a signal")
        if code == 0:
            return Outcome(0)
        if lost is not None or (lost := self._steady_state(RETRIES)) in (*LOST, ABSENT):
            return Outcome(75, True, f"the slice was lost ({lost})")
        code = code if code > 0 else 128 - code
        return Outcome(code, code not in NEVER_AGAIN, f"the job ended with {describe(code)}")

    def _ended(self, running: subprocess.Popen) -> int | None:
        """Wait for the end of the job up to a poll, or a signal. Return its exit code, or None."""
        try:
            return running.wait(0.2)
        except subprocess.TimeoutExpired:
            pass
        waited = 0.2
        before = self._stop.count
        while waited < self._poll_seconds and self._stop.count == before:
            try:
                return running.wait(0.2)
            except subprocess.TimeoutExpired:
                waited += 0.2
        return None


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LaunchError(f"git {words[0]}: {done.stderr.strip()}; give --repo URL and --commit COMMIT")
    return done.stdout.strip()


def find_code(args: Namespace) -> Code:
    """Return the code to run. Raises LaunchError where it has no name."""
    if args.commit is not None and args.repo is not None:
        return Code(args.repo, args.commit)
    commit = _git("rev-parse", "--verify", f"{args.commit or 'HEAD'}^{{commit}}")
    if args.commit is None and _git("status", "--porcelain", "--untracked-files=no"):
        say(f"warning: changes that are not committed stay here; the hosts run {commit[:12]}")
    return Code(args.repo, commit)


def check_words(words: Sequence[str], found: Slice) -> None:
    """Raise LaunchError, or warn, where the command does not fit a slice of several hosts."""
    if "experiments" not in words[:3] or "train" not in words[3:4]:
        return
    if found.hosts > 1 and "--distributed" not in words:
        raise LaunchError(f"{found.name} has {found.hosts} hosts: add --distributed to the command")
    if not any(word.startswith("gs://") for word in words):
        say("warning: the run folder is on a disk of the slice, which a preemption deletes; add --run gs://BUCKET/NAME")


def launch(args: Namespace, words: Sequence[str], variables: Mapping[str, str]) -> int:
    """Run the job on a slice, or print its commands. Return its exit code. Raises LaunchError."""
    check_name("--name", args.name)
    found = find_slice(args.accelerator)
    if warning := check_zone(args.zone, found.family):
        say(f"warning: {warning}")
    check_words(words, found)
    commands = Commands(args, found, find_code(args))
    if args.dry_run:
        run = commands.run(words, placeholders(variables), 0)
        lines = [commands.create(), commands.describe(), *commands.install(), run]
        if args.delete:
            lines.append(commands.delete())
        for line in lines:
            print(shown(line))
        return 0
    require("gcloud", *(["git"] if args.repo is None else []))
    say(f"{found.name}: {found.chips} chips on {found.hosts} host{'s' if found.hosts > 1 else ''}")
    with StopRequests() as stop:
        job = SliceJob(commands, words, variables, stop, args.poll)
        try:
            return keep_running(job.attempt, stop, args.restarts, args.backoff)
        finally:
            sys.stdout.flush()
            if args.delete:
                subprocess.run(commands.delete(), stdin=subprocess.DEVNULL, start_new_session=True, check=False)
            else:
                say(f"{args.name} may still exist, and cost money; to delete it: {shown(commands.delete())}")
