"""Resolution of experiments: overrides, vocabulary, and the fields that may change on resume."""

from __future__ import annotations

import dataclasses

import pytest

from data.config import SPECIAL_PIECES
from experiments.quickstart import EXPERIMENTS
from experiments.resolve import fill_vocabulary, load_experiment, may_differ_on_resume, resolve
from model.cost import train_flops_per_token
from train.config import Experiment
from train.config_io import ConfigError, flatten, from_dict, save_json, to_dict
from train.records import RunFolder


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_resolves(name, devices):
    experiment = resolve(name, [], devices)
    assert experiment.name == name and experiment.question and EXPERIMENTS[name].__doc__
    assert from_dict(Experiment, to_dict(experiment)) == experiment
    assert experiment.model.vocab_size % 128 == 0


def test_an_override_changes_only_its_field():
    base, changed = resolve("smoke", [], 1), resolve("smoke", ["model.moe.top_k=3", "train.steps=17"], 1)
    a, b = flatten(base), flatten(changed)
    assert {name for name in a if a[name] != b[name]} == {"model.moe.top_k", "train.steps"}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.tokenizer.kind=byte"], 384),  # 256 bytes and 11 special tokens, rounded up to a multiple of 128
        (["data.tokenizer.vocab_size=1000"], 1024),
        (["data.tokenizer.vocab_size=1024"], 1024),
        (["data.tokenizer.vocab_size=1000", "model.vocab_size=1000"], 1000),
    ],
)
def test_the_vocabulary_fits_the_tokenizer(overrides, expected):
    assert resolve("smoke", overrides, 1).model.vocab_size == expected


def test_a_vocabulary_below_the_tokenizers_is_refused():
    with pytest.raises(ConfigError, match=r"model.vocab_size = 266: the byte tokenizer has 267 ids"):
        resolve("smoke", ["data.tokenizer.kind=byte", f"model.vocab_size={255 + len(SPECIAL_PIECES)}"], 1)
    experiment = EXPERIMENTS["smoke"]()
    assert fill_vocabulary(fill_vocabulary(experiment)) == fill_vocabulary(experiment)


def test_the_dense_ablation_has_equal_flops_except_for_the_router():
    moe, dense = resolve("quickstart", [], 1), resolve("quickstart_dense", [], 1)
    router = 3 * 2 * moe.model.num_layers * moe.model.embed_dim * moe.model.moe.num_experts
    assert train_flops_per_token(moe.model, 512) == train_flops_per_token(dense.model, 512) + router


def test_resuming_may_change_the_length_but_not_the_computation():
    names = flatten(resolve("quickstart", [], 1))
    may = {name for name in names if may_differ_on_resume(name)}
    assert {"train.steps", "train.nonfinite", "mesh.fsdp", "sharding.weights.embed", "samples.count"} <= may
    assert not may & {
        "model.embed_dim",
        "train.seed",
        "data.seed",
        "optimizer.learning_rate",
        "train.objective",
        "data.batch_size",
    }


def test_a_run_folder_restores_its_experiment(tmp_path):
    experiment = dataclasses.replace(resolve("quickstart_fim", ["train.z_loss=1e-4"], 1))
    run = RunFolder(tmp_path)
    save_json(experiment, run.config)
    assert load_experiment(run) == experiment


@pytest.mark.parametrize("name, device", [("tpu", "tpu"), ("hopper", "gpu"), ("triton", "gpu")])
def test_a_kernel_of_another_device_is_refused_before_anything_is_made(name, device):
    with pytest.raises(
        ConfigError,
        match=rf"model.attention.implementation = '{name}': runs on a {device}, but the device is a cpu; use",
    ):
        resolve("smoke", [f"model.attention.implementation={name}"], 1)


@pytest.mark.parametrize(
    "override",
    [
        "model.attention.implementation=tpu",
        "model.attention.decode_implementation=gpu",
        "model.moe.implementation=triton",
    ],
)
def test_a_kernel_of_another_platform_is_refused(override):
    field, value = override.split("=")
    with pytest.raises(
        ConfigError, match=rf"{field} = '{value}': runs on a [tg]pu, but the device is a cpu; use 'auto'"
    ):
        resolve("smoke", [override], 1)
    resolve("smoke", [f"{field}=reference"], 1)
