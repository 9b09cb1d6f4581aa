"""What each command of the command line does. Heavy imports wait until the command needs them, so that errors come
fast."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiments.meshes import fit_mesh
from experiments.named import EXPERIMENTS
from experiments.resolve import find_run, is_run, load_experiment, resolve, resolve_from
from train.config import Experiment
from train.records import RunFolder

HEARTBEAT_SECONDS = 30  # after which the others learn that a process died; jax waits 100


class UsageError(ValueError):
    """The arguments of a command do not go together."""


def list(args: argparse.Namespace) -> int:
    """Every experiment with its question, source and cost."""
    table = Table("experiment", "question", "source", "cost", box=None, pad_edge=False)
    for name, make in EXPERIMENTS.items():
        experiment = make()
        table.add_row(name, experiment.question, experiment.source, experiment.cost)
    _console().print(table)
    return 0


def show(args: argparse.Namespace) -> int:
    """The resolved config, and what the network is and costs."""
    from experiments.show import print_experiment

    experiment = _checked(lambda: resolve(args.subject, args.overrides, args.devices))
    print_experiment(experiment, args.devices, _console())
    return 0


def compile(args: argparse.Namespace) -> int:
    """What a train step takes on a topology of TPUs, which need not be here."""
    from experiments.compile import compile_step, print_compiled, save, topology_devices

    devices = len(topology_devices(args.topology))
    experiment = _checked(lambda: resolve(args.subject, args.overrides, devices, platform="tpu"))
    compiled = compile_step(experiment, args.topology)
    print_compiled(compiled, _console())
    if args.save:
        save(compiled, experiment, args.overrides, Path(args.save))
    return 0


def train(args: argparse.Namespace) -> int:
    """Trains a run to its end, or resumes it."""
    use_compilation_cache()
    if args.distributed:
        join_processes()
    if args.resume and args.run:
        raise UsageError(
            f"--resume {args.resume} and --run {args.run}: give one of them; --resume needs an existing run"
        )
    if args.resume:
        path = find_run(args.resume).path
        experiment = _load(args.resume, args.overrides, training=True)
        if experiment.name != args.subject:
            raise UsageError(f"--resume {args.resume}: it is a run of {experiment.name!r}, not of {args.subject!r}")
    elif args.subject not in EXPERIMENTS and is_run(args.subject):
        path = find_run(args.subject).path
        if args.run:
            path = _copied(find_run(args.subject), _run_path(args.run))
        experiment = _load(str(path), args.overrides, training=True)
    else:
        path = _run_path(args.run or args.subject)
        experiment = _checked(lambda: resolve(args.subject, args.overrides, None))
    import jax

    from experiments.run import run_experiment

    say = print if jax.process_index() == 0 else lambda text: None
    run_experiment(experiment, path, overrides=args.overrides, override=args.override, say=say)
    return 0


def _copied(run: RunFolder, path: Path) -> Path:
    """`path`, a copy of an imported run, made by process 0 unless it is there."""
    import jax

    from experiments.convert import copy_import
    from experiments.run import barrier

    if jax.process_index() == 0:
        with _written(path):
            copy_import(run, path)
    barrier("imported run copied")
    return path


def eval(args: argparse.Namespace) -> int:
    """Bits per byte of a run's weights on all held-out files, beside compressors."""
    from data.compressors import compressed_sizes
    from data.prepare import heldout_files
    from experiments.run import heldout_table, open_trained, prepare_data
    from train.evaluate import evaluate_all

    use_compilation_cache()
    run = find_run(args.subject)
    stride = [] if args.stride is None else [f"train.eval_stride={args.stride}"]
    experiment = _load(args.subject, args.overrides + stride)
    prepared = prepare_data(experiment, print)
    program, trained = open_trained(run, experiment, prepared.tokenizer, args.step)
    print(f"weights of step {trained.step}")
    for name, result in evaluate_all(program, trained.model, prepared, full=True).items():
        files = [text.encode() for _, text in heldout_files(prepared, name)]
        print(heldout_table(name, {**result.row(), "compressors": compressed_sizes(files)}))
    return 0


def generate(args: argparse.Namespace) -> int:
    """Continues prompts, or answers them, with a run's weights and the tokenizer in its folder."""
    use_compilation_cache()
    from data.tokenizer import load_tokenizer, prompt_ids
    from decode.generate import generate as generate_batch
    from decode.generate import stream
    from decode.sampling import SamplingParams
    from decode.text import chat_prompts, continued, text_of
    from experiments.run import open_trained
    from sharding.mesh import use_mesh

    if args.system is not None and not args.chat:
        raise UsageError("--system: is told to a model that chats; add --chat, or leave it out")
    if args.stream and len(args.prompt) > 1:
        raise UsageError("--stream: prints one text as it is made; give one --prompt, or leave --stream out")
    run = find_run(args.subject)
    tokenizer = load_tokenizer(run.tokenizer)
    params = SamplingParams(
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p, seed=args.seed,
        repetition_penalty=args.repetition_penalty, frequency_penalty=args.frequency_penalty,
        presence_penalty=args.presence_penalty, max_new_tokens=args.max_new_tokens, stop_ids=tokenizer.stops,
    )  # fmt: skip
    _checked(params.validate)
    if args.chat:
        prompts = chat_prompts(tokenizer, args.prompt, args.system)
    else:
        prompts = [prompt_ids(tokenizer, text) for text in args.prompt]
    shown = [""] * len(prompts) if args.chat else args.prompt  # an answer is printed by itself
    program, trained = open_trained(run, _load(args.subject, args.overrides), tokenizer, args.step)
    with use_mesh(program.mesh):
        if args.stream:
            print(shown[0], end="", flush=True)
            tokens = (token for token, _ in _checked(lambda: stream(trained.model, prompts[0], params)))
            for piece in continued(tokenizer, prompts[0], tokens):
                print(piece, end="", flush=True)
            print()
            return 0
        results = _checked(lambda: generate_batch(trained.model, prompts, params))
    for text, prompt, result in zip(shown, prompts, results, strict=True):
        print(text + "".join(continued(tokenizer, prompt, result.tokens)))
        if args.logprobs:
            for token, logprob in zip(result.tokens, result.logprobs, strict=True):
                print(f"  {logprob:8.4f}  {text_of(tokenizer, [token])!r}")
        print(f"[{len(result.tokens)} tokens, finished by {result.finished}]")
    return 0


def import_(args: argparse.Namespace) -> int:
    """Makes a run of a published model."""
    from experiments.convert import import_run

    use_compilation_cache()
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", args.name):
        raise UsageError(f"--name {args.name}: names a folder under runs/; use letters, digits, '.', '_' and '-'")
    if args.name in EXPERIMENTS:
        raise UsageError(f"--name {args.name}: is the name of an experiment; choose another")
    tokenizer, path = None if args.tokenizer is None else Path(args.tokenizer), Path("runs") / args.name
    with _written(path):
        import_run(
            Path(args.subject),
            path,
            name=args.name,
            overrides=args.overrides,
            dtype=args.dtype,
            tokenizer_path=tokenizer,
            dry_run=args.dry_run,
            console=_console(),
        )
    return 0


def export(args: argparse.Namespace) -> int:
    """Writes a run as a published model."""
    from experiments.convert import export_run

    run, folder = find_run(args.subject), Path(args.to)
    with _written(folder):
        export_run(
            run, _load(args.subject, args.overrides), folder, dtype=args.dtype, family=args.family, step=args.step,
            dry_run=args.dry_run, console=_console(),
        )  # fmt: skip
    return 0


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    """A folder is written in one piece: SIGTERM ends it as Ctrl-C does, and what is wrong with files is the user's to
    mend."""
    from interop.load import ModelFilesError
    from interop.translate import UnsupportedModelError

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except (ModelFilesError, UnsupportedModelError) as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written ({error}); free the disk, or fix the permissions. Nothing was kept"
        ) from error
    finally:
        signal.signal(signal.SIGTERM, before)


def upcycle(args: argparse.Namespace) -> int:
    """Writes a run with experts that starts from a dense run's weights."""
    from experiments.upcycle import upcycle_run, with_experts

    use_compilation_cache()
    run = find_run(args.subject)
    dense = load_experiment(run)
    experiment = _checked(lambda: with_experts(dense, args.overrides))
    upcycle_run(run, dense, experiment, _run_path(args.run), overrides=args.overrides, step=args.step)
    return 0


def report(args: argparse.Namespace) -> int:
    """Writes a run's report anew."""
    from experiments.report import write_report

    print(write_report(find_run(args.subject).path))
    return 0


def join_processes() -> None:
    """Makes this process one of several. What the environment does not say, jax finds on TPU pods, SLURM and the
    like."""
    import jax

    from train.signals import exit_hard_on_exception

    number, index = (os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    jax.distributed.initialize(
        num_processes=int(number) if number else None,
        process_id=int(index) if index else None,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
    exit_hard_on_exception()


def use_compilation_cache() -> None:
    """Keeps compiled programs in .cache/jax (or JAX_COMPILATION_CACHE_DIR), so that a second start is fast."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path(".cache/jax").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _load(name: str, overrides: Sequence[str], *, training: bool = False) -> Experiment:
    """Return the experiment of a run, with overrides, checked for the devices that are here. Unless for `training`, a
    mesh that does not fit them is replaced."""
    experiment = load_experiment(find_run(name))
    return _checked(lambda: resolve_from(experiment if training else fit_mesh(experiment, overrides), overrides))


def _console() -> Console:
    """As wide as the terminal; wide enough for a table elsewhere."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def _run_path(name: str) -> Path:
    return Path(name) if "/" in name or name.startswith(".") else Path("runs") / name


def _checked(make):
    """The result of `make`, a ValueError of which is the user's to mend: configs and prompts are checked there."""
    try:
        return make()
    except ValueError as error:
        raise UsageError(str(error)) from error
