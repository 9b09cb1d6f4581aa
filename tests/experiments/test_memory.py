"""A config that cannot fit into memory is refused at once, with the field; one that can run is not."""

from __future__ import annotations

import time

import pytest

from experiments.memory import Memory, estimate, host_memory
from experiments.named import EXPERIMENTS
from experiments.pods import PODS
from experiments.resolve import resolve, resolve_from
from model.config import LayerSpec, ModelConfig, ScanGroup, scan_groups
from model.cost import count_parameters
from model.memory import least_parameters
from train.config_io import ConfigError

LAPTOP = Memory(24 * 10**9, "this machine has")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.num_layers=100000000"], ["model.num_layers = 100000000", "at most 4096"]),
        (["model.moe.num_experts=100000000"], ["model.moe.num_experts = 100000000", "at most"]),
        (["model.attention.num_heads=999999999", "model.attention.num_kv_heads=7"], ["num_heads = 999999999"]),
        (
            ["data.sequence_length=10000000", "model.max_length=10000000"],
            ["data.sequence_length = 10000000", "logits", "this machine has 24 GB", "Try smaller"],
        ),
        (["data.batch_size=10000000"], ["data.batch_size = 10000000", "logits", "24 GB"]),
        (["model.embed_dim=100000000"], ["model.embed_dim = 100000000", "at least"]),
        (["model.moe.hidden_dim=1000000000"], ["model.moe.hidden_dim = 1000000000", "experts"]),
        (["model.vocab_size=10000000000"], ["model.vocab_size = 10000000000", "embeddings"]),
        (["train.seed=4294967296"], ["train.seed = 4294967296", "2**32 - 1"]),
        (["train.steps=" + "9" * 30], ["train.steps = 999", "2**31 - 1"]),
        (["train.steps=5"], ["optimizer.warmup_steps = 10", "train.steps = 5", "set it to 5 or less"]),
    ],
)
def test_a_config_that_cannot_fit_is_refused_at_once(overrides, expected):
    began = time.process_time()
    with pytest.raises(ValueError) as refused:
        resolve("smoke", overrides, 1, memory=lambda: LAPTOP)
    assert time.process_time() - began < 2  # seconds; about 0.01 on an idle core
    message = str(refused.value)
    assert all(part in message for part in expected) and "\n" not in message, message


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name not in PODS])
def test_experiments_that_run_on_a_small_machine_are_accepted(name):
    resolve(name, [], 1, memory=lambda: Memory(2 * 10**9, "this machine has"))
    resolve(name, [], 8, memory=lambda: Memory(2 * 10**9 // 8, "this machine has"))


@pytest.mark.parametrize(("name", "devices"), [("mixtral_8x7b", 64), ("deepseek_v3_like", 64)])
def test_the_estimate_is_a_lower_bound_of_the_compilers_figures(name, devices):
    """experiments/pods.py has the compiler's figures: 8.76 and 34.0 GB of arguments per chip, 11.95 and 45.0 GB of
    temporaries."""
    arguments, temporaries = {"mixtral_8x7b": (8.76e9, 11.95e9), "deepseek_v3_like": (34.0e9, 45.0e9)}[name]
    parts = {part.name: part.size for part in estimate(resolve(name, [], devices, "tpu"), devices)}
    held = sum(size for part, size in parts.items() if "weights" in part)
    assert 0.8 * arguments < held <= arguments
    assert sum(parts.values()) - held < temporaries
    with pytest.raises(ConfigError, match=r"model\.moe\.num_experts.*a TPU v5e chip has 1 GB.*experts"):
        resolve(name, [], devices, "tpu", lambda: Memory(10**9, "a TPU v5e chip has"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_least_number_of_parameters_is_a_close_lower_bound(name):
    config = EXPERIMENTS[name]().model
    if config.vocab_size == 0:
        config = resolve(name, [], 1).model
    least = sum(number for number, _ in least_parameters(config).values())
    total = count_parameters(config).total
    assert 0.97 * total < least <= total


def test_sampling_needs_no_optimizer_and_no_schedule():
    experiment = resolve("smoke", [], 1)
    training, sampling = (sum(part.size for part in estimate(experiment, 1, training=t)) for t in (True, False))
    assert sampling < training / 3
    resolve_from(experiment, ["train.steps=5"], 1, training=False)


def test_host_memory_respects_the_limit_of_the_control_group(tmp_path):
    assert host_memory(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 1000 kB\nMemFree: 10 kB\nHugePages_Total: 0\nSwapTotal: 24 kB\n")
    assert host_memory(tmp_path) == 1024 * 1024
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert host_memory(tmp_path) == 1024 * 1024
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("1024\n")
    assert host_memory(tmp_path) == 25 * 1024


def test_thousands_of_layers_are_planned_quickly():
    began = time.process_time()
    plan = scan_groups(ModelConfig(num_layers=2000))
    assert plan == (ScanGroup((LayerSpec(),), 2000),) and time.process_time() - began < 2
