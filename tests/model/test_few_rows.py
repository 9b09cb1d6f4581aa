"""Products of a few rows with a large matrix equal float64 NumPy, and decoding with them equals decoding one row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.generate import generate
from decode.sampling import SamplingParams
from model import few_rows
from model.transformer import unstack
from tests.closeness import assert_close
from tests.models import random_model, tiny_config

LARGE = 512  # LARGE * LARGE entries are the fewest of a large matrix


def matrices(rows: int, inputs: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng([rows, inputs, columns])
    return tuple(draw.standard_normal(shape).astype(np.float32) for shape in ((rows, inputs), (inputs, columns)))


@pytest.mark.parametrize("rows", [2, 5, 8])
@pytest.mark.parametrize(("inputs", "columns"), [(96, 512), (90, 512), (96, 500)])
def test_products_equal_float64(rows, inputs, columns):
    x, w = matrices(rows, inputs, columns)
    expected, scale = x.astype(np.float64) @ w, np.abs(x).astype(np.float64) @ np.abs(w)
    assert_close(jax.jit(few_rows.multiply)(x, w), expected, 1e-6, scale=scale)
    assert_close(jax.jit(few_rows.multiply_transposed)(x, w.T), expected, 1e-6, scale=scale)


def test_gradients_equal_those_of_the_plain_product():
    x, w = matrices(3, 64, 256)
    for found, plain in (
        (few_rows.multiply, lambda x, w: x @ w),
        (lambda x, w: few_rows.multiply_transposed(x, w.T), lambda x, w: x @ w),
    ):
        loss = lambda f: jax.grad(lambda x, w: jnp.square(f(x, w)).sum(), argnums=(0, 1))
        for a, b in zip(loss(found)(x, w), loss(plain)(x, w), strict=True):
            assert_close(a, b, 1e-5)


def test_only_a_few_rows_of_a_large_float32_matrix_are_sliced():
    large = jnp.zeros((LARGE, LARGE))
    assert [rows for rows in range(1, 20) if few_rows.few_rows(rows, large)] == list(few_rows.ROWS)
    assert not few_rows.few_rows(4, large[1:])
    assert not few_rows.few_rows(4, large.astype(jnp.bfloat16))


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_a_batch_decode_like_one_row(tied, monkeypatch):
    """The batch uses slices for attention, MLP and head; one row does not."""
    config = tiny_config(embed_dim=64, vocab_size=256, tied_embeddings=tied, mlp=tiny_config().mlp)
    model = unstack(random_model(config))
    prompts = [[5, 9, 200], [7, 1, 3], [250, 2, 8]]
    params = SamplingParams(temperature=0.0, max_new_tokens=8)
    alone = [generate(model, [prompt], params)[0] for prompt in prompts]
    monkeypatch.setattr(few_rows, "LEAST_ENTRIES", 0)
    used = []
    for name in ("multiply", "multiply_transposed"):
        original = getattr(few_rows, name)
        wrapped = lambda x, w, f=original, n=name: (used.append(n), f(x, w))[1]
        monkeypatch.setattr(f"model.{'weights' if name == 'multiply' else 'transformer'}.{name}", wrapped)
    batch = generate(model, prompts, params)
    assert set(used) == ({"multiply", "multiply_transposed"} if tied else {"multiply"})
    for one, row in zip(alone, batch, strict=True):
        assert one.tokens == row.tokens
        np.testing.assert_allclose(row.logprobs, one.logprobs, atol=1e-5)
