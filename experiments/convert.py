"""Conversion of published models to runs and of runs to published models (`import` and `export`)."""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from data.config import DataConfig, TokenizerConfig
from data.tokenizer import Tokenizer, fit_vocabulary, load_tokenizer, read_tokenizer, special_ids, write_published
from experiments.resolve import resolve_from
from experiments.run import imported_from, open_trained, untouched_import
from interop.families import to_json
from interop.load import load
from interop.plan import plan
from interop.published import Published, open_published
from interop.save import save_published, staged
from interop.translate import architecture, differences
from interop.verify import verify, verify_saved
from model.cost import count_parameters
from model.positions import check_length
from model.transformer import Transformer, forward
from sharding.mesh import make_mesh, use_mesh
from train.checkpoint import Checkpointer, CheckpointError
from train.config import Experiment, OptimizerConfig, TrainConfig
from train.config_io import ConfigError
from train.objectives import token_losses
from train.records import MetricsWriter, RunFolder, RunFolderError, describe_environment, open_run, write_environment

PROBE = Path(argparse.__file__)  # text that every machine has, on which an imported model is tested
PROBE_TOKENS = 256


def fine_tuning(name: str, published: Published, tokenizer: Tokenizer, overrides: Sequence[str]) -> Experiment:
    """Return an experiment that fine-tunes a published model, at a low learning rate, on the default corpus.

    Raises ConfigError that names the field.
    """
    config = published.config
    with tempfile.TemporaryDirectory() as folder:  # holds the tokenizer for the checks, before the run folder exists
        tokenizer.save(folder)
        saved = TokenizerConfig(kind="saved", path=folder, vocab_size=tokenizer.vocab_size)
        experiment = _experiment(name, published, saved, overrides)
    _length_note(published, experiment)
    if lost := differences(architecture(config), architecture(experiment.model)):
        raise ConfigError(
            f"{lost[0].replace('(there', '(requested')}: the published weights fix this field; remove its --set"
        )
    if experiment.data.tokenizer != saved:
        raise ConfigError(
            "data.tokenizer: the published weights need their own tokenizer; remove its --set, or pass --tokenizer PATH"
        )
    return _with_tokenizer(experiment, Path("runs") / name / "tokenizer")


def _length_note(published: Published, experiment: Experiment) -> str | None:
    """Return a note if model.max_length differs from the published one. Raises ConfigError if it is impossible."""
    try:
        return check_length(experiment.model, published.config.max_length)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _with_tokenizer(experiment: Experiment, folder: PathLike) -> Experiment:
    return replace(
        experiment, data=replace(experiment.data, tokenizer=replace(experiment.data.tokenizer, path=str(folder)))
    )


def _experiment(name: str, published: Published, tokenizer: TokenizerConfig, overrides: Sequence[str]) -> Experiment:
    config = published.config
    experiment = Experiment(
        name=name,
        question="What does a published model learn from this text?",
        source=f"published weights ({published.family})",
        model=config,
        data=DataConfig(
            tokenizer=tokenizer, sequence_length=min(512, config.max_length), batch_size=8, holdout_fraction=0.01,
        ),
        optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=20, weight_decay=0.0),
        train=TrainConfig(steps=200, eval_every=50, checkpoint_every=50),
    )  # fmt: skip
    try:
        return resolve_from(experiment, overrides)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def import_run(
    path: Path, run_path: Path, *, name: str, overrides: Sequence[str], dtype: str, tokenizer_path: Path | None,
    dry_run: bool, console: Console,
) -> None:  # fmt: skip
    """Write the published model at `path` (a folder, or a GGUF file) as the run folder `run_path`.

    The run holds the weights stored as `dtype`, the model's tokenizer (or the one at `tokenizer_path`) and an
    experiment to fine-tune it. The weights are read back and compared with the files bit by bit. The folder appears
    atomically. `dry_run` reads only headers and prints the plan. Raises RunFolderError, ModelFilesError,
    UnsupportedModelError, DataError or ConfigError.
    """
    if run_path.exists():
        raise RunFolderError(f"run folder {run_path} exists already; choose another name with --name, or delete it")
    published = open_published(path)
    tokenizer, unused = fit_vocabulary(read_tokenizer(tokenizer_path or path), published.config.vocab_size)
    experiment = fine_tuning(name, published, tokenizer, overrides)
    console.print(_plan(path, published, tokenizer, unused, experiment, dtype))
    if dry_run:
        console.print("dry run: nothing was written")
        return
    mesh = make_mesh(experiment.mesh)
    with staged(run_path, console.print) as partial, open_run(partial, experiment, overrides=overrides) as run:
        write_environment(run, describe_environment())
        tokenizer.save(run.tokenizer)
        with _progress(console, "reading", count_parameters(experiment.model).total) as advance:
            model = load(
                published.source, published.tensor_map, experiment.model, experiment.sharding, mesh, dtype=dtype,
                progress=lambda piece, size: advance(size),
            )  # fmt: skip
        _write(run, model, experiment, tokenizer, dtype, str(path))
        del model
        _, trained = open_trained(run, _with_tokenizer(experiment, run.tokenizer), tokenizer)
        with _progress(console, "verifying", count_parameters(experiment.model).total) as advance:
            verified = verify(trained.model, published, dtype, lambda piece, size: advance(size))
        with use_mesh(mesh):
            loss, tokens = probe(trained.model, tokenizer)
        console.print(
            f"verified: {verified.elements:,} weights match the files, bit by bit as {dtype}; "
            f"{loss:.3f} nats per token on {tokens} tokens of Python's {PROBE.name} (guessing: "
            f"{math.log(experiment.model.vocab_size):.2f})"
        )
        if not math.isfinite(loss):
            raise CheckpointError(
                f"{path}: the model's loss on a test text is {loss}; nothing was kept. Check the files"
            )
    console.print(f"{run_path} is ready: python -m experiments generate {name} --prompt '...'")


def export_run(
    run: RunFolder,
    experiment: Experiment,
    folder: Path,
    *,
    dtype: str,
    family: str | None,
    step: int | None,
    dry_run: bool,
    console: Console,
) -> None:
    """Write a run's weights (their average if it keeps one) and tokenizer as a folder that transformers loads.

    The weights are read back and compared with those of the run. The folder appears atomically. Raises
    UnsupportedModelError, naming the fields, if no family's config.json can describe the network, and ModelFilesError,
    RunFolderError or CheckpointError.
    """
    if folder.exists():
        raise RunFolderError(f"{folder} exists already; choose another folder with --to, or delete it")
    family, values = to_json(experiment.model, family)
    tokenizer = load_tokenizer(run.tokenizer)
    counts = count_parameters(experiment.model)
    size = counts.total * jnp.dtype(dtype).itemsize
    console.print(
        f"{run.path} as {values['architectures'][0]} ({family}): {counts.total:,} parameters, {size / 1e6:,.0f} MB of "
        f"{dtype}"
    )
    length, wanted = values.get("max_position_embeddings"), experiment.model.max_length
    if length not in (None, wanted):
        console.print(
            f"note: max_position_embeddings = {length} instead of model.max_length = {wanted}, because dynamic scaling "
            "starts from it"
        )
    if dry_run:
        console.print("dry run: nothing was written")
        return
    program, trained = open_trained(run, experiment, tokenizer, step)
    with staged(folder, console.print) as partial, use_mesh(program.mesh):
        with _progress(console, "writing", counts.total) as advance:
            save_published(
                trained.model, experiment.model, partial, family=family, dtype=dtype, more=special_ids(tokenizer),
                progress=lambda piece, size: advance(size),
            )  # fmt: skip
        write_published(tokenizer, partial)
        with _progress(console, "verifying", counts.total) as advance:
            verify_saved(trained.model, partial, dtype, lambda piece, size: advance(size))
    console.print(f"{folder} is ready: the weights of step {trained.step}, verified bit by bit as {dtype}")


def copy_import(run: RunFolder, path: Path) -> None:
    """Copy an imported run to `path`, to be trained there. An existing copy stays. Raises RunFolderError."""
    if not imported_from(run):
        raise RunFolderError(
            f"{run.path} is not an imported run, and only copies of imported runs can be trained; to start a new run "
            f"from its weights, export and import it: python -m experiments export {run.path.name} --to FOLDER, then "
            "python -m experiments import FOLDER --name NAME"
        )
    if path.exists():
        if imported_from(RunFolder(path)) == imported_from(run):
            return
        raise RunFolderError(f"{path} already exists and is not a copy of {run.path}; choose another name with --run")
    if not untouched_import(run):
        raise RunFolderError(
            f"{run.path} was trained further, so a copy would not start from the published weights; continue it "
            "without --run, or import the model again"
        )
    with staged(path) as partial:
        shutil.copytree(
            run.path, partial, ignore=shutil.ignore_patterns(run.lock.name, run.wandb_id.name), dirs_exist_ok=True
        )
        with MetricsWriter(RunFolder(partial)) as metrics:
            metrics.write({
                "kind": "event", "step": 0, "event": "copied", "message": f"from {run.path}",
                "copied_from": {"run": str(run.path)},
            })  # fmt: skip


def probe(model: Transformer, tokenizer: Tokenizer) -> tuple[float, int]:
    """Return (nats per token, number of tokens) on the beginning of `PROBE`."""
    start = [] if tokenizer.special.start < 0 else [tokenizer.special.start]
    ids = [*start, *tokenizer.encode(PROBE.read_text()[: 16 * PROBE_TOKENS]).tolist()][
        : min(PROBE_TOKENS, model.config.max_length) + 1
    ]
    tokens = jnp.asarray([ids] * model.rules.batch_slices())

    @jax.jit
    def loss(model: Transformer, tokens: jax.Array) -> jax.Array:
        return token_losses(model, forward(model, tokens[:, :-1]).hidden_BTD, tokens[:, 1:])[0].mean()

    return float(loss(model, tokens)), len(ids) - 1


def _write(
    run: RunFolder, model: Transformer, experiment: Experiment, tokenizer: Tokenizer, dtype: str, origin: str
) -> None:
    """Write a checkpoint of only the weights at step 0, and the event that the report reads."""
    counts = count_parameters(experiment.model)
    summary = f"{counts.total:,} parameters ({counts.active:,} active per token) from {Path(origin).name}"
    metadata = {"weights": dtype, "tokenizer": tokenizer.identity, "seconds": 0.0, "imported_from": Path(origin).name}
    with Checkpointer(str(run.checkpoints)) as checkpoints, MetricsWriter(run) as metrics:
        if not checkpoints.save(0, {"model": model}, metadata=metadata, wait=True):
            raise CheckpointError(
                f"{run.path}: the checkpoint was not written (the warning above says why); free the disk"
            )
        metrics.write({
            "kind": "event", "step": 0, "event": "started", "message": f"imported: {summary}",
            "imported_from": Path(origin).name, "parameters_total": counts.total, "parameters_active": counts.active,
        })  # fmt: skip


def _plan(
    path: Path, published: Published, tokenizer: Tokenizer, unused: int, experiment: Experiment, dtype: str
) -> Table:
    """Return a table of the files' content and of the run that they become."""
    found = plan(published, dtype, experiment.sharding, make_mesh(experiment.mesh))
    kinds = ", ".join(f"{n} of {kind}" for kind, n in sorted(found.tensors.items()))
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("model", f"{path.name}: {found.family}, {found.summary}")
    table.add_row("parameters", f"{found.parameters.total:,} ({found.parameters.active:,} active per token)")
    files = f"{len(found.files)} files" if len(found.files) > 1 else Path(found.files[0]).name
    table.add_row(
        "tensors", f"{kinds}, {found.disk / 1e6:,.1f} MB in {files}; the largest {found.largest / 1e6:,.1f} MB"
    )
    device = "" if found.device == found.weights else f", {found.device / 1e6:,.1f} MB per device"
    table.add_row("weights", f"{found.weights / 1e6:,.1f} MB as {dtype}{device}")
    rows = f"; {unused} rows of the embedding have no id" if unused else ""
    chats = "" if tokenizer.chat_template is None else "; a chat template"
    table.add_row("tokenizer", f"{tokenizer.vocab_size:,} ids{rows}{chats}")
    if published.unread:
        table.add_row(
            "not read", f"{', '.join(published.unread)} (in config.json; check that none changes the computation)"
        )
    for note in (*published.notes, _length_note(published, experiment)):
        if note is not None:
            table.add_row("note", note)
    return table


@contextmanager
def _progress(console: Console, title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar over `total` numbers on a terminal, or print one line elsewhere."""
    if not console.is_terminal:
        console.print(f"{title} {total:,} numbers")
        yield lambda size: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total)
        yield lambda size: bar.advance(task, size)
