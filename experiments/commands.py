"""The commands of the command line. Each imports what it needs, so that `list` and errors come fast: nothing here
imports jax or matplotlib at the top."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from etils import epath

from experiments.memory import memory_here
from experiments.meshes import fit_mesh
from experiments.named import EXPERIMENTS
from experiments.resolve import (
    find_run,
    is_run,
    load_experiment,
    new_local_run_path,
    new_run_path,
    resolve,
    resolve_from,
)
from experiments.stopping import stopped_by_sigterm
from train.config import Experiment
from train.records import RunFolder


class UsageError(ValueError):
    """Arguments that do not fit each other, or that name something that cannot be used."""


def refuse_other_encodings(args: argparse.Namespace) -> None:
    """Raise UsageError where an argument is not UTF-8. Python keeps such bytes as lone surrogates, which no tokenizer
    and no JSON file can hold."""
    for name, value in vars(args).items():
        for text in value if isinstance(value, list) else [value]:
            try:
                _ = text.encode() if isinstance(text, str) else None
            except UnicodeEncodeError as error:
                option = {"overrides": "--set", "subject": args.command, "others": args.command}.get(
                    name, f"--{name.replace('_', '-')}"
                )
                raise UsageError(
                    f"{option}: the text is not UTF-8 (byte 0x{ord(text[error.start]) & 0xFF:02x} after "
                    f"{text[: error.start][-40:]!r}); give it in UTF-8"
                ) from error


def list_command(args: argparse.Namespace) -> int:
    """Print every experiment with its question, source and cost."""
    from experiments.terminal import Column, Line, open_console, print_table

    columns = (
        Column("experiment", style="cyan"), Column("question", fold=True), Column("source", fold=True),
        Column("cost", fold=True),
    )  # fmt: skip
    experiments = {name: make() for name, make in EXPERIMENTS.items()}
    lines = [Line((name, each.question, each.source, each.cost)) for name, each in experiments.items()]
    print_table(open_console(), columns, lines)
    return 0


def show_command(args: argparse.Namespace) -> int:
    """Print the config of an experiment, its parameters and what it costs."""
    from experiments.show import print_experiment
    from experiments.terminal import open_console

    experiment = _checked(lambda: resolve(args.subject, args.overrides, args.devices))
    print_experiment(experiment, args.devices, open_console(), every_field=args.all)
    return 0


def compile_command(args: argparse.Namespace) -> int:
    """Print the memory and the traffic of a train step on a topology of TPUs, which need not be here."""
    from experiments.compile import compile_step, memory_of, print_compiled, save, topology_devices

    devices = topology_devices(args.topology)
    experiment = _checked(
        lambda: resolve(args.subject, args.overrides, len(devices), "tpu", lambda: memory_of(devices[0]))
    )
    compiled = compile_step(experiment, args.topology)
    print_compiled(compiled, _console())
    if args.save:
        try:
            save(compiled, experiment, args.overrides, Path(args.save))
        except OSError as error:
            raise UsageError(f"--save {args.save}: cannot be written ({error}); choose another file") from error
    return 0


def train_command(args: argparse.Namespace) -> int:
    """Train a run to its end, or resume it. Return 0 at its end, 128 + signal where a signal stopped it before."""
    began = time.monotonic()
    with stopped_by_sigterm():
        use_compilation_cache()
        if args.distributed:
            join_processes()
        experiment, path = _run_to_train(args)
        if args.profile is not None:
            args.profile.check(experiment.train.steps)
        import jax

        from experiments.backend import backend_lines
        from experiments.run import run_experiment
        from train.signals import StopSignal

        log = print if jax.process_index() == 0 else lambda text: None
        for line in backend_lines():
            log(line)
        finished = run_experiment(
            experiment, path, overrides=args.overrides, override=args.override, log=log, profile=args.profile,
            startup=time.monotonic() - began,
        )  # fmt: skip
        if finished:
            from experiments.next_steps import next_steps

            for line in next_steps(experiment, RunFolder(path)):
                log(line)
        return 0 if finished else 128 + (StopSignal.last_number or signal.SIGTERM)


def _run_to_train(args: argparse.Namespace) -> tuple[Experiment, epath.Path]:
    """Return the experiment and the folder that the arguments of `train` name."""
    if args.resume and args.run:
        raise UsageError(
            f"--resume {args.resume} and --run {args.run}: give one of them; --resume needs an existing run"
        )
    if args.resume:
        path = find_run(args.resume).path
        experiment = _load_to_train(args.resume, args)
        if experiment.name != args.subject:
            raise UsageError(f"--resume {args.resume}: it is a run of {experiment.name!r}, not of {args.subject!r}")
        return experiment, path
    if args.subject not in EXPERIMENTS and is_run(args.subject):
        experiment = _load_to_train(args.subject, args)
        if not args.run:
            return experiment, find_run(args.subject).path
        path = epath.Path(_copied(find_run(args.subject), new_local_run_path(args.run)))
        return _load_to_train(str(path), args), path
    path = new_run_path(args.run or args.subject)
    devices = _devices(args, RunFolder(path))
    return _checked(lambda: resolve(args.subject, args.overrides, devices, memory=memory_here)), path


def _devices(args: argparse.Namespace, run: RunFolder | None) -> Callable[[Experiment], int] | None:
    """Return what starts the devices to train on, or None where several processes have theirs already."""
    from experiments.cpu_devices import start_devices

    return None if args.distributed else partial(start_devices, run=run)


def _copied(run: RunFolder, path: Path) -> Path:
    """Return `path`, a copy of an imported run, which process 0 makes unless it exists."""
    import jax

    from experiments.convert import copy_import
    from experiments.processes import barrier

    if jax.process_index() == 0:
        with _written(path):
            copy_import(run, path)
    barrier()  # the imported run is copied
    return path


def eval_command(args: argparse.Namespace) -> int:
    """Print the bits per byte of a run's weights on all held-out files, beside compressors."""
    from data.compressors import compressed_sizes
    from data.prepare import heldout_documents
    from experiments.cpu_devices import start_devices
    from experiments.run import heldout_table, open_trained, prepare_data
    from train.evaluate import evaluate_all

    use_compilation_cache()
    run = find_run(args.subject)
    start_devices(load_experiment(run), run, training=False)
    stride = [] if args.stride is None else [f"train.eval_stride={args.stride}"]
    experiment = _load(args.subject, args.overrides + stride)
    prepared = prepare_data(experiment, print)
    if not prepared.heldout_names:
        raise UsageError(
            f"data.holdout_fraction = {experiment.data.holdout_fraction:g}: {args.subject} holds no text out to "
            f"evaluate on; train a run with data.holdout_fraction above 0, or with data.evaluation_sources"
        )
    program, trained = open_trained(run, experiment, prepared.tokenizer, args.step)
    print(f"weights of step {trained.step}")
    for name, result in evaluate_all(program, trained.model, prepared, full=True).items():
        files = (text.encode() for _, text in heldout_documents(prepared, name))
        print(heldout_table(name, {**result.row(), "compressors": compressed_sizes(files)}))
    return 0


def generate_command(args: argparse.Namespace) -> int:
    """Continue prompts, or answer them, with a run's weights and the tokenizer in its folder."""
    use_compilation_cache()
    from data.tokenizer import load_tokenizer, prompt_ids
    from decode.generate import for_decoding, stream
    from decode.generate import generate as generate_batch
    from decode.sampling import SamplingParams
    from decode.text import chat_prompts, continued, text_of
    from experiments.run import open_trained
    from model.positions import check_length
    from sharding.mesh import use_mesh

    if args.system is not None and not args.chat:
        raise UsageError("--system requires --chat; add it, or leave --system out")
    if args.stream and len(args.prompt) > 1:
        raise UsageError("--stream: prints one text as it is generated; give one --prompt, or leave --stream out")
    run = find_run(args.subject)
    tokenizer = load_tokenizer(run.tokenizer)
    params = SamplingParams(
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p, seed=args.seed,
        repetition_penalty=args.repetition_penalty, frequency_penalty=args.frequency_penalty,
        presence_penalty=args.presence_penalty, max_new_tokens=args.max_new_tokens,
        stop_token_ids=tokenizer.stop_token_ids,
    )  # fmt: skip
    _checked(params.validate)
    if args.chat:
        prompts = chat_prompts(tokenizer, args.prompt, args.system)
    else:
        prompts = [prompt_ids(tokenizer, text) for text in args.prompt]
    shown = [""] * len(prompts) if args.chat else args.prompt  # an answer is printed without its prompt
    experiment = _load(args.subject, args.overrides)
    if notice := _checked(lambda: check_length(experiment.model, load_experiment(run).model.max_length)):
        print(f"note: {notice}", file=sys.stderr)
    program, trained = open_trained(run, experiment, tokenizer, args.step)
    with use_mesh(program.mesh):
        model = for_decoding(trained.model, donate=True)
        if args.stream:
            print(shown[0], end="", flush=True)
            tokens = (token for token, _ in _checked(lambda: stream(model, prompts[0], params)))
            for piece in continued(tokenizer, prompts[0], tokens):
                print(piece, end="", flush=True)
            print()
            return 0
        results = _checked(lambda: generate_batch(model, prompts, params))
    for text, prompt, result in zip(shown, prompts, results, strict=True):
        print(text + "".join(continued(tokenizer, prompt, result.tokens)))
        if args.logprobs:
            for token, logprob in zip(result.tokens, result.logprobs, strict=True):
                print(f"  {logprob:8.4f}  {text_of(tokenizer, [token])!r}")
        print(f"[{len(result.tokens)} tokens, finished by {result.finished}]")
    return 0


def import_command(args: argparse.Namespace) -> int:
    """Make a run from a published model."""
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


def export_command(args: argparse.Namespace) -> int:
    """Write a run as a published model."""
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
    """Write a folder in one piece: SIGTERM ends the command as Ctrl-C does, and errors of files become UsageErrors."""
    from interop.load import ModelFilesError
    from interop.translate import UnsupportedModelError

    try:
        with stopped_by_sigterm():
            yield
    except (ModelFilesError, UnsupportedModelError) as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written ({error}); free the disk, or fix the permissions. Nothing was kept"
        ) from error


def upcycle_command(args: argparse.Namespace) -> int:
    """Write a run with experts that starts from a dense run's weights."""
    from experiments.upcycle import upcycle_run, with_experts

    use_compilation_cache()
    run = find_run(args.subject)
    dense = load_experiment(run)
    experiment = _checked(lambda: with_experts(dense, args.overrides))
    path = new_local_run_path(args.run)
    with _written(path):
        upcycle_run(run, dense, experiment, path, overrides=args.overrides, step=args.step)
    return 0


def report_command(args: argparse.Namespace) -> int:
    """Write a run's report again, and print where the run's time went."""
    from experiments.lifetime import life_lines, lifetime
    from experiments.report import read_starts, write_report

    run = find_run(args.subject)
    report = write_report(run.path, log=lambda text: print(text, file=sys.stderr))
    with suppress(LookupError, TypeError, ValueError):  # rows that are not a run's, which the report names
        for line in life_lines(lifetime(read_starts(run))):
            print(line)
    print(report)
    return 0


def compare_command(args: argparse.Namespace) -> int:
    """Write a page that overlays the curves of several runs."""
    from experiments.compare import write_comparison

    names = [args.subject, *args.others]
    print(
        write_comparison(
            [find_run(name) for name in names], Path(args.to), log=lambda text: print(text, file=sys.stderr)
        )
    )
    return 0


def inspect_command(args: argparse.Namespace) -> int:
    """Write a page with what a run's network computes for a text."""
    use_compilation_cache()
    from data.tokenizer import load_tokenizer
    from experiments.inspection.write import cut, read_text, write_inspection

    text = _checked(lambda: read_text(args.text))
    run = find_run(args.subject)
    tokenizer = load_tokenizer(run.tokenizer)
    experiment = _load(args.subject, args.overrides, device_count=1)
    ids, notes = _checked(lambda: cut(tokenizer, text, experiment.model, args.max_tokens))
    log = lambda line: print(line, file=sys.stderr)
    print(write_inspection(run, experiment, tokenizer, ids, notes, step=args.step, path=args.to, log=log))
    return 0


def study_command(args: argparse.Namespace) -> int:
    """Run a study, or plan it, or write its report."""
    return _run_study_command("study", args)


def new_study_command(args: argparse.Namespace) -> int:
    """Write the skeleton of a study."""
    return _run_study_command("new_study", args)


def search_command(args: argparse.Namespace) -> int:
    """Search for the best hyperparameters of an experiment, or plan that, or write its report."""
    return _run_study_command("search", args, "experiments.search.command")


def _run_study_command(name: str, args: argparse.Namespace, module: str = "experiments.study.command") -> int:
    """Run a command of a module that needs Optuna, with StudyErrors as UsageErrors."""
    try:
        command = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        raise UsageError("studies and searches need Optuna: pip install -e '.[study]'") from error
    from experiments.study.definition import StudyError

    try:
        return getattr(command, name)(args)
    except StudyError as error:
        raise UsageError(str(error)) from error


def launch_command(args: argparse.Namespace) -> int:
    """Run a command in many processes, here or elsewhere."""
    from experiments.__main__ import COMMANDS
    from experiments.launch.command import launch
    from experiments.launch.job import LaunchError

    try:
        return launch(args, COMMANDS)
    except LaunchError as error:
        raise UsageError(str(error)) from error


def join_processes() -> None:
    """Make this process one of several. jax finds what the environment does not say on TPU pods, SLURM and the like.
    Raises UsageError."""
    from train.peer_watch import join
    from train.signals import exit_hard_on_exception

    number, index = (_count_of(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    try:
        join(number, index)
    except (ValueError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"--distributed: {reason.rstrip('.')}. On a TPU pod or under SLURM nothing needs to be set; elsewhere give "
            f"every process JAX_COORDINATOR_ADDRESS (host:port of process 0; it is "
            f"{os.environ.get('JAX_COORDINATOR_ADDRESS', 'unset')}), JAX_NUM_PROCESSES (it is "
            f"{'unset' if number is None else number}) and its JAX_PROCESS_ID (it is "
            f"{'unset' if index is None else index}), or leave --distributed out"
        ) from error
    exit_hard_on_exception()


def _count_of(name: str) -> int | None:
    """Return the whole number in an environment variable; None where it is not set. Raises UsageError."""
    text = os.environ.get(name)
    if not text:
        return None
    if not (text.isascii() and text.isdigit()):
        raise UsageError(f"{name} = {text}: set it to a whole number, 0 or more")
    return int(text)


def use_compilation_cache() -> None:
    """Keep compiled programs in .cache/jax (or JAX_COMPILATION_CACHE_DIR), so that a second start is fast."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path(".cache/jax").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _load(name: str, overrides: Sequence[str], device_count: int | None = None) -> Experiment:
    """Return the experiment of a run, with overrides, checked for `device_count` devices (None: all that are here) and
    their memory. A mesh that does not fit them is replaced."""
    experiment = load_experiment(find_run(name))

    def resolved() -> Experiment:
        fitting = fit_mesh(experiment, overrides, device_count)
        return resolve_from(fitting, overrides, device_count, memory=memory_here, training=False)

    return _checked(resolved)


def _load_to_train(name: str, args: argparse.Namespace) -> Experiment:
    """Return the experiment of a run, with overrides, checked for the devices on which it will be trained."""
    run = find_run(name)
    experiment, devices = load_experiment(run), _devices(args, run)
    return _checked(lambda: resolve_from(experiment, args.overrides, devices, memory=memory_here))


def _console():
    """Return a console as wide as the terminal; elsewhere wide enough for a table."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def _checked(make):
    """Return `make()`. A ValueError becomes a UsageError: `make` checks configs and prompts, which the user can fix."""
    try:
        return make()
    except ValueError as error:
        raise UsageError(str(error)) from error
