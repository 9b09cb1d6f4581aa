"""Generate text: prefill, then one jitted loop over a cache that is updated in place.

`generate` and `stream` run the same two compiled programs, one for the prompt and one for the loop. Sizes are rounded
up to buckets and sampling parameters are arrays, so that a new request compiles nothing unless it needs a new bucket.

Shapes: B rows, P bucket of the prompt length, S positions of a row (prompt and new tokens), V vocabulary, E stop ids,
D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int

from decode.sampling import HostOrDevice, SamplerArrays, SamplingParams, choose, sampler_arrays
from model.transformer import Cache, Transformer, forward, init_cache, logits, unstack, with_stacks
from model.weights import repeats
from sharding.rules import ShardingRules, no_mesh, reshard

SMALLEST_BUCKET = 16


@dataclass(frozen=True)
class Generation:
    """The generated tokens for one prompt."""

    tokens: list[int]  # new tokens; the last one is the stop id if finished == 'stop'
    logprobs: list[float]  # natural log of each token's probability before penalties, temperature and filters
    finished: Literal["stop", "length"]


class Request(NamedTuple):
    """Inputs that stay constant while a batch is generated."""

    sampler: SamplerArrays
    prompt_B: Int[HostOrDevice, "B"]  # number of prompt tokens
    limit_B: Int[HostOrDevice, "B"]  # maximum number of tokens, including the prompt
    stop_BE: Int[HostOrDevice, "B E"]  # padded with -1


class State(NamedTuple):
    """State of a batch. Every row has one token more than its cache: the newest, which the model has not yet read."""

    cache: Cache
    tokens_BS: Int[Array, "B S"]
    logprobs_BS: Float[Array, "B S"]  # of the generated tokens
    length_B: Int[Array, "B"]  # number of tokens in the row
    stopped_B: Bool[Array, "B"]  # whether the newest token is a stop id


def generate(
    model: Transformer, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
) -> list[Generation]:
    """Generate a continuation of each prompt with its parameters (one for all prompts, or one for each).

    A row's noise depends only on its seed and the index of the new token, so that a request gives the same text in any
    batch. An exception is a tie within rounding error, since matmuls of other sizes may sum in another order. On CPUs,
    a stacked model is first unstacked, which copies its weights; pass `for_decoding(model)` to generate repeatedly. If
    a mesh is set, rows are sharded over `rules.activations.batch`. Raises ValueError for invalid requests, before
    compiling.
    """
    params = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    check(model, prompts, params)
    model = for_decoding(model)
    request, state = start(model, prompts, params)
    state = advance(model, request, state, np.int32(state.tokens_BS.shape[1]))
    tokens, logprobs, length, stopped = jax.device_get(state._replace(cache=None))[1:]
    return [
        Generation(
            tokens[b, len(prompt) : length[b]].tolist(),
            logprobs[b, len(prompt) : length[b]].tolist(),
            "stop" if stopped[b] else "length",
        )
        for b, prompt in enumerate(prompts)
    ]


def stream(model: Transformer, prompt: Sequence[int], params: SamplingParams) -> Iterator[tuple[int, float]]:
    """Yield each new token and its log-probability as soon as it is generated; results equal those of `generate`.

    Raises ValueError like `generate`, at the call rather than at the first token.
    """
    check(model, [prompt], [params])
    return _stream(for_decoding(model), prompt, params)


def _stream(model: Transformer, prompt: Sequence[int], params: SamplingParams) -> Iterator[tuple[int, float]]:
    request, state = start(model, [prompt], [params])
    for made in range(params.max_new_tokens):
        if made:
            state = advance(model, request, state, np.int32(1))
        token, logprob = (value[0].item() for value in jax.device_get(newest(state)))
        yield token, logprob
        if token in params.stop_token_ids:
            return


def check(model: Transformer, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> None:
    """Raise ValueError, with value and fix, for a request that cannot be generated."""
    config = model.config
    if config.attention.mask == "bidirectional":
        raise ValueError(
            "model.attention.mask = 'bidirectional': the model sees the tokens it would have to predict, so it cannot "
            "generate. Use a model trained with 'causal' or 'prefix'"
        )
    if not config.can_generate:
        assert config.moe is not None
        raise ValueError(
            f"model.moe.router = {config.moe.router!r}: it reads the tokens that the model would have to predict, so "
            "the model cannot generate. Use a model trained with another router"
        )
    if not no_mesh() and any(jax.sharding.get_abstract_mesh().shape[a] > 1 for a in model.rules.activations.sequence):
        raise ValueError(
            f"mesh.{model.rules.activations.sequence[0]} > 1: a single new token cannot be sharded over several "
            "devices. Use a mesh whose sequence axis is 1"
        )
    if not prompts:
        raise ValueError("prompts = []: give at least one prompt")
    if len(params) != len(prompts):
        raise ValueError(f"params: {len(params)} given for {len(prompts)} prompts. Give one for all or one for each")
    for i, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
        p.validate()
        if not len(prompt):
            raise ValueError(f"prompts[{i}] = []: the model needs a token to start from. Give at least one")
        total = len(prompt) + p.max_new_tokens
        if total > config.max_length:
            shorter, fewer = config.max_length - p.max_new_tokens, config.max_length - len(prompt)
            raise ValueError(
                f"prompts[{i}] has {len(prompt)} tokens, and with sampling.max_new_tokens = {p.max_new_tokens} that "
                f"makes {total}, more than model.max_length = {config.max_length}. "
                + (f"Shorten the prompt to {shorter} tokens or fewer" if shorter > 0 else "Request fewer new tokens")
                + (f", or set max_new_tokens to {fewer} or less" if fewer > 0 else "")
            )
        for name, ids in ((f"prompts[{i}]", prompt), ("sampling.stop_token_ids", p.stop_token_ids)):
            wrong = [t for t in ids if not 0 <= t < config.vocab_size]
            if wrong:
                raise ValueError(
                    f"{name} has token {wrong[0]}, outside the model's vocabulary, 0 to {config.vocab_size - 1}. Encode"
                    " with the tokenizer that the model was trained with"
                )


def bucket(size: int, steps: int = 1) -> int:
    """Return the smallest bucket that holds `size`. Between powers of two there are `steps` evenly spaced buckets."""
    power = max(SMALLEST_BUCKET, 1 << (size - 1).bit_length())
    grain = max(power // (2 * steps), SMALLEST_BUCKET)
    return -(-size // grain) * grain if steps > 1 else power


def start(model: Transformer, prompts, params: Sequence[SamplingParams]) -> tuple[Request, State]:
    """Pad checked requests to their buckets, prefill, and draw the first token of each row.

    Rows that are added to fill the batch bucket or the shards of a mesh hold one token and do not grow.
    """
    config, rules = model.config, model.rules
    lengths = [len(prompt) for prompt in prompts]
    limits = [n + p.max_new_tokens for n, p in zip(lengths, params, strict=True)]
    capacity = min(bucket(max(limits), steps=4), config.max_length)
    width = min(bucket(max(lengths)), capacity)
    rows = 1 << (len(prompts) - 1).bit_length()
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if no_mesh() else math.prod(mesh.shape[axis] for axis in rules.activations.batch)
    empty = -(-rows // shards) * shards - len(prompts)
    tokens_BS = np.zeros((len(prompts) + empty, capacity), np.int32)
    for b, prompt in enumerate(prompts):
        tokens_BS[b, : len(prompt)] = prompt
    stops = max(4, 1 << (max(len(p.stop_token_ids) for p in params) - 1).bit_length())
    stop_BE = [(*p.stop_token_ids, *(-1,) * (stops - len(p.stop_token_ids))) for p in params]
    request = Request(
        sampler_arrays([*params, *[SamplingParams(temperature=0.0)] * empty]),
        np.asarray(lengths + [1] * empty, np.int32),
        np.asarray(limits + [1] * empty, np.int32),
        np.asarray(stop_BE + [(-1,) * stops] * empty, np.int32),
    )
    request, tokens_BS = _put_rows((request, tokens_BS), rules)
    return request, prefill(model, request, tokens_BS, width)


@partial(jax.jit, static_argnames="width")
def prefill(model: Transformer, request: Request, tokens_BS: Int[Array, "B S"], width: int) -> State:
    """Run the prompts, in the first `width` positions, in one pass and append a token to each row that may grow."""
    B, S = tokens_BS.shape
    rules, prompt_B = model.rules, jnp.asarray(request.prompt_B)
    positions_P = jnp.arange(width, dtype=jnp.int32)
    valid_BP = positions_P < prompt_B[:, None]
    prefix_BP = valid_BP if model.config.attention.mask == "prefix" else None
    cache = init_cache(model, B, S)
    out = forward(model, tokens_BS[:, :width], valid_BT=valid_BP, prefix_BT=prefix_BP, cache=cache)
    last_BP = positions_P == prompt_B[:, None] - 1
    hidden_BTD = reshard(out.hidden_BTD, rules, "batch", None, None)
    hidden_BD = jnp.where(last_BP[..., None], hidden_BTD, 0).sum(1)  # exact, unlike a matmul on accelerators
    assert out.cache is not None
    # The cache contains keys of padding; the next tokens overwrite them before any query can attend to them.
    state = State(
        out.cache.at_length(prompt_B), tokens_BS, jnp.zeros_like(tokens_BS, jnp.float32), prompt_B, prompt_B < 0
    )
    return _append(model, request, state, hidden_BD)


@partial(jax.jit, donate_argnames="state")
def advance(model: Transformer, request: Request, state: State, steps: Int[Array, ""]) -> State:
    """Append up to `steps` tokens to every row that may grow; stop early if none may."""
    S = state.tokens_BS.shape[1]
    prefix_BS = None
    if model.config.attention.mask == "prefix":
        prefix_BS = jnp.arange(S, dtype=jnp.int32) < request.prompt_B[:, None]

    def step(carry):
        i, state = carry
        out = forward(model, newest(state)[0][:, None], prefix_BT=prefix_BS, cache=state.cache)
        assert out.cache is not None
        cache = out.cache.at_length(jnp.where(_may_grow(request, state), out.cache.length_B, state.cache.length_B))
        return i + 1, _append(model, request, state._replace(cache=cache), out.hidden_BTD[:, 0])

    def more(carry):
        i, state = carry
        return (i < steps) & _may_grow(request, state).any()

    return jax.lax.while_loop(more, step, (jnp.int32(0), state))[1]


@jax.jit
def newest(state: State) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Return the last token of each row and its log-probability, which is 0 for a prompt token."""
    here_BS = _position_mask(state.length_B - 1, state.tokens_BS.shape[1])
    return jnp.where(here_BS, state.tokens_BS, 0).sum(1), jnp.where(here_BS, state.logprobs_BS, 0.0).sum(1)


def _append(model: Transformer, request: Request, state: State, hidden_BD: Array) -> State:
    """Return the state with one more token in each row that may grow."""
    grows_B, S = _may_grow(request, state), state.tokens_BS.shape[1]
    logits_BV = logits(model, hidden_BD)
    token_B, logprob_B = choose(
        logits_BV, request.sampler, state.tokens_BS, jnp.asarray(request.prompt_B), state.length_B, model.rules
    )
    here_BS = _position_mask(jnp.where(grows_B, state.length_B, S), S)
    return State(
        state.cache,
        jnp.where(here_BS, token_B[:, None], state.tokens_BS),
        jnp.where(here_BS, logprob_B[:, None], state.logprobs_BS),
        state.length_B + grows_B,
        jnp.where(grows_B, (token_B[:, None] == request.stop_BE).any(1), state.stopped_B),
    )


def _may_grow(request: Request, state: State) -> Bool[Array, "B"]:
    return ~state.stopped_B & (state.length_B < request.limit_B)


def _position_mask(position_B: Array, S: int) -> Bool[Array, "B S"]:
    return jnp.arange(S, dtype=jnp.int32) == position_B[:, None]


def for_decoding(model: Transformer, *, donate: bool = False) -> Transformer:
    """Return the network in the form that decodes fastest: unstacked into single layers on CPUs, unchanged elsewhere.

    A scan over layers slices each layer's weights, which an accelerator reads in place but a CPU copies for every
    token. `donate`: free each stacked array as soon as it is split, so that the copy needs the memory of one array; the
    given network must not be used again.
    """
    if jax.default_backend() != "cpu" or all(repeats(unit) == 1 for unit in model.stacks):
        return model
    return _unstack_and_free(model) if donate else jax.jit(unstack)(model)


def _unstack_and_free(model: Transformer) -> Transformer:
    stacks = []
    for unit in model.stacks:
        layers = []
        for block in unit:
            leaves, treedef = jax.tree.flatten(block)
            parts = []
            for leaf in leaves:
                parts.append(jax.block_until_ready(_single_layers(leaf)))
                leaf.delete()
            layers.append([jax.tree.unflatten(treedef, slices) for slices in zip(*parts, strict=True)])
        stacks += [[layer] for repetition in zip(*layers, strict=True) for layer in repetition]
    return with_stacks(model, stacks)


@jax.jit
def _single_layers(leaf: Array) -> list[Array]:
    return [leaf[i : i + 1] for i in range(leaf.shape[0])]


def _put_rows(tree, rules: ShardingRules):
    """Put NumPy arrays [B, ...] on the device, with rows sharded like activations if a mesh is set."""
    if no_mesh():
        return jax.device_put(tree)
    mesh = jax.sharding.get_mesh()
    return jax.device_put(tree, NamedSharding(mesh, rules.spec("activations", ("batch",))))
