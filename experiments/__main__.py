"""The command line: python -m experiments list | show | train | compile | eval | generate | import | export | upcycle |
report.

Exit codes: 0 done, or a run that is finished; 1 the user must change something, which one paragraph on stderr names; 2
the arguments cannot be parsed; 75 a step hangs or another process is lost; 130 and 143 stopped by Ctrl-C or SIGTERM,
after which the same command continues.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from experiments.stopping import Stopped
from train.config_io import ConfigError
from train.host_memory import keep_freed_memory

STOPPED = "stopped by {name}: what was saved is kept, and the same command continues from there"
LARGEST = 2**31 - 1  # of a count on the command line


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = _parser().parse_args(arguments)
    if args.command in ("train", "eval"):
        keep_freed_memory()
    from data.config import DataError
    from experiments import commands
    from train.records import RunFolderError

    code = 1
    failure: Exception | None = None
    try:
        commands.refuse_other_encodings(args)
        return getattr(commands, f"{args.command}_command")(args)
    except (ConfigError, DataError, RunFolderError, commands.UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
        failure = error
    except RuntimeError as error:
        # Seconds of imports, which a command that could raise these has already paid.
        from train.checkpoint import CheckpointError
        from train.hooks import NonfiniteError

        if not isinstance(error, CheckpointError | NonfiniteError):
            raise
        print(f"error: {error}", file=sys.stderr)
        failure = error
    except Stopped:
        print(STOPPED.format(name="SIGTERM"), file=sys.stderr)
        code = Stopped.code
    except KeyboardInterrupt:
        print(STOPPED.format(name="SIGINT"), file=sys.stderr)
        code = 130
    if getattr(args, "distributed", False):
        # An orderly exit would wait for peers that wait for this process.
        if failure is not None:
            from train.peer_watch import say_farewell

            say_farewell(failure)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (subject, help, add_arguments) in COMMANDS.items():
        command = commands.add_parser(name, help=help, description=help)
        if subject is not None:
            command.add_argument("subject", metavar=subject)
        add_arguments(command)
    return parser


def _integer(low: int, high: int = LARGEST) -> Callable[[str], int]:
    """Return a parser of whole numbers between `low` and `high`, written in ASCII digits."""

    def integer(text: str) -> int:
        if not text.isascii():
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number in the digits 0 to 9")
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number such as {max(low, 4)}") from None
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{text[:40]} is not between {low} and {high}")
        return number

    return integer


def _number(text: str) -> float:
    """Parse a finite number, written in ASCII digits."""
    try:
        number = float(text) if text.isascii() else float("nan")
    except ValueError:
        number = float("nan")
    if not abs(number) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number such as 0.8")
    return number


def _settable(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", dest="overrides",
        help="change a field of the config, e.g. --set model.moe.top_k=3; may be repeated",
    )  # fmt: skip


def _step(command: argparse.ArgumentParser) -> None:
    command.add_argument("--step", type=_integer(0), help="step of the checkpoint (default: the newest good one)")


def _nothing(command: argparse.ArgumentParser) -> None:
    """`list` and `report` take no option."""


def _show(command: argparse.ArgumentParser) -> None:
    _settable(command)
    command.add_argument("--all", action="store_true", help="print every field, not only those that differ")
    command.add_argument("--devices", type=_integer(1), help="number of devices to lay out for (default: those here)")


def _compile(command: argparse.ArgumentParser) -> None:
    _settable(command)
    command.add_argument(
        "--topology", required=True, help="generation and chips along each axis, such as v5p:4x4x4 or v5e:16x16"
    )
    command.add_argument("--save", metavar="FILE", help="write the figures as JSON, too")


def _train(command: argparse.ArgumentParser) -> None:
    _settable(command)
    command.add_argument(
        "--run",
        metavar="NAME",
        help="name of the run under runs/, or a path to a folder that is new, empty or a run's (default: the "
        "experiment's name)",
    )
    command.add_argument("--resume", metavar="RUN", help="continue this run")
    command.add_argument(
        "--override", action="store_true", help="continue although the run folder belongs to another config"
    )
    command.add_argument(
        "--distributed",
        action="store_true",
        help="be one of several processes: JAX finds the others on a TPU pod or under SLURM; elsewhere set "
        "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. The run folder must be on a file system that "
        "they share",
    )


def _eval(command: argparse.ArgumentParser) -> None:
    _settable(command)
    _step(command)
    command.add_argument(
        "--stride", type=_integer(1), help="tokens scored in a window; the rest is context (default: the run's)"
    )


def _generate(command: argparse.ArgumentParser) -> None:
    _settable(command)
    _step(command)
    command.add_argument("--prompt", action="append", required=True, help="text to continue; may be repeated")
    command.add_argument(
        "--chat", action="store_true", help="apply the chat template; the prompt is the user's message"
    )
    command.add_argument("--system", help="system message; requires --chat")
    command.add_argument("--max-new-tokens", type=_integer(1), default=128)
    command.add_argument("--temperature", type=_number, default=0.8, help="0 takes the likeliest token")
    command.add_argument("--top-k", type=_integer(0), default=0, help="keep the k likeliest tokens; 0 keeps all")
    command.add_argument("--top-p", type=_number, default=1.0, help="keep the likeliest tokens up to this probability")
    command.add_argument(
        "--min-p", type=_number, default=0.0, help="keep tokens at least this fraction as likely as the best"
    )
    command.add_argument("--repetition-penalty", type=_number, default=1.0)
    command.add_argument("--frequency-penalty", type=_number, default=0.0)
    command.add_argument("--presence-penalty", type=_number, default=0.0)
    command.add_argument("--seed", type=_integer(0, 2**32 - 1), default=0)
    command.add_argument("--stream", action="store_true", help="print the text as it is made")
    command.add_argument("--logprobs", action="store_true", help="print each token with its log-probability (nats)")


def _import(command: argparse.ArgumentParser) -> None:
    _settable(command)
    command.add_argument("--name", required=True, help="name of the run under runs/")
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="type that the weights are stored in"
    )
    command.add_argument("--tokenizer", metavar="PATH", help="tokenizer, if it is not beside the weights")
    command.add_argument("--dry-run", action="store_true", help="read headers alone, and print what would be done")


def _export(command: argparse.ArgumentParser) -> None:
    _settable(command)
    _step(command)
    command.add_argument("--to", required=True, metavar="FOLDER", help="folder to make")
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="type that the weights are stored in",
    )
    command.add_argument("--family", help="architecture to write (default: the first that can say all of the config)")
    command.add_argument("--dry-run", action="store_true", help="print what would be written")


def _upcycle(command: argparse.ArgumentParser) -> None:
    _settable(command)
    _step(command)
    command.add_argument("--run", metavar="NEW", required=True, help="name of the new run under runs/, or a path")


# Of each command: what its argument is, what it does, and its options.
COMMANDS: dict[str, tuple[str | None, str, Callable[[argparse.ArgumentParser], None]]] = {
    "list": (None, "every experiment with its question, source and cost", _nothing),
    "show": ("EXPERIMENT", "resolved config, parameters with shapes and shardings, FLOPs", _show),
    "compile": ("EXPERIMENT", "check the memory and the traffic of a step on TPUs you don't have", _compile),
    "train": ("EXPERIMENT|RUN", "train, evaluate, sample and report; the same command again resumes", _train),
    "eval": ("RUN", "bits per byte on all held-out files", _eval),
    "generate": ("RUN", "continue a prompt", _generate),
    "import": ("PATH", "make a run of a published model: a Hugging Face folder or a GGUF file", _import),
    "export": ("RUN", "write a run as a Hugging Face folder that transformers loads", _export),
    "upcycle": ("DENSE_RUN", "write a run whose experts start as the MLPs of a dense run", _upcycle),
    "report": ("RUN", "write the run's report.html again", _nothing),
}


if __name__ == "__main__":
    sys.exit(main())
