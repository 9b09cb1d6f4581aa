"""The training loop: mesh, abstract state, compile, restore or init, then batches; step t is dispatched before the
metrics
of t - 1 are read."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from data.pipeline import mixture, train_batches
from data.prepare import Prepared
from data.tokenizer import SpecialTokens, Tokenizer, special_tokens
from model.balance import max_violation
from model.cost import CONVENTION, count_parameters, train_flops_per_token
from model.transformer import Transformer
from sharding.mesh import concrete_shardings, make_mesh, put_batch, use_mesh
from sharding.peak import peak_flops
from train.checkpoint import Checkpointer, CheckpointError, Restored
from train.config import OBJECTIVE_MARKS, Experiment
from train.config_io import ConfigError
from train.evaluate import Evaluation, evaluate, make_score
from train.objectives import ROUTER_METRICS, make_objective, scoring_objective
from train.optimizers import make_optimizer, schedule
from train.progress import Progress, duration
from train.records import MetricsWriter, RunFolder
from train.routing import make_probe
from train.signals import StopSignal, Watchdog
from train.step import TrainState, init_state, make_step, weights_alone

CLOCK_STEPS = 10


class NonfiniteError(RuntimeError):
    """The loss or the gradient is not finite and `train.nonfinite` is 'stop'."""


@dataclass(frozen=True)
class Program:
    """All that a run computes with, made from its config before any data is read."""

    experiment: Experiment
    mesh: Mesh | None
    batch_spec: PartitionSpec
    abstract_state: TrainState  # shapes, dtypes, shardings
    make_state: Callable[[], TrainState]
    begin: Callable[[Transformer], TrainState]  # the state before the first step, of a network that has its weights
    step: Callable  # (state, batch) -> (state, metrics), not jitted
    score: Callable  # (model, batch) -> (loss, tokens), jitted


@dataclass(frozen=True)
class Trained:
    """Where a run stands when `train` returns."""

    state: TrainState
    step: int
    finished: bool  # False: it was asked to stop
    seconds: float  # of training, evaluation and saving, over all the run's starts

    @property
    def model(self) -> Transformer:
        """The weights to evaluate and to sample from: the average where there is one."""
        return self.state.model if self.state.ema is None else self.state.ema


def build(experiment: Experiment, mesh: Mesh | None = None) -> Program:
    """The program of a resolved experiment (its vocabulary known), over all the devices there are, or over `mesh`,
    whose
    devices may be a topology's, to be compiled for alone. Raises ConfigError."""
    model, config = experiment.model, experiment.train
    mesh = make_mesh(experiment.mesh) if mesh is None else mesh
    slices = 1 if mesh is None else math.prod(mesh.shape[a] for a in experiment.sharding.activations.batch)
    if slices % jax.process_count():
        raise ConfigError(
            f"mesh: the batch is cut into {slices} slices for {jax.process_count()} processes, and each needs slices "
            f"of its "
            "own; raise mesh.data or mesh.fsdp, and lower mesh.tensor or mesh.sequence"
        )
    optimizer = make_optimizer(experiment.optimizer, model, config.steps)

    def begin(network: Transformer) -> TrainState:
        network = jax.tree.map(lambda w: w.astype(jnp.float32), network)
        return init_state(jax.random.split(jax.random.key(config.seed))[1], network, optimizer, config)

    def make_state() -> TrainState:
        return begin(Transformer(jax.random.split(jax.random.key(config.seed))[0], model, experiment.sharding))

    with use_mesh(mesh):
        abstract_state = concrete_shardings(jax.eval_shape(make_state), mesh)
    ids = experiment.data.tokenizer.ids
    # Only objectives with marks read a saved tokenizer's: the others compile where its folder is not at hand.
    special = special_tokens(experiment.data.tokenizer) if config.objective in OBJECTIVE_MARKS else SpecialTokens()
    objective = make_objective(config, ids, special)
    step = make_step(objective, optimizer, schedule(experiment.optimizer, config.steps), config)
    score = jax.jit(make_score(scoring_objective(config, ids, special)))
    spec = experiment.sharding.spec("activations", ("batch", None))
    return Program(experiment, mesh, spec, abstract_state, make_state, begin, step, score)


def evaluate_all(
    program: Program,
    model: Transformer,
    prepared: Prepared,
    *,
    full: bool,
    between: Callable[[], object] = lambda: None,
) -> dict[str, Evaluation]:
    """Every held-out set: `train.eval_windows` of each, or all of it."""
    config = program.experiment.train
    with use_mesh(program.mesh):
        return {
            name: evaluate(
                program.score,
                model,
                prepared,
                name,
                batch_size=program.experiment.data.batch_size,
                stride=config.eval_stride,
                max_windows=None if full else config.eval_windows,
                mesh=program.mesh,
                spec=program.batch_spec,
                between=between,
            )
            for name in prepared.heldout_names
        }


def restore(
    program: Program, checkpoints: Checkpointer, tokenizer: Tokenizer, step: int | None = None, *, training: bool = True
) -> Restored | None:
    """The newest good checkpoint (or that of `step`) on this program's mesh, or None. Refuses another tokenizer's.

    A checkpoint of weights alone (metadata 'weights': their dtype) begins a training. Not `training`, only the weights
    are read (the average where there is one), and there is no optimizer.
    """
    state = program.abstract_state

    def template(metadata: dict[str, Any]):
        if "weights" in metadata:
            dtype = metadata["weights"]
            return {
                "model": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), state.model)
            }
        if training:
            return state
        return {"model": state.model} if state.ema is None else {"ema": state.ema}

    restored = checkpoints.restore(template, step=step, part=not training)
    if restored is not None and restored.metadata["tokenizer"] != tokenizer.identity:
        raise CheckpointError(
            f"step {restored.step}: it was trained with the tokenizer {restored.metadata['tokenizer'][:12]}, the one "
            f"at hand is "
            f"{tokenizer.identity[:12]}; they do not belong together: restore the data config (and the text the "
            "tokenizer was trained on), or start a new run with --run NEWNAME"
        )
    if restored is None or isinstance(restored.state, TrainState):
        return restored
    (model,) = restored.state.values()
    if not training:
        return replace(restored, state=weights_alone(model))
    begin = jax.jit(program.begin, donate_argnums=0 if restored.metadata["weights"] == "float32" else ())
    return replace(restored, state=begin(model))


def train(
    program: Program,
    prepared: Prepared,
    run: RunFolder,
    *,
    notice: Callable[[str], None] = print,
    show_progress: bool = True,
) -> Trained:
    """Trains from the newest checkpoint of the run, or from the start, to `train.steps` or the first SIGINT or SIGTERM.

    Resumed, the losses are those of the uninterrupted run, bit for bit on the same devices. Raises NonfiniteError,
    CheckpointError, DataError; whatever is raised, the last checkpoint stands.
    """
    experiment, config = program.experiment, program.experiment.train
    first_process = jax.process_index() == 0
    counts = count_parameters(experiment.model)
    peak, peak_source = peak_flops(jax.local_devices()[0])
    flops = train_flops_per_token(experiment.model, experiment.data.sequence_length)
    convention = f"FLOPs {CONVENTION}; of the {peak_source}" + (
        f" on {jax.device_count()} devices" if jax.device_count() > 1 else ""
    )
    shares = [(share, prepared.counts(name)) for name, share in mixture(prepared, experiment.data).items()]
    bytes_per_token = sum(share * counts.train_bytes / counts.train_tokens for share, counts in shares)

    with (
        MetricsWriter(run, sinks=config.sinks, process_index=jax.process_index()) as metrics,
        Checkpointer(
            str(run.checkpoints), keep_last=config.keep_last, keep_best=config.keep_best, warn=lambda text: warn(text)
        ) as checkpoints,
        StopSignal() as stop,
        Watchdog(config.watchdog_seconds) as watchdog,
        train_batches(
            prepared, experiment.data, process_index=jax.process_index(), process_count=jax.process_count()
        ) as batches,
        use_mesh(program.mesh),
    ):
        step = 0

        def record(row: dict[str, Any]) -> None:
            """Writes a row; a full disk costs rows, not the run."""
            try:
                metrics.write(row)
            except OSError as error:
                notice(f"warning: the metrics of step {row['step']} were not written ({error})")

        def warn(text: str) -> None:
            notice(f"warning: {text}")
            record({"kind": "event", "step": step, "event": "warning", "message": text})

        restored = restore(program, checkpoints, prepared.tokenizer)
        began, seconds_before = time.monotonic(), 0.0
        if restored is None:
            notice(f"initializing {counts.total:,} parameters ({counts.active:,} active per token)")
            state, first = jax.jit(program.make_state)(), 0
            record({
                "kind": "event", "step": 0, "event": "started", "message": f"{counts.total:,} parameters",
                "parameters_total": counts.total, "parameters_active": counts.active, "mfu_convention": convention,
                "flops_per_token": flops,
            })  # fmt: skip
        else:
            # A refusal that ended the run before does not end this one before it begins.
            state, first = restored.state._replace(nonfinite=jnp.zeros_like(restored.state.nonfinite)), restored.step
            if "data" in restored.metadata:
                batches.set_state(restored.metadata["data"])
            seconds_before = restored.metadata["seconds"]
            notice(f"resuming from step {first}")
            record({"kind": "event", "step": first, "event": "resumed", "message": f"from step {first}"})
        del restored

        def save(state: TrainState, step: int, metric: float | None = None, wait: bool = False) -> None:
            metadata = {
                "data": {**batches.get_state(), "step": step},
                "tokenizer": prepared.tokenizer.identity,
                "seconds": seconds_before + time.monotonic() - began,
            }
            watchdog.rest()
            checkpoints.save(step, state, metadata=metadata, metric=metric, wait=wait)

        if first >= config.steps:
            return Trained(state, first, True, seconds_before)
        compiled = _compile(program, state, batches.batch_at(first), notice)

        clock = _Clock(flops, None if peak is None else peak * jax.device_count())
        pending: tuple[int, dict[str, Any], dict[str, np.ndarray]] | None = None  # dispatched, not yet read
        step = done = saved = first
        stopped, refused = False, 0

        def read() -> None:
            """Takes the metrics of the step that was dispatched last, records and shows them."""
            nonlocal pending, done, refused
            if pending is None:
                return
            (done, values, batch), pending = pending, None
            row = _row(done, jax.device_get(values), bytes_per_token, experiment)
            row |= clock.rates(done, row.pop("tokens"))
            if (count := row.pop("nonfinite_updates")) > refused:
                refused = count
                _report_nonfinite(run, done, row, batch, record, notice, config.nonfinite == "stop")
            if done % config.log_every == 0 or done in (first + 1, config.steps):
                record(row)
            progress.update(done, row)

        probe = None
        if experiment.model.moe is not None:
            probe = make_probe(experiment, prepared, run, program.mesh, program.batch_spec)

        with Progress(
            config.steps,
            start_step=first,
            title=experiment.name,
            mfu_convention=convention if peak else "",
            enabled=first_process and show_progress,
        ) as progress:
            try:
                for step in range(first + 1, config.steps + 1):
                    batch = next(batches)
                    state, values = compiled(state, put_batch(batch, program.mesh, program.batch_spec))
                    read()
                    pending = (step, values, batch)
                    watchdog.beat()
                    stopped = stop.agreed(step)
                    evaluating = bool(config.eval_every) and step % config.eval_every == 0 and step < config.steps
                    saving = step % config.checkpoint_every == 0 or step == config.steps or stopped
                    if evaluating or saving:
                        read()  # a step that is not finite must not be saved as if it were
                    metric = None
                    model = state.model if state.ema is None else state.ema
                    if probe is not None and (evaluating or step == config.steps) and not stopped:
                        watchdog.rest()
                        probe(model, step)
                        clock.pause()
                    if evaluating and not stopped:
                        watchdog.rest()  # the first evaluation compiles
                        results = evaluate_all(program, model, prepared, full=False, between=watchdog.beat)
                        for name, result in results.items():
                            row = {"kind": "eval", "step": step, "set": name, **result.row()}
                            record(row)
                            progress.update(step, row)
                        metric = next((r.bits_per_byte for r in results.values()), None)
                        clock.pause()
                    if saving:
                        saved = step
                        save(state, step, metric, wait=stopped or step == config.steps)
                        clock.pause()
                    if stopped:
                        break
            except NonfiniteError:
                # The refused step and the one dispatched after it changed only the counters: saved as of the refused
                # one, so that a run that goes on with 'skip' takes the very next batch.
                if saved < done:
                    save(state._replace(step=state.step - (step - done)), done, wait=True)
                raise
        seconds = seconds_before + time.monotonic() - began
        finished = step >= config.steps
        if not finished:
            message = f"stopped at step {step} after {duration(seconds)}; the same command goes on from there"
            record({"kind": "event", "step": step, "event": "stopped", "message": message})
            notice(message)
        return Trained(state, step, finished, seconds)


class _Clock:
    """Tokens per second and MFU over the last CLOCK_STEPS steps, pauses left out: where a backend runs a step while it
    is
    dispatched, two steps may be read at once, and the time between two reads says nothing."""

    def __init__(self, flops_per_token: float, peak: float | None):
        self._flops, self._peak = flops_per_token, peak
        self._reads: deque[tuple[int, float]] = deque(maxlen=CLOCK_STEPS + 1)

    def pause(self) -> None:
        self._reads.clear()

    def rates(self, step: int, tokens: float) -> dict[str, float | None]:
        self._reads.append((step, time.monotonic()))
        (first, began), (last, now) = self._reads[0], self._reads[-1]
        if last == first or now <= began:
            return {}
        rate = tokens * (last - first) / (now - began)
        return {"tokens_per_second": rate, "mfu": rate * self._flops / self._peak if self._peak else None}


def _compile(program: Program, state: TrainState, batch: dict[str, np.ndarray], notice: Callable[[str], None]):
    """The step compiled ahead of its first call, with its memory told. The state is donated."""
    start = time.monotonic()
    arrays = put_batch(batch, program.mesh, program.batch_spec)
    compiled = jax.jit(program.step, donate_argnums=0).lower(state, arrays).compile()
    memory = compiled.memory_analysis()
    told = ""
    if memory is not None:
        told = (
            f"; per device: state and batch {memory.argument_size_in_bytes / 1e6:,.0f} MB "
            f"({memory.alias_size_in_bytes / 1e6:,.0f} MB updated in place), temporaries "
            f"{memory.temp_size_in_bytes / 1e6:,.0f} MB"
        )
    notice(f"compiled the train step in {time.monotonic() - start:.1f} s{told}")
    return compiled


def _row(step: int, values: dict[str, Any], bytes_per_token: float, experiment: Experiment) -> dict[str, Any]:
    """The row of metrics.jsonl for a train step."""
    loss = float(values["loss"])
    row: dict[str, Any] = {
        "kind": "train", "step": step, "loss": loss, "bits_per_byte": loss / math.log(2) / bytes_per_token,
        "learning_rate": float(values["learning_rate"]), "grad_norm": float(values["grad_norm"]),
        "tokens": float(values["tokens"]), "nonfinite_updates": int(values["nonfinite"]),
    }  # fmt: skip
    clip = experiment.optimizer.clip_norm
    if clip is not None:
        row["clipped"] = bool(row["grad_norm"] > clip)
    if values["loss_scale"] != 1.0:
        row["loss_scale"] = float(values["loss_scale"])
    if "expert_load" in values:
        load_LE = np.asarray(values["expert_load"], np.float64)
        row |= {name: float(values[name]) for name in ROUTER_METRICS}
        row["max_violation"] = float(max_violation(jnp.asarray(load_LE)).mean())
        row["expert_load"] = np.round(load_LE, 4).tolist()
        layers_LM = np.asarray(values["router_layers"], np.float64)  # the same by layer
        row["router_layers"] = {
            name: [float(f"{x:.4g}") for x in layers_LM[:, i]] for i, name in enumerate(ROUTER_METRICS)
        }
    return row


def _report_nonfinite(
    run: RunFolder,
    step: int,
    row: dict,
    batch: dict,
    record: Callable[[dict], None],
    notice: Callable[[str], None],
    stop: bool,
) -> None:
    """Saves the batch and says what happened; raises NonfiniteError if the run is to stop."""
    path = run.path / f"nonfinite_step_{step}_process_{jax.process_index()}.npz"
    try:
        np.savez(path, **batch)
        kept = f"the batch is in {path.name}"
    except OSError as error:
        kept = f"the batch could not be kept ({error})"
    message = (
        f"step {step}: loss {row['loss']}, gradient norm {row['grad_norm']}; the weights were left as they were, {kept}"
    )
    record({"kind": "event", "step": step, "event": "nonfinite", "message": message})
    if stop:
        raise NonfiniteError(
            f"{message}. train.nonfinite = 'stop' ended the run: go on without such batches with "
            "--set train.nonfinite=skip, or lower optimizer.learning_rate in a new run (--run NEWNAME)"
        )
    notice(message)
