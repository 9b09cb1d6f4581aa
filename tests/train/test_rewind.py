"""A run that diverges returns to an earlier checkpoint, and ends like a run without the batches that it skips."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from data.config import SourceConfig
from data.pipeline import TrainBatches
from data.prepare import prepare
from tests.data.conftest import byte_config, write_corpus
from tests.train.small_runs import StopAt, bits, experiment, run, train_rows, with_train
from train.checkpoint import Checkpointer
from train.config import RewindConfig
from train.hooks import DivergedError
from train.objectives import make_objective
from train.program import build
from train.records import read_metrics
from train.rewind import LossWatch

SLOW = pytest.mark.slow
STEPS = 12
BAD = 266  # the token of byte 255, which UTF-8 never contains; it raises the loss of its microbatch by 8 nats
REWIND = RewindConfig(rise=2.0, patience=2, window=3, margin=1, limit=2)


@dataclasses.dataclass(frozen=True)
class Raised:
    """An objective that reports a loss 8 nats too high if a microbatch holds the bad token."""

    objective: object

    def __call__(self, trainable, frozen, batch, key):
        loss = self.objective(trainable, frozen, batch, key)
        higher = jnp.where((batch.tokens == BAD).any(), 8.0, 0.0)
        return loss._replace(metrics=loss.metrics | {"loss": loss.metrics["loss"] + higher})

    def with_hyper(self, hyper):
        return Raised(self.objective.with_hyper(hyper))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("rewind")
    return prepare(byte_config(root, write_corpus(root / "large", 30), write_corpus(root / "small", 8)))


@pytest.fixture(scope="module")
def data(prepared):
    root = prepared.directory.parents[1]
    return byte_config(root, *(SourceConfig(name=name, path=str(root / name)) for name in ("large", "small")))


@pytest.fixture(scope="module")
def program(data):
    config = experiment(data, checkpoint_every=2, keep_last=3, eval_every=5)
    objective = Raised(make_objective(config.train, config.data.tokenizer.ids))
    return build(config, devices=jax.devices()[:1], objective=objective)


def stream(prepared, data, bad=(), without=()):
    """Return the stream with the bad token in the batches `bad`, numbered from 1, and without the batches `without`."""

    class Changed(TrainBatches):
        def __next__(self):
            number = self.get_state()["step"] + 1
            batch = super().__next__()
            if number in without:
                return next(self)
            if number in bad:
                batch.tokens[0, 3] = BAD
            return batch

    return Changed(prepared, data, 0, 0, 1)


def events(folder: Path, name: str) -> list[dict]:
    return [row for row in read_metrics(folder / "metrics.jsonl") if row.get("event") == name]


@pytest.mark.parametrize("bad, to, skipped", [
    ((7, 8), 6, (7, 8, 9)),  # found at step 8, a checkpoint
    pytest.param((8, 9), 6, (7, 8, 9, 10), marks=SLOW),  # found after step 10 was dispatched; step 7 is not saved
    pytest.param((9, 10), 8, (9, 10, 11), marks=SLOW),  # found at step 10, an evaluation and a checkpoint
])  # fmt: skip
def test_a_rewound_run_equals_one_without_the_skipped_batches(program, prepared, data, tmp_path, bad, to, skipped):
    rewound = run(
        with_train(program, rewind=REWIND), prepared, tmp_path / "rewound", batches=stream(prepared, data, bad)
    )
    never = run(program, prepared, tmp_path / "never", batches=stream(prepared, data, without=skipped))
    assert bits(rewound.state) == bits(never.state)
    assert train_rows(tmp_path / "rewound") == train_rows(tmp_path / "never")
    assert [row[0] for row in train_rows(tmp_path / "rewound")] == list(range(1, STEPS + 1))
    (event,) = events(tmp_path / "rewound", "rewound")
    assert (event["step"], event["diverged"], event["skipped"]) == (to, skipped[-1], len(skipped))
    evaluations = {row["step"] for row in read_metrics(tmp_path / "rewound/metrics.jsonl") if row["kind"] == "eval"}
    assert evaluations == {5, 10}


@pytest.fixture(scope="module")
def rewound(program, prepared, data, tmp_path_factory):
    """(folder, trained) of an uninterrupted run that rewinds."""
    folder = tmp_path_factory.mktemp("rewound")
    return folder, run(with_train(program, rewind=REWIND), prepared, folder, batches=stream(prepared, data, (7, 8)))


@pytest.mark.parametrize(
    "when", [pytest.param(7, marks=SLOW), pytest.param(8, marks=SLOW), 11]
)  # before, at and after the rewind
def test_a_stopped_run_rewinds_like_an_uninterrupted_one(program, prepared, data, rewound, tmp_path, when):
    folder, whole = rewound
    rewinding, batches = with_train(program, rewind=REWIND), lambda: stream(prepared, data, (7, 8))
    with StopAt(when) as stop:
        assert not run(rewinding, prepared, tmp_path, batches=batches(), stop=stop).finished
    resumed = run(rewinding, prepared, tmp_path, batches=batches())
    assert bits(resumed.state) == bits(whole.state)
    assert train_rows(tmp_path) == train_rows(folder)


def test_the_checkpoints_of_the_divergence_are_never_resumed(program, prepared, data, tmp_path):
    config = dataclasses.replace(REWIND, margin=4)  # found at step 8, returns to step 2
    rewinding = with_train(program, rewind=config, keep_last=4)

    class Killed(Exception):
        pass

    def killed(step):
        steps.append(step)
        if step == 3 and 8 in steps:  # the first step after the rewind
            raise Killed
        return False

    steps: list[int] = []
    with StopAt(99) as stop:
        stop.agreed = killed
        with pytest.raises(Killed):
            run(rewinding, prepared, tmp_path, batches=stream(prepared, data, (7, 8)), stop=stop)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "4.abandoned", "6.abandoned"]
    assert run(rewinding, prepared, tmp_path, batches=stream(prepared, data, (7, 8))).finished
    assert [row["step"] for row in events(tmp_path, "resumed")] == [2]


def test_a_run_that_diverges_again_and_again_ends(program, prepared, data, tmp_path):
    rewinding = with_train(program, rewind=REWIND)
    with pytest.raises(DivergedError) as error:
        run(rewinding, prepared, tmp_path, batches=stream(prepared, data, range(7, 30)))
    message = str(error.value)
    assert "train.rewind.limit = 2" in message and "--run NEWNAME" in message and "\n" not in message
    assert len(events(tmp_path, "rewound")) == 2


def test_a_run_without_an_old_checkpoint_goes_on(program, prepared, data, tmp_path):
    rewinding = with_train(program, rewind=dataclasses.replace(REWIND, margin=7))
    assert run(rewinding, prepared, tmp_path, batches=stream(prepared, data, (7, 8))).finished
    assert "the run continues" in events(tmp_path, "warning")[0]["message"] and not events(tmp_path, "rewound")


def test_a_spike_shorter_than_the_patience_does_not_rewind(program, prepared, data, tmp_path):
    run(with_train(program, rewind=REWIND), prepared, tmp_path, batches=stream(prepared, data, (7, 9, 11)))
    assert not events(tmp_path, "rewound") and not events(tmp_path, "warning")


# ---------------------------------------------------------------------------------------------------- without a run


@pytest.mark.parametrize("loss", [3.01, math.nan, math.inf])
def test_losses_diverge_when_they_stay_above_the_median(loss):
    watch = LossWatch(RewindConfig(rise=1.0, patience=2, window=3))
    found = [watch.add(x) for x in (9.0, 1.0, 2.0, 3.0, loss, 3.0, loss, loss)]  # medians: 2 (of 1, 2, 3), then 3
    assert found == [*[False] * 7, loss != 3.01]  # 3.01 is not 1 nat above
    again = LossWatch(RewindConfig(rise=1.0, patience=2, window=3), **watch.state)
    assert again.state == watch.state and again.add(math.nan) == watch.add(math.nan)


def test_no_loss_diverges_before_the_window_is_full():
    watch = LossWatch(RewindConfig(rise=1.0, patience=1, window=4))
    assert not any(watch.add(x) for x in (1.0, 9.0, 1.0, 9.0))
    assert watch.add(9.0)


@pytest.mark.parametrize("changes, words", [
    ({"rise": 0.0}, "train.rewind.rise = 0.0"),
    ({"rise": math.nan}, "train.rewind.rise = nan"),
    ({"patience": 0}, "train.rewind.patience = 0"),
    ({"limit": 0}, "train.rewind.limit = 0"),
    ({"margin": -1}, "train.rewind.margin = -1"),
])  # fmt: skip
def test_rewinding_that_cannot_work_is_refused(data, changes, words):
    config = experiment(data, checkpoint_every=100, keep_last=3)
    train = dataclasses.replace(config.train, rewind=dataclasses.replace(RewindConfig(), **changes))
    with pytest.raises(ValueError, match=words):
        train.validate()


def test_a_checkpoint_that_is_old_enough_is_always_kept(tmp_path):
    older, every = 7, 2
    with Checkpointer(tmp_path, keep_last=1, keep_older=older) as checkpoints:
        for step in range(every, 40, every):
            checkpoints.save(step, {"x": jnp.zeros(3)}, metadata={}, wait=True)
            kept = checkpoints.steps()
            assert len(kept) <= 3 and kept[-1] == step
            # The first one is `older` steps old at step 10, and one of them from then on.
            assert step <= older + every or any(step - older - (older + every) <= k <= step - older for k in kept)
