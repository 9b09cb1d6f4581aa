"""A whole run: prepare data, train, evaluate, sample and report."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from data.compressors import compressed_sizes
from data.config import DataError
from data.prepare import Prepared, heldout_documents, prepare
from data.tokenizer import Tokenizer, load_tokenizer
from decode.generate import generate
from decode.sampling import SamplingParams
from decode.text import text_of
from experiments.lifetime import life_lines, read_lifetime
from experiments.meshes import fit_mesh
from experiments.processes import agree, agree_on_code, agree_on_devices, all_processes, barrier, compare_clocks
from experiments.report import write_report
from experiments.resolve import load_experiment, may_differ_on_resume
from interop.translate import architecture, differences
from model.cost import count_parameters
from model.transformer import Transformer
from sharding.mesh import use_mesh
from train.ahead import StepCompilation
from train.checkpoint import Checkpointer, CheckpointError
from train.config import Experiment, SampleConfig
from train.config_io import ConfigError, config_hash
from train.evaluate import evaluate_all
from train.goodput import Goodput
from train.loop import Trained, train
from train.profile import Profile
from train.profile_steps import ProfileSteps
from train.program import Network, Program, Weights, build, build_network, load_weights
from train.progress import duration
from train.records import (
    MetricsWriter,
    RunFolder,
    RunFolderError,
    describe_environment,
    open_run,
    read_metrics,
    write_environment,
    write_samples,
)
from train.signals import StopSignal


def run_experiment(
    experiment: Experiment,
    path: str | os.PathLike[str],
    *,
    overrides: Sequence[str],
    override: bool,
    log: Callable[[str], None] = print,
    profile: ProfileSteps | None = None,
    startup: float = 0.0,
) -> bool:
    """Train or resume the experiment in its folder, and finish it. Return False if a signal stopped it before its end.

    `profile`: the steps to trace. `startup`: the seconds that this process has already spent on its start. Raises
    ValueError, RunFolderError, CheckpointError, DivergedError or DeviceError with one paragraph for the user.
    """
    started, goodput = time.monotonic(), Goodput(startup=startup)
    with shared_run(path, experiment, overrides, override, log) as run:
        if run.report.exists() and (run.finished_step or 0) >= experiment.train.steps:
            log(f"{run.path} is finished: {run.report}. More steps: --set train.steps=N; another run: --run NEWNAME")
            return True
        program = build(experiment)
        if jax.process_count() == 1 and (run.finished_step or 0) < experiment.train.steps:
            program.executables["step"] = StepCompilation(program)  # while data and weights are prepared
        with goodput.phase("data"):
            prepared = prepare_data(experiment, log)
        if jax.process_index() == 0:
            with written(run):
                write_environment(run, describe_environment())
                _keep_tokenizer(run, prepared.tokenizer)
        with StopSignal() as stop:
            with contextlib.ExitStack() as traces:
                hooks = [] if profile is None else [traces.enter_context(Profile(profile, run, log))]
                trained = train(program, prepared, run, log=log, stop=stop, goodput=goodput, hooks=hooks)
            with goodput.phase("evaluation"):
                finished = trained.finished and finish(program, prepared, run, trained, log, stop)
        with written(run), MetricsWriter(run, process_index=jax.process_index()) as metrics:
            metrics.write(goodput.row(trained.step))
        if jax.process_index() == 0:
            for line in life_lines(read_lifetime(run.metrics)):
                log(line)
            report = write_report(run.path)
            log(f"report: {report}  (after {duration(time.monotonic() - started)})")
        return finished


@contextlib.contextmanager
def written(run: RunFolder) -> Iterator[None]:
    """Convert an OSError for a file of the run to a RunFolderError with a fix."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"run folder {run.path} cannot be written ({error}); free the disk or fix the permissions, then start the "
            "same command again: it continues from the last checkpoint"
        ) from error


def _keep_tokenizer(run: RunFolder, tokenizer: Tokenizer) -> None:
    """Save the tokenizer in the run folder, unless its weights may need another one there. Raises ConfigError."""
    with contextlib.suppress(DataError):  # no tokenizer, or a damaged one
        if run.begun and load_tokenizer(run.tokenizer).identity != tokenizer.identity:
            raise ConfigError(
                f"data.tokenizer: the weights of {run.path} were trained with another tokenizer; restore "
                "data.tokenizer and the text from which it is learned, or start a new run with --run NEWNAME"
            )
    tokenizer.save(run.tokenizer)


def prepare_data(experiment: Experiment, log: Callable[[str], None]) -> Prepared:
    """Return the prepared data of an experiment, identical on every process. Raises DataError or ConfigError."""
    try:
        prepared = prepare(experiment.data, log=log, processes=all_processes())
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir = {experiment.data.cache_dir!r}: the prepared data cannot be stored there ({error}); free "
            "the disk, fix the permissions, or set it to another folder"
        ) from error
    agree(prepared.identity, "prepared different data", "give every host the same text and the same Python")
    return prepared


@contextlib.contextmanager
def shared_run(
    path: str | os.PathLike[str],
    experiment: Experiment,
    overrides: Sequence[str],
    override: bool,
    log: Callable[[str], None],
) -> Iterator[RunFolder]:
    """Yield the run folder, which process 0 opens for all.

    Raises ConfigError if the processes' code or configs differ, and DeviceError if their devices do.
    """
    agree_on_code()
    fix = "start every one with the same experiment and the same --set"
    agree(config_hash(experiment), "were started with different configs", fix)
    compare_clocks(log)
    if experiment.train.check_devices:
        agree_on_devices(log)
    if jax.process_index() == 0:
        with open_run(
            path,
            experiment,
            overrides=overrides,
            may_differ=_may_differ(path, experiment),
            override=override,
            log=log,
        ) as run:
            barrier()
            yield run
    else:
        barrier()
        yield RunFolder(path)


def _may_differ(path: str | os.PathLike[str], experiment: Experiment) -> Callable[[str], bool]:
    """Return a predicate on the fields that may change in an existing run folder.

    For imported weights that were not trained yet, these are all fields that do not change the network or tokenizer.
    """
    run = RunFolder(path)
    if not untouched_import(run) or differences(
        architecture(load_experiment(run).model), architecture(experiment.model)
    ):
        return may_differ_on_resume
    return lambda name: not name.startswith("data.tokenizer.") or may_differ_on_resume(name)


def untouched_import(run: RunFolder) -> bool:
    """Return whether a run has imported weights and was not trained further."""
    return imported_from(run) is not None and not any(row["kind"] == "train" for row in read_metrics(run.metrics))


def imported_from(run: RunFolder) -> str | None:
    """Return the name of the published model from which a run was imported, or None."""
    rows = read_metrics(run.metrics) if run.metrics.exists() else []
    return next((row["imported_from"] for row in rows if "imported_from" in row), None)


class _StoppedError(Exception):
    """A signal requested the end of the final evaluation."""


def finish(
    program: Program, prepared: Prepared, run: RunFolder, trained: Trained, log: Callable[[str], None], stop: StopSignal
) -> bool:
    """Evaluate and sample at the end of a run, and record the results. Return False if `stop` ended that.

    The results are held-out bits per byte, compared with compressors, and completions of held-out files.
    """
    log("evaluating on all held-out files")
    asked = itertools.count(trained.step + 1)  # every process asks after each batch, and all stop after the same one

    def poll() -> None:
        if stop.agreed(next(asked)):
            raise _StoppedError

    with written(run), MetricsWriter(run, process_index=jax.process_index()) as metrics:
        try:
            results = evaluate_all(program, trained.model, prepared, full=True, between=poll)
        except _StoppedError:
            message = "stopped in the evaluation after the last step; the same command continues with it"
            metrics.write({"kind": "event", "step": trained.step, "event": "stopped", "message": message})
            log(message)
            return False
        sets = {}
        for name, result in results.items():
            compressors = compressed_sizes(text.encode() for _, text in heldout_documents(prepared, name))
            sets[name] = {**result.row(), "compressors": compressors}
            metrics.write({"kind": "eval", "step": trained.step, "set": name, **result.row()})
            log(heldout_table(name, sets[name]))
        rows = complete_heldout(program, trained.model, prepared)
        if jax.process_index() == 0:
            write_samples(run, rows)
        metrics.write(final_row(program.experiment, trained, sets))
    for row in rows:
        log(f"\n--- {row['file']}\n{row['prompt']}\n>>> the model continues:\n{row['completion']}")
    return True


def final_row(experiment: Experiment, trained: Trained, sets: dict[str, dict]) -> dict[str, Any]:
    """Return the row that ends metrics.jsonl."""
    counts = count_parameters(experiment.model)
    return {
        "kind": "final",
        "step": trained.step,
        "sets": sets,
        "wall_seconds": trained.seconds,
        "tokens": experiment.data.batch_size * experiment.data.sequence_length * trained.step,
        "parameters_total": counts.total,
        "parameters_active": counts.active,
    }


def heldout_table(name: str, figures: dict) -> str:
    """Return lines of text with the bits per byte of the model and of compressors, best first."""
    entries = {"this model": figures["bits_per_byte"], **figures["compressors"]}
    width = max(map(len, entries))
    lines = [f"  {label:<{width}}  {value:.4f}" for label, value in sorted(entries.items(), key=lambda item: item[1])]
    return "\n".join([f"held-out {name}, {figures['bytes']:,} bytes, bits per byte:", *lines])


def complete_heldout(network: Network, model: Transformer, prepared: Prepared) -> list[dict[str, str]]:
    """Return completions of held-out files. Each prompt ends at the end of a line near the middle of the file."""
    config, tokenizer, mesh = network.experiment.samples, prepared.tokenizer, network.mesh
    if config.count == 0 or not network.experiment.model.can_generate:
        return []
    spread = mesh is not None and mesh.shape["sequence"] > 1
    if jax.process_count() > 1 or spread:
        return []  # users can run `generate` later, on one host and another mesh
    cases = _cases(prepared, config)
    if not cases:
        return []
    params = [
        SamplingParams(
            temperature=config.temperature, top_p=config.top_p, max_new_tokens=config.new_tokens, seed=i,
            stop_token_ids=tokenizer.stop_token_ids,
        )
        for i in range(len(cases))
    ]  # fmt: skip
    with use_mesh(mesh):
        results = generate(model, [[tokenizer.special.document_start, *ids] for _, ids, _ in cases], params)
    return [
        {
            "file": file,
            "prompt": tokenizer.decode(ids),
            "completion": text_of(tokenizer, result.tokens),
            "reference": reference,
        }
        for (file, ids, reference), result in zip(cases, results, strict=True)
    ]


def _cases(prepared: Prepared, config: SampleConfig) -> list[tuple[str, list[int], str]]:
    """Return (file, prompt ids, reference text) for held-out files that are long enough, evenly spaced among them."""
    tokenizer: Tokenizer = prepared.tokenizer
    needed = (config.prompt_tokens + config.new_tokens) * 8

    def files() -> Iterator[tuple[str, str]]:  # their text may not fit in memory
        for set_name in prepared.heldout_names:
            yield from (file for file in heldout_documents(prepared, set_name) if len(file[1]) > needed)

    count = sum(1 for _ in files())
    if not count:
        return []
    picked = {int(i) for i in np.linspace(0, count - 1, config.count)}
    cases = []
    for name, text in (file for i, file in enumerate(files()) if i in picked):
        middle = text.find("\n", len(text) // 2) + 1 or len(text) // 2
        before = text[:middle]
        ids = tokenizer.encode(before[-config.prompt_tokens * 8 :]).tolist()[-(config.prompt_tokens - 1) :]
        after = tokenizer.encode(text[middle : middle + config.new_tokens * 8]).tolist()[: config.new_tokens]
        cases.append((name, ids, tokenizer.decode(after)))
    return cases


def open_trained(
    run: RunFolder,
    experiment: Experiment,
    tokenizer: Tokenizer,
    step: int | None = None,
    *,
    devices: Sequence[jax.Device] | None = None,
    log: Callable[[str], None] = print,
) -> tuple[Network, Weights]:
    """Return a run's network and its weights of `step` (default: the newest good checkpoint), without an optimizer.

    They serve evaluation, sampling and export. A mesh that does not fit the `devices` (default: all of this machine) is
    replaced by one that does. Raises CheckpointError.
    """
    count = None if devices is None else len(devices)
    network = build_network(fit_mesh(experiment, device_count=count, log=log), devices=devices)
    with Checkpointer(run.checkpoints, read_only=True, log=log) as checkpoints, use_mesh(network.mesh):
        weights = load_weights(network, checkpoints, tokenizer, step, frozen=run.frozen, log=log)
    if weights is None:
        raise CheckpointError(
            f"{run.path} has no checkpoint yet; train it: python -m experiments train {experiment.name}"
        )
    return network, weights
