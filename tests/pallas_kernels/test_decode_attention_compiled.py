"""Decode attention without a device: compiled for TPUs, lowered for NVIDIA GPUs, and the calls it refuses."""

from __future__ import annotations

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax._src.mesh import AbstractDevice
from jax.sharding import AbstractMesh

from pallas_kernels.ahead_of_time import TOPOLOGIES, compile_for
from pallas_kernels.decode_attention import decode_attention, gpu, tpu
from pallas_kernels.decode_attention.shapes import SIZES, Case
from pallas_kernels.decode_attention.spec import Cache, Spec

# JAX's persistent cache can store an executable for an absent device but cannot read it back.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry")
BY_NAME = {case.name: case for case in SIZES}
QUICK = {
    "v5e": ("llama", "llama_int8_pages_of_128", "head_dim_192_value_128_speculative"),
    "v6e": ("llama_pages_of_16", "head_dim_96_features"),
}
TPU_CASES = [
    pytest.param(
        name, case, id=f"{name}-{case.name}", marks=() if case.name in QUICK.get(name, ()) else pytest.mark.slow
    )
    for name in TOPOLOGIES
    for case in SIZES
]


@pytest.fixture(autouse=True)
def no_cpu_flags(monkeypatch):
    """Unset XLA_FLAGS after the CPU backend has read it. The TPU compiler aborts at a flag that it does not know."""
    jax.devices()
    monkeypatch.delenv("XLA_FLAGS", raising=False)


def on_gpu(kind: str = "NVIDIA H100 80GB HBM3"):
    """Return a context in which JAX traces as if this GPU were present."""
    device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("device",), abstract_device=device))


def caches(case: Case) -> Cache:
    s = case.shapes()
    return Cache(*(s.get(name) for name in ("k_cache", "v_cache", "k_scales", "v_scales", "page_table_BP")))


@pytest.mark.parametrize(("target", "case"), TPU_CASES)
def test_compiles_for_tpus_without_copying_a_cache(target, case):
    # No implementation is named: the default for a TPU must be the kernel.
    compiled = compile_for(target, lambda arrays: decode_attention(**arrays, **case.choices()), case.shapes())
    text = compiled.as_text()
    assert "tpu_custom_call" in text
    lead = case.shapes()["k_cache"].shape[:3]
    cache = "|".join(f"{lead[0]},{lead[1]},{x},{y}" for w in (case.H, case.V) for x, y in ((lead[2], w), (w, lead[2])))
    copies = re.findall(rf"= \w+\[(?:{cache})\]\S* (?!bitcast|parameter)[\w-]+\(", text)
    assert not copies, copies
    assert compiled.memory_analysis().temp_size_in_bytes < case.cache_bytes / 8


@pytest.mark.parametrize("H", [128, pytest.param(64, marks=pytest.mark.slow)])
def test_a_decoding_loop_does_not_copy_caches(H):
    """A program may copy a cache where it enters and leaves the loop, but not inside the loop."""
    small = jax.ShapeDtypeStruct((4, 1, 16, H), jnp.bfloat16)
    cache = jax.ShapeDtypeStruct((4, 8, 1 << 15, H), jnp.bfloat16)

    def write(cache_BKSH, new_BTKH, lengths_B):
        one = lambda cache_SH, new_TH, start: jax.lax.dynamic_update_slice_in_dim(cache_SH, new_TH, start, axis=0)
        starts_BK = jnp.broadcast_to(lengths_B[:, None], cache_BKSH.shape[:2])
        return jax.vmap(jax.vmap(one))(cache_BKSH, jnp.moveaxis(new_BTKH, 2, 1), starts_BK)

    def generate(q, k, v, lengths):
        def step(_, state):
            q, k, v, lengths = state
            k, v = write(k, q[:, :, :8], lengths), write(v, q[:, :, 8:], lengths)
            return decode_attention(q, k, v, lengths + 1), k, v, lengths + 1

        return jax.lax.fori_loop(0, 8, step, (q, k, v, lengths))

    text = compile_for("v5e", generate, small, cache, cache, jax.ShapeDtypeStruct((4,), jnp.int32)).as_text()
    assert "tpu_custom_call" in text
    inside = text[: text.index("\nENTRY ")]
    assert not re.findall(rf"= bf16\[4,8,(?:32768,{H}|{H},32768)\]\S* (?:copy|transpose)\(", inside)


@pytest.mark.parametrize("case", SIZES, ids=lambda case: case.name)
def test_plan_stays_within_the_vmem_budget(case):
    q = case.shapes()["q_BTNH"]
    spec = Spec(case.T, 1.0, case.window, case.softcap, 1, False, case.slots_innermost)
    cut = tpu.plan(spec, q, caches(case))
    assert cut is not None
    used = tpu.vmem_bytes(spec, cut.heads, cut.block, q, caches(case))
    assert used <= tpu.VMEM_BUDGET < 16 << 20
    # Blocks are large enough to hide a copy's latency, and small enough that short rows read little in vain.
    assert 128 <= cut.block <= tpu.MAX_BLOCK and case.K % cut.heads == 0


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=() if n in (1, 3, 6) else pytest.mark.slow) for n, c in enumerate(SIZES)]
)
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # since jax 0.12, which still has it
def test_lowers_for_nvidia_gpus(case):
    with on_gpu():
        lowered = jax.jit(lambda arrays: decode_attention(**arrays, **case.choices())).trace(case.shapes())
        text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    assert "triton" in text


def test_default_splits_fill_the_device():
    one, many = replace(BY_NAME["llama"], B=1), replace(BY_NAME["llama"], B=64)
    for platform, kind, expected in (
        ("tpu", "TPU v5 lite", (1, 1)), ("tpu", "TPU v5p", (2, 2)), ("gpu", "NVIDIA H100 80GB HBM3", (32, 1)),
        ("gpu", "NVIDIA A100-SXM4-40GB", (27, 1)),
    ):  # fmt: skip
        module = tpu if platform == "tpu" else gpu
        device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
        with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("device",), abstract_device=device)):
            found = tuple(module.default_splits(case.shapes()["q_BTNH"], caches(case)) for case in (one, many))
        assert found == expected, kind


def refused(case: Case, match: str, without: tuple[str, ...] = (), given: dict | None = None, **choices):
    arrays = {name: x for name, x in case.shapes().items() if name not in without} | (given or {})
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(lambda arrays: decode_attention(**arrays, **choices), arrays)


@pytest.mark.unchecked
def test_arguments_that_do_not_fit_are_refused():
    small, int8 = Case("small"), Case("int8", cache="int8")
    shape = lambda *dims, dtype="float32": jax.ShapeDtypeStruct(dims, jnp.dtype(dtype))
    refused(replace(small, N=3, K=2), "2 heads: must divide the 3 heads")
    refused(replace(small, T=17), "T = 17 queries per row: at most 16; use flash_attention")
    refused(small, r"lengths_B of shape \(2,\): must be \(3,\)", given={"lengths_B": shape(2, dtype="int32")})
    refused(small, "lengths_B is float32: must be int32", given={"lengths_B": shape(3)})
    refused(small, "page_table_BP of shape", given={"page_table_BP": shape(2, 4, dtype="int32")})
    refused(small, "do not fit", given={"v_cache": shape(3, 2, 255, 64)})
    refused(small, "must be", given={"q_BTNH": shape(3, 2, 64)})
    refused(small, "no dimension may be empty", given={"q_BTNH": shape(3, 0, 2, 64)})
    refused(small, "must share one of", given={"v_cache": shape(3, 1, 256, 64, dtype="bfloat16")})
    refused(small, "q is float64|q is int32", given={"q_BTNH": shape(3, 1, 2, 64, dtype="int32")})
    refused(small, "k_scales: required for 8-bit caches and refused for others", given={"k_scales": shape(3, 1, 256)})
    refused(int8, "v_scales: required for 8-bit caches", without=("v_scales",))
    refused(int8, r"k_scales \(3, 1, 255\) float32: must be \(3, 1, 256\)", given={"k_scales": shape(3, 1, 255)})
    refused(small, r"alibi_N of shape \(3,\): must be \(2,\)", given={"alibi_N": shape(3)})
    refused(small, "window = 0: must be at least 1", window=0)
    refused(small, r"softcap = 0.0: must be above 0", softcap=0.0)
    refused(small, "splits = 0: must be at least 1", splits=0)
    refused(small, "unknown; use one of tpu, gpu, reference", implementation="cuda")
    refused(small, "name the kernel to interpret", interpret=True)


def test_calls_that_a_kernel_cannot_run_are_refused():
    small = Case("small")
    refused(small, "the reference does not split rows", implementation="reference", splits=2)
    refused(replace(small, dtype="float16"), "no float16 arithmetic; use bfloat16", implementation="tpu")
    refused(replace(small, S=250), "slots per row = 250: must be a multiple of 8", implementation="tpu")
    refused(replace(small, S=240, page=20), "page_size = 20: must be a multiple of 8", implementation="tpu")
    refused(replace(small, B=64, S=1 << 15, page=8), "page_table_BP of 1048576 bytes: at most", implementation="tpu")
    refused(replace(small, N=2048, T=16, H=256, V=256), "MiB of VMEM", implementation="tpu")
    refused(replace(small, H=320, V=64), "head dimensions of 320 and 64: at most 256", implementation="gpu")
    refused(replace(small, B=48, S=1 << 20, cache="int8"), "between 2\\*\\*31 and 2\\*\\*32", implementation="gpu")


def test_a_named_kernel_does_not_fall_back_on_a_cpu():
    case = Case("small")
    for name in ("tpu", "gpu"):
        with pytest.raises(ValueError, match=r"[Oo]nly interpret mode is supported"):
            decode_attention(**case.arguments(), implementation=name, splits=1)


def test_the_default_is_the_reference_where_no_kernel_can_run():
    """On CPUs, and for calls that the backend's kernel refuses."""
    case = Case("small", S=250, lengths=(1, 2, 3))
    assert "custom_call" not in jax.jit(lambda arrays: decode_attention(**arrays)).lower(case.shapes()).as_text()
    compiled = compile_for("v5e", lambda arrays: decode_attention(**arrays), case.shapes())
    assert "tpu_custom_call" not in compiled.as_text()
