"""Position encodings: RoPE and its scalings, ALiBi, sinusoids. Pure functions of positions.

Shapes: B batch, T time, N heads, H head dimension, R half of the rotated dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Array, Float, Int

from model.config import ModelConfig, RopeScalingConfig, rotary_dim


def inverse_frequencies(dim: int, theta: float, scaling: RopeScalingConfig | None) -> np.ndarray:
    """Return the radians per position of each rotated pair, float64 [dim / 2], for every scaling that is fixed in
    advance.

    linear: Chen et al. 2023; ntk: bloc97 2023; yarn: Peng et al. 2023, sec. 3.2; llama3: the Llama 3.1 release.
    'dynamic_ntk' depends on the current length, so this function returns the unscaled frequencies for it.
    """
    exponents = np.arange(0, dim, 2, dtype=np.float64) / dim
    plain = theta**-exponents
    if scaling is None or scaling.kind == "dynamic_ntk":
        return plain
    s = scaling
    if s.kind == "linear":
        return plain / s.factor
    if s.kind == "ntk":
        return (theta * s.factor ** (dim / (dim - 2))) ** -exponents
    if s.kind == "yarn":

        def pair_with(rotations: float) -> float:
            return dim * math.log(s.original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

        low, high = pair_with(s.fast), pair_with(s.beta_slow)
        if s.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        # If the original length is below 2 pi beta_slow, clipping puts `high` below `low`. transformers then divides by
        # the negative difference, which leaves every frequency unchanged. Published weights expect this, so do the
        # same.
        width = high - low if high != low else 0.001
        ramp = np.clip((np.arange(dim // 2) - low) / width, 0, 1)
        return plain / s.factor * ramp + plain * (1 - ramp)
    wavelength = 2 * math.pi / plain
    smooth = (s.original_length / wavelength - s.beta_slow) / (s.fast - s.beta_slow)
    smooth = np.clip(smooth, 0, 1)
    return (1 - smooth) * plain / s.factor + smooth * plain


def rope_tables(
    config: ModelConfig, positions_BT: Int[Array, "B T"], length_B: Int[Array, "B"] | None = None, local: bool = False
) -> tuple[Float[Array, "B T R"], Float[Array, "B T R"]]:
    """Return cosines and sines, float32 [B, T, R], of the angles at `positions_BT`.

    `length_B`: current context length, which 'dynamic_ntk' scales by and other scalings ignore. `local`: whether the
    layer has a sliding window. If `config.position.local_theta` is set, such a layer uses it as its base and is not
    scaled.
    """
    dim, theta, scaling = rotary_dim(config), config.position.theta, config.position.scaling
    if local and config.position.local_theta is not None:
        theta, scaling = config.position.local_theta, None
    factor = 1.0
    if scaling is not None and scaling.kind == "dynamic_ntk":
        assert length_B is not None, "dynamic_ntk needs the length of the context"
        stretch = scaling.factor * length_B / scaling.original_length - (scaling.factor - 1)
        base_B = theta * jnp.maximum(stretch, 1.0) ** (dim / (dim - 2))
        frequencies = base_B[:, None] ** -(jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
        angles_BTR = positions_BT[..., None].astype(jnp.float32) * frequencies[:, None, :]
    else:
        frequencies = jnp.asarray(inverse_frequencies(dim, theta, scaling), jnp.float32)
        angles_BTR = positions_BT[..., None].astype(jnp.float32) * frequencies
        if scaling is not None and scaling.kind == "yarn":
            factor = scaling.attention_factor or 0.1 * math.log(max(scaling.factor, 1.0)) + 1.0
    return jnp.cos(angles_BTR) * factor, jnp.sin(angles_BTR) * factor


def rotate(
    x_BTNH: Float[Array, "B T N H"], cos_BTR: Float[Array, "B T R"], sin_BTR: Float[Array, "B T R"], interleaved: bool
) -> Float[Array, "B T N H"]:
    """Apply RoPE (Su et al. 2021) to the first 2R dimensions of each head, as pairs (i, i+R), or (2i, 2i+1) if
    interleaved."""
    half = cos_BTR.shape[-1]
    cos, sin = cos_BTR[:, :, None, :], sin_BTR[:, :, None, :]
    x, rest = x_BTNH[..., : 2 * half].astype(jnp.float32), x_BTNH[..., 2 * half :]
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        out = jnp.stack((a * cos - b * sin, b * cos + a * sin), axis=-1).reshape(x.shape)
    else:
        a, b = x[..., :half], x[..., half:]
        out = jnp.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1)
    return jnp.concatenate((out.astype(x_BTNH.dtype), rest), axis=-1)


def check_length(config: ModelConfig, published: int) -> str | None:
    """Return a notice if `config.max_length` exceeds the positions that the weights support, else None. `published`:
    number of positions that the weights were published for.

    Dynamic scaling and ALiBi support any length, other scalings up to factor times their original length. Raises
    ValueError if the positions are a learned table of another length.
    """
    kind, scaling, length = config.position.kind, config.position.scaling, config.max_length
    if kind == "learned" and length != published:
        raise ValueError(
            f"model.max_length = {length}: the weights hold a learned table of {published} positions. Try {published}"
        )
    if kind == "alibi" or (scaling is not None and scaling.kind == "dynamic_ntk"):
        return None
    reach = published if scaling is None else max(published, int(scaling.factor * scaling.original_length))
    if length <= reach:
        return None
    return (
        f"model.max_length = {length}: the weights were published for {reach} positions, and no scaling of the "
        f"positions covers more: expect worse text past position {reach}"
    )


def alibi_slopes(num_heads: int) -> np.ndarray:
    """Return the slopes of ALiBi, float32 [N] (Press et al. 2022, sec. 3), with its rule for head counts that are not
    powers of 2."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return np.asarray(slopes, np.float32)


def sinusoids(positions_BT: Int[Array, "B T"], width: int) -> Float[Array, "B T D"]:
    """Return float32 [B, T, D] with sines in the first half and cosines in the second (Vaswani et al. 2017, sec.
    3.5)."""
    frequencies = 10_000.0 ** -(jnp.arange(width // 2, dtype=jnp.float32) / (width // 2))
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate((jnp.sin(angles), jnp.cos(angles)), axis=-1)


def apply_rope(
    config: ModelConfig,
    kind: str,
    x_BTNH: Float[Array, "B T N H"],
    positions_BT: Int[Array, "B T"],
    length_B: Int[Array, "B"] | None,
) -> Float[Array, "B T N H"]:
    """Apply RoPE to the first `rotary_dim` dimensions of each head, as a layer of kind `kind` does. Return the heads
    unchanged if the model has no RoPE."""
    if config.position.kind != "rope":
        return x_BTNH
    tables = partial(rope_tables, config, local=kind == "sliding")
    cos_BTR, sin_BTR = compute_once(tables)(positions_BT, length_B)
    return rotate(x_BTNH, cos_BTR, sin_BTR, config.position.interleaved)


def compute_once(function: Callable) -> Callable:
    """Return `function` such that XLA computes its result once, rather than again in each fusion that reads it.

    XLA's CPU backend drops an optimization barrier before it fuses, but does not fuse with a call that it may not
    inline. Without this, each head's rotation computes the sines again, which takes most of its time.
    """

    def once(*args):
        with set_xla_metadata(inlineable="false"):
            return jax.lax.optimization_barrier(jax.jit(function)(*args))

    return once
