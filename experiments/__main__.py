"""The command line: python -m experiments list | show | train | compile | eval | generate | import | export | upcycle |
report."""

from __future__ import annotations

import argparse
import os
import sys

from train.config_io import ConfigError
from train.host_memory import keep_freed_memory


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; 0 when it did what was asked, 1 with one paragraph on stderr when the user must change
    something."""
    args = _parser().parse_args(arguments)
    if args.command in ("train", "eval"):
        keep_freed_memory()
    from data.config import DataError
    from experiments import commands
    from train.records import RunFolderError

    try:
        return getattr(commands, {"import": "import_"}.get(args.command, args.command))(args)
    except (ConfigError, DataError, RunFolderError, commands.UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
    except RuntimeError as error:
        # Seconds of imports, which a command that could raise these has already paid.
        from train.checkpoint import CheckpointError
        from train.hooks import NonfiniteError

        if not isinstance(error, CheckpointError | NonfiniteError):
            raise
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted; what was saved stands, and the same command goes on from there", file=sys.stderr)
        return 130
    if getattr(args, "distributed", False):
        # An orderly exit would wait for peers that wait for this process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, subject: str | None = None) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        if subject is not None:
            sub.add_argument("subject", metavar=subject)
        return sub

    def settable(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--set", action="append", default=[], metavar="FIELD=VALUE", dest="overrides",
            help="change a field of the config, e.g. --set model.moe.top_k=3; may be repeated",
        )  # fmt: skip

    command("list", "every experiment with its question, source and cost")
    show = command("show", "resolved config, parameters with shapes and shardings, FLOPs", "EXPERIMENT")
    settable(show)
    show.add_argument("--devices", type=int, help="as if so many devices were here (default: those that are)")

    compile_ = command(
        "compile", "compile the train step for TPUs that are not here: memory and collectives", "EXPERIMENT"
    )
    settable(compile_)
    compile_.add_argument(
        "--topology", required=True, help="generation and chips along each axis, such as v5p:4x4x4 or v5e:16x16"
    )
    compile_.add_argument("--save", metavar="FILE", help="write the figures as JSON, too")

    train = command("train", "train, evaluate, sample and report; the same command again resumes", "EXPERIMENT|RUN")
    settable(train)
    train.add_argument(
        "--run", metavar="NAME", help="name of the run under runs/, or a path (default: the experiment's name)"
    )
    train.add_argument("--resume", metavar="RUN", help="go on with this run")
    train.add_argument(
        "--override", action="store_true", help="go on although the run folder belongs to another config"
    )

    train.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes: on a TPU pod or under SLURM found by itself, elsewhere by "
        "JAX_COORDINATOR_ADDRESS, "
        "JAX_NUM_PROCESSES and JAX_PROCESS_ID; the run folder must be on a file system they share",
    )

    evaluate = command("eval", "bits per byte on all held-out files", "RUN")
    settable(evaluate)
    evaluate.add_argument("--step", type=int, help="of this checkpoint (default: the newest good one)")
    evaluate.add_argument("--stride", type=int, help="tokens scored a window; the rest is context (default: the run's)")

    generate = command("generate", "continue a prompt", "RUN")
    settable(generate)
    generate.add_argument("--prompt", action="append", required=True, help="text to continue; may be repeated")
    generate.add_argument(
        "--chat", action="store_true", help="the prompt is said by a user; the chat template is applied"
    )
    generate.add_argument("--system", help="with --chat: what the model is told first")
    generate.add_argument("--max-new-tokens", type=int, default=128)
    generate.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    generate.add_argument("--top-k", type=int, default=0, help="keep the k likeliest tokens; 0 keeps all")
    generate.add_argument("--top-p", type=float, default=1.0, help="keep the likeliest tokens up to this probability")
    generate.add_argument(
        "--min-p", type=float, default=0.0, help="keep tokens at least this fraction as likely as the best"
    )
    generate.add_argument("--repetition-penalty", type=float, default=1.0)
    generate.add_argument("--frequency-penalty", type=float, default=0.0)
    generate.add_argument("--presence-penalty", type=float, default=0.0)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--step", type=int, help="of this checkpoint (default: the newest good one)")
    generate.add_argument("--stream", action="store_true", help="print the text as it is made")
    generate.add_argument("--logprobs", action="store_true", help="print each token with its log-probability (nats)")

    import_ = command("import", "make a run of a published model: a Hugging Face folder or a GGUF file", "PATH")
    settable(import_)
    import_.add_argument("--name", required=True, help="of the run, under runs/")
    import_.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="that the weights are stored in"
    )
    import_.add_argument("--tokenizer", metavar="PATH", help="where the tokenizer is, if not beside the weights")
    import_.add_argument("--dry-run", action="store_true", help="read headers alone, and tell what would be done")

    export = command("export", "write a run as a Hugging Face folder that transformers loads", "RUN")
    settable(export)
    export.add_argument("--to", required=True, metavar="FOLDER", help="that is to be made")
    export.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="that the weights are stored in"
    )
    export.add_argument("--family", help="architecture to write (default: the first that can say all of the config)")
    export.add_argument("--step", type=int, help="of this checkpoint (default: the newest good one)")
    export.add_argument("--dry-run", action="store_true", help="tell what would be written")

    upcycle = command("upcycle", "write a run whose experts start as the MLPs of a dense run", "DENSE_RUN")
    settable(upcycle)
    upcycle.add_argument("--run", metavar="NEW", required=True, help="name of the new run under runs/, or a path")
    upcycle.add_argument("--step", type=int, help="of this checkpoint of the dense run (default: the newest good one)")

    command("report", "write the run's report.html anew", "RUN")
    return parser


if __name__ == "__main__":
    sys.exit(main())
