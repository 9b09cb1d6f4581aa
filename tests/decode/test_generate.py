"""Generation equals recomputation without a cache in any batch, bucket and mesh, streamed or not."""

from __future__ import annotations

import dataclasses
import re

import jax
import numpy as np
import pytest

from decode.generate import Generation, advance, bucket, for_decoding, generate, prefill, start, stream
from decode.sampling import SamplingParams
from model.config import MoEConfig
from model.transformer import Transformer, forward, logits, unstack
from sharding.mesh import MeshConfig, concrete_shardings, make_mesh, use_mesh
from sharding.rules import ShardingRules
from tests.models import TINY_ATTENTION, random_model, tiny_config

ATTENTION = dataclasses.replace(TINY_ATTENTION, layers=("sliding", "global"))
CONFIG = tiny_config(attention=ATTENTION, moe=MoEConfig(num_experts=4, hidden_dim=32, layers=("dense", "moe")))
MODEL = unstack(random_model(CONFIG))
WIDTH = 40
PROMPTS = [np.random.default_rng(n).integers(0, CONFIG.vocab_size, n).tolist() for n in (3, 1, 11, 7, 5)]
PARAMS = [
    SamplingParams(temperature=0.0, max_new_tokens=12),
    SamplingParams(temperature=1.3, top_k=20, seed=3, max_new_tokens=20),
    SamplingParams(top_p=0.8, seed=2**32 - 1, max_new_tokens=5),
    SamplingParams(
        temperature=0.0, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.2, max_new_tokens=20
    ),
    SamplingParams(min_p=0.05, frequency_penalty=0.3, max_new_tokens=1),
]


@jax.jit
def full(model, tokens_1W):
    return logits(model, forward(model, tokens_1W).hidden_BTD)


def uncached(tokens: list[int]) -> np.ndarray:
    """Return the logits after each token, float64 [len(tokens), V], without a cache."""
    padded = np.asarray([tokens + [0] * (WIDTH - len(tokens))])
    return np.asarray(full(MODEL, padded), np.float64)[0, : len(tokens)]


@pytest.fixture(scope="module")
def batch() -> list[Generation]:
    return generate(MODEL, PROMPTS, PARAMS)


def test_greedy_matches_the_argmax_of_a_full_forward_pass(batch):
    tokens = list(PROMPTS[0])
    for _ in range(12):
        tokens.append(int(uncached(tokens)[-1].argmax()))
    assert batch[0].tokens == tokens[3:]


def test_log_probabilities_match_a_full_forward_pass(batch):
    for prompt, made in zip(PROMPTS, batch, strict=True):
        table = uncached(prompt + made.tokens)[len(prompt) - 1 : -1]
        table -= np.log(np.exp(table).sum(-1, keepdims=True))
        np.testing.assert_allclose(made.logprobs, table[np.arange(len(made.tokens)), made.tokens], atol=1e-5)


def test_penalized_greedy_matches_numpy(batch):
    p, tokens = PARAMS[3], list(PROMPTS[3])
    for _ in range(20):
        x, made = uncached(tokens)[-1], tokens[7:]
        for t in set(tokens):
            x[t] = x[t] / p.repetition_penalty if x[t] > 0 else x[t] * p.repetition_penalty
        for t in set(made):
            x[t] -= p.frequency_penalty * made.count(t) + p.presence_penalty
        tokens.append(int(x.argmax()))
    assert batch[3].tokens == tokens[7:]


def test_a_request_gives_the_same_text_in_any_batch(batch):
    """Alone, in another order and in a larger bucket."""
    for i in (1, 3):
        assert generate(MODEL, [PROMPTS[i]], PARAMS[i])[0].tokens == batch[i].tokens
    order = [4, 2, 0, 3, 1]
    mixed = generate(MODEL, [PROMPTS[i] for i in order], [PARAMS[i] for i in order])
    assert [g.tokens for g in mixed] == [batch[i].tokens for i in order]
    other = SamplingParams(seed=9, max_new_tokens=24)
    wide = generate(MODEL, [*PROMPTS, [1] * 40], [*PARAMS, other])
    assert [g.tokens for g in wide[:-1]] == [g.tokens for g in batch]


def test_texts_depend_on_seeds():
    p = PARAMS[1]
    texts = generate(MODEL, [[5]] * 5, [dataclasses.replace(p, seed=s) for s in (0, 1, 2, 0, 2)])
    assert texts[0] == texts[3] and texts[2] == texts[4]
    assert len({tuple(t.tokens) for t in texts}) == 3


def test_stream_equals_generate(batch):
    for i in (1, 3):
        streamed = list(stream(MODEL, PROMPTS[i], PARAMS[i]))
        assert [t for t, _ in streamed] == batch[i].tokens
        np.testing.assert_allclose([p for _, p in streamed], batch[i].logprobs, atol=1e-5)


def test_stop_ids_end_only_their_row(batch):
    text = batch[1].tokens
    stop = text[6]
    first = text.index(stop)
    params = [
        dataclasses.replace(p, stop_token_ids=stops)
        for p, stops in zip(PARAMS, ((), (60, stop), (), (), ()), strict=True)
    ]
    stopped = generate(MODEL, PROMPTS, params)
    assert stopped[1].tokens == text[: first + 1] and stopped[1].finished == "stop"
    assert len(stopped[1].logprobs) == first + 1
    for i in (0, 2, 3, 4):
        assert stopped[i] == batch[i] and stopped[i].finished == "length"
    assert [t for t, _ in stream(MODEL, PROMPTS[1], params[1])] == stopped[1].tokens


def test_nothing_recompiles_within_a_bucket(batch):
    def programs():
        return prefill._cache_size(), advance._cache_size()

    before = programs()
    rng = np.random.default_rng(0)
    for seed in range(4):
        params = [
            SamplingParams(
                temperature=float(rng.choice([0.0, 0.7])),
                top_k=int(rng.integers(0, 9)),
                top_p=float(rng.uniform(0.1, 1.0)),
                min_p=float(rng.choice([0.0, 0.3])),
                repetition_penalty=float(rng.choice([1.0, 1.4])),
                presence_penalty=float(rng.choice([0.0, 0.5])),
                max_new_tokens=20 - seed,
                stop_token_ids=(3,) * seed,
                seed=seed,
            )
            for _ in range(6)
        ]
        generate(MODEL, [[1] * int(n) for n in rng.integers(1, 12, 6)], params)
    assert programs() == before


@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_the_cache_is_updated_in_place(rows):
    """No step of the compiled loop copies a cache, and the state is donated."""
    request, state = start(MODEL, PROMPTS[:rows], PARAMS[:rows])
    program = advance.lower(MODEL, request, state, np.int32(1)).compile()
    for leaf in jax.tree.leaves(state.cache.stacks):  # contiguous and ring caches
        shape = ",".join(str(n) for n in leaf.shape[1:])
        assert not re.findall(rf"= f32\[(?:1,)?{shape}\]\S* copy\(.*", program.as_text())
    caches = sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache.stacks))
    assert program.memory_analysis().alias_size_in_bytes >= caches


def test_a_mesh_gives_the_same_tokens(batch):
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    with use_mesh(mesh):
        abstract = jax.eval_shape(lambda: Transformer(jax.random.key(0), CONFIG, ShardingRules()))
        place = lambda weight, there: jax.device_put(np.asarray(weight), there.sharding)
        model = jax.tree.map(place, random_model(CONFIG), concrete_shardings(abstract, mesh))
        spread = generate(model, PROMPTS, PARAMS)
    for here, there in zip(batch, spread, strict=True):
        assert there.tokens == here.tokens and there.finished == here.finished
        np.testing.assert_allclose(there.logprobs, here.logprobs, atol=1e-5)


def test_prefix_models_continue_past_their_window():
    """The prompt stays visible to every later token, beyond the sliding window."""
    config = tiny_config(attention=dataclasses.replace(TINY_ATTENTION, mask="prefix", layers=("sliding",)))
    model, tokens = random_model(config), list(PROMPTS[3])
    made = generate(model, [tokens], SamplingParams(temperature=0.0, max_new_tokens=8))[0].tokens
    prefix = np.arange(WIDTH)[None] < len(tokens)
    recompute = jax.jit(lambda t: logits(model, forward(model, t, prefix_BT=prefix).hidden_BTD))
    table = np.asarray(recompute(np.asarray([tokens + made + [0] * (WIDTH - 15)])))[0]
    assert made == table[6:14].argmax(-1).tolist()


def test_buckets_hold_the_size_and_waste_little():
    for steps in (1, 4):
        sizes = [bucket(n, steps) for n in range(1, 3000)]
        assert all(n <= b and b % 16 == 0 for n, b in enumerate(sizes, 1))
        assert sizes == sorted(sizes)
        assert all(b < n * (1 + 1 / steps) + 16 for n, b in enumerate(sizes, 1))
    assert len({bucket(n, 4) for n in range(1, 4097)}) <= 32


@pytest.mark.parametrize(
    ("prompts", "params", "words"),
    [
        ([], SamplingParams(), "prompts = []"),
        ([[1], []], SamplingParams(max_new_tokens=2), "prompts[1] = []"),
        (
            [[1, 64]],
            SamplingParams(max_new_tokens=2),
            "prompts[0] has token 64, outside the model's vocabulary, 0",
        ),
        ([[-1]], SamplingParams(max_new_tokens=2), "prompts[0] has token -1"),
        ([[1]], SamplingParams(max_new_tokens=2, stop_token_ids=(99,)), "sampling.stop_token_ids has token 99"),
        ([[1] * 60], SamplingParams(max_new_tokens=5), "60 tokens, and with sampling.max_new_tokens = 5 that makes 65"),
        ([[1] * 64], SamplingParams(max_new_tokens=1), "Shorten the prompt to 63 tokens or fewer"),
        ([[1]], [SamplingParams()] * 2, "2 given for 1 prompts"),
        ([[1]], SamplingParams(top_p=3.0), "sampling.top_p = 3.0"),
    ],
)
def test_invalid_requests_are_refused_before_compiling(prompts, params, words):
    before = prefill._cache_size()
    with pytest.raises(ValueError) as error:
        generate(MODEL, prompts, params)
    assert words in str(error.value)
    if len(prompts) == 1 and isinstance(params, SamplingParams):
        with pytest.raises(ValueError) as error:
            stream(MODEL, prompts[0], params)
        assert words in str(error.value)
    assert prefill._cache_size() == before


@pytest.mark.parametrize("router", ["expert_choice", "soft"])
def test_routers_that_read_later_tokens_are_refused(router):
    model = random_model(tiny_config(moe=MoEConfig(4, 2, 16, router=router, allow_leak=True)))
    with pytest.raises(ValueError, match=f"model.moe.router = '{router}'"):
        generate(model, [[1]], SamplingParams())


def test_bidirectional_models_are_refused():
    model = random_model(tiny_config(attention=dataclasses.replace(TINY_ATTENTION, mask="bidirectional")))
    with pytest.raises(ValueError, match=r"model\.attention\.mask = 'bidirectional'"):
        generate(model, [[1]], SamplingParams(max_new_tokens=2))


def test_for_decoding_unstacks_on_cpus_and_frees_donated_weights():
    stacked = random_model(
        dataclasses.replace(
            CONFIG, num_layers=4, attention=dataclasses.replace(CONFIG.attention, layers=("global", "sliding"))
        )
    )
    copy = for_decoding(stacked)
    expected, sizes = jax.device_get(copy), [len(unit) for unit in stacked.stacks]
    assert len(copy.stacks) == 4 and sizes == [2] and for_decoding(copy) is copy
    held = jax.tree.leaves(stacked.stacks)
    moved = for_decoding(stacked, donate=True)
    assert all(leaf.is_deleted() for leaf in held)
    assert jax.tree.structure(moved) == jax.tree.structure(copy)
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_last_hidden_state_is_selected_without_a_matmul():
    """At their default precision, accelerators would round a product with a one-hot row."""
    request, _ = start(MODEL, PROMPTS[:3], PARAMS[:3])
    width, tokens_BS = 16, np.zeros((4, 32), np.int32)
    traced = jax.make_jaxpr(lambda m, r, t: prefill(m, r, t, width))(MODEL, request, tokens_BS)

    def products(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                yield tuple(variable.aval.shape for variable in equation.invars)
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from products(inner)

    shapes = list(products(traced.jaxpr))
    assert shapes and not any(left == (4, width) or right == (4, width) for left, right in shapes)
