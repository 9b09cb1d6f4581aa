"""The command line: python -m experiments COMMAND. `--help` lists the commands.

Exit codes: 0 done, or a run that is finished; 1 the user must change something, which one paragraph on stderr names; 2
the arguments cannot be parsed; 75 a step hangs or another process is lost; 76 a device computes wrong; 130 and 143
stopped by Ctrl-C or SIGTERM, after which the same command continues.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from experiments.command_help import Command, make_parser
from experiments.launch.targets import add_targets
from experiments.stopping import Stopped
from train.config_io import ConfigError
from train.host_memory import keep_freed_memory
from train.profile_steps import ProfileSteps

STOPPED = "stopped by {name}: what was saved is kept, and the same command continues from there"
LARGEST = 2**31 - 1  # of a count on the command line
DESCRIPTION = "Train, measure and use language models in JAX."
EPILOGUE = """\
EXPERIMENT is a name that 'list' prints. RUN is a name under runs/, or the path
of a run's folder, local or gs://. 'python -m experiments COMMAND --help' prints
the options of a command and an example.

Exit codes:
  0         done
  1         something to change, named on stderr
  2         arguments that cannot be parsed
  75        a step hangs, or another process is lost
  76        a device computes wrong, which stderr names
  130, 143  stopped by Ctrl-C or SIGTERM; the same command continues
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = make_parser(COMMANDS, DESCRIPTION, EPILOGUE).parse_args(arguments)
    if args.command in ("train", "eval", "study", "search"):
        keep_freed_memory()
    from data.config import DataError
    from experiments import commands
    from train.records import RunFolderError

    code = 1
    failure: Exception | None = None
    try:
        commands.refuse_other_encodings(args)
        return getattr(commands, f"{args.command.replace('-', '_')}_command")(args)
    except (ConfigError, DataError, RunFolderError, commands.UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
        failure = error
    except RuntimeError as error:
        # Seconds of imports, which a command that could raise these has already paid.
        from train.checkpoint import CheckpointError
        from train.device_check import EXIT_WRONG_DEVICE, DeviceError
        from train.hooks import DivergedError

        if not isinstance(error, CheckpointError | DivergedError | DeviceError):
            raise
        print(f"error: {error}", file=sys.stderr)
        failure = error
        if isinstance(error, DeviceError):
            code = EXIT_WRONG_DEVICE
    except Exception as error:
        from train.bucket import is_client_error, reason_of

        if not is_client_error(error):
            raise
        print(f"error: {reason_of(error)}", file=sys.stderr)
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


def _experiment(command: argparse.ArgumentParser) -> None:
    command.add_argument("subject", metavar="EXPERIMENT", help="name of an experiment")


def _run(command: argparse.ArgumentParser) -> None:
    command.add_argument("subject", metavar="RUN", help="name of a run under runs/, or path of its folder")


def _settable(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", dest="overrides",
        help="change a field of the config, such as model.moe.top_k=3; may be repeated",
    )  # fmt: skip


def _step(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--step", type=_integer(0), metavar="N", help="step of the checkpoint [default: the newest good one]"
    )


def _list(command: argparse.ArgumentParser) -> None:
    """`list` takes no argument."""


def _show(command: argparse.ArgumentParser) -> None:
    _experiment(command)
    _settable(command)
    command.add_argument("--all", action="store_true", help="print every field [default: those that differ]")
    command.add_argument(
        "--devices", type=_integer(1), metavar="N", help="devices to shard for, present or not [default: those here]"
    )


def _compile(command: argparse.ArgumentParser) -> None:
    _experiment(command)
    _settable(command)
    command.add_argument(
        "--topology", required=True, metavar="CHIPS",
        help="TPU generation and chips along each axis, such as v5p:4x4x4 or v5e:16x16; required",
    )  # fmt: skip
    command.add_argument("--save", metavar="FILE", help="write the figures as JSON, too [default: print them only]")


def _train(command: argparse.ArgumentParser) -> None:
    command.add_argument("subject", metavar="EXPERIMENT|RUN", help="name of an experiment, or an imported run")
    _settable(command)
    command.add_argument(
        "--run", metavar="NAME",
        help="name of the run under runs/, or a path to a folder that is new, empty or a run's [default: the name of "
        "the experiment]",
    )  # fmt: skip
    command.add_argument("--resume", metavar="RUN", help="continue this run, whose config is then the base of --set")
    command.add_argument(
        "--override", action="store_true",
        help="continue although the run's folder has another config [default: refuse]",
    )  # fmt: skip
    command.add_argument(
        "--profile", type=_profile_steps, metavar="STEPS",
        help="trace these steps into the run's folder, and print where their time goes: a range such as 10-15, or a "
        "number of steps after the first three of this start [default: no trace]",
    )  # fmt: skip
    command.add_argument(
        "--distributed", action="store_true",
        help="be one of several processes, which share the run's folder. JAX finds the others on a TPU pod or under "
        "SLURM; elsewhere set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID [default: one process]",
    )  # fmt: skip


def _profile_steps(text: str) -> ProfileSteps:
    """Parse the steps of --profile."""
    try:
        return ProfileSteps.parse(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--profile ")) from None


def _eval(command: argparse.ArgumentParser) -> None:
    _run(command)
    _settable(command)
    _step(command)
    command.add_argument(
        "--stride", type=_integer(1), metavar="TOKENS",
        help="tokens scored in each window; those before them are context [default: as the run was trained]",
    )  # fmt: skip


def _generate(command: argparse.ArgumentParser) -> None:
    _run(command)
    command.add_argument(
        "--prompt", action="append", required=True, metavar="TEXT", help="text to continue; required, may be repeated"
    )
    command.add_argument("--chat", action="store_true", help="apply the chat template to the prompt, a user's message")
    command.add_argument("--system", metavar="TEXT", help="system message; requires --chat")
    command.add_argument("--stream", action="store_true", help="print the text as it is generated")
    command.add_argument("--logprobs", action="store_true", help="print each token with its log-probability (nats)")
    command.add_argument("--max-new-tokens", type=_integer(1), default=128, metavar="N", help="tokens to generate")
    _settable(command)
    _step(command)
    sampling = command.add_argument_group("sampling")
    sampling.add_argument(
        "--temperature", type=_number, default=0.8, metavar="T", help="0 always takes the most likely token"
    )
    sampling.add_argument(
        "--top-k", type=_integer(0), default=0, metavar="K", help="keep the K most likely tokens; 0 keeps all"
    )
    sampling.add_argument(
        "--top-p", type=_number, default=1.0, metavar="P", help="keep the likeliest tokens up to this probability"
    )
    sampling.add_argument(
        "--min-p", type=_number, default=0.0, metavar="P",
        help="keep tokens whose probability is at least this fraction of the largest",
    )  # fmt: skip
    sampling.add_argument(
        "--repetition-penalty", type=_number, default=1.0, metavar="X", help="above 1 makes repeated tokens less likely"
    )
    sampling.add_argument(
        "--frequency-penalty", type=_number, default=0.0, metavar="X", help="taken from a logit for each occurrence"
    )
    sampling.add_argument(
        "--presence-penalty", type=_number, default=0.0, metavar="X", help="taken once from the logit of a used token"
    )
    sampling.add_argument("--seed", type=_integer(0, 2**32 - 1), default=0, metavar="N", help="seed of the sampling")


def _import(command: argparse.ArgumentParser) -> None:
    command.add_argument("subject", metavar="PATH", help="a Hugging Face folder, or a GGUF file")
    _settable(command)
    command.add_argument("--name", required=True, help="name of the new run under runs/; required")
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="type of the stored weights"
    )
    command.add_argument("--tokenizer", metavar="PATH", help="tokenizer [default: the one beside the weights]")
    command.add_argument("--dry-run", action="store_true", help="read the headers only, and print the plan")


def _export(command: argparse.ArgumentParser) -> None:
    _run(command)
    _settable(command)
    _step(command)
    command.add_argument("--to", required=True, metavar="FOLDER", help="new folder to write; required")
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="type of the stored weights"
    )
    command.add_argument("--family", help="architecture to write [default: the first that can express the config]")
    command.add_argument("--dry-run", action="store_true", help="print what would be written")


def _upcycle(command: argparse.ArgumentParser) -> None:
    command.add_argument("subject", metavar="DENSE_RUN", help="name or path of a run without experts")
    _settable(command)
    _step(command)
    command.add_argument(
        "--run", metavar="NEW", required=True, help="name of the new run under runs/, or a path; required"
    )


def _compare(command: argparse.ArgumentParser) -> None:
    _run(command)
    command.add_argument("others", metavar="RUN", nargs="+", help="the runs to compare it with")
    command.add_argument("--to", metavar="FILE", default="runs/comparison.html", help="page to write, or overwrite")


def _inspect(command: argparse.ArgumentParser) -> None:
    _run(command)
    command.add_argument(
        "--text", required=True, metavar="TEXT", help="text to read; @FILE reads it from a file in UTF-8; required"
    )
    command.add_argument(
        "--max-tokens", type=_integer(2), metavar="N",
        help="tokens to show, from the start of the text [default: 256, or fewer if the network or the page holds "
        "fewer]",
    )  # fmt: skip
    command.add_argument("--to", metavar="FILE", help="page to write, or overwrite [default: inspect.html in RUN]")
    _settable(command)
    _step(command)


def _shared_by_workers(command: argparse.ArgumentParser) -> None:
    """Options of commands that run trials in worker processes."""
    command.add_argument(
        "--workers", type=_integer(1, 4096), metavar="N",
        help="processes on this machine [default: one for each core, or one with an accelerator]",
    )  # fmt: skip
    command.add_argument(
        "--vectorize", type=_integer(1, 1024), metavar="K",
        help="trials that differ in seeds and rates alone train up to K at a time [default: 1 on a CPU or with several "
        "devices, 4 on one accelerator]",
    )  # fmt: skip
    command.add_argument(
        "--storage", default="sqlite:///runs/studies.db", metavar="URL",
        help="database of the trials; machines that share it share the work",
    )  # fmt: skip
    command.add_argument(
        "--max-minutes", type=_number, metavar="M", help="stop at a step after M minutes, and save [default: no limit]"
    )


def _study(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "subject", metavar="STUDY", nargs="?", help="name of a study, or a file.py with one [default: list them]"
    )
    command.add_argument("--scale", default="cpu", metavar="SCALE", help="size of the trials: ci, cpu, gpu or tpu")
    _shared_by_workers(command)
    command.add_argument("--to", default="docs/studies", metavar="FOLDER", help="folder of the report and its records")
    command.add_argument("--dry-run", action="store_true", help="print the trials and what they cost")
    command.add_argument("--smoke", action="store_true", help="run five steps of every arm, and record nothing")
    command.add_argument("--report", action="store_true", help="write the report of what is recorded; run nothing")
    command.add_argument("--retry-failed", action="store_true", help="run trials that failed once more")
    command.add_argument(
        "--distributed", action="store_true", help="be one process of a multi-host worker, as in train"
    )
    command.add_argument(
        "--worker", action="store_true", help="be one worker, as 'launch' starts them: no plan, no report"
    )


def _search(command: argparse.ArgumentParser) -> None:
    _experiment(command)
    _settable(command)
    command.add_argument(
        "--space", action="append", default=[], metavar="SPACE",
        help="a field and its values: FIELD=log:LOW:HIGH, FIELD=uniform:LOW:HIGH, FIELD=int:LOW:HIGH[:STEP] or "
        "FIELD=A,B,C; or a JSON file of {FIELD: VALUES}; required except with --report, may be repeated",
    )  # fmt: skip
    command.add_argument(
        "--sampler", choices=("tpe", "cmaes", "grid", "random"), default="tpe",
        help="how values are proposed; grid takes lists, int, and log or uniform with points, such as log:LOW:HIGH:5",
    )  # fmt: skip
    command.add_argument(
        "--pruner", choices=("none", "median", "hyperband"), default="median",
        help="which trials end early, by the held-out metric at each evaluation",
    )  # fmt: skip
    command.add_argument(
        "--trials", type=_integer(1, 100_000), metavar="N",
        help="trials in all, those of earlier calls included [default: 20, or every point of a grid]",
    )  # fmt: skip
    command.add_argument(
        "--steps", type=_integer(1), metavar="N", help="train steps of a trial [default: those of the experiment]"
    )
    command.add_argument(
        "--metric", choices=("bits_per_byte", "loss"), default="bits_per_byte", help="held-out metric to minimize"
    )
    command.add_argument("--seed", type=_integer(0, 2**32 - 1), default=0, metavar="N", help="seed of the sampler")
    command.add_argument(
        "--name", metavar="NAME", help="name after that of the experiment, for a further search [default: none]"
    )
    _shared_by_workers(command)
    command.add_argument("--to", metavar="FOLDER", help="folder of the report [default: runs/searches/NAME]")
    command.add_argument("--dry-run", action="store_true", help="print the space and what the trials cost")
    command.add_argument("--report", action="store_true", help="write the report of what is recorded; run nothing")
    command.add_argument("--retry-failed", action="store_true", help="run trials that failed once more")
    command.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # started by the command itself


def _new_study(command: argparse.ArgumentParser) -> None:
    command.add_argument("subject", metavar="NAME", help="name of the study and of its file")
    command.add_argument("--question", default="Does the change help?", metavar="TEXT", help="what the study asks")


COMMANDS: dict[str, Command] = {
    "list": Command(
        "Look around", "", "List every experiment with its question, source and cost", ("list",), _list
    ),
    "show": Command(
        "Look around", "EXPERIMENT", "Print an experiment's config, parameters, shardings and FLOPs",
        ("show quickstart", "show quickstart --devices 8 --set mesh.tensor=2"), _show,
        "Nothing is compiled, and the devices need not exist. Into a pipe, each row is one line of plain text.",
    ),
    "compile": Command(
        "Look around", "EXPERIMENT --topology CHIPS", "Check memory and traffic for a TPU pod you don't have",
        ("compile mixtral_8x7b --topology v5p:4x4x4",), _compile,
        "Compiles the train step with the TPU's compiler, on this machine.",
    ),
    "train": Command(
        "Train", "EXPERIMENT|RUN", "Train, evaluate, sample and report; the same command again resumes",
        ("train quickstart", "train quickstart --run small --set model.num_layers=2 --set train.steps=200"), _train,
        "Given an imported run, trains its weights further; --run NAME trains a copy of it.",
    ),
    "upcycle": Command(
        "Train", "DENSE_RUN --run NEW", "Make a mixture of experts out of a dense run's weights",
        ("upcycle quickstart_dense --run experts --set model.moe.num_experts=4",), _upcycle,
    ),
    "eval": Command(
        "Measure and use", "RUN", "Measure bits per byte on all held-out files, beside compressors",
        ("eval quickstart --stride 64",), _eval,
    ),
    "generate": Command(
        "Measure and use", "RUN --prompt TEXT", "Continue a prompt, or answer it with --chat",
        ('generate quickstart --prompt "def fib(n):" --temperature 0.8 --top-p 0.95 --stream',), _generate,
    ),
    "report": Command(
        "Measure and use", "RUN", "Write the run's report.html again", ("report quickstart",), _run,
        "'train' writes it at the end. It also works on a run that is unfinished or still training.",
    ),
    "compare": Command(
        "Measure and use", "RUN RUN [RUN...]", "Write a page that overlays the curves of several runs",
        ("compare quickstart quickstart_dense",), _compare,
        "The page also has a table of the final figures, and one of the config fields in which the runs differ.",
    ),
    "inspect": Command(
        "Measure and use", "RUN --text TEXT", "Write a page with what the network computes for a text",
        ('inspect quickstart --text "def fib(n):"', "inspect quickstart --text @notes.txt --to notes.html"), _inspect,
        "The page shows the probability of each token, the predictions after each layer (logit lens), the attention "
        "maps of all heads and the routers' choices. The network runs on one device.",
    ),
    "study": Command(
        "Compare", "[STUDY]", "Run a study: arms, seeds, and a verdict on each claim",
        ("study", "study glu_variants --dry-run", "study glu_variants --workers 2"), _study,
        "The same command again continues. Any number of machines can work on one --storage.",
    ),
    "new-study": Command(
        "Compare", "NAME", "Write the skeleton of a study", ("new-study my_study",), _new_study,
    ),
    "search": Command(
        "Compare", "EXPERIMENT --space SPACE...", "Search for an experiment's best hyperparameters",
        ("search smoke --space optimizer.learning_rate=log:1e-4:1e-1 --space model.num_layers=int:1:3",
         "search smoke --report"), _search,
        "The same command again continues. Any number of machines can work on one --storage and one runs/ folder.",
    ),
    "launch": Command(
        "Many machines", "TARGET", "Run a command in many processes: local, ssh, tpu, gke, slurm",
        ("launch local --processes 2 -- train quickstart --distributed",
         "launch ssh --hosts a,b -- train quickstart --distributed"), add_targets,
        "COMMAND, after --, is a command of this program with its arguments, or any other program, or a line for bash "
        "in quotes. The job is started again when a process dies, and resumes.",
    ),
    "import": Command(
        "Exchange models", "PATH --name NAME", "Make a run from a Hugging Face folder or a GGUF file",
        ("import ./SmolLM2-135M --name smollm2",), _import,
    ),
    "export": Command(
        "Exchange models", "RUN --to FOLDER", "Write a run as a folder that transformers loads",
        ("export quickstart --to quickstart-hf --dtype bfloat16",), _export,
    ),
}  # fmt: skip


def _exit(code: int) -> None:
    """End the process; at once if a thread still compiles, since the interpreter would tear XLA down below it."""
    ahead = sys.modules.get("train.ahead")
    if ahead is not None and ahead.in_progress():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    _exit(main())
