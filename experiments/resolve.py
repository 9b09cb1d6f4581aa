"""From a name and `--set` overrides to a complete, checked Experiment; from a run folder back to it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from etils import epath

from data.paths import PathError, is_local, parse_path, require_backend
from experiments.memory import Memory, refuse_what_cannot_fit
from experiments.named import EXPERIMENTS
from train.config import Experiment
from train.config_io import ConfigError, apply_overrides, load_json
from train.records import RunFolder, RunFolderError

MOST_OF_A_NAME = 200  # bytes of a run's name; file systems take 255
VOCAB_MULTIPLE = 128  # what matrix units and tensor-parallel meshes divide well

DeviceCount = int | Callable[[Experiment], int] | None

# What may change when a run goes on: how long, how it is watched and stored, not what is computed.
MAY_DIFFER_ON_RESUME = (
    "train.steps",
    "train.eval_every",
    "train.eval_windows",
    "train.eval_stride",
    "train.checkpoint_every",
    "train.keep_last",
    "train.keep_best",
    "train.log_every",
    "train.sinks",
    "train.watchdog_seconds",
    "train.nonfinite",
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
    """Return the experiment `name` with `overrides` applied and its vocabulary filled in, checked for `device_count`
    devices of `platform` ('cpu', 'gpu' or 'tpu'); None: those that are here; a function: those that it starts for the
    experiment. `memory`, asked once the config is valid,
    returns what a device has; None: it is not checked.

    Raises ConfigError or another ValueError with one paragraph that names field, value and fix.
    """
    if name not in EXPERIMENTS:
        near = get_close_matches(name, EXPERIMENTS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"experiment {name!r} is unknown; {hint}there are {', '.join(EXPERIMENTS)}")
    return resolve_from(EXPERIMENTS[name](), overrides, device_count, platform, memory)


def resolve_from(
    experiment: Experiment,
    overrides: Sequence[str],
    device_count: DeviceCount = None,
    platform: str | None = None,
    memory: Callable[[], Memory | None] | None = None,
    *,
    training: bool = True,
) -> Experiment:
    """Do what `resolve` does for an experiment that is not a named one, such as that of a run folder. Without
    `training`, for evaluation and sampling, nothing is refused that only a training run needs."""
    experiment = _find_teacher(fill_vocabulary(apply_overrides(experiment, overrides)))
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


def _find_teacher(experiment: Experiment) -> Experiment:
    """Return the experiment with the teacher as the path of a run's folder; a name stands for a run below runs/."""
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
            raise ConfigError(f"model.{field} = {value!r}: runs on a {wanted}, and here is a {here}; use {others}")


def fill_vocabulary(experiment: Experiment) -> Experiment:
    """`model.vocab_size` 0 becomes the tokenizer's, rounded up; another value must hold the tokenizer's ids."""
    tokenizer, given = experiment.data.tokenizer, experiment.model.vocab_size
    needed = tokenizer.ids
    if given and given < needed:
        raise ConfigError(
            f"model.vocab_size = {given}: the {tokenizer.kind} tokenizer has {needed} ids; set it to 0 (fitted) or "
            f"more than that"
        )
    vocab_size = given or -(-needed // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    return replace(experiment, model=replace(experiment.model, vocab_size=vocab_size))


def may_differ_on_resume(name: str) -> bool:
    """Whether a field (dotted) may change when a run is resumed."""
    return any(
        name == allowed or (allowed.endswith(".") and name.startswith(allowed)) for allowed in MAY_DIFFER_ON_RESUME
    )


def is_run(text: str) -> bool:
    """Return whether `find_run` would find it."""
    return any(_holds_run(path) for path in _places(text))


def _places(text: str) -> tuple[str, ...]:
    """Return the paths that a user may mean: the text itself and, unless it is gs://, a name under runs/."""
    return (text,) if "://" in text else (text, f"runs/{text}")


def _holds_run(path: str | os.PathLike[str]) -> bool:
    """Return whether a folder is a run's; a published model's folder has a config.json, too."""
    try:
        return RunFolder(path).config.exists() and RunFolder(path).overrides.exists()
    except (OSError, ValueError):  # a name that no file system takes
        return False


def find_run(text: str) -> RunFolder:
    """Return the run folder of a path or of a name under runs/. Raises RunFolderError."""
    if not is_local(text):
        _parse(text, "run")
    for path in _places(text):
        if _holds_run(path):
            return RunFolder(path)
    known = sorted(p.parent.name for p in Path("runs").glob("[!.]*/overrides.json"))
    shown = text if len(text) <= MOST_OF_A_NAME else f"{text[:MOST_OF_A_NAME]}..."
    published = False
    with contextlib.suppress(OSError, ValueError):
        published = (parse_path(text) / "config.json").exists()
    if published:
        raise RunFolderError(
            f"{text} is a published model, not a run: python -m experiments import {text} --name NAME makes one of it"
        )
    raise RunFolderError(
        f"run {shown!r} is not a run folder (no config.json and overrides.json in it"
        + (f" or in runs/{shown}" if is_local(text) else "")
        + "); "
        + (f"there are {', '.join(known)}" if known else "there are none yet: python -m experiments train quickstart")
    )


def _parse(text: str, field: str) -> epath.Path:
    """Return the path of a text. Raises RunFolderError where it names no file, or a bucket that cannot be reached."""
    try:
        return require_backend(parse_path(text, field), field)
    except PathError as error:
        raise RunFolderError(str(error)) from error


def new_local_run_path(name: str) -> Path:
    """Return `new_run_path` for a command whose folder is renamed in the end. Raises RunFolderError for gs://."""
    path = new_run_path(name)
    if not is_local(path):
        raise RunFolderError(f"--run {name}: this command writes a local folder. Try a local one, and copy it to gs://")
    return Path(path)


def new_run_path(name: str) -> epath.Path:
    """Return the folder that `--run NAME` writes. A name stands for a folder below runs/; a path, which has a '/' or
    begins with a '.', for itself; gs://BUCKET/NAME for a folder of a bucket. Raises RunFolderError unless that folder
    is missing, empty, or already a run's."""
    if "/" in name or name.startswith("."):
        path = _parse(name, "--run")
    elif name and name.isprintable() and "\\" not in name and len(os.fsencode(name)) <= MOST_OF_A_NAME:
        path = epath.Path("runs") / name
    else:
        shown = name if len(name) <= MOST_OF_A_NAME else f"{name[:MOST_OF_A_NAME]}... ({len(name)} characters)"
        raise RunFolderError(
            f"--run {shown!r}: names a folder below runs/; use at most {MOST_OF_A_NAME} bytes of letters, digits, '_', "
            f"'-' and the like, or give a path"
        )
    try:
        foreign = path.exists() and not _holds_run(path) and _foreign(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunFolderError(f"--run {name[:MOST_OF_A_NAME]}: cannot be a folder ({reason}); choose another") from error
    if foreign:
        shown = path.resolve() if is_local(path) else path
        raise RunFolderError(
            f"--run {name}: {shown} holds other files ({foreign}) and is not a run; name a run below runs/, "
            f"or give a path that is new, empty, or already a run"
        )
    return path


def _foreign(path: epath.Path) -> str | None:
    """Return a file in `path` that a run which died while its folder was made would not have left; None if none."""
    if not path.is_dir():
        return "it is a file"
    run = RunFolder(path)
    names = sorted(entry.name for entry in path.iterdir())
    if run.lock.name in names:
        return None
    return next((name for name in names if name != run.checkpoints.name or any(run.checkpoints.iterdir())), None)


def load_experiment(run: RunFolder) -> Experiment:
    """The resolved experiment of a run folder. A saved tokenizer is the one that lies in the folder, wherever that
    went."""
    experiment = load_json(Experiment, run.config)
    tokenizer = experiment.data.tokenizer
    if tokenizer.kind != "saved" or not run.tokenizer.exists():
        return experiment
    return replace(experiment, data=replace(experiment.data, tokenizer=replace(tokenizer, path=str(run.tokenizer))))
