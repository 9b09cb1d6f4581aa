"""Programs of a run, built from its config before any data is read, and functions that restore its weights.

`build_network` suffices for evaluation and sampling; `build` adds the optimizer and the train step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh, PartitionSpec

from data.batch import Batch
from data.tokenizer import SpecialTokens, Tokenizer, special_tokens
from model.transformer import Transformer
from model.weights import merge
from sharding.mesh import concrete_shardings, make_mesh, use_mesh
from train.checkpoint import Checkpointer, CheckpointError, Restored
from train.config import OBJECTIVE_MARKS, Experiment
from train.config_io import ConfigError, load_json
from train.evaluate import Score, make_score
from train.frozen import Frozen, read_frozen, rejoin, train_last
from train.hyper import Hyper, hyper_of
from train.objectives import Objective, make_objective, scoring_objective
from train.optimizers import make_optimizer, schedule
from train.run_folder import RunFolder, RunFolderError
from train.step import Step, TrainState, init_state, make_step


@dataclass(frozen=True, kw_only=True)
class Network:
    """The mesh, shapes and functions that evaluation and sampling need."""

    experiment: Experiment
    mesh: Mesh | None
    batch_spec: PartitionSpec
    abstract_model: Transformer  # shapes, dtypes, shardings of the whole network
    score: Callable[[Transformer, Batch], Score]  # jitted


@dataclass(frozen=True, kw_only=True)
class Program(Network):
    """A network with the functions that training needs."""

    abstract_state: TrainState  # shapes, dtypes, shardings
    make_state: Callable[..., TrainState]  # (hyper=None): the state before the first step, weights drawn from the seed
    begin: Callable[..., TrainState]  # (model, hyper=None): the same, with the weights of a given network
    step: Step  # not jitted
    hyper: Hyper  # of the config, as NumPy
    teacher: Network | None = None  # for distillation
    # Compiled programs by name, or a StepCompilation (train/ahead.py); shared by replaced copies.
    executables: dict[str, Any] = field(default_factory=dict)


class Weights(NamedTuple):
    """Weights of a network, read from a checkpoint."""

    model: Transformer
    step: int
    finished: bool  # whether `step` is the run's last step


def build_network(
    experiment: Experiment, mesh: Mesh | None = None, *, devices: Sequence[jax.Device] | None = None
) -> Network:
    """Return the network of a resolved experiment (with a known vocabulary), without weights or an optimizer.

    Its mesh is the experiment's over `devices` (default: all), or `mesh`, whose devices may be those of a topology, for
    which programs can only be compiled. Raises ConfigError.
    """
    mesh = make_mesh(experiment.mesh, None if devices is None else list(devices)) if mesh is None else mesh
    return _network_on(mesh, experiment)


def _network_on(mesh: Mesh | None, experiment: Experiment) -> Network:
    """Return the network of an experiment on `mesh`, or on one device if `mesh` is None."""
    config = experiment.train
    slices = experiment.sharding.batch_slices(mesh)
    if slices % jax.process_count():
        raise ConfigError(
            f"mesh: the batch is split into {slices} slices, which do not divide evenly over {jax.process_count()} "
            "processes; raise mesh.data or mesh.fsdp, and lower mesh.tensor or mesh.sequence"
        )
    with use_mesh(mesh):
        abstract_model = concrete_shardings(
            jax.eval_shape(lambda: Transformer(jax.random.key(0), experiment.model, experiment.sharding)), mesh
        )
    score = jax.jit(make_score(scoring_objective(config, experiment.data.tokenizer.ids, _special(experiment))))
    spec = experiment.sharding.spec("activations", ("batch", None))
    return Network(experiment=experiment, mesh=mesh, batch_spec=spec, abstract_model=abstract_model, score=score)


def build(
    experiment: Experiment,
    mesh: Mesh | None = None,
    *,
    devices: Sequence[jax.Device] | None = None,
    objective: Objective | None = None,
) -> Program:
    """Return the program of a resolved experiment: `build_network` with the optimizer and the train step.

    `objective` replaces the configured one. Raises ConfigError.
    """
    network = build_network(experiment, mesh, devices=devices)
    model, config = experiment.model, experiment.train
    optimizer = lambda hyper: make_optimizer(experiment.optimizer, model, config.steps, hyper)
    rate = lambda hyper: schedule(experiment.optimizer, config.steps, hyper)

    def keys(hyper: Hyper | None) -> jax.Array:
        return jax.random.split(jax.random.key(config.seed if hyper is None else hyper.seed))

    def begin(network: Transformer, hyper: Hyper | None = None) -> TrainState:
        network = jax.tree.map(lambda w: w.astype(jnp.float32), network)
        trainable, frozen = train_last(network, config.trainable_layers)
        return init_state(keys(hyper)[1], trainable, optimizer(None), config, frozen)

    def make_state(hyper: Hyper | None = None) -> TrainState:
        return begin(Transformer(keys(hyper)[0], model, experiment.sharding), hyper)

    with use_mesh(network.mesh):
        abstract_state = concrete_shardings(jax.eval_shape(make_state), network.mesh)
    teacher = _teacher(experiment, network.mesh) if config.teacher else None
    if teacher is not None:
        abstract_state = with_teacher(abstract_state, teacher.abstract_model)
    if objective is None:
        objective = make_objective(config, experiment.data.tokenizer.ids, _special(experiment))
    return Program(
        **{f.name: getattr(network, f.name) for f in fields(Network)},
        abstract_state=abstract_state,
        make_state=make_state,
        begin=begin,
        step=make_step(objective, optimizer, rate, config),
        hyper=hyper_of(experiment),
        teacher=teacher,
    )


def _teacher(experiment: Experiment, mesh: Mesh | None) -> Network:
    """Return the network of `train.teacher`, sharded like the student. Raises ConfigError."""
    try:
        teacher = load_json(Experiment, RunFolder(experiment.train.teacher).config)
    except (OSError, ConfigError, RunFolderError) as error:
        raise ConfigError(
            f"train.teacher = {experiment.train.teacher!r}: not a run with a readable config ({error}); give the "
            "path of a run folder"
        ) from error
    if teacher.model.vocab_size != experiment.model.vocab_size:
        raise ConfigError(
            f"train.teacher = {experiment.train.teacher!r}: the teacher has model.vocab_size = "
            f"{teacher.model.vocab_size}, the student {experiment.model.vocab_size}; they must be equal"
        )
    return _network_on(mesh, replace(teacher, mesh=experiment.mesh, sharding=experiment.sharding))


def with_teacher(state: TrainState, teacher: Transformer) -> TrainState:
    """Return the state with a second network among its frozen weights."""
    return state._replace(frozen=(state.frozen or Frozen())._replace(teacher=teacher))


def _special(experiment: Experiment) -> SpecialTokens:
    """Return the special tokens that the objective uses.

    Only objectives that need them read a saved tokenizer; the others also compile without its folder.
    """
    marked = experiment.train.objective in OBJECTIVE_MARKS
    return special_tokens(experiment.data.tokenizer) if marked else SpecialTokens()


def initial_state(program: Program) -> TrainState:
    """Return the state before the first step of a run."""
    options = None
    if jax.default_backend() == "cpu" and "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
        # Of 10 s in which LLVM compiles this program for quickstart, 7 optimize what then runs once, in 0.2 s.
        options = {"xla_backend_optimization_level": 1}
    return jax.jit(program.make_state, compiler_options=options)(program.hyper)


def restore(
    program: Program,
    checkpoints: Checkpointer,
    tokenizer: Tokenizer,
    *,
    at_most: int | None = None,
    frozen: epath.PathLike | None = None,
    log: Callable[[str], None] = print,
) -> Restored | None:
    """Return the train state of the newest good checkpoint (up to step `at_most`) on this program's mesh, or None.

    `frozen`: the folder of the run's frozen weights; None: the state comes without them. A checkpoint that holds only
    weights (metadata 'weights': their dtype) gives a state before its first update, without a teacher. Raises
    CheckpointError, also if the checkpoint belongs to another tokenizer.
    """

    def template(metadata: dict[str, Any]) -> Any:
        if "weights" in metadata:
            return _weights_alone(program, metadata)
        return program.abstract_state._replace(frozen=None)

    restored = checkpoints.restore(template, at_most=at_most)
    if restored is None:
        return None
    _check_tokenizer(restored, tokenizer)
    if isinstance(restored.state, TrainState):
        if program.abstract_state.frozen is None or frozen is None:
            return restored
        kept = read_frozen(frozen, program.abstract_state.frozen, restored.metadata["frozen"], log)
        return replace(restored, state=restored.state._replace(frozen=kept))
    begin = jax.jit(program.begin, donate_argnums=0 if restored.metadata["weights"] == "float32" else ())
    return replace(restored, state=begin(restored.state["model"]))


def load_weights(
    network: Network,
    checkpoints: Checkpointer,
    tokenizer: Tokenizer,
    step: int | None = None,
    *,
    frozen: epath.PathLike | None = None,
    log: Callable[[str], None] = print,
) -> Weights | None:
    """Return the weights (their average if the run keeps one) of the newest good checkpoint, or of `step`, or None.

    `frozen`: the folder of the run's frozen weights. No optimizer is built.
    """
    config = network.experiment.train
    name, layers = "model" if config.ema_decay is None else "ema", config.trainable_layers
    with use_mesh(network.mesh):
        cut = jax.eval_shape(lambda: train_last(Transformer(jax.random.key(0), *_shape(network)), layers))
    trainable, rest = concrete_shardings(cut, network.mesh)

    def template(metadata: dict[str, Any]) -> Any:
        return _weights_alone(network, metadata) if "weights" in metadata else {name: trainable}

    restored = checkpoints.restore(template, step=step, part=True)
    if restored is None:
        return None
    _check_tokenizer(restored, tokenizer)
    (model,) = restored.state.values()
    if rest is not None and "weights" not in restored.metadata:
        assert frozen is not None, "the network has frozen weights"
        kept = read_frozen(frozen, {"model": rest.model}, restored.metadata["frozen"], log)
        model = jax.jit(lambda a, b: rejoin(merge(a, b)))(model, kept["model"])
    return Weights(model, restored.step, restored.step >= config.steps)


def _shape(network: Network) -> tuple[Any, Any]:
    return network.experiment.model, network.experiment.sharding


def _weights_alone(network: Network, metadata: dict[str, Any]) -> dict[str, Transformer]:
    """Return the template of a checkpoint that holds only weights, of one dtype."""
    dtype, model = metadata["weights"], network.abstract_model
    return {"model": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), model)}


def _check_tokenizer(restored: Restored, tokenizer: Tokenizer) -> None:
    if restored.metadata["tokenizer"] != tokenizer.identity:
        raise CheckpointError(
            f"step {restored.step} was trained with tokenizer {restored.metadata['tokenizer'][:12]}, but the current "
            f"one is {tokenizer.identity[:12]}: restore the data config (and the text on which the tokenizer was "
            "trained), or start a new run with --run NEWNAME"
        )
