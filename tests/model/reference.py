"""A reference Transformer in float64 NumPy, one row and one layer at a time, written from the papers.

It shares only the configuration with `model/`. Weights are a flat dict; those of a layer have names like
`layers.3.attention.q`.

Shapes: T time, S keys, D width, N query heads, K key/value heads, H head dimension, E experts, C choices, F hidden
width.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from model.config import (
    AttentionConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    PositionConfig,
    RopeScalingConfig,
)
from model.transformer import Transformer
from tests.models import weight_names

Weights = dict[str, np.ndarray]


@dataclasses.dataclass
class Stats:
    """A router's losses and load, with the names of RouterStats."""

    load_balance: float
    z: float
    load_E: np.ndarray
    entropy: float


def flat_weights(model: Transformer) -> Weights:
    """Return float64 weights by name. Layers are numbered in the order in which they run, independent of stacking."""
    flat: Weights = {}
    arrays = [(name.split("."), np.asarray(x, np.float64)) for name, x in weight_names(model)]
    first = 0
    for stack in range(len(model.stacks)):
        units = len(model.stacks[stack])
        stacked = [(path, x) for path, x in arrays if path[:2] == ["stacks", str(stack)]]
        repeats = len(stacked[0][1])
        for path, x in stacked:
            for r in range(repeats):
                flat[".".join(["layers", str(first + r * units + int(path[2])), *path[3:]])] = x[r]
        first += repeats * units
    return flat | {".".join(path): x for path, x in arrays if path[0] != "stacks"}


def part(w: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): x for name, x in w.items() if name.startswith(prefix)}


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def norm(x: np.ndarray, w: Weights, c: NormConfig, axes: int = 1) -> np.ndarray:
    """RMSNorm: x / sqrt(mean x^2 + eps). LayerNorm: the same for x - mean. Then times scale (or 1 + scale), plus
    bias."""
    dims = tuple(range(x.ndim - axes, x.ndim))
    if c.kind == "layernorm":
        x = x - x.mean(dims, keepdims=True)
    y = x / np.sqrt((x**2).mean(dims, keepdims=True) + c.epsilon)
    y = y * (1 + w["scale"] if c.unit_offset else w["scale"])
    return y + w["bias"] if c.bias else y


def rope_frequencies(dim: int, theta: float, s: RopeScalingConfig | None, length: int) -> np.ndarray:
    """Return the radians per position of each of dim / 2 pairs, for a context of `length` positions."""
    if s is not None and s.kind == "ntk":
        theta *= s.factor ** (dim / (dim - 2))
    if s is not None and s.kind == "dynamic_ntk" and length > s.original_length:
        theta *= (s.factor * length / s.original_length - (s.factor - 1)) ** (dim / (dim - 2))
    f = np.array([theta ** (-2 * i / dim) for i in range(dim // 2)])
    if s is None or s.kind in ("ntk", "dynamic_ntk"):
        return f
    if s.kind == "linear":
        return f / s.factor
    if s.kind == "llama3":
        out = []
        for x in f:
            rotations = s.original_length * x / (2 * math.pi)
            keep = min(max((rotations - s.beta_slow) / (s.fast - s.beta_slow), 0), 1)
            out.append(keep * x + (1 - keep) * x / s.factor)
        return np.array(out)
    # yarn: the dimension at which `rotations` rotations fit into the original length, rounded outward
    low, high = (
        dim * math.log(s.original_length / (2 * math.pi * rotations)) / (2 * math.log(theta))
        for rotations in (s.fast, s.beta_slow)
    )
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    interpolate = np.clip((np.arange(dim // 2) - low) / (high - low or 0.001), 0, 1)
    return f / s.factor * interpolate + f * (1 - interpolate)


def rope(x_TNH: np.ndarray, positions_T: np.ndarray, p: PositionConfig, theta: float) -> np.ndarray:
    dim = int(x_TNH.shape[-1] * p.rotary_fraction)
    s = p.scaling
    angle = positions_T[:, None] * rope_frequencies(dim, theta, s, int(positions_T.max()) + 1)
    stretch = 1.0
    if s is not None and s.kind == "yarn":
        stretch = 0.1 * math.log(s.factor) + 1 if s.attention_factor is None else s.attention_factor
    rotation = stretch * np.exp(1j * angle)[:, None]
    first, second = (slice(0, dim, 2), slice(1, dim, 2)) if p.interleaved else (slice(dim // 2), slice(dim // 2, dim))
    z = (x_TNH[..., first] + 1j * x_TNH[..., second]) * rotation
    out = x_TNH.copy()
    out[..., first], out[..., second] = z.real, z.imag
    return out


def slopes(heads: int) -> list[float]:
    """ALiBi: the powers of 2^(-8/n). For n off the powers of two: those of the power of two below, completed with every
    other slope of twice that power."""
    below = 2 ** math.floor(math.log2(heads))
    first = [2.0 ** (-8 * (i + 1) / below) for i in range(below)]
    return first + [2.0 ** (-8 * (i + 1) / (2 * below)) for i in range(0, 2 * below, 2)][: heads - below]


def sees(a: AttentionConfig, layer: str, q: int, k: int, segments, prefix) -> bool:
    """Return whether the key at index k is visible to the query at index q."""
    if segments is not None and segments[q] != segments[k]:
        return False
    if a.mask == "causal" and k > q:
        return False
    if a.mask == "prefix" and k > q and not prefix[k]:
        return False
    if layer == "sliding":
        return abs(q - k) < a.window
    if layer == "block_sparse":
        size, local, stride = a.blocks
        return abs(q // size - k // size) < local or k // size % stride == stride - 1
    return True


def latent_qkv(x_TD, w: Weights, c: ModelConfig, positions_T, theta: float) -> tuple[np.ndarray, ...]:
    """DeepSeek-V2, eq. 37 to 47, with biases on the down projections and RMSNorms of epsilon 1e-6 as in the published
    code."""
    latent, N = c.attention.latent, c.attention.num_heads
    plain, small = c.attention.head_dim - latent.rope_dim, dataclasses.replace(c.norm, epsilon=1e-6)
    down = {"kv": x_TD @ w["kv_down"], "q": x_TD if latent.q_rank is None else x_TD @ w["q_down"]}
    if c.attention.bias != "none":
        down = {name: y + w.get(f"{name}_down_bias", 0.0) for name, y in down.items()}
    if latent.q_rank is not None:
        down["q"] = norm(down["q"], part(w, "q_down_norm."), small)
    q = np.einsum("tc,cnh->tnh", down["q"], w["q"])
    latent_TR = norm(down["kv"][:, : latent.kv_rank], part(w, "kv_down_norm."), small)
    shared_T1P = rope(down["kv"][:, None, latent.kv_rank :], positions_T, c.position, theta)
    k_up = np.einsum("tr,rnh->tnh", latent_TR, w["k_up"])
    k = np.concatenate([k_up, np.repeat(shared_T1P, N, axis=1)], -1)
    q = np.concatenate([q[..., :plain], rope(q[..., plain:], positions_T, c.position, theta)], -1)
    return q, k, np.einsum("tr,rnv->tnv", latent_TR, w["v_up"])


def heads_qkv(x_TD, w: Weights, c: ModelConfig, positions_T, theta: float) -> tuple[np.ndarray, ...]:
    a, p = c.attention, c.position
    qkv = []
    for name in ("q", "k", "v"):
        y = np.einsum("td,dnh->tnh", x_TD, w[name])
        qkv.append(y + w[f"{name}_bias"] if a.bias != "none" else y)
    q, k, v = qkv
    if a.qk_norm != "none":
        axes = 1 if a.qk_norm == "head" else 2
        q, k = norm(q, part(w, "q_norm."), c.norm, axes), norm(k, part(w, "k_norm."), c.norm, axes)
    if p.kind == "rope":
        q, k = rope(q, positions_T, p, theta), rope(k, positions_T, p, theta)
    return q, k, v


def attention(x_TD, w: Weights, c: ModelConfig, layer: str, positions_T, segments, prefix) -> np.ndarray:
    a, p, T = c.attention, c.position, len(x_TD)
    theta = p.theta if layer != "sliding" or p.local_theta is None else p.local_theta
    q, k, v = (heads_qkv if a.latent is None else latent_qkv)(x_TD, w, c, positions_T, theta)
    scale = a.head_dim**-0.5 if a.query_scale is None else a.query_scale
    mask = np.array([[sees(a, layer, i, j, segments, prefix) for j in range(T)] for i in range(T)])
    out_TNH = np.zeros((T, a.num_heads, v.shape[-1]))
    for n in range(a.num_heads):
        kv = n // (a.num_heads // a.num_kv_heads)
        score = q[:, n] @ k[:, kv].T * scale
        if a.softcap is not None:
            score = a.softcap * np.tanh(score / a.softcap)
        if p.kind == "alibi":
            score -= slopes(a.num_heads)[n] * np.abs(positions_T[:, None] - positions_T)
        score = np.where(mask, score, -np.inf)
        if a.sinks:
            score = np.concatenate([score, np.full((T, 1), w["sinks"][n])], 1)
        out_TNH[:, n] = softmax(score)[:, :T] @ v[:, kv]
    y = np.einsum("tnh,nhd->td", out_TNH, w["out"])
    return y + w["out_bias"] if a.bias == "all" else y


def feed_forward(x_TD, up_DGF, down_FD, kind: str, up_bias=0.0, down_bias=0.0) -> np.ndarray:
    h = np.einsum("td,dgf->tgf", x_TD, up_DGF) + up_bias
    act = {
        "gelu": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "relu": lambda x: np.maximum(x, 0),
        "relu2": lambda x: np.maximum(x, 0) ** 2,
        "silu": lambda x: x / (1 + np.exp(-x)),
        "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
        "identity": lambda x: x,
    }
    gated = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu", "glu": "sigmoid", "bilinear": "identity"}
    h_TF = act[gated[kind]](h[:, 0]) * h[:, 1] if kind in gated else act[kind](h[:, 0])
    return h_TF @ down_FD + down_bias


def moe(x_TD, w: Weights, m: MoEConfig, mlp: MLPConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (output [T, D], router logits [T, E], one-hot choices [T, E])."""
    scores_TE = x_TD @ w["router"]
    p_TE = softmax(scores_TE)
    y, chosen_TE = np.zeros_like(x_TD), np.zeros_like(p_TE)
    for t, p in enumerate(p_TE):
        top = np.argsort(-p)[: m.top_k]
        chosen_TE[t, top] = 1
        for e in top:
            weight = p[e] / p[top].sum() if m.weights == "renormalized" else p[e]
            y[t] += weight * feed_forward(x_TD[t : t + 1], w["up"][e], w["down"][e], mlp.kind)[0]
    return y, scores_TE, chosen_TE


def router_stats(scores_BTE, chosen_BTE, valid_BT, m: MoEConfig) -> Stats:
    p_BTE = softmax(scores_BTE)

    def share(x_BTE, rows):
        return x_BTE[rows][valid_BT[rows]].mean(0)

    groups = [slice(None)] if m.balance_scope == "batch" else [slice(b, b + 1) for b in range(len(valid_BT))]
    balance = [m.num_experts * (share(chosen_BTE, g) / m.top_k * share(p_BTE, g)).sum() for g in groups]
    z = np.log(np.exp(scores_BTE).sum(-1)) ** 2
    entropy = -(p_BTE * np.log(p_BTE)).sum(-1)
    load = share(chosen_BTE, slice(None)) / m.top_k
    tokens = [valid_BT[g].sum() for g in groups]
    return Stats(
        float(np.average(balance, weights=tokens)), float(z[valid_BT].mean()), load, float(entropy[valid_BT].mean())
    )


def transformer(
    w: Weights, c: ModelConfig, tokens_BT, *, positions_BT=None, segment_ids_BT=None, prefix_BT=None
) -> tuple[np.ndarray, list[Stats]]:
    """Return (float64 logits [B, T, V], the statistics of each MoE layer)."""
    B, T = tokens_BT.shape
    positions_BT = np.tile(np.arange(T), (B, 1)) if positions_BT is None else positions_BT
    valid_BT = np.ones((B, T), bool) if segment_ids_BT is None else segment_ids_BT > 0
    x = w["embedding"][tokens_BT] * (1.0 if c.embedding_scale is None else c.embedding_scale)
    if c.position.kind == "learned":
        x = x + w["positions"][positions_BT]
    if c.position.kind == "sinusoidal":
        angle = positions_BT[..., None] * 10_000.0 ** (-2 * np.arange(c.embed_dim // 2) / c.embed_dim)
        x = x + np.concatenate([np.sin(angle), np.cos(angle)], -1)
    stats, placement = [], c.norm.placement

    def residual(x, layer: Weights, name: str, f):
        h = x if placement == "post" else norm(x, part(layer, f"{name}_norm."), c.norm)
        y = np.stack([f(row, b) for b, row in enumerate(h)])
        return x + (y if placement == "pre" else norm(y, part(layer, f"{name}_post_norm."), c.norm))

    for i in range(c.num_layers):
        layer, kind = part(w, f"layers.{i}."), c.attention.layers[i % len(c.attention.layers)]
        attend, mlp, routed = part(layer, "attention."), part(layer, "mlp."), []

        def attention_row(row, b, attend=attend, kind=kind):
            segments = None if segment_ids_BT is None else segment_ids_BT[b]
            prefix = None if prefix_BT is None else prefix_BT[b]
            return attention(row, attend, c, kind, positions_BT[b], segments, prefix)

        def mlp_row(row, b, mlp=mlp, i=i, routed=routed):
            if c.moe is not None and c.moe.layers[i % len(c.moe.layers)] == "moe":
                y, *route = moe(row, mlp, c.moe, c.mlp)
                routed.append(route)
                return y
            biases = (mlp["up_bias"], mlp["down_bias"]) if c.mlp.bias else ()
            return feed_forward(row, mlp["up"], mlp["down"], c.mlp.kind, *biases)

        x = residual(residual(x, layer, "attention", attention_row), layer, "mlp", mlp_row)
        if routed:
            stats.append(router_stats(*(np.stack(a) for a in zip(*routed, strict=True)), valid_BT, c.moe))
    x = norm(x, part(w, "final_norm."), c.norm)
    head = w["embedding"].T if c.tied_embeddings else w["head"]
    out = x @ head * (1.0 if c.mup_base_dim is None else c.mup_base_dim / c.embed_dim)
    return out if c.final_softcap is None else c.final_softcap * np.tanh(out / c.final_softcap), stats
