"""The Hopper kernels, run by jax's Mosaic GPU interpreter against the reference and lowered for CUDA. No GPU is needed.

The interpreter takes seconds per block of the grid, so the default cases combine many features in few blocks.
"""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.flash_attention import FULL, Mask, Strided, Tiles, flash_attention, hopper_parts
from pallas_kernels.flash_attention.hopper_forward import plan
from pallas_kernels.flash_attention.shapes import CASES, Case

# Relative to the largest entry; weights and gradients of logits are rounded to 16 bits before their products.
FORWARD = {"bfloat16": 6e-3, "float16": 1e-3}
BACKWARD = {"bfloat16": 1e-2, "float16": 1.5e-3}
LSE = 2e-6

RUNNABLE = [
    replace(case, dtype="bfloat16" if case.dtype == "float32" else case.dtype)
    for case in CASES
    if not case.bias and case.H % 64 == 0 and case.V % 64 == 0
]
SMALL = Case("small", T=100, S=180, N=2, K=1, V=128, dtype="bfloat16", mask=Mask(window=110), offset=70, segments=3,
             alibi=True, softcap=5.0, sinks=True, dropout=0.1)  # fmt: skip
# PLAIN has 64 keys in the last tile, FULL, PARTIAL and EMPTY tiles, queries that see no key, and a static mask whose
# offset is data.
PLAIN = Case("plain", B=1, T=192, S=320, N=1, K=1, dtype="float16", offset=(-40,))
SPARSE = Case("sparse", T=256, S=256, N=1, K=1, dtype="bfloat16", segments=2, positions=True, prefix=20, blocks=0.6,
              mask=Mask(strided=Strided(16, 2, 4), block_shape=(128, 128)))  # fmt: skip


@pytest.fixture(autouse=True)
def clean_interpreter():
    """Clear the interpreter's memory, which a failed kernel would leave to the next one."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    yield
    interpret_pallas_call.reset_gpu_interpret_mode_state()


def arrays(case, seed=0):
    """Return q, k, v in the case's dtype, and its other arguments, as JAX arrays."""
    (q, k, v), kwargs = case.arguments(seed)
    as_jax = lambda x: jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, x)
    return tuple(jnp.asarray(x, case.dtype) for x in (q, k, v)), {name: as_jax(x) for name, x in kwargs.items()}


def run(case, implementation, gradient, tiles=None, seed=0):
    """Return {out, lse} and, with `gradient`, their gradients {q, k, v, sinks_N} in float32. Both `out` and `lse` have
    a cotangent. The reference runs in float32 on the same 16-bit inputs."""
    (q, k, v), kwargs = arrays(case, seed)
    if implementation == "reference":
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    r = np.random.default_rng(seed + 1)
    # The cotangent has 16 bits, so that its rounding does not count as an error.
    dout = jnp.asarray(r.normal(size=(*q.shape[:3], v.shape[3])), case.dtype).astype(jnp.float32)
    dlse = jnp.asarray(r.normal(size=(q.shape[0], q.shape[2], q.shape[1])), jnp.float32)
    inputs = {"q": q, "k": k, "v": v} | {name: kwargs.pop(name) for name in ("sinks_N",) if name in kwargs}

    def call(inputs):
        sinks = {name: x for name, x in inputs.items() if name not in "qkv"}
        return flash_attention(
            inputs["q"], inputs["k"], inputs["v"], **sinks, **kwargs, tiles=tiles or Tiles(), return_lse=True,
            implementation=implementation, interpret=implementation == "hopper",
        )  # fmt: skip

    def loss(inputs):
        out, lse = call(inputs)
        total = (out.astype(jnp.float32) * dout).sum() + jnp.where(lse > -1e29, lse * dlse, 0.0).sum()
        return total, (out, lse)

    gradients: dict[str, Any] = {}
    if gradient:
        gradients, values = jax.jit(jax.grad(loss, has_aux=True))(inputs)
    else:
        values = jax.jit(call)(inputs)
    results = dict(zip(("out", "lse"), values, strict=True)) | gradients
    return {name: np.asarray(x, np.float32) for name, x in results.items()}


def assert_close(case, gradient, tiles=None, seed=0):
    got, expected = (run(case, implementation, gradient, tiles, seed) for implementation in ("hopper", "reference"))
    for name in expected:
        bound = LSE if name == "lse" else (FORWARD if name == "out" else BACKWARD)[case.dtype]
        scale = np.abs(expected[name][np.abs(expected[name]) < 1e29]).max(initial=1e-3)
        error = np.abs(got[name] - expected[name]).max() / scale
        assert error <= bound, f"{case.name}: {name} off by {error:.2e} of the largest entry"


def test_forward_matches_with_data_dependent_tiles_and_queries_without_keys():
    assert_close(PLAIN, gradient=False, tiles=Tiles(k=64))


def test_gradients_match_with_many_features_at_once():
    assert_close(SMALL, gradient=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*RUNNABLE, SMALL, PLAIN, SPARSE], ids=lambda case: case.name)
def test_every_case_matches_the_reference(case):
    assert_close(case, gradient=True)


@pytest.mark.slow
@pytest.mark.parametrize("tile_k", [64, 128, 192, 256])
def test_every_tile_size_of_keys_matches_the_reference(tile_k):
    case = Case("keys", T=128, S=384, N=1, K=1, dtype="float16", mask=Mask(causal=False), segments=2)
    assert_close(case, gradient=False, tiles=Tiles(k=tile_k))


@pytest.mark.slow
@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    T=st.integers(1, 200), S=st.integers(1, 300), offset=st.integers(-60, 200), group=st.sampled_from([1, 2]),
    causal=st.booleans(), window=st.sampled_from([None, 1, 70]), segments=st.sampled_from([0, 3]), sinks=st.booleans(),
    softcap=st.sampled_from([None, 3.0]), gradient=st.booleans(),
)  # fmt: skip
def test_random_shapes_match_the_reference(T, S, offset, group, causal, window, segments, sinks, softcap, gradient):
    case = Case("any", T=T, S=max(S, segments), N=group, K=1, dtype="float16", mask=Mask(causal, window), offset=offset,
                segments=segments, sinks=sinks, softcap=softcap)  # fmt: skip
    assert_close(case, gradient)


@pytest.mark.slow
def test_results_are_deterministic():
    first, second = run(SMALL, "hopper", gradient=True), run(SMALL, "hopper", gradient=True)
    assert all((first[name] == second[name]).all() for name in first)


@pytest.mark.slow
def test_no_two_warpgroups_race(monkeypatch):
    """The ring wraps around, since there are more tiles than slots. If a wait is missing, this test fails."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    watching = InterpretGPUParams(uninitialized_memory="nan", detect_races=True)
    monkeypatch.setattr(hopper_parts, "interpreter", lambda interpret: watching)
    assert_close(Case("ring", T=320, S=320, N=2, K=1, dtype="bfloat16", mask=Mask(causal=False)), gradient=True)
    assert not interpret_pallas_call.get_races().races_found


def lowered(case, gradient):
    """Return the text of the program for CUDA."""
    inputs, kwargs = arrays(case)
    call = partial(flash_attention, implementation="hopper", **kwargs)
    if gradient:
        function = jax.grad(lambda *a: call(*a).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    else:
        function = call
    described = nullcontext()
    if hasattr(jax.sharding, "AbstractDevice"):  # since jax 0.12, where Mosaic GPU needs the device
        device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
        auto = (jax.sharding.AxisType.Auto,)
        described = jax.sharding.use_abstract_mesh(
            jax.sharding.AbstractMesh((1,), ("x",), axis_types=auto, abstract_device=device)
        )
    with described:
        return jax.jit(function).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()


KERNEL = "custom_call @mosaic_gpu_v2"


def test_lowers_for_cuda():
    assert lowered(SMALL, gradient=True).count(KERNEL) == 3  # forward, dq, dk and dv
    assert lowered(SPARSE, gradient=False).count(KERNEL) == 1


@pytest.mark.slow
@pytest.mark.parametrize("case", RUNNABLE, ids=lambda case: case.name)
def test_every_case_lowers_for_cuda(case):
    lowers = lowered(case, gradient=True)
    assert lowers.count(KERNEL) == (3 if case.H + case.V <= 256 else 1)
    assert ("xla.gpu.triton" in lowers) == (case.H + case.V > 256)


@given(seed=st.integers(0, 999))
@settings(max_examples=20, deadline=None)
def test_the_schedule_visits_full_tiles_first_then_partial_ones_only(seed):
    I, J = 3, 6
    kinds = np.random.default_rng(seed).integers(0, 3, size=(1, 2, I, J))
    found = {name: np.asarray(x) for name, x in hopper_parts.schedule(kinds).items()}
    traced = hopper_parts.schedule(jnp.asarray(kinds))
    assert all((np.asarray(traced[name]) == found[name]).all() for name in found)
    for head in range(2):
        for i in range(I):
            row = kinds[0, head, i]
            full, some = found["full"][0, head, i], found["some"][0, head, i]
            visited = found["order"][0, head, i, :some]
            assert sorted(visited[:full]) == list(np.flatnonzero(row == FULL))
            assert sorted(visited) == list(np.flatnonzero(row))


def test_plans_fit_shared_memory_and_registers():
    for H in (64, 128, 192, 256):
        for V in (64, 128, 192, 256):
            planned = plan(H, V, 4096, None, None)
            if H != V and H + V >= 448:
                assert planned is None
                continue
            assert planned is not None, f"H {H}, V {V}: no plan"
            keys, slots = planned
            used = 2 * 128 * (H + (V if V != H else 0)) + 2 * slots * keys * (H + V)
            assert used < hopper_parts.SHARED_MEMORY and slots >= 2 and keys in (64, 128)
    assert plan(128, 128, 4096, None, None) == (128, 2)


@pytest.mark.parametrize(
    ("case", "tiles", "named"),
    [
        (Case("float32"), Tiles(), "implementation='triton'"),
        (Case("bias", dtype="bfloat16", bias=True), Tiles(), "alibi_N"),
        (Case("width", dtype="bfloat16", H=80, V=80), Tiles(), "head dimensions 80 and 80"),
        (Case("rows", dtype="bfloat16"), Tiles(q=64), "tiles.q = 64: must be 128"),
        (Case("step", dtype="bfloat16"), Tiles(k_dkv=64), "tiles.k_dkv = 64: must be 128"),
        (Case("keys", dtype="bfloat16"), Tiles(k=96), "tiles.k = 96"),
        (Case("memory", dtype="bfloat16", H=256, V=256), Tiles(k=128), "shared memory"),
        (Case("widths", dtype="bfloat16", H=192, V=256), Tiles(), "head dimensions 192 and 256"),
        (Case("blocks", dtype="bfloat16", mask=Mask(block_shape=(64, 128)), blocks=0.5), Tiles(), "multiples of 128"),
    ],
    ids=lambda x: x.name if isinstance(x, Case) else None,
)
def test_refusals_name_the_reason(case, tiles, named):
    (q, k, v), kwargs = arrays(case)
    with pytest.raises(ValueError, match="implementation = 'hopper'") as refused:
        flash_attention(q, k, v, tiles=tiles, implementation="hopper", **kwargs)
    assert named in str(refused.value)
