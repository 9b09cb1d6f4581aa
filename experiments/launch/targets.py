"""The targets of `launch`, with their options. Nothing heavy is imported, so that --help is fast."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from experiments.command_help import PROGRAM, Command, parser_options

RESTARTS = 3
BACKOFF_SECONDS = 10.0
PORT = 8476
POLL_SECONDS = 30.0


class TargetParser(argparse.ArgumentParser):
    """A parser that leaves what follows the first `--` to the worker, as `words`."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        given = list(args or [])
        split = given.index("--") if "--" in given else len(given)
        found, unknown = super().parse_known_args(given[:split], namespace)
        found.words = given[split + 1 :]
        return found, unknown


def add_targets(command: argparse.ArgumentParser) -> None:
    """Add the targets to the parser of `launch`."""
    made = command.add_subparsers(dest="target", required=True, metavar="TARGET", parser_class=TargetParser)
    for name, target in TARGETS.items():
        usage = f"{PROGRAM} launch {name} {target.arguments}".rstrip() + " [OPTIONS] -- COMMAND"
        options: dict[str, Any] = parser_options(target) | {"prog": f"{PROGRAM} launch {name}", "usage": usage}
        each = made.add_parser(name, help=target.summary, **options)
        target.add_arguments(each)
        each.add_argument("-h", "--help", action="help", help="print this help")


def _whole(low: int, high: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number between {low} and {high}")
        return int(text)

    return whole


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0.0 <= number <= 86_400.0:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number of seconds between 0 and 86400")
    return number


def _shared(command: argparse.ArgumentParser, backoff: bool = True) -> None:
    command.add_argument("--dry-run", action="store_true", help="print the commands, and run nothing")
    command.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE",
        help="set a variable for COMMAND; NAME alone copies its value from here; may be repeated [default: none]",
    )  # fmt: skip
    command.add_argument(
        "--restarts", type=_whole(0, 1000), default=RESTARTS, metavar="N",
        help="restart the job after a failure, N times in a row at most",
    )  # fmt: skip
    if backoff:
        command.add_argument(
            "--backoff", type=_seconds, default=BACKOFF_SECONDS, metavar="SECONDS",
            help="pause before the first restart; doubled before each further one, up to 300",
        )  # fmt: skip


def _logs(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--logs", metavar="FOLDER", help="also write the output of each process to FOLDER [default: print it only]"
    )


def _local(command: argparse.ArgumentParser) -> None:
    command.add_argument("--processes", type=_whole(1, 512), default=1, metavar="N", help="processes to start")
    _logs(command)
    _shared(command)


def _ssh(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--hosts", required=True, metavar="HOSTS", help="a,b,c or a file with a host on each line; required"
    )
    command.add_argument(
        "--folder", metavar="FOLDER", help="folder of the code on every host [default: this folder's path]"
    )
    command.add_argument("--python", metavar="FILE", help="interpreter on every host [default: this one's path]")
    command.add_argument(
        "--coordinator", metavar="HOST", help="name by which all hosts reach the first [default: as in --hosts]"
    )
    command.add_argument(
        "--port", type=_whole(1024, 60_000), default=PORT, metavar="PORT",
        help="port of the first host for the others; the k-th restart uses PORT + k",
    )  # fmt: skip
    _logs(command)
    _shared(command)


def _slice(command: argparse.ArgumentParser) -> None:
    command.add_argument("--name", required=True, help="name of the slice or of the workload; required")
    command.add_argument("--accelerator", required=True, metavar="TYPE", help="such as v5litepod-16; required")
    command.add_argument("--zone", required=True, help="such as us-central1-a; required")
    command.add_argument("--project", help="Google Cloud project [default: gcloud's]")


def _tpu(command: argparse.ArgumentParser) -> None:
    _slice(command)
    command.add_argument("--spot", action="store_true", help="a cheaper slice, which may be preempted at any time")
    command.add_argument("--runtime", metavar="VERSION", help="software of the hosts [default: the type's]")
    command.add_argument(
        "--queue-for", metavar="DURATION", help="give up after waiting in the queue, such as 6h [default: wait]"
    )
    command.add_argument("--repo", metavar="URL", help="clone the code from URL [default: send this folder's]")
    command.add_argument("--commit", metavar="COMMIT", help="code to run [default: HEAD of this folder]")
    command.add_argument(
        "--setup",
        metavar="LINE",
        help="install with this shell line [default: Python 3.12 and the extras tpu, gcs, study]",
    )
    command.add_argument("--delete", action="store_true", help="delete the slice at the end, however the job ends")
    command.add_argument(
        "--poll", type=_seconds, default=POLL_SECONDS, metavar="SECONDS", help="time between two looks at its state"
    )
    _shared(command)


def _gke(command: argparse.ArgumentParser) -> None:
    _slice(command)
    command.add_argument("--cluster", required=True, help="name of a GKE cluster that xpk has set up; required")
    command.add_argument("--slices", type=_whole(1, 1024), default=1, metavar="N", help="slices of this type")
    command.add_argument("--image", help="container image that holds the code [default: --base-image]")
    command.add_argument("--base-image", metavar="IMAGE", help="image to which xpk adds this folder [default: --image]")
    _shared(command, backoff=False)


def _slurm(command: argparse.ArgumentParser) -> None:
    command.add_argument("--name", default="meshwork", help="name of the job")
    command.add_argument("--nodes", type=_whole(1, 10_000), default=1, metavar="N", help="nodes of the job")
    command.add_argument("--tasks", type=_whole(1, 512), default=1, metavar="N", help="processes on each node")
    command.add_argument(
        "--gpus", type=_whole(1, 64), metavar="N", help="GPUs of each node, one process for each [default: none]"
    )
    command.add_argument("--partition", metavar="NAME", help="partition [default: the cluster's]")
    command.add_argument("--account", metavar="NAME", help="account to charge [default: yours]")
    command.add_argument("--time", metavar="LIMIT", help="minutes or HH:MM:SS; it saves and requeues [default: none]")
    command.add_argument(
        "--warning", type=_whole(10, 3600), default=120, metavar="SECONDS", help="SIGTERM this long before --time ends"
    )
    command.add_argument("--logs", default="logs", metavar="FOLDER", help="folder of the output")
    _shared(command, backoff=False)


TARGETS: dict[str, Command] = {
    "local": Command(
        "", "", "Start N processes on this machine",
        ("launch local --processes 2 -- train quickstart --distributed",), _local,
    ),
    "ssh": Command(
        "", "--hosts HOSTS", "Start one process on each of several hosts",
        ("launch ssh --hosts a,b -- train quickstart --distributed",
         "launch ssh --hosts hosts.txt -- study glu_variants --storage URL --worker"), _ssh,
        "The hosts have the same folder, and let you log in without a password.",
    ),
    "tpu": Command(
        "", "--name NAME --accelerator TYPE --zone ZONE", "Get a Cloud TPU slice, and run on all its hosts",
        ("launch tpu --name one --accelerator v5litepod-16 --zone us-central1-a --spot -- train quickstart "
         "--distributed --run gs://BUCKET/one",), _tpu,
        "A preempted slice is asked for again, and the same command resumes on it. Needs gcloud.",
    ),
    "gke": Command(
        "", "--name NAME --cluster NAME --accelerator TYPE --zone ZONE", "Submit a workload to a GKE cluster with xpk",
        ("launch gke --name one --cluster main --accelerator v5litepod-16 --zone us-central1-a --base-image IMAGE -- "
         "train quickstart --distributed --run gs://BUCKET/one",), _gke,
        "Kubernetes restarts it. Needs xpk.",
    ),
    "slurm": Command(
        "", "", "Submit a batch job to SLURM",
        ("launch slurm --nodes 2 --gpus 8 --time 12:00:00 -- train quickstart --distributed",), _slurm,
        "The job requeues itself after a failure and at its time limit, and then resumes. Needs sbatch.",
    ),
}  # fmt: skip
