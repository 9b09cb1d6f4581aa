"""From a name and `--set` overrides to a complete, checked Experiment; from a run folder back to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from experiments.named import EXPERIMENTS
from train.config import Experiment
from train.config_io import ConfigError, apply_overrides, load_json
from train.records import RunFolder, RunFolderError

VOCAB_MULTIPLE = 128  # what matrix units and tensor-parallel meshes divide well

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


def resolve(name: str, overrides: Sequence[str], device_count: int | None, platform: str | None = None) -> Experiment:
    """The experiment `name` with `overrides` applied and its vocabulary filled in, checked for `device_count` devices
    of
    `platform` ('cpu', 'gpu' or 'tpu'); None: those that are here.

    Raises ConfigError or another ValueError with one paragraph that names field, value and fix.
    """
    if name not in EXPERIMENTS:
        near = get_close_matches(name, EXPERIMENTS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"experiment {name!r} is unknown; {hint}there are {', '.join(EXPERIMENTS)}")
    return resolve_from(EXPERIMENTS[name](), overrides, device_count, platform)


def resolve_from(
    experiment: Experiment, overrides: Sequence[str], device_count: int | None = None, platform: str | None = None
) -> Experiment:
    """`resolve` for an experiment at hand, such as that of a run folder."""
    experiment = fill_vocabulary(apply_overrides(experiment, overrides))
    if device_count is None:
        import jax

        device_count = jax.device_count()
    experiment.validate(device_count)
    wanted = {"tpu": "tpu", "hopper": "gpu", "triton": "gpu"}.get(experiment.model.attention.implementation)
    if wanted is not None:
        import jax

        if (platform or jax.default_backend()) != wanted:
            raise ConfigError(
                f"model.attention.implementation = {experiment.model.attention.implementation!r}: runs on a {wanted}, "
                f"and here is a "
                f"{platform or jax.default_backend()}; use 'auto', 'xla' or 'reference'"
            )
    return experiment


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
    """Whether `find_run` would find it."""
    return any(_holds_run(path) for path in (Path(text), Path("runs") / text))


def _holds_run(path: Path) -> bool:
    """A published model's folder has a config.json, too."""
    return RunFolder(path).config.exists() and RunFolder(path).overrides.exists()


def find_run(text: str) -> RunFolder:
    """The run folder of a path or of a name under runs/. Raises RunFolderError."""
    for path in (Path(text), Path("runs") / text):
        if _holds_run(path):
            return RunFolder(path)
    known = sorted(p.parent.name for p in Path("runs").glob("[!.]*/overrides.json"))
    if (Path(text) / "config.json").exists():
        raise RunFolderError(
            f"{text} is a published model, not a run: python -m experiments import {text} --name NAME makes one of it"
        )
    raise RunFolderError(
        f"run {text!r} is not a run folder (no config.json and overrides.json in it or in runs/{text}); "
        + (f"there are {', '.join(known)}" if known else "there are none yet: python -m experiments train quickstart")
    )


def load_experiment(run: RunFolder) -> Experiment:
    """The resolved experiment of a run folder. A saved tokenizer is the one that lies in the folder, wherever that
    went."""
    experiment = load_json(Experiment, run.config)
    tokenizer = experiment.data.tokenizer
    if tokenizer.kind != "saved" or not run.tokenizer.exists():
        return experiment
    return replace(experiment, data=replace(experiment.data, tokenizer=replace(tokenizer, path=str(run.tokenizer))))
