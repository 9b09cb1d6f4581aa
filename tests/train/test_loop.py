"""A run that is interrupted, damaged or out of disk space ends like the undisturbed one, bit for bit."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.config import SourceConfig
from data.pipeline import TrainBatches
from data.prepare import prepare
from sharding.mesh import MeshConfig, use_mesh
from tests.data.conftest import byte_config, write_corpus
from tests.train.small_runs import StopAt, bits, experiment, run, train_rows, with_train
from train.checkpoint import Checkpointer, CheckpointError
from train.config_io import save_json
from train.hooks import Hook, NonfiniteError
from train.objectives import Objective, make_objective
from train.optimizers import schedule
from train.program import build, restore
from train.records import MetricsWriter, read_metrics
from train.signals import Watchdog

ROOT = Path(__file__).parents[2]
STEPS = 12
POISON = 266  # the token of byte 255, which UTF-8 never contains; a batch with it has a NaN loss


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("loop")
    return prepare(byte_config(root, write_corpus(root / "large", 30), write_corpus(root / "small", 8)))


@pytest.fixture(scope="module")
def data(prepared):
    root = prepared.directory.parents[1]
    return byte_config(root, *(SourceConfig(name=name, path=str(root / name)) for name in ("large", "small")))


@dataclasses.dataclass(frozen=True)
class Poisoned:
    """An objective whose loss is NaN if a batch holds the poison token."""

    objective: Objective

    def __call__(self, trainable, frozen, batch, key):
        loss = self.objective(trainable, frozen, batch, key)
        factor = jnp.where((batch.tokens == POISON).any(), jnp.nan, 1.0)
        return loss._replace(total=loss.total * factor, metrics=loss.metrics | {"loss": loss.metrics["loss"] * factor})

    def with_hyper(self, hyper):
        return Poisoned(self.objective.with_hyper(hyper))


@pytest.fixture(scope="module")
def programs(data):
    """The program of each policy, on one device. Each compiles its step once for all tests."""
    made = {}
    for policy in ("stop", "skip"):
        config = experiment(data, nonfinite=policy)
        objective = Poisoned(make_objective(config.train, config.data.tokenizer.ids))
        made[policy] = build(config, devices=jax.devices()[:1], objective=objective)
    return made


@pytest.fixture(scope="module")
def undisturbed(programs, prepared, tmp_path_factory):
    """(folder, trained) of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, run(programs["stop"], prepared, folder)


def stopped_at(when: int, program, prepared, folder):
    """Run in `folder` until SIGTERM stops it at step `when`."""
    with StopAt(when) as stop:
        return run(program, prepared, folder, stop=stop)


def poisoned_batches(prepared, data, *steps: int):
    """Return (batches with the poison token at these steps, the list in which these are collected)."""
    collected = []

    class PoisonedBatches(TrainBatches):
        def __next__(self):
            step = self.get_state()["step"] + 1
            batch = super().__next__()
            if step in steps:
                batch.tokens[0, 3] = POISON
                collected.append({name: rows.copy() for name, rows in batch.arrays().items()})
            return batch

    return PoisonedBatches(prepared, data, 0, 0, 1), collected


def evals(folder: Path) -> dict:
    return {
        (r["step"], r["set"]): r["bits_per_byte"] for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "eval"
    }


def events(folder: Path) -> list[str]:
    return [r["event"] for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "event"]


# ---------------------------------------------------------------------------------------------------- resuming


def test_an_undisturbed_run_learns_and_records(undisturbed):
    folder, trained = undisturbed
    rows = train_rows(folder)
    assert [row[0] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1][1] < rows[0][1] and trained.finished and trained.step == int(trained.state.step) == STEPS
    assert set(evals(folder)) == {(step, name) for step in (4, 8) for name in ("large", "small")}
    assert events(folder) == ["started"]


class CrashAt(Hook):
    """Fails at step `when`."""

    def __init__(self, when: int):
        self._when = when

    def on_step(self, trainer, result):
        if result.step == self._when:
            raise ConnectionError("a crash")


def test_a_run_that_crashes_continues_from_its_newest_local_checkpoint(programs, prepared, undisturbed, tmp_path):
    tiered = {"local_checkpoint_every": 2, "local_checkpoint_dir": str(tmp_path / "local")}
    program, notices = with_train(programs["stop"], **tiered), []
    with pytest.raises(ConnectionError):
        run(program, prepared, tmp_path / "run", hooks=[CrashAt(9)])
    assert Checkpointer(tmp_path / "run" / "checkpoints", read_only=True).steps() == [5]
    resumed = run(program, prepared, tmp_path / "run", notices)
    assert "resuming from step 8" in notices
    assert bits(resumed.state) == bits(undisturbed[1].state)
    assert train_rows(tmp_path / "run") == train_rows(undisturbed[0])
    notices.clear()  # without its local folder, as on another host
    with pytest.raises(ConnectionError):
        run(program, prepared, tmp_path / "other", hooks=[CrashAt(9)])
    (tmp_path / "local").rename(tmp_path / "lost")
    assert bits(run(program, prepared, tmp_path / "other", notices).state) == bits(undisturbed[1].state)
    assert "resuming from step 5" in notices


@pytest.mark.parametrize("when", [pytest.param(1, marks=pytest.mark.slow), 4, 10])  # 4: an evaluation, 10: a checkpoint
def test_a_run_stopped_by_sigterm_resumes_bit_for_bit(programs, prepared, undisturbed, tmp_path, when):
    stopped = stopped_at(when, programs["stop"], prepared, tmp_path)
    assert (stopped.step, stopped.finished) == (when, False)
    assert events(tmp_path) == ["started", "stopped"]
    resumed = run(programs["stop"], prepared, tmp_path)
    folder, trained = undisturbed
    assert resumed.finished and train_rows(tmp_path) == train_rows(folder)
    assert bits(resumed.state) == bits(trained.state)
    assert evals(tmp_path) == evals(folder)


def test_a_run_with_more_steps_continues_as_if_planned_from_the_start(programs, prepared, undisturbed, tmp_path):
    """Evaluations and checkpoints at other steps do not change the data stream either."""
    program = with_train(programs["stop"], eval_every=0, checkpoint_every=3)
    for steps in (2, 7, STEPS):
        trained = run(with_train(program, steps=steps), prepared, tmp_path)
    assert train_rows(tmp_path) == train_rows(undisturbed[0])
    assert bits(trained.state) == bits(undisturbed[1].state)
    again = run(program, prepared, tmp_path)
    assert again.finished and bits(again.state) == bits(trained.state)


def test_a_repeated_run_is_identical(programs, prepared, undisturbed, tmp_path):
    assert bits(run(programs["stop"], prepared, tmp_path).state) == bits(undisturbed[1].state)


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(MeshConfig(fsdp=8), marks=pytest.mark.slow),
        MeshConfig(data=2, fsdp=2, expert=2),
        MeshConfig(fsdp=4, tensor=2),
    ],
)
def test_weights_restored_onto_another_mesh_are_the_same_bits(data, prepared, undisturbed, mesh):
    e = experiment(data)
    rules = e.sharding
    if mesh.tensor > 1:  # a single key head cannot be sharded
        rules = dataclasses.replace(
            rules, **{s: dataclasses.replace(getattr(rules, s), kv_heads=()) for s in ("weights", "activations")}
        )
    program = build(dataclasses.replace(e, mesh=mesh, sharding=rules))
    assert program.mesh is not None
    with use_mesh(program.mesh), Checkpointer(str(undisturbed[0] / "checkpoints"), read_only=True) as checkpoints:
        restored = restore(program, checkpoints, prepared.tokenizer)
    assert bits(restored.state) == bits(undisturbed[1].state)
    for x, y in zip(jax.tree.leaves(restored.state), jax.tree.leaves(program.abstract_state), strict=True):
        assert x.sharding == y.sharding


@pytest.mark.unchecked
def test_weights_of_another_tokenizer_are_refused(programs, undisturbed):
    class Other:
        identity = "0" * 64

    with Checkpointer(str(undisturbed[0] / "checkpoints"), read_only=True) as checkpoints:
        with pytest.raises(CheckpointError, match="was trained with tokenizer"):
            restore(programs["stop"], checkpoints, Other())


# ---------------------------------------------------------------------------------------------------- faults


def test_a_damaged_newest_checkpoint_is_skipped(programs, prepared, undisturbed, tmp_path):
    run(with_train(programs["stop"], steps=8), prepared, tmp_path)
    files = sorted((tmp_path / "checkpoints" / "8").rglob("d/*"), key=lambda f: f.stat().st_size)
    content = bytearray(files[-1].read_bytes())
    content[len(content) // 2] ^= 4
    files[-1].write_bytes(content)
    notices: list[str] = []
    resumed = run(programs["stop"], prepared, tmp_path, notices)
    assert any("step 8" in n and "falling back to step 5" in n for n in notices), notices
    assert train_rows(tmp_path) == train_rows(undisturbed[0])
    assert bits(resumed.state) == bits(undisturbed[1].state)


def checkpointer(folder: Path, warnings: list[str], free: list[float]) -> Checkpointer:
    """Return a Checkpointer that finds the given free space at each save."""
    return Checkpointer(str(folder / "checkpoints"), keep_last=3, log=warnings.append, free_bytes=lambda: free.pop(0))


def test_a_full_disk_loses_checkpoints_but_does_not_stop_training(programs, prepared, undisturbed, tmp_path):
    notices: list[str] = []
    checkpoints = checkpointer(tmp_path, notices, [1e12, 0.0, 1e12])  # saves of steps 5, 10 and 12
    trained = run(programs["stop"], prepared, tmp_path, checkpoints=checkpoints)
    assert sum("save of step 10 failed: no space left" in n and "last good step 5" in n for n in notices) == 1
    assert bits(trained.state) == bits(undisturbed[1].state)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["12", "5"]


@pytest.mark.parametrize("when", [None, 4])
def test_a_run_whose_last_checkpoint_is_lost_is_not_finished(programs, prepared, undisturbed, tmp_path, when):
    """Neither at its end nor on a stop request. With free space, the same command ends like the undisturbed run."""
    warnings: list[str] = []
    free = [0.0] if when else [1e12, 1e12, 0.0]
    with StopAt(when or 0) as stop, pytest.raises(CheckpointError) as error:
        run(programs["stop"], prepared, tmp_path, checkpoints=checkpointer(tmp_path, warnings, free), stop=stop)
    lost, last = (4, "no step was saved") if when else (12, "step 10 is the last good one")
    assert f"checkpoint of step {lost} was not written" in str(error.value) and last in str(error.value)
    resumed = run(programs["stop"], prepared, tmp_path)
    assert resumed.finished and bits(resumed.state) == bits(undisturbed[1].state)


def test_a_run_whose_last_checkpoint_does_not_read_back_is_not_finished(programs, prepared, undisturbed, tmp_path):
    """A save may succeed although the disk corrupts it. The same command then ends like the undisturbed run."""

    class Damage(Hook):
        def on_save(self, trainer, step, written):
            if step == 12:
                file = max((tmp_path / "checkpoints" / "12").rglob("d/*"), key=lambda path: path.stat().st_size)
                content = bytearray(file.read_bytes())
                content[len(content) // 2] ^= 1
                file.write_bytes(content)

    with pytest.raises(CheckpointError, match=r"step 12 of .* is damaged"):
        run(programs["stop"], prepared, tmp_path, hooks=[Damage()])
    resumed = run(programs["stop"], prepared, tmp_path)
    assert resumed.finished and bits(resumed.state) == bits(undisturbed[1].state)


def test_a_full_disk_loses_metrics_but_does_not_stop_training(programs, prepared, tmp_path, monkeypatch):
    def full(self, row):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MetricsWriter, "write", full)
    messages: list[str] = []
    trained = run(with_train(programs["stop"], steps=3), prepared, tmp_path, messages)
    assert trained.finished and any("metrics of step" in text and "No space left" in text for text in messages)


def test_nonfinite_stop_keeps_the_last_good_state_and_names_a_fix(programs, prepared, data, tmp_path):
    stream, batches = poisoned_batches(prepared, data, 7)
    with pytest.raises(NonfiniteError) as error:
        run(programs["stop"], prepared, tmp_path, batches=stream)
    message = str(error.value)
    assert "\n" not in message and "step 7" in message and "train.nonfinite=skip" in message
    with np.load(tmp_path / "nonfinite_step_7_process_0.npz") as saved:
        assert {name: saved[name].tolist() for name in saved} == {
            name: rows.tolist() for name, rows in batches[0].items()
        }
    assert events(tmp_path)[-1] == "nonfinite"

    good = tmp_path / "good"
    until = run(with_train(programs["stop"], steps=6), prepared, good)
    with Checkpointer(str(tmp_path / "checkpoints"), read_only=True) as checkpoints:
        last = checkpoints.restore(programs["stop"].abstract_state)
        assert last.step == 7, "the refused step counts, so that a resumed run takes the next batch"
        assert bits((last.state.model, last.state.optimizer, last.state.ema)) == bits(
            (until.state.model, until.state.optimizer, until.state.ema)
        )
        assert checkpoints.restore(programs["stop"].abstract_state, step=5).step == 5


def test_nonfinite_skip_continues_also_after_nonfinite_stop(programs, prepared, data, tmp_path):
    poisoned = lambda: poisoned_batches(prepared, data, 7, 12)[0]
    skipped = run(programs["skip"], prepared, tmp_path / "skip", batches=poisoned())
    assert skipped.finished and int(skipped.state.nonfinite) == 2
    assert events(tmp_path / "skip") == ["started", "nonfinite", "nonfinite"]
    assert np.isfinite(weights_of(skipped.state.model)).all()

    with pytest.raises(NonfiniteError):
        run(programs["stop"], prepared, tmp_path / "stop", batches=poisoned())
    resumed = run(programs["skip"], prepared, tmp_path / "stop", batches=poisoned())
    # The two policies compile to two programs, which may round sums differently.
    losses = [[row[:3] for row in train_rows(tmp_path / name) if row[0] not in (7, 12)] for name in ("skip", "stop")]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert len(losses[0]) == 10 and int(resumed.state.step) == STEPS
    np.testing.assert_allclose(weights_of(skipped.state.model), weights_of(resumed.state.model), rtol=1e-3, atol=1e-5)
    # The recorded rate is that of the update, and refused updates do not count.
    rates = dict(row[0::3] for row in train_rows(tmp_path / "skip"))
    rate = schedule(programs["skip"].experiment.optimizer, STEPS)
    assert [rates[step] for step in (6, 7, 8, 11)] == pytest.approx([float(rate(n)) for n in (5, 6, 6, 9)], rel=1e-6)


def weights_of(tree) -> np.ndarray:
    return np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(tree)])


def test_a_refused_last_step_saves_only_good_weights(programs, prepared, data, tmp_path):
    with pytest.raises(NonfiniteError, match=f"step {STEPS}"):
        run(programs["stop"], prepared, tmp_path, batches=poisoned_batches(prepared, data, STEPS)[0])
    with Checkpointer(str(tmp_path / "checkpoints"), read_only=True) as checkpoints:
        assert np.isfinite(weights_of(checkpoints.restore(programs["stop"].abstract_state).state.model)).all()


def test_every_step_and_evaluation_feeds_the_watchdog(programs, prepared, tmp_path):
    beats = []

    class Watch(Watchdog):
        def beat(self):
            beats.append(1)

    run(with_train(programs["stop"], steps=9, eval_windows=8), prepared, tmp_path, watchdog=Watch(60.0))
    assert len(beats) >= 9 + 2 * 2  # two evaluations of two sets, each of at least one batch


def test_delayed_reads_lose_no_rows(programs, prepared, tmp_path):
    run(with_train(programs["stop"], log_every=5, eval_every=0, steps=11), prepared, tmp_path)
    assert [row[0] for row in train_rows(tmp_path)] == [1, 5, 10, 11]


# ---------------------------------------------------------------------------------------------------- several processes


def start_peers(folder: Path, term_at: int) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.train.training_peer", address]
    return [
        subprocess.Popen(
            [*command, str(rank), str(folder), str(term_at)], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in (0, 1)
    ]  # fmt: skip


@pytest.mark.slow
def test_two_processes_train_as_one_and_stop_together(prepared, data, tmp_path):
    """After SIGTERM to one of them, both save the same step. Resumed, they end like one process on the same mesh."""
    save_json(data, tmp_path / "two.data.json")
    e = dataclasses.replace(experiment(data, microbatches=1), mesh=MeshConfig(fsdp=8))
    one = run(build(e), prepared, tmp_path / "one")
    stopped = finish(start_peers(tmp_path / "two", term_at=5))
    steps = [line.split()[1] for output in stopped for line in output.splitlines() if line.startswith("stopped")]
    assert len(steps) == 2 and len(set(steps)) == 1 and int(steps[0]) < STEPS, stopped
    ended = finish(start_peers(tmp_path / "two", term_at=0))
    assert all(f"finished {STEPS}" in output for output in ended), ended
    alone, together = (np.array([row[:3] for row in train_rows(tmp_path / name)]) for name in ("one", "two"))
    np.testing.assert_allclose(together[:, 1], alone[:, 1], rtol=1e-5)  # losses
    np.testing.assert_allclose(together[:, 2], alone[:, 2], rtol=1e-4)  # gradient norms
    with use_mesh(None), Checkpointer(str(tmp_path / "two" / "checkpoints"), read_only=True) as checkpoints:
        state = checkpoints.restore(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), one.state)).state
    distance = np.linalg.norm(weights_of(state.model) - weights_of(one.state.model))
    assert distance / np.linalg.norm(weights_of(one.state.model)) < 1e-4


@pytest.mark.slow
def test_runs_of_two_processes_are_reproducible(data, tmp_path):
    """Equal runs of two processes are equal to the last bit, whether they are interrupted or not."""
    for name, term_at in (("first", 0), ("second", 5)):
        save_json(data, tmp_path / f"{name}.data.json")
        finish(start_peers(tmp_path / name, term_at))
    finish(start_peers(tmp_path / "second", 0))
    assert train_rows(tmp_path / "first") == train_rows(tmp_path / "second")


def finish(peers: list[subprocess.Popen]) -> list[str]:
    try:
        outputs = [peer.communicate(timeout=240)[0] for peer in peers]
    finally:
        for peer in peers:
            peer.kill()
    assert [peer.returncode for peer in peers] == [0, 0], outputs
    return outputs


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_resuming_is_exact_with_compiler_optimizations(tmp_path, devices):
    write_corpus(tmp_path / "large", 30)
    write_corpus(tmp_path / "small", 8)
    flags = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.exact_resume", str(tmp_path)],
        cwd=ROOT, env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.endswith("exact\n"), done.stderr
