"""Experts on eight devices give the values and gradients of one device, for any mesh and any skew of the routing."""

from __future__ import annotations

import functools
from dataclasses import replace

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from model import exchange
from model.config import MLPConfig, ModelConfig, MoEConfig
from model.dispatch import run_experts
from model.transformer import Transformer, forward
from sharding.collectives import read_collectives
from sharding.mesh import MeshConfig, concrete_shardings, make_mesh, use_mesh
from sharding.rules import AxisRules, ShardingRules
from tests.models import expert_weights, tiny_config

E, D, F, B, T = 8, 8, 6, 8, 8
RULES = ShardingRules()
TOKENS = ("batch", "sequence", None)
AXES = [TOKENS, TOKENS, TOKENS, ("expert", None, None, "mlp"), ("expert", "mlp", None), TOKENS]
NAMES = ["y", "gradient of x", "of weights", "of up", "of down"]


def emulated(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """Emulate jax.lax.ragged_all_to_all, as documented, with collectives that CPUs support. Return NaN if the arguments
    break its rules."""
    sent, start, size, end = (
        jax.lax.all_gather(x, axis_name) for x in (operand, input_offsets, send_sizes, output_offsets)
    )
    me, row = jax.lax.axis_index(axis_name), jnp.arange(output.shape[0])
    broken = (recv_sizes != size[:, me]).any() | (size < 0).any() | (start < 0).any() | (end < 0).any()
    broken |= (input_offsets + send_sizes > operand.shape[0]).any() | (end[:, me] + size[:, me] > output.shape[0]).any()
    for s in range(sent.shape[0]):
        here = (row >= end[s, me]) & (row < end[s, me] + size[s, me])
        output = jnp.where(here[:, None], sent[s].at[start[s, me] + row - end[s, me]].get(mode="clip"), output)
    return jnp.where(broken, jnp.nan, output)


def inputs(style: str, k: int, seed: int = 0) -> list[np.ndarray]:
    """Return x, indices, weights, up, down and the gradient of y. A tenth of the pairs have no expert, as with a
    capacity or padding."""
    rng = np.random.default_rng(seed)
    shapes = [(B, T, D), (B, T, k), (E, D, 2, F), (E, F, D), (B, T, D)]
    x, weights, up, down, dy = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    indices = np.stack([rng.permutation(E)[:k] for _ in range(B * T)]).reshape(B, T, k)
    if style == "same":  # the same experts for all tokens: most devices receive none
        indices[:] = np.arange(k)
    if style == "half":  # half of the devices send all rows to the last experts
        indices[: B // 2] = E - 1 - np.arange(k)
    indices = np.where(rng.random(indices.shape) < (1.0 if style == "none" else 0.1), E, indices).astype(np.int32)
    return [x, indices, weights, up, down, dy]


def values_and_gradients(config: ModelConfig, rules: ShardingRules = RULES):
    def f(x, indices, weights, up, down, dy):
        run = lambda x, weights, up, down: run_experts(
            x, indices, weights, None, expert_weights(up, down, rules), config, rules
        )
        y, pull = jax.vjp(run, x, weights, up, down)
        return y, *pull(dy)

    return jax.jit(f)


def shard_over(mesh, arrays, rules=RULES):
    return [
        jax.device_put(x, jax.NamedSharding(mesh, rules.spec("activations", axes)))
        for x, axes in zip(arrays, AXES, strict=True)
    ]


def config_of(k: int, factor: float | None, **changes) -> ModelConfig:
    return ModelConfig(
        mlp=MLPConfig("swiglu"), moe=MoEConfig(E, k, F, all_to_all_buffer_factor=factor, **changes), dtype="float32"
    )


@functools.cache
def oracle(k: int, style: str):
    """Return the result of one device that runs every expert on every token: the oracle for every exchange."""
    return values_on_one_device(k)(*inputs(style, k))


@functools.cache
def values_on_one_device(k: int):
    return values_and_gradients(config_of(k, None, dispatch="dense"))


def check(
    config: ModelConfig, axes: dict[str, int], rules: ShardingRules = RULES, styles=("any", "same", "half", "none")
):
    k = config.moe.top_k
    with use_mesh(mesh := make_mesh(MeshConfig(**{"fsdp": 1, **axes}))):
        together = values_and_gradients(config, rules)
    for style in styles:
        expected = oracle(k, style)
        with use_mesh(mesh):
            found = together(*shard_over(mesh, inputs(style, k), rules))
        for name, a, b in zip(NAMES, found, expected, strict=True):
            message = f"{style}: {name}"
            np.testing.assert_allclose(a, b, atol=1e-5 * max(np.abs(b).max(), 1e-6), rtol=0, err_msg=message)


slow = pytest.mark.slow
WAYS = [
    ({"expert": 8}, 2, 1.0, False),
    ({"data": 2, "expert": 4}, 3, 0.5, False),
    ({"fsdp": 2, "expert": 2, "tensor": 2}, 1, 1.25, False),
    pytest.param({"sequence": 2, "expert": 4}, 2, 2.0, False, marks=slow),
    pytest.param({"expert": 8}, 2, 1.0, True, marks=slow),
    ({"data": 2, "expert": 4}, 3, 0.5, True),
    pytest.param({"fsdp": 2, "expert": 2, "tensor": 2}, 1, 1.25, True, marks=slow),
    pytest.param({"sequence": 2, "expert": 4}, 2, 2.0, True, marks=slow),
]


def name(x) -> str:
    if isinstance(x, bool):
        return "ragged" if x else "padded"
    return "".join(f"{k}{v}" for k, v in x.items()) if isinstance(x, dict) else str(x)


@pytest.mark.parametrize("axes, k, factor, ragged", WAYS, ids=name)
def test_the_exchange_matches_one_device(axes, k, factor, ragged, monkeypatch):
    monkeypatch.setattr(exchange, "ROW_MULTIPLE", 1)  # so that a few tokens overflow
    if ragged:
        monkeypatch.setattr(exchange, "target", lambda: ("tpu", "emulated"))
        monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated)
    check(config_of(k, factor), axes)


SEQUENCE = replace(RULES, activations=AxisRules(batch=("data",), sequence=("sequence",), expert=("sequence",)))
TENSOR = replace(RULES, activations=AxisRules(batch=("data",), expert=("tensor",), mlp=()))
TWO = replace(RULES, activations=AxisRules(batch=("data", "fsdp", "expert"), expert=("expert", "fsdp")))
BOTH = replace(RULES, activations=AxisRules(batch=("data", "expert"), expert=("expert", "tensor"), mlp=()))


@pytest.mark.parametrize(
    "axes, rules, factor",
    [
        ({"expert": 4, "tensor": 2}, RULES, None),
        ({"data": 2, "sequence": 4}, SEQUENCE, None),  # experts on the devices of a sequence's shards
        ({"data": 2, "sequence": 4}, SEQUENCE, 1.0),
        ({"data": 2, "tensor": 4}, TENSOR, 1.0),  # each device has the group's tokens already
        ({"data": 2, "expert": 2, "tensor": 2}, BOTH, 1.0),
        ({"data": 2, "expert": 2, "fsdp": 2}, TWO, 0.5),
    ],
    ids=["gathered", "sequence-gathered", "sequence", "tensor", "both", "two"],
)
def test_experts_can_be_sharded_over_any_axis(axes, rules, factor):
    rules.validate()
    check(config_of(2, factor), axes, rules, styles=("any", "same"))


def test_the_oracle_runs_on_a_mesh():
    check(config_of(2, 1.0, dispatch="dense"), {"data": 2, "expert": 4}, styles=("any",))


def test_buffers_without_a_capacity_are_refused():
    with pytest.raises(ValueError, match="capacity_factor"):
        jax.eval_shape(values_and_gradients(config_of(2, None, dispatch="gather")), *inputs("any", 2))


@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])
def test_tokens_return_bit_for_bit_to_their_rows(ragged, monkeypatch):
    """The experts return their own rows, and NaN for a row of another expert. The exchange takes several rounds."""
    monkeypatch.setattr(exchange, "ROW_MULTIPLE", 1)
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated)
    rng = np.random.default_rng(0)
    indices = np.where(rng.random((64, 1)) < 0.7, 5, rng.integers(0, 9, (64, 1))).astype(np.int32)  # 8: no expert
    x = np.concatenate([indices, np.arange(64)[:, None], rng.standard_normal((64, 6))], 1).astype(np.float32)

    def local(x, indices, up, down):
        def experts(x_RD, expert_R, up, down):
            belongs = (x_RD[:, 0] == jax.lax.axis_index("expert") * 2 + expert_R) | (expert_R == 2)
            return jnp.where(belongs[:, None], x_RD, jnp.nan)

        ones = jnp.ones(indices.shape, jnp.float32)
        options = {"axes": ("expert",), "agree": ("data", "expert"), "factor": 1.0, "ragged": ragged}
        return exchange.exchanged_experts(x, indices, ones, up, down, experts, **options)

    with use_mesh(mesh := make_mesh(MeshConfig(data=2, fsdp=1, expert=4))):
        rows, by_expert = jax.P(("data", "expert")), jax.P("expert")
        arrays = [
            jax.device_put(a, jax.NamedSharding(mesh, spec))
            for a, spec in [
                (x, rows),
                (indices, rows),
                (np.zeros((8, 8, 2, 2)), by_expert),
                (np.zeros((8, 2, 8)), by_expert),
            ]
        ]
        call = jax.shard_map(local, in_specs=(rows, rows, by_expert, by_expert), out_specs=rows, check_vma=False)
        y = jax.jit(call)(*arrays)
    np.testing.assert_array_equal(y, np.where(indices == 8, 0, x))


@given(
    tokens=st.integers(1, 300), k=st.integers(1, 4), experts=st.integers(1, 4), peers=st.sampled_from([2, 4, 8]),
    factor=st.floats(0.1, 8), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_buffers_take_a_share_and_rounds_cover_the_rest(tokens, k, experts, peers, factor, seed):
    k = min(k, experts * peers)
    rows = exchange.buffer_rows(tokens * k, tokens, k, experts, peers, factor)
    bound, most = rows // peers, tokens * min(k, experts)
    assert rows % peers == 0 and 1 <= bound <= most
    assert bound >= min(most, factor * tokens * k / peers)
    assert bound == most or bound % exchange.ROW_MULTIPLE == 0
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(tokens * k, rng.dirichlet(np.full(peers * experts, 0.3)), peers).reshape(peers, peers, -1)
    for ragged in (False, True):
        n = int(exchange.overflow_rounds(jnp.asarray(counts), rows, ragged))
        fullest = counts.sum(-1).sum(0).max() / rows if ragged else counts.sum(-1).max() / bound
        assert n - 1 < fullest <= n
    even = np.full((peers, peers, experts), 16)
    assert exchange.overflow_rounds(jnp.asarray(even), peers * experts * 16, True) == 1


def test_the_exchange_sends_only_pairs():
    """With one choice for each of 64 tokens per device, eight devices and buffers for an even share, the exchange sends
    an eighth of the bytes of gathering."""
    traffic = {}
    for factor in (1.0, None):
        with use_mesh(mesh := make_mesh(MeshConfig(fsdp=1, expert=8))):
            x, indices, weights, up, down, dy = inputs("any", 1)
            x, indices, weights, dy = (np.repeat(a, 8, 1) for a in (x, indices, weights, dy))
            arrays = shard_over(mesh, [x, indices, weights, up, down, dy])
            text = values_and_gradients(config_of(1, factor)).lower(*arrays).compile().as_text()
        found = read_collectives(text)
        traffic[factor] = {c.kind: c.bytes for c in found.collectives if c.devices == 8 and c.bytes >= 64 * D * 4}
        if factor is not None:
            assert found.open_loops == 2  # overflow rounds, in both directions
    assert traffic[1.0] == {"all-to-all": 64 * D * 4}
    assert traffic[None] == {"all-gather": 8 * 64 * D * 4, "reduce-scatter": 64 * D * 4}


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_the_ragged_transport_is_the_default_on_tpus_only(platform, monkeypatch):
    monkeypatch.setattr(exchange, "target", lambda: (platform, "as on it"))
    with use_mesh(mesh := make_mesh(MeshConfig(fsdp=1, expert=8))):
        traced = str(values_and_gradients(config_of(2, 1.0)).trace(*shard_over(mesh, inputs("any", 2))).jaxpr)
    assert (" ragged_all_to_all[" in traced, " all_to_all[" in traced) == (platform == "tpu", platform != "tpu")


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=slow)], ids=["lowered", "compiled"])
def test_rematerialization_can_keep_expert_inputs_and_outputs(compiled):
    """If it keeps them, the backward pass repeats no exchange. Each of two layers sends and returns tokens once forward
    and once backward."""
    moe = MoEConfig(4, 2, 8, all_to_all_buffer_factor=8.0, dispatch="dense")  # compiles faster
    found = {}
    for changes in ({"remat": "full"}, {"remat": "names", "remat_names": ("expert_in", "expert_out")}):
        config = tiny_config(moe=moe, **changes)
        with use_mesh(mesh := make_mesh(MeshConfig(fsdp=1, expert=4), jax.devices()[:4])):
            abstract = jax.eval_shape(lambda config=config: Transformer(jax.random.key(0), config, RULES))
            shaped = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            model = jax.tree.map(shaped, concrete_shardings(abstract, mesh))
            rows = jax.NamedSharding(mesh, RULES.spec("activations", ("batch", None)))
            ids = jax.ShapeDtypeStruct((8, 4), jnp.int32, sharding=rows)
            gradient = jax.jit(
                jax.grad(lambda model, ids: forward(model, ids, segment_ids_BT=ids, positions_BT=ids).hidden_BTD.sum())
            )
            program = gradient.lower(model, ids)
            if compiled:
                text = program.compile(compiler_options={"xla_backend_optimization_level": 0}).as_text()
                found[config.remat] = read_collectives(text).by_kind()["all-to-all"][0]
            else:
                found[config.remat] = program.as_text().count("stablehlo.all_to_all")
    if compiled:
        assert found == {"full": 12, "names": 8}
    else:  # the layers are a loop, and the text includes overflow rounds
        assert found["names"] == found["full"] - 2
