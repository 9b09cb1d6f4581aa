"""One trial: train an experiment in its run folder, or continue there, evaluate it, and return what is recorded."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from etils import epath

from data.pipeline import heldout_windows
from data.prepare import Prepared
from data.tokenizer import byte_lengths
from experiments.backend import device_name
from experiments.run import prepare_data, shared_run, written
from experiments.study.definition import Study, identity
from experiments.study.measures import Trained
from experiments.study.trials import Trial
from model.cost import count_parameters, train_flops_per_token
from train.config import Experiment
from train.evaluate import evaluate_all
from train.hooks import DivergedError, Hook
from train.hyper import hyper_of
from train.loop import Trained as TrainedRun
from train.loop import train
from train.program import Program, build
from train.records import MetricsWriter, RunFolder, describe_environment, read_metrics, write_environment
from train.signals import StopSignal

# Fields that the compiled step takes as traced values (train/hyper.py); a coefficient of 0 compiles to another program.
TRACED = ("train.seed", "optimizer.learning_rate", "optimizer.weight_decay")
COEFFICIENTS = ("train.z_loss", "model.moe.load_balance", "model.moe.z_loss")
LOOP = ("train.eval_every", "train.eval_windows", "data.seed")  # of the loop, not of the step
# Metrics of train steps that enter the figures, as means over the last tenth of a run, and the curves.
TRAIN_METRICS = ("loss", "grad_norm", "router_z_loss", "load_balance_loss", "router_entropy", "dropped_fraction",
                 "max_violation")  # fmt: skip
CURVE_POINTS = 60


class Programs:
    """Compiled programs of a worker for `devices` (default: all), by everything in a config that decides them."""

    def __init__(self, devices: Sequence[jax.Device] | None = None) -> None:
        self.devices = jax.devices() if devices is None else list(devices)
        self._programs: dict[str, Program] = {}

    def get(self, experiment: Experiment) -> Program:
        """Return the program of an experiment. Trials that differ in seeds and rates share one compilation."""
        key = program_key(experiment)
        if key not in self._programs:
            self._programs[key] = build(experiment, devices=self.devices)
        return replace(self._programs[key], experiment=experiment, hyper=hyper_of(experiment))


def program_key(experiment: Experiment) -> str:
    """Return a text that is equal for experiments with the same compiled step."""
    fields = identity(experiment)
    shared = {name: value for name, value in fields.items() if name not in (*TRACED, *LOOP)}
    return str({name: bool(value) if name in COEFFICIENTS else value for name, value in shared.items()})


def trial_folder(root: epath.Path, study: str, scale: str, trial: Trial) -> epath.Path:
    """Return the run folder of a trial."""
    label = re.sub(r"[^A-Za-z0-9.=_-]+", "-", trial.label)[:80]
    return root / study / scale / f"{label}-{trial.id[:8]}"


def run_trial(
    study: Study,
    trial: Trial,
    folder: epath.Path,
    programs: Programs,
    *,
    log: Callable[[str], None],
    stop: StopSignal,
    hooks: Sequence[Hook] = (),
) -> dict[str, Any] | None:
    """Return the outcome of a trial as JSON values, or None if `stop` ended it early.

    The outcome has figures, curves, arrays, diverged and seconds. Divergence is an outcome: the figures are then those
    of a network that gives every token the same probability. Raises what a run or one of the `hooks` raises.
    """
    clock = trial_clock()
    began = clock()
    if study.run is not None:
        figures = {name: float(value) for name, value in study.run(trial.experiment).items()}
        return _outcome(figures, {}, {}, False, clock() - began)
    program = checked_program(trial, programs)
    prepared = prepare_data(trial.experiment, log)
    with opened(trial, folder, log) as run:
        try:
            trained = train(program, prepared, run, log=log, show_progress=False, stop=stop, hooks=hooks)
        except DivergedError:
            return diverged_outcome(program, prepared, run, clock() - began)
        if not trained.finished:
            return None
        outcome = finished_outcome(study, program, prepared, run, trained, log)
        return outcome | {"seconds": round(clock() - began, 2)}


def checked_program(trial: Trial, programs: Programs) -> Program:
    """Return the program of a trial. Raises ConfigError if its devices do not suit the experiment."""
    trial.experiment.validate(len(programs.devices))
    return programs.get(trial.experiment)


@contextlib.contextmanager
def opened(trial: Trial, folder: epath.Path, log: Callable[[str], None]) -> Iterator[RunFolder]:
    """Yield the run folder of a trial as its only writer, with this start in its records. Raises RunFolderError."""
    with shared_run(folder, trial.experiment, (), False, log) as run:
        if jax.process_index() == 0:
            with written(run):
                write_environment(run, describe_environment())
        yield run


def diverged_outcome(program: Program, prepared: Prepared, run: RunFolder, seconds: float) -> dict[str, Any]:
    """Return the outcome of a trial that diverged: the figures are those of uniform predictions."""
    figures = {"bits_per_byte": uniform_bits(prepared, program), "loss": _uniform_loss(program)}
    return _outcome(figures, _curves(run), {}, True, seconds)


def finished_outcome(
    study: Study, program: Program, prepared: Prepared, run: RunFolder, trained: TrainedRun,
    log: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Evaluate a trained trial, write the row of its evaluation, and return its outcome without its seconds."""
    results = evaluate_all(program, trained.model, prepared, full=True)
    first = next(iter(results.values()))
    figures = {**_train_figures(run), **first.row()}
    if len(results) > 1:
        figures |= {f"{name}.bits_per_byte": result.bits_per_byte for name, result in results.items()}
    for measure in study.measures.values():
        figures |= measure(Trained(program, trained.model, prepared, log))
    figures |= _costs(program.experiment)
    with written(run), MetricsWriter(run, process_index=jax.process_index()) as metrics:
        metrics.write({"kind": "eval", "step": trained.step, "set": next(iter(results)), **first.row()})
    return _outcome(figures, _curves(run), _arrays(run), False, 0.0)


def trial_clock() -> Callable[[], float]:
    """Return the clock of a trial's cost: processor time on a CPU (a busy machine adds none), else wall time."""
    return time.process_time if jax.default_backend() == "cpu" else time.monotonic


def _outcome(
    figures: Mapping[str, float], curves: Mapping[str, Sequence[float]], arrays: Mapping[str, Any], diverged: bool,
    seconds: float,
) -> dict[str, Any]:  # fmt: skip
    return {
        "figures": {name: value for name, value in figures.items() if math.isfinite(value)},
        "curves": dict(curves), "arrays": dict(arrays), "diverged": diverged, "seconds": round(seconds, 2),
        "device": device_name(),
    }  # fmt: skip


def _uniform_loss(program: Program) -> float:
    return math.log(program.experiment.model.vocab_size)


def uniform_bits(prepared: Prepared, program: Program) -> float:
    """Return the bits per byte of uniform predictions on the first held-out set."""
    lengths, tokens, size = byte_lengths(prepared.tokenizer), 0, 0
    for batch in heldout_windows(prepared, prepared.heldout_names[0], batch_size=64):
        scored = batch.loss_weights > 0
        tokens, size = tokens + int(scored.sum()), size + int((lengths[batch.targets] * scored).sum())
    return _uniform_loss(program) / math.log(2) * tokens / size


def _costs(experiment: Experiment) -> dict[str, float]:
    counts = count_parameters(experiment.model)
    return {
        "parameters": counts.total,
        "active_parameters": counts.active,
        "flops_per_token": train_flops_per_token(experiment.model, experiment.data.sequence_length),
        "tokens": experiment.train.steps * experiment.data.batch_size * experiment.data.sequence_length,
    }


def _train_figures(run: RunFolder) -> dict[str, float]:
    """Return means over the last tenth of the train rows."""
    rows = [row for row in read_metrics(run.metrics) if row["kind"] == "train"]
    last = rows[-max(len(rows) // 10, 1) :]
    return {
        f"train_{name}" if name in ("loss", "max_violation", "dropped_fraction") else name: float(
            np.mean([row[name] for row in last])
        )
        for name in TRAIN_METRICS
        if all(row.get(name) is not None for row in last)
    }


def _curves(run: RunFolder) -> dict[str, list[float]]:
    """Return bits per byte by step, and the train metrics at no more than `CURVE_POINTS` steps."""
    rows = read_metrics(run.metrics)
    evaluated = [row for row in rows if row["kind"] == "eval" and row["set"] == _first_set(rows)]
    trained = [row for row in rows if row["kind"] == "train"]
    trained = trained[:: max(len(trained) // CURVE_POINTS, 1)]
    curves: dict[str, list[float]] = {}
    if evaluated:
        curves["step"] = [row["step"] for row in evaluated]
        curves["bits_per_byte"] = [_rounded(row["bits_per_byte"]) for row in evaluated]
    curves["train_step"] = [row["step"] for row in trained]
    for name in TRAIN_METRICS:
        if trained and all(row.get(name) is not None for row in trained):
            curves[f"train_{name}"] = [_rounded(row[name]) for row in trained]
    return curves


def _first_set(rows: Sequence[Mapping[str, Any]]) -> str | None:
    return next((row["set"] for row in rows if row["kind"] == "eval"), None)


def _arrays(run: RunFolder) -> dict[str, Any]:
    """Return the load of the experts, [layer][expert], at the last recorded step of a mixture of experts."""
    loads = [row["expert_load"] for row in read_metrics(run.metrics) if "expert_load" in row]
    return {"expert_load": loads[-1]} if loads else {}


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
