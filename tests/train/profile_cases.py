"""Traces of train steps: which they hold, that they change no result, and how they end. test_profile.py runs this."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from data.config import SourceConfig
from data.paths import parse_path
from data.prepare import prepare
from tests.data.conftest import byte_config, write_corpus
from tests.fake_bucket import use_fake_bucket
from tests.train.small_runs import TINY, StopAt, bits, experiment, run
from train.config_io import ConfigError
from train.goodput import Goodput
from train.hooks import Hook
from train.operation_kinds import read_program
from train.profile import Profile, copy_trace
from train.profile_steps import MOST_STEPS, SKIPPED, ProfileSteps
from train.program import build
from train.records import RunFolder, read_metrics
from train.trace import STEP, read_trace, table

STEPS = 12


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("profile")
    return prepare(byte_config(root, write_corpus(root / "large", 30)))


@pytest.fixture(scope="module")
def program(prepared):
    """A program on two devices whose step is compiled once for all tests."""
    root = prepared.directory.parents[1]
    data = byte_config(root, SourceConfig(name="large", path=str(root / "large")))
    config = experiment(data, microbatches=1, log_every=1)
    return build(dataclasses.replace(config, model=TINY), devices=jax.devices()[:2])


@pytest.fixture(scope="module")
def plain(program, prepared, tmp_path_factory):
    """(folder, trained) of a run without a trace."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, run(program, prepared, folder)


def profiled(program, prepared, folder: Path, steps: str, **parts):
    """Train with a trace of `steps`. Return (trained, messages)."""
    messages: list[str] = []
    goodput = Goodput()
    with Profile(ProfileSteps.parse(steps), RunFolder(folder), messages.append) as profile:
        trained = run(program, prepared, folder, hooks=[profile, *parts.pop("hooks", [])], goodput=goodput, **parts)
    return trained, messages


def losses(folder: Path) -> list[tuple]:
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == "train"]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def sessions(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the annotated steps of each trace by the name of its folder; every trace must be whole."""
    found = {}
    for session in sorted((folder / "profile" / "plugins" / "profile").glob("*")):
        (file,) = session.glob("*.xplane.pb")
        assert len(list(session.glob("*.trace.json.gz"))) == 1
        found[session.name] = read_trace(jax.profiler.ProfileData.from_file(str(file))).steps
    assert not list((folder / "profile").glob(".trace-*"))
    return found


def test_a_traced_run_equals_one_without_a_trace_bit_for_bit(program, prepared, plain, tmp_path):
    """The range covers an evaluation (step 4) and a checkpoint (step 5)."""
    trained, messages = profiled(program, prepared, tmp_path, "3-6")
    assert losses(tmp_path) == losses(plain[0]) != [] and bits(trained.state) == bits(plain[1].state)
    assert sessions(tmp_path) == {"steps_3-6": (3, 4, 5, 6)}
    text = "\n".join(messages)
    assert "profile of steps 3 to 6\n" in text and "4 steps in" in text and "on 2 devices" in text
    assert "matmul" in text and "dot_general" in text and "xprof --logdir" in text and "perfetto" in text
    (session,) = (tmp_path / "profile" / "plugins" / "profile").glob("*")
    assert "matmul" in (session / "operations.txt").read_text()
    last = [row for row in read_metrics(tmp_path / "metrics.jsonl") if row["kind"] == "goodput"][-1]
    assert last["seconds"]["profile"] > 0


def test_a_number_of_steps_leaves_out_the_first_ones_of_the_start(program, prepared, plain, tmp_path):
    with StopAt(2) as stop:
        profiled(program, prepared, tmp_path, "5", stop=stop)
    assert not (tmp_path / "profile").exists()
    trained, _ = profiled(program, prepared, tmp_path, "2")
    assert sessions(tmp_path) == {f"steps_{2 + SKIPPED + 1}-{2 + SKIPPED + 2}": (6, 7)}
    assert bits(trained.state) == bits(plain[1].state)


def test_a_run_stopped_within_the_range_keeps_the_trace_so_far_and_resumes(program, prepared, plain, tmp_path):
    with StopAt(4) as stop:
        trained, messages = profiled(program, prepared, tmp_path, "3-6", stop=stop)
    assert trained.step == 4 and sessions(tmp_path) == {"steps_3-4": (3, 4)}
    assert any("profile of steps 3 to 4; the run ended there" in line for line in messages)
    assert any("dot_general" in line for line in messages)  # the table knows the program
    trained, messages = profiled(program, prepared, tmp_path, "3-6")
    assert sessions(tmp_path) == {"steps_3-4": (3, 4), "steps_5-6": (5, 6)}
    assert losses(tmp_path) == losses(plain[0]) != [] and bits(trained.state) == bits(plain[1].state)


class Fail(Hook):
    def on_step(self, trainer, result):
        if result.step == 4:
            raise RuntimeError("a fault")


def test_a_run_that_fails_within_the_range_closes_its_trace(program, prepared, tmp_path):
    with pytest.raises(RuntimeError, match="a fault"):
        profiled(program, prepared, tmp_path, "3-6", hooks=[Fail()])
    assert sessions(tmp_path) == {"steps_3-4": (3, 4)}
    jax.profiler.start_trace(tmp_path / "next")  # no trace is open
    jax.profiler.stop_trace()


def test_a_trace_that_cannot_be_started_or_written_does_not_end_the_run(program, prepared, plain, tmp_path):
    (tmp_path / "profile").write_text("a file where the folder should be")
    trained, messages = profiled(program, prepared, tmp_path, "3-6")
    assert bits(trained.state) == bits(plain[1].state)
    assert any("no trace was started" in line for line in messages)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = options.host_tracer_level = 0
    jax.profiler.start_trace(tmp_path / "mine", profiler_options=options)
    try:
        trained, messages = profiled(program, prepared, tmp_path / "other", "3-6")
    finally:
        jax.profiler.stop_trace()
    assert any("Only one profile may be run at a time" in line for line in messages)
    assert bits(trained.state) == bits(plain[1].state) and sessions(tmp_path / "other") == {}


def test_steps_of_an_earlier_start_are_left_out_with_a_message(program, prepared, tmp_path):
    with StopAt(5) as stop:
        run(program, prepared, tmp_path, stop=stop)
    trained, messages = profiled(program, prepared, tmp_path, "2-5")
    assert trained.finished and sum("nothing is traced" in line for line in messages) == 1
    assert not (tmp_path / "profile").exists()


def test_a_trace_is_copied_into_a_bucket(tmp_path):
    use_fake_bucket()
    (tmp_path / "a.xplane.pb").write_bytes(b"trace")
    path = copy_trace(tmp_path / "a.xplane.pb", parse_path("gs://bucket/run/profile/steps_1-2"))
    assert str(path).startswith("gs://bucket/run/profile/steps_1-2/") and path.name.endswith(".xplane.pb")
    assert path.read_bytes() == b"trace"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not steps"), ("a", "not steps"), ("3-", "not steps"), ("-3", "not steps"), ("1-2-3", "not steps"),
        ("1.5", "not steps"), ("٣", "not steps"), ("0", "counted from 1"), ("0-3", "counted from 1. Try 1-3"),
        ("9-3", "ends before it begins. Try 3-9"), ("1-1000", f"1,000 steps is too large. Try 1-{MOST_STEPS}"),
        (f"{MOST_STEPS + 1}", f"is too large. Try {MOST_STEPS}"),
    ],
)  # fmt: skip
def test_steps_that_cannot_be_traced_are_refused(text, message):
    with pytest.raises(ConfigError, match="--profile") as refusal:
        ProfileSteps.parse(text)
    assert message in str(refusal.value)


def test_steps_that_a_run_does_not_have_are_refused():
    ProfileSteps.parse("3-12").check(12)
    ProfileSteps.parse("9").check(12)
    for text in ("3-13", "10"):
        with pytest.raises(ConfigError, match=r"has 12 steps.*--profile 1-12.*train.steps=13"):
            ProfileSteps.parse(text).check(12)


@pytest.mark.parametrize(
    ("text", "step", "expected"),
    [("3-6", 0, (3, 6)), ("3-6", 4, (5, 6)), ("3-6", 6, None), ("2", 0, (4, 5)), ("2", 8, (12, 12)), ("2", 9, None)],
)
def test_the_traced_steps_are_those_that_this_start_still_has(text, step, expected):
    assert ProfileSteps.parse(text).after(step, 12) == expected


# ---- the reader ----


def heavy(x, w):
    """Matrix products, and a little of other work."""
    return jax.lax.fori_loop(0, 4, lambda i, x: jnp.tanh(x @ w), x).sum()


def test_matrix_products_lead_the_real_trace_of_a_program_of_them(tmp_path):
    x = jnp.ones((384, 384))
    compiled = jax.jit(heavy).lower(x, x).compile()
    module, instructions = read_program(compiled.as_text())
    assert module == "jit_heavy" and "matmul" in {each.kind for each in instructions.values()}
    jax.block_until_ready(compiled(x, x))
    with jax.profiler.trace(tmp_path):
        for step in range(3):
            with jax.profiler.StepTraceAnnotation(STEP, step_num=step + 5):
                compiled(x, x).block_until_ready()
    (file,) = tmp_path.rglob("*.xplane.pb")
    found = read_trace(jax.profiler.ProfileData.from_file(str(file)), module, instructions)
    assert found.steps == (5, 6, 7) and found.devices == 1
    assert found.operations[0].kind == "matmul" and found.operations[0].runs == 12
    assert found.operations[0].source.endswith("dot_general")
    assert max(found.kinds(), key=found.kinds().get) == "matmul"
    assert math.fsum(each.seconds for each in found.operations) <= found.window * 1.001
    assert any("dot_general" in line for line in table(found))
