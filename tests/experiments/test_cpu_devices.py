"""Simulated CPU devices: how many are chosen, when, and what a resumed run keeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import cpu_devices
from experiments.cpu_devices import best_count, recorded_devices, start_devices, use_devices
from experiments.named import EXPERIMENTS
from sharding.mesh import MeshConfig
from train.config import Experiment
from train.records import RunFolder, read_metrics

SMOKE = EXPERIMENTS["smoke"]()

REPLICAS = MeshConfig(data=-1, fsdp=1)


def with_batch(rows: int, mesh: MeshConfig = REPLICAS) -> Experiment:
    return replace(
        SMOKE, data=replace(SMOKE.data, batch_size=rows), mesh=mesh, model=replace(SMOKE.model, vocab_size=1024)
    )


def run_folder(path: Path, devices: dict) -> RunFolder:
    run = RunFolder(path)
    (path / "environment.json").write_text(json.dumps({"devices": devices}))
    return run


@pytest.mark.parametrize(
    ("rows", "cores", "recorded", "expected"),
    [(8, 2, None, 2), (6, 4, None, 3), (7, 4, None, 1), (8, 64, None, 8), (8, 4, 2, 2), (8, 2, 4, 2), (8, 4, 3, 4)],
)
def test_most_devices_that_divide_the_batch_and_have_a_core_each(rows, cores, recorded, expected):
    assert best_count(with_batch(rows), cores, recorded) == expected


@pytest.mark.parametrize(
    ("mesh", "expected"), [(MeshConfig(fsdp=1), 1), (MeshConfig(fsdp=2), 2), (MeshConfig(fsdp=8), 1)]
)
def test_a_fixed_mesh_decides(mesh, expected):
    assert best_count(with_batch(8, mesh), 4) == expected


def test_flags_are_added_to_those_of_the_user():
    environ = {"XLA_FLAGS": "--xla_cpu_max_isa=AVX2"}
    use_devices(environ, 1)
    assert environ == {"XLA_FLAGS": "--xla_cpu_max_isa=AVX2"}
    use_devices(environ, 2)
    assert environ["XLA_FLAGS"].split() == [
        "--xla_cpu_max_isa=AVX2", "--xla_force_host_platform_device_count=2", "--xla_cpu_multi_thread_eigen=false",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "accelerators", "expected"),
    [
        ({}, (), True),
        ({"JAX_PLATFORMS": "cpu"}, ("/dev/null",), True),
        ({}, ("/dev/null",), False),
        ({"JAX_PLATFORMS": "cuda"}, (), False),
        ({"JAX_NUM_CPU_DEVICES": "4"}, (), False),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}, (), False),
        ({"XLA_FLAGS": "--xla_cpu_max_isa=AVX2"}, (), True),
    ],
)
def test_only_cpus_are_simulated_and_only_where_the_user_has_not_chosen(monkeypatch, environ, accelerators, expected):
    monkeypatch.setattr(cpu_devices, "ACCELERATORS", accelerators)
    assert cpu_devices._simulated(environ) is expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [('{"devices": {"cpu": 2}}', 2), ('{"devices": {"a": 4, "b": 4}}', 8), ("{}", None), ("[]", None), ("x", None)],
)
def test_recorded_devices(tmp_path, content, expected):
    (tmp_path / "environment.json").write_text(content)
    assert recorded_devices(RunFolder(tmp_path)) == expected
    assert recorded_devices(RunFolder(tmp_path / "absent")) is None


@pytest.mark.parametrize(("recorded", "noted"), [({"cpu": 4}, True), ({"cpu": 8}, False)])
def test_another_count_is_explained(tmp_path, recorded, noted):
    lines: list[str] = []
    assert start_devices(with_batch(8), run_folder(tmp_path, recorded), log=lines.append) == 8
    assert bool(lines) is noted
    if noted:
        assert "trained on 4 devices and continues on 8" in lines[0] and "last bits" in lines[0]
    lines.clear()
    start_devices(with_batch(8), run_folder(tmp_path, recorded), training=False, log=lines.append)
    assert not lines


def train(folder: Path, steps: int, run: str, **environ: str) -> str:
    """Train smoke to a step in a process that has no flags but `environ`, and return its output."""
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    fields = [
        "train.steps=6",
        "train.checkpoint_every=3",
        "train.eval_every=0",
        "samples.count=0",
        "train.eval_windows=8",
    ]
    fields += ["data.tokenizer.vocab_size=512", "optimizer.schedule=constant", "optimizer.warmup_steps=1"]
    fields += [f"train.steps={steps}", f"data.cache_dir={folder / 'cache'}"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments", "train", "smoke", "--run", str(folder / run),
         *(word for field in fields for word in ("--set", field))],
        cwd=Path(__file__).parents[2], env=kept | environ, capture_output=True, text=True, check=True, timeout=600,
    )  # fmt: skip
    return done.stdout


@pytest.mark.slow
def test_a_resumed_run_keeps_its_devices_bit_for_bit(tmp_path):
    first = train(tmp_path, 6, "whole")
    count = recorded_devices(RunFolder(tmp_path / "whole"))
    assert count == min(cpu_devices.cores(), 8) and f"cpu, {count} device" in first
    train(tmp_path, 3, "parts")
    assert "note:" not in train(tmp_path, 6, "parts")
    losses = [
        [row["loss"] for row in read_metrics(RunFolder(tmp_path / run).metrics) if row["kind"] == "train"]
        for run in ("whole", "parts")
    ]
    assert len(losses[0]) >= 2 and losses[0][-1] == losses[1][-1]
    other = 1 if count > 1 else 2
    output = train(tmp_path, 9, "parts", JAX_NUM_CPU_DEVICES=str(other))
    assert f"trained on {count} devices and continues on {other}" in output
