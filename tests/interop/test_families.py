"""Thirteen published families, tiny: models read from folders match transformers (tests/parity/families.py).

Shapes: B batch, T time, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.batch import Batch
from interop.families import FAMILIES as READERS
from interop.load import abstract, load, named
from interop.published import Published, open_published
from model.config import ModelConfig
from model.transformer import Transformer, forward, init_cache, logits
from sharding.mesh import MeshConfig, make_mesh, use_mesh
from sharding.rules import ShardingRules
from tests.closeness import assert_close
from tests.parity import families as reference
from tests.parity.families import BY_NAME, FAMILIES, B, Family, T
from train.objectives import NextToken

# Relative to the largest logit, or to the tensor's largest gradient (1e-4 to 3). Both sides are float32, and the order
# of sums differs: with AVX2, AVX-512 and SSE4.2, logits and losses differ by up to 22 units in the last place, and
# gradients, which pass through the layers twice and sum over all tokens, by up to 56. The bounds are 3 times that.
LOGITS, GRADIENTS = 64 * 2.0**-23, 160 * 2.0**-23
SEEN = 10  # tokens of the prompt: longer than the window
MOVED = 1e-2  # smallest change of some logit that a wrong option must cause
TRIED = 1  # wrong options per family in the default tests; the others are slow
RULES = ShardingRules()
slow = pytest.mark.slow
by_name = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
# The default tests try three different families: learned positions; latent attention and expert groups; windows and
# sinks. The others have features of these or of tests/decode/test_cache.py, and are slow tests.
CACHED = ("gpt2", "deepseek_v3", "gpt_oss")


class Opened(NamedTuple):
    published: Published
    model: Transformer


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], Opened]:
    """Return a function that writes a family's folder with the safetensors library and loads the network."""

    @cache
    def open_(family: Family) -> Opened:
        published = open_published(reference.write_folder(family, tmp_path_factory.mktemp(family.name)))
        return Opened(published, load(published.source, published.tensor_map, published.config, RULES))

    return open_


FIRST = SEEN + 1  # tokens of row 0 in the first of two packed documents; the second has tokens of row 1


@jax.jit
def plain(model: Transformer, tokens_BT: jax.Array) -> jax.Array:
    return logits(model, forward(model, tokens_BT).hidden_BTD)


@jax.jit
def cached_and_packed(model: Transformer, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the logits [B, T, V] of a whole prompt followed by single tokens, and [T, V] of two packed documents."""

    def step(cache, token_B):
        out = forward(model, token_B[:, None], cache=cache)
        return out.cache, logits(model, out.hidden_BTD)[:, 0]

    prompt = forward(model, tokens_BT[:, :SEEN], cache=init_cache(model, B, T))
    _, rest_TBV = jax.lax.scan(step, prompt.cache, tokens_BT[:, SEEN:].T)
    cached_BTV = jnp.concatenate([logits(model, prompt.hidden_BTD), rest_TBV.swapaxes(0, 1)], 1)

    row_1T = jnp.concatenate([tokens_BT[0, :FIRST], tokens_BT[1, : T - FIRST]])[None]
    t = np.arange(T)
    packing = {"positions_BT": np.where(t < FIRST, t, t - FIRST)[None], "segment_ids_BT": 1 + (t >= FIRST)[None]}
    packed = forward(model, row_1T, **{name: jnp.asarray(x, jnp.int32) for name, x in packing.items()})
    return cached_BTV, logits(model, packed.hidden_BTD)[0]


@by_name
def test_logits_and_loss_match_transformers(family: Family, opened):
    tokens_BT, want = reference.tokens(family), reference.load(family)
    found_BTV = np.asarray(plain(opened(family).model, tokens_BT))
    assert np.abs(want["logits"]).max() > 1
    assert_close(found_BTV, want["logits"], LOGITS, what="logits")
    shifted = found_BTV[:, :-1].astype(np.float64)
    nll = np.log(np.exp(shifted).sum(-1)) - np.take_along_axis(shifted, tokens_BT[:, 1:, None], -1)[..., 0]
    assert_close(nll.mean(), want["loss"], LOGITS, what="loss")


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f.name in CACHED else slow, id=f.name) for f in FAMILIES]
)
def test_cached_and_packed_logits_match_transformers(family: Family, opened):
    tokens_BT, want = reference.tokens(family), reference.load(family)["logits"]
    cached_BTV, packed_TV = cached_and_packed(opened(family).model, tokens_BT)
    assert_close(cached_BTV, want, LOGITS, what="cached")
    assert_close(packed_TV[:FIRST], want[0, :FIRST], LOGITS, what="first document")
    assert_close(packed_TV[FIRST:], want[1, : T - FIRST], LOGITS, what="second document")


@by_name
def test_tensor_names_and_shapes_match_transformers(family: Family, opened):
    assert {entry.name: entry.shape for entry in opened(family).published.tensor_map} == reference.shapes(family)


@jax.jit
def loss_and_gradients(model: Transformer, tokens_BT: jax.Array) -> tuple[jax.Array, Transformer]:
    """Return the training loss and its gradients."""
    batch = Batch.of_windows(tokens_BT, np.ones(tokens_BT.shape, np.int32))

    def mean(model: Transformer) -> jax.Array:
        loss = NextToken()(model, None, batch, None)
        return loss.total / loss.count

    return jax.value_and_grad(mean)(model)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.gradients], ids=lambda family: family.name)
def test_gradients_of_every_tensor_match_transformers(family: Family, opened):
    published, model = opened(family)
    want = reference.load(family)
    if published.config.moe is not None:  # the reference's loss excludes router losses
        moe = dataclasses.replace(published.config.moe, load_balance=0.0, z_loss=0.0)
        model = filled(family, published, dataclasses.replace(published.config, moe=moe))
    loss, gradients = jax.device_get(loss_and_gradients(model, reference.tokens(family)))
    assert_close(loss, want["loss"], LOGITS, what="loss")
    leaves, seen = named(gradients), set()
    for entry in published.tensor_map:
        if f"d_{entry.name}" in want:
            part = entry.part(want[f"d_{entry.name}"])
            seen.add(f"d_{entry.name}")
            assert np.abs(part).max() > 1e-4, f"{entry.name}: the reference's gradient is too small to compare"
            assert_close(leaves[entry.leaf][entry.at], part, GRADIENTS, what=entry.name)
    assert seen == {name for name in want if name.startswith("d_")} and len(seen) > 20


def changed(config: Any, changes: dict[str, Any]) -> Any:
    """Return a config with the fields `changes` (by dotted name) set to other values."""
    for name, value in changes.items():
        first, _, rest = name.partition(".")
        if rest:
            value = changed(getattr(config, first), {rest: value})
        assert getattr(config, first) != value, f"{name} is already {value!r}"
        config = dataclasses.replace(config, **{first: value})
    return config


def filled(family: Family, published: Published, config: ModelConfig) -> Transformer:
    """Return a network of another config, with those published weights that it has."""
    model = abstract(config, RULES, None)
    weights = {path: np.zeros(leaf.shape, np.float32) for path, leaf in named(model).items()}
    for entry in READERS[published.family].tensor_map(config):
        if entry.leaf in weights:
            weights[entry.leaf][entry.at] = entry.part(reference.draw(family, entry.name, entry.shape))
    return jax.tree.unflatten(jax.tree.structure(model), weights.values())


WRONG = [
    pytest.param(f, w, marks=[slow] if i >= TRIED else [], id=f"{f.name}-{', '.join(f'{k}={v}' for k, v in w.items())}")
    for f in FAMILIES for i, w in enumerate(f.wrong)
]  # fmt: skip


@pytest.mark.parametrize("family, wrong", WRONG)
def test_a_wrong_option_changes_the_logits(family: Family, wrong: dict, opened):
    published = opened(family).published
    config = changed(published.config, wrong)
    if config.moe is not None:  # dense dispatch compiles faster
        config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, dispatch="dense"))
    model = filled(family, published, config)
    moved = np.abs(plain(model, reference.tokens(family)) - reference.load(family)["logits"]).max()
    assert moved > MOVED, f"moves the logits by only {moved:.1e}"


@pytest.mark.parametrize(
    "name, axes",
    [
        ("mixtral", {"fsdp": 2, "expert": 2, "tensor": 2}),
        pytest.param("deepseek_v3", {"data": 2, "fsdp": 2, "tensor": 2}, marks=slow),
        pytest.param("gpt_oss", {"fsdp": 2, "expert": 2, "tensor": 2}, marks=slow),
        pytest.param("gemma3", {"fsdp": 4, "sequence": 2}, marks=slow),
    ],
)
def test_a_model_loaded_onto_eight_devices_matches_transformers(name: str, axes: dict[str, int], opened):
    family = BY_NAME[name]
    published = opened(family).published
    mesh = make_mesh(MeshConfig(**{"fsdp": 1, **axes}))
    model = load(published.source, published.tensor_map, published.config, RULES, mesh)
    assert any(leaf.addressable_shards[0].data.size < leaf.size for leaf in jax.tree.leaves(model))
    with use_mesh(mesh):
        spec = jax.NamedSharding(mesh, RULES.spec("activations", ("batch", "sequence")))
        tokens_BT = jax.device_put(np.tile(reference.tokens(family), (4, 1)), spec)
        found = jax.device_get(plain(model, tokens_BT))
    assert_close(found, np.tile(reference.load(family)["logits"], (4, 1, 1)), LOGITS, what=name)
