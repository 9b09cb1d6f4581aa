"""Devices that compute differently or slowly are named, and a run ends when one of them computes wrong."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import device_check
from train.device_check import UNSTABLE, DeviceError, Reading, from_text, measure, slow, to_text, wrong
from train.hooks import Recorder, StepResult
from train.host_hooks import DeviceCheck, RecordStragglers, host_hooks


def reading(process: int, device: int = 0, checksum: str = "aa", seconds: float = 0.01, kind: str = "TPU v5e", **more):
    fields = {"host": f"w-{process}", "setup": ""} | more
    return Reading(process, fields["host"], device, kind, fields["setup"], checksum, seconds)


def hosts(count: int, devices: int, **bad: dict) -> list[Reading]:
    """Return readings of `count` hosts; `bad` changes the one of process P and device D, given as pP_D."""
    return [reading(p, d, **bad.get(f"p{p}_{d}", {})) for p in range(count) for d in range(devices)]


def test_every_device_computes_the_same_and_repeats_it():
    first = measure(jax.local_devices()[:2])
    assert [each.device for each in first] == [0, 1] and len(measure()) == 1
    assert len({each.checksum for each in [*first, *measure()]}) == 1 and UNSTABLE not in {first[0].checksum}
    assert all(0 < each.seconds < 60 for each in first)
    assert from_text(to_text(first)) == first and wrong(first) is None


def test_one_bit_of_one_element_changes_the_checksum():
    step = device_check._compiled(jax.local_devices()[0])
    x, w = (np.random.default_rng(seed).normal(size=(256, 256)).astype(np.float32) / 16 for seed in (0, 1))
    changed = x.copy()
    changed.view(np.uint32)[137, 41] ^= 1
    assert int(step(x, w)) == int(step(x, w)) != int(step(changed, w))


def test_the_compiler_knows_the_options_for_gpus():
    """The compiler for CPUs parses the same options."""
    lowered = jax.jit(lambda x: x + 1).lower(1.0)
    lowered.compile(compiler_options=device_check.GPU_OPTIONS)
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        lowered.compile(compiler_options={"xla_gpu_no_such_option": True})


def test_a_device_whose_tries_differ_is_unstable(monkeypatch):
    results = iter(jnp.arange(3, dtype=jnp.uint32))
    monkeypatch.setattr(device_check, "_compiled", lambda device: lambda x, w: next(results))
    assert [each.checksum for each in measure()] == [UNSTABLE]


def test_devices_that_agree_pass():
    assert wrong(hosts(4, 2)) is None and wrong(hosts(1, 1)) is None and wrong([]) is None


def test_the_device_that_differs_from_the_majority_is_named():
    text = wrong(hosts(2, 4, p1_3={"checksum": "bb"}))
    assert text.startswith(
        "process 1 (host w-1), device 3: computes differently from 7 of 8 TPU v5e. Take the host out of the job"
    )
    assert "train.check_devices = False" in text
    text = wrong(hosts(3, 1, p0_0={"checksum": "bb"}))
    assert text.startswith("process 0 (host w-0), device 0: computes differently from 2 of 3") and "w-1" not in text


def test_without_a_majority_all_are_named():
    text = wrong(hosts(2, 1, p1_0={"checksum": "bb"}))
    assert "w-0), device 0: computes aa, and no majority of 2 agrees" in text
    assert "w-1), device 0: computes bb, and no majority of 2 agrees" in text
    assert wrong(hosts(2, 2, p1_0={"checksum": "bb"}, p1_1={"checksum": "bb"})).count("no majority of 4") == 4


def test_an_unstable_device_is_named_alone():
    text = wrong(hosts(2, 1, p1_0={"checksum": UNSTABLE}))
    assert text.startswith("process 1 (host w-1), device 0: computes the same step differently each time. Take")
    assert "each time" in wrong(hosts(1, 1, p0_0={"checksum": UNSTABLE}))


def test_kinds_and_setups_are_compared_apart():
    mixed = [reading(0), reading(1), reading(2, kind="TPU v4", checksum="bb", seconds=1.0), reading(3, checksum="cc")]
    assert wrong(mixed).startswith("process 3 (host w-3), device 0: computes differently from 2 of 3 TPU v5e")
    assert slow(mixed) is None
    assert wrong([reading(0), reading(1, checksum="bb", setup="--xla_other_flag")]) is None


def test_slow_devices_are_named():
    text = slow(hosts(4, 2, p3_1={"seconds": 0.0213}))
    assert text == ("process 3 (host w-3), device 1: takes 21.3 ms for a step that takes 10.0 ms on the median TPU v5e")
    assert slow(hosts(4, 2, p3_1={"seconds": 0.019})) is None
    shared = [reading(p, kind="cpu", host="w", seconds=0.01 * 9**p) for p in range(4)]
    assert slow(shared) is None  # four processes on one host share its cores
    alone = [dataclasses.replace(each, host=f"w-{each.process}") for each in shared]
    assert slow(alone) is not None


# ---- the check at checkpoints ----


class Store(dict):
    """The key-value store of the coordination service, within one process."""

    def key_value_set(self, key, value):
        assert key not in self
        self[key] = value

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in self.items() if key.startswith(folder)]

    def key_value_delete(self, key):
        del self[key]


class Record(Recorder):
    """Keeps events and warnings instead of writing them."""

    def __init__(self):
        self.events, self.warnings = [], []

    def event(self, step, event, message):
        self.events.append((step, event, message))

    def warn(self, text):
        self.warnings.append(text)


@pytest.fixture
def checks(monkeypatch):
    """The hooks of three simulated processes with one device each, their records, and the checksum of each device."""
    store, checksums, times = Store(), ["aa"] * 3, [0.01] * 3
    made, records = [], [Record() for _ in range(3)]
    for index in range(3):
        monkeypatch.setattr("train.host_hooks._generation", iter([0]))
        read = lambda index=index: [reading(index, checksum=checksums[index], seconds=times[index])]
        made.append(DeviceCheck(records[index], store, index, 3, read))
    return store, made, records, checksums, times


def saved(made, step):
    for check in made:
        check.on_save(None, step, True)


def stepped(check, step):
    check.on_step(None, StepResult(step, {}, None, 0))


def test_a_device_that_turns_wrong_ends_the_run_on_every_process(checks):
    store, made, records, checksums, _ = checks
    for step in (5, 10, 15):
        saved(made, step)
        for check in made:
            stepped(check, step + 1)
            stepped(check, step + 2)  # compared once
    assert len(store) == 6  # of the last two checkpoints
    checksums[2] = "bb"
    saved(made, 20)
    for check, record in zip(made, records, strict=True):
        with pytest.raises(DeviceError) as error:
            stepped(check, 21)
        assert str(error.value).startswith(
            "the devices differ after step 20: process 2 (host w-2), device 0: computes differently from 2 of 3 TPU v5e"
        )
        assert str(error.value).endswith("They agreed after step 15, so later checkpoints may be damaged")
        assert [event[:2] for event in record.events] == [(20, "wrong device")]


def test_the_last_checkpoint_is_compared_at_the_end(checks):
    _, made, _, checksums, _ = checks
    checksums[0] = UNSTABLE
    saved(made, 12)
    with pytest.raises(DeviceError, match=r"process 0 .* differently each time.*checkpoints of this job may be"):
        made[1].on_stop(None, True)


def test_no_process_waits_for_a_reading(checks):
    _, made, records, checksums, _ = checks
    checksums[1] = "bb"
    saved(made[:2], 5)  # process 2 has not come that far, which no step of all can allow
    stepped(made[0], 6)
    assert not records[0].events and not records[0].warnings


def test_process_0_warns_about_a_device_that_turns_slow(checks):
    _, made, records, _, times = checks
    times[1] = 0.03
    saved(made, 5)
    for check in made:
        stepped(check, 6)
    assert [len(record.warnings) for record in records] == [1, 0, 0]
    assert records[0].warnings[0].startswith("process 1 (host w-1), device 0: takes 30.0 ms")


def test_a_straggler_is_recorded_as_an_event_of_the_step():
    record, sentences = Record(), [["process 3 takes 2 s"], []]
    hook = RecordStragglers(record, lambda: sentences.pop(0))
    stepped(hook, 7)
    stepped(hook, 8)
    assert record.events == [(7, "straggler", "process 3 takes 2 s")]


def test_one_process_needs_no_hooks():
    assert host_hooks(Record(), check_devices=True) == []
