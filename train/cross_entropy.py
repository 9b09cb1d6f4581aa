"""Cross-entropy from hidden states and head, without storing all logits of a large vocabulary at once.

Only the logits of one chunk of the vocabulary exist at a time. The forward pass keeps a running log-sum-exp over the
chunks (Milakov and Gimelshein 2018, online softmax). The backward pass recomputes each chunk's logits, which costs one
more matmul with the head, and writes each chunk of the head's gradient once (as in Wijmans et al. 2024, Cut Your
Losses, sec. 4). A vocabulary that fits into one chunk keeps its logits for the backward pass instead.

On a mesh, the vocabulary may be sharded over devices. Each device then processes its own slice, and the devices
exchange three numbers per token.

Shapes: B batch, T time, N tokens, D width, V vocabulary, C ids of a chunk.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from sharding.manual import vary, varying_axes
from sharding.rules import no_mesh

WHOLE_IDS = 32768  # a vocabulary, or a device's slice of it, of up to this size is one chunk
CHUNK_IDS = 8192  # of a larger one: enough for a matmul at full rate, small next to the activations of a layer


def cross_entropy(
    hidden_BTD: Float[Array, "*B D"],
    head: Float[Array, "D V"] | Float[Array, "V D"],
    targets_BT: Int[Array | np.ndarray, "*B"],
    *,
    vocab_axis: int = 1,
    softcap: float | None = None,
    chunk: int | None = None,
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """Return the negative log-likelihood of each target and the log of each softmax's denominator, in nats, float32.

    z-loss squares the latter. Hidden states [..., D] and the head have the dtype of the matmuls, which accumulate in
    float32; targets are int32 [...] in [0, V). `vocab_axis`: the dimension of the head that has size V; 0 for a matrix
    that is also the embedding, so that it need not be transposed. `softcap`: cap in cap * tanh(logits / cap). `chunk`:
    number of ids whose logits exist at once on a device; None: all of up to WHOLE_IDS, otherwise CHUNK_IDS.

    Both results have first-order, reverse-mode gradients with respect to the hidden states and the head. On a mesh with
    explicit axes, the head may be sharded over V and `hidden_BTD` over every dimension but D, on different mesh axes.
    The results are sharded like the tokens, and each gradient like its primal. Raises ValueError if chunk < 1 or the
    shapes disagree.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk = {chunk}: must be at least one id of the vocabulary, or None")
    if hidden_BTD.shape != (*targets_BT.shape, head.shape[1 - vocab_axis]):
        raise ValueError(
            f"hidden states {hidden_BTD.shape}, targets {targets_BT.shape}, head {head.shape} with vocab_axis = "
            f"{vocab_axis}: must have shapes [..., D], [...] and, for the head, D and V"
        )
    local = partial(_tokens, vocab_axis=vocab_axis, softcap=softcap, chunk=chunk)
    if no_mesh():
        return local(hidden_BTD, head, targets_BT, vocab_axes=())
    rows = P(*jax.typeof(hidden_BTD).sharding.spec[: targets_BT.ndim])
    vocab_part = jax.typeof(head).sharding.spec[vocab_axis]
    vocab_axes = vocab_part if isinstance(vocab_part, tuple) else (vocab_part,) if vocab_part else ()
    shared = {axis for part in rows for axis in (part if isinstance(part, tuple) else (part,))} & set(vocab_axes)
    if shared:
        raise ValueError(
            f"mesh axis {shared.pop()!r} shards both the tokens and the vocabulary: shard one of them over another axis"
        )
    specs = P(*rows, None), P(None, vocab_part) if vocab_axis else P(vocab_part, None), rows
    on_devices = jax.shard_map(partial(local, vocab_axes=vocab_axes), in_specs=specs, out_specs=(rows, rows))
    return on_devices(
        *(jax.sharding.reshard(x, spec) for x, spec in zip((hidden_BTD, head, targets_BT), specs, strict=True))
    )


def _tokens(
    hidden_BTD,
    head,
    targets_BT,
    *,
    vocab_axes: tuple[str, ...],
    vocab_axis: int,
    softcap: float | None,
    chunk: int | None,
):
    """Return `cross_entropy` of one device's tokens, with the vocabulary sharded over `vocab_axes` of the mesh."""
    V = head.shape[vocab_axis]
    first = jax.lax.axis_index(vocab_axes) * V if vocab_axes else 0
    # Declared before use, so that gradients are summed over the devices that hold other tokens or other ids.
    axes = varying_axes(hidden_BTD) | varying_axes(head) | varying_axes(targets_BT)
    hidden_ND = vary(hidden_BTD, axes).reshape(-1, hidden_BTD.shape[-1])
    targets_N = vary(targets_BT - first, axes).reshape(-1)
    size = chunk if chunk is not None else V if V <= WHOLE_IDS else CHUNK_IDS
    log_total_N, target_N = _slice(hidden_ND, vary(head, axes), targets_N, vocab_axis, softcap, min(size, V))
    if vocab_axes:
        top_N = jax.lax.pmax(jax.lax.stop_gradient(log_total_N), vocab_axes)
        total_N, target_N = jax.lax.psum((jnp.exp(log_total_N - top_N), target_N), vocab_axes)
        log_total_N = top_N + jnp.log(total_N)
    return (log_total_N - target_N).reshape(targets_BT.shape), log_total_N.reshape(targets_BT.shape)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _slice(hidden_ND, head, targets_N, vocab_axis: int, softcap: float | None, chunk: int):
    """Return (logsumexp of the logits, logit of the target, or 0 if it is not one of these V ids), float32 [N]."""
    return _slice_forward(hidden_ND, head, targets_N, vocab_axis, softcap, chunk)[0]


def _slice_forward(hidden_ND, head, targets_N, vocab_axis, softcap, chunk):
    def add(start, size: int, carry):
        top_N, total_N, target_N = carry
        logits_NC = _logits(hidden_ND, _ids(head, start, size, vocab_axis), vocab_axis, softcap)
        new_top_N = jnp.maximum(top_N, logits_NC.max(-1))
        weights_NC = jnp.exp(logits_NC - new_top_N[:, None])
        total_N = total_N * jnp.exp(top_N - new_top_N) + weights_NC.sum(-1)
        carry = new_top_N, total_N, target_N + _target_logits(logits_NC, targets_N - start)
        return carry, (logits_NC, weights_NC)

    N, V = targets_N.shape[0], head.shape[vocab_axis]
    zeros_N = vary(jnp.zeros(N, jnp.float32), varying_axes(hidden_ND))
    carry, stored = (zeros_N - jnp.inf, zeros_N, zeros_N), None
    if chunk == V:
        carry, stored = add(0, V, carry)
    else:
        carry = _over_chunks(lambda start, size, carry: add(start, size, carry)[0], V, chunk, carry)
    top_N, total_N, target_N = carry
    log_total_N = top_N + jnp.log(total_N)
    return (log_total_N, target_N), (hidden_ND, head, targets_N, log_total_N, top_N, stored)


def _slice_backward(vocab_axis, softcap, chunk, saved, cotangents):
    hidden_ND, head, targets_N, log_total_N, top_N, stored = saved
    dlog_total_N, dtarget_N = cotangents
    V, letters = head.shape[vocab_axis], _letters(vocab_axis)

    def probabilities(logits_NC, _):
        return jnp.exp(logits_NC - log_total_N[:, None])

    def gradients(start, head_part, logits_NC, probabilities_NC):
        is_target_NC = (targets_N - start)[:, None] == jnp.arange(logits_NC.shape[1])
        dlogits_NC = probabilities_NC * dlog_total_N[:, None] + jnp.where(is_target_NC, dtarget_N[:, None], 0.0)
        if softcap is not None:
            dlogits_NC = dlogits_NC * (1.0 - jnp.square(logits_NC / softcap))
        dlogits_NC = dlogits_NC.astype(hidden_ND.dtype)
        dhidden_ND = jnp.einsum(f"nc,{letters}->nd", dlogits_NC, head_part, preferred_element_type=jnp.float32)
        return dhidden_ND, _head_gradient(hidden_ND, dlogits_NC, vocab_axis).astype(head.dtype)

    def add(start, size: int, carry):
        dhidden_ND, dhead = carry
        head_part = _ids(head, start, size, vocab_axis)
        logits_NC = _logits(hidden_ND, head_part, vocab_axis, softcap)
        more_ND, dhead_part = gradients(start, head_part, logits_NC, probabilities(logits_NC, None))
        return dhidden_ND + more_ND, jax.lax.dynamic_update_slice_in_dim(dhead, dhead_part, start, vocab_axis)

    if stored is not None:
        # Values that the backward pass does not use are not stored. CPUs keep the exponentials, which cost them more
        # to compute than to store; other devices recompute them.
        scaled = lambda _, weights_NV: weights_NV * jnp.exp(top_N - log_total_N)[:, None]
        probabilities_NV = jax.lax.platform_dependent(*stored, cpu=scaled, default=probabilities)
        dhidden_ND, dhead = gradients(0, head, stored[0], probabilities_NV)
    else:
        zeros = jnp.zeros(hidden_ND.shape, jnp.float32), jnp.zeros(head.shape, head.dtype)
        carry = tuple(vary(x, varying_axes(hidden_ND)) for x in zeros)
        dhidden_ND, dhead = _over_chunks(add, V, chunk, carry)
    return dhidden_ND.astype(hidden_ND.dtype), dhead, None


_slice.defvjp(_slice_forward, _slice_backward)


def _over_chunks(add, V: int, chunk: int, carry):
    """Run `add(start, size, carry)` over the full chunks in a loop, and then over the smaller remainder, if any."""
    carry = jax.lax.fori_loop(0, V // chunk, lambda i, carry: add(i * chunk, chunk, carry), carry)
    return add(V - V % chunk, V % chunk, carry) if V % chunk else carry


def _letters(vocab_axis: int) -> str:
    return "dc" if vocab_axis else "cd"


def _ids(head, start, size: int, vocab_axis: int) -> Array:
    """Return the part of the head for `size` ids from `start`."""
    return head if size == head.shape[vocab_axis] else jax.lax.dynamic_slice_in_dim(head, start, size, vocab_axis)


def _logits(hidden_ND, head_part, vocab_axis: int, softcap: float | None) -> Array:
    logits_NC = jnp.einsum(f"nd,{_letters(vocab_axis)}->nc", hidden_ND, head_part, preferred_element_type=jnp.float32)
    return logits_NC if softcap is None else softcap * jnp.tanh(logits_NC / softcap)


def _head_gradient(hidden_ND, dlogits_NC, vocab_axis: int) -> Array:
    def transposed_first(hidden_ND, dlogits_NC):
        # XLA's CPU matmul is slow where it contracts first dimensions (29 of 61 GFLOP/s), and slower still where the
        # result is tall. The barriers keep XLA from folding the transposes back into the matmul.
        hidden_DN = jax.lax.optimization_barrier(hidden_ND.T)
        dhead_DC = jnp.matmul(hidden_DN, dlogits_NC, preferred_element_type=jnp.float32)
        return dhead_DC if vocab_axis else jax.lax.optimization_barrier(dhead_DC).T

    def direct(hidden_ND, dlogits_NC):
        equation = f"nd,nc->{_letters(vocab_axis)}"
        return jnp.einsum(equation, hidden_ND, dlogits_NC, preferred_element_type=jnp.float32)

    return jax.lax.platform_dependent(hidden_ND, dlogits_NC, cpu=transposed_first, default=direct)


def _target_logits(logits_NC, ids_N) -> Array:
    """Return the logits of the ids, and 0 for ids outside the chunk."""
    C = logits_NC.shape[1]

    def gathered(logits_NC, ids_N):  # saves a pass over the logits
        picked_N = jnp.take_along_axis(logits_NC, jnp.clip(ids_N, 0, C - 1)[:, None], axis=1)[:, 0]
        return jnp.where((ids_N >= 0) & (ids_N < C), picked_N, 0.0)

    def summed(logits_NC, ids_N):  # fuses with the sum of exponentials
        return jnp.where(ids_N[:, None] == jnp.arange(C), logits_NC, 0.0).sum(-1)

    return jax.lax.platform_dependent(logits_NC, ids_N, cpu=gathered, default=summed)
