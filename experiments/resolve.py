"""Resolution of a name and `--set` overrides, or of a run folder, to a complete and valid Experiment."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from etils import epath

from data.paths import PathError, is_local, parse_path
from experiments.memory import Memory, refuse_what_cannot_fit
from experiments.named import EXPERIMENTS
from train.bucket import check_bucket
from train.config import Experiment
from train.config_io import ConfigError, apply_overrides, load_json
from train.records import RunFolder, RunFolderError, with_writer

MAX_NAME_BYTES = 200  # bytes of a run's name; file systems allow 255
VOCAB_MULTIPLE = 128  # suits matrix units and tensor-parallel meshes

DeviceCount = int | Callable[[Experiment], int] | None

# Fields that may change when a run resumes: its length, logging, storage and layout, but not its computation.
MAY_DIFFER_ON_RESUME = (
    "train.steps",
    "train.eval_every",
    "train.eval_windows",
    "train.eval_stride",
    "train.checkpoint_every",
    "train.local_checkpoint_every",
    "train.local_checkpoint_dir",
    "train.keep_last",
    "train.keep_best",
    "train.log_every",
    "train.sinks",
    "train.watchdog_seconds",
    "train.check_devices",
    "train.nonfinite",
    "train.rewind",
    "train.rewind.",
    "data.prefetch",
    "data.cache_dir",
    "data.tokenizer.path",
    "mesh.",
    "sharding.",
    "samples.",
    "name",
    "question",
    "source",
    "cost",
    "model.remat",
    "model.scan_unroll",
)


def resolve(
    name: str,
    overrides: Sequence[str],
    device_count: DeviceCount,
    platform: str | None = None,
    memory: Callable[[], Memory | None] | None = None,
) -> Experiment:
    """Return the experiment `name` with `overrides` applied, its vocabulary filled in, and its fields checked.

    The check is for `device_count` devices of `platform` ('cpu', 'gpu' or 'tpu'). None: the devices of this machine; a
    function: the number of devices that it starts for the experiment. `memory`, called once the config is valid,
    returns the memory of a device; None: memory is not checked.

    Raises ConfigError or another ValueError with one paragraph that names field, value and fix.
    """
    return resolve_from(named_experiment(name), overrides, device_count, platform, memory)


def named_experiment(name: str) -> Experiment:
    """Return the experiment `name` as it is written. Raises ConfigError."""
    if name not in EXPERIMENTS:
        near = get_close_matches(name, EXPERIMENTS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"experiment {name!r} is unknown; {hint}the experiments are {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]()


def resolve_from(
    experiment: Experiment,
    overrides: Sequence[str],
    device_count: DeviceCount = None,
    platform: str | None = None,
    memory: Callable[[], Memory | None] | None = None,
    *,
    training: bool = True,
) -> Experiment:
    """Return an experiment that need not be a named one, such as that of a run folder, resolved as by `resolve`.

    Without `training`, for evaluation and sampling, skip the checks that only matter for training.
    """
    experiment = fill_in(experiment, overrides)
    if device_count is None:
        import jax

        device_count = jax.device_count()
    elif not isinstance(device_count, int):
        device_count = device_count(experiment)
    experiment.validate(device_count, training=training)
    if memory is not None:
        refuse_what_cannot_fit(experiment, device_count, memory(), training=training)
    _refuse_kernels_of_other_platforms(experiment, platform)
    return experiment


def fill_in(experiment: Experiment, overrides: Sequence[str]) -> Experiment:
    """Return an experiment with overrides applied, its vocabulary and the path of its teacher filled in, unchecked."""
    return _find_teacher(fill_vocabulary(apply_overrides(experiment, overrides)))


def _find_teacher(experiment: Experiment) -> Experiment:
    """Return the experiment with the teacher as the path of a run folder. A name means a run below runs/."""
    train = experiment.train
    if not train.teacher or train.objective != "distillation":
        return experiment
    return replace(experiment, train=replace(train, teacher=str(find_run(train.teacher).path)))


def _refuse_kernels_of_other_platforms(experiment: Experiment, platform: str | None) -> None:
    attention, moe = experiment.model.attention, experiment.model.moe
    chosen = {
        "attention.implementation": (attention.implementation, "'auto', 'xla' or 'reference'"),
        "attention.decode_implementation": (attention.decode_implementation, "'auto', 'reference' or 'off'"),
    }
    if moe is not None:
        chosen["moe.implementation"] = (moe.implementation, "'auto', 'xla' or 'reference'")
    for field, (value, others) in chosen.items():
        wanted = {"tpu": "tpu", "hopper": "gpu", "triton": "gpu", "gpu": "gpu"}.get(value)
        if wanted is None:
            continue
        import jax

        here = platform or jax.default_backend()
        if here != wanted:
            raise ConfigError(
                f"model.{field} = {value!r}: runs on a {wanted}, but the device is a {here}; use {others}"
            )


def fill_vocabulary(experiment: Experiment) -> Experiment:
    """Return the experiment with a `model.vocab_size` of 0 replaced by the tokenizer's size, rounded up.

    Raises ConfigError for another value that is smaller than the tokenizer's number of ids.
    """
    tokenizer, given = experiment.data.tokenizer, experiment.model.vocab_size
    needed = tokenizer.ids
    if given and given < needed:
        raise ConfigError(
            f"model.vocab_size = {given}: the {tokenizer.kind} tokenizer has {needed} ids; set it to 0 (fitted) or "
            f"to at least {needed}"
        )
    vocab_size = given or -(-needed // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    return replace(experiment, model=replace(experiment.model, vocab_size=vocab_size))


def may_differ_on_resume(name: str) -> bool:
    """Return whether a field, given by its dotted name, may change when a run resumes."""
    return any(
        name == allowed or (allowed.endswith(".") and name.startswith(allowed)) for allowed in MAY_DIFFER_ON_RESUME
    )


def is_run(text: str) -> bool:
    """Return whether `find_run` would find a run."""
    return any(_holds_run(path) for path in _candidate_paths(text))


def _candidate_paths(text: str) -> tuple[str, ...]:
    """Return the paths that a user may mean: the text itself and, unless it is gs://, a name under runs/."""
    return (text,) if "://" in text else (text, f"runs/{text}")


def _holds_run(path: str | os.PathLike[str]) -> bool:
    """Return whether a folder is that of a run. A published model's folder also has a config.json."""
    try:
        return RunFolder(path).config.exists() and RunFolder(path).overrides.exists()
    except (OSError, ValueError):  # a name that no file system accepts
        return False


def find_run(text: str) -> RunFolder:
    """Return the run folder of a path or of a name under runs/. Raises RunFolderError."""
    if not is_local(text):
        _parse(text, "run")
    for path in _candidate_paths(text):
        if _holds_run(path):
            return RunFolder(path)
    known = sorted(p.parent.name for p in Path("runs").glob("[!.]*/overrides.json"))
    shown = text if len(text) <= MAX_NAME_BYTES else f"{text[:MAX_NAME_BYTES]}..."
    published = False
    with contextlib.suppress(OSError, ValueError):
        published = (parse_path(text) / "config.json").exists()
    if published:
        raise RunFolderError(
            f"{text} is a published model, not a run; import it: python -m experiments import {text} --name NAME"
        )
    raise RunFolderError(
        f"run {shown!r} is not a run folder (no config.json and overrides.json in it"
        + (f" or in runs/{shown}" if is_local(text) else "")
        + "); "
        + (
            f"the runs are {', '.join(known)}"
            if known
            else "there are none yet: python -m experiments train quickstart"
        )
    )


def _parse(text: str, field: str) -> epath.Path:
    """Return the path that a text names. Raises RunFolderError if it is invalid or an unreachable bucket."""
    try:
        return check_bucket(parse_path(text, field), field)
    except PathError as error:
        raise RunFolderError(str(error)) from error


def new_local_run_path(name: str) -> Path:
    """Return `new_run_path` for a command that renames the folder at the end. Raises RunFolderError for gs://."""
    path = new_run_path(name)
    if not is_local(path):
        raise RunFolderError(f"--run {name}: this command needs a local folder. Use one, then copy it to gs://")
    return Path(path)


def new_run_path(name: str) -> epath.Path:
    """Return the folder that `--run NAME` writes.

    A name means a folder below runs/. A path, which contains a '/' or begins with a '.', means that path, and
    gs://BUCKET/NAME a folder in a bucket. Raises RunFolderError unless the folder is missing, empty or already a run.
    """
    if "/" in name or name.startswith("."):
        path = _parse(name, "--run")
    elif name and name.isprintable() and "\\" not in name and len(os.fsencode(name)) <= MAX_NAME_BYTES:
        path = epath.Path("runs") / name
    else:
        shown = name if len(name) <= MAX_NAME_BYTES else f"{name[:MAX_NAME_BYTES]}... ({len(name)} characters)"
        raise RunFolderError(
            f"--run {shown!r}: not a valid name of a folder below runs/; use at most {MAX_NAME_BYTES} bytes of "
            f"letters, digits, '_', '-' and the like, or give a path"
        )
    try:
        foreign = path.exists() and not _holds_run(path) and _foreign_file(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunFolderError(
            f"--run {name[:MAX_NAME_BYTES]}: cannot be a folder ({reason}); choose another name"
        ) from error
    if foreign:
        shown = path.resolve() if is_local(path) else path
        raise RunFolderError(
            f"--run {name}: {shown} holds other files ({foreign}) and is not a run; name a run below runs/, "
            f"or give a path that is new, empty, or already a run"
        )
    return path


def _foreign_file(path: epath.Path) -> str | None:
    """Return the name of a file in `path` that a run which died while creating its folder cannot have left, or None."""
    if not path.is_dir():
        return "it is a file"
    run = RunFolder(path)
    names = sorted(entry.name for entry in path.iterdir())
    if run.lock.name in names:
        return None
    return next((name for name in names if name != run.checkpoints.name or any(run.checkpoints.iterdir())), None)


def load_experiment(run: RunFolder) -> Experiment:
    """Return the resolved experiment of a run folder. Its saved tokenizer is the one in the folder, even if moved.

    Raises ConfigError, which names the code that wrote the folder.
    """
    try:
        experiment = load_json(Experiment, run.config)
    except ConfigError as error:
        raise ConfigError(with_writer(error, run)) from error
    tokenizer = experiment.data.tokenizer
    if tokenizer.kind != "saved" or not run.tokenizer.exists():
        return experiment
    return replace(experiment, data=replace(experiment.data, tokenizer=replace(tokenizer, path=str(run.tokenizer))))
