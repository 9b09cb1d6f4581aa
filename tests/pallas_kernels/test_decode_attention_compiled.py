"""Decode attention for devices that are not here: compiled for TPUs, lowered for NVIDIA GPUs; and what is refused."""

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

# An executable for a device that is not here can be written to the cache of programs and not be read from it.
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
def no_flags_of_cpus(monkeypatch):
    """The compiler for TPUs ends the process at a flag that it does not know; the CPU's have been read by now."""
    jax.devices()
    monkeypatch.delenv("XLA_FLAGS", raising=False)


def on_gpu(kind: str = "NVIDIA H100 80GB HBM3"):
    """Traced in this context, jax takes the GPU to be there."""
    device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("device",), abstract_device=device))


def caches(case: Case) -> Cache:
    s = case.shapes()
    return Cache(*(s.get(name) for name in ("k_cache", "v_cache", "k_scales", "v_scales", "page_table_BP")))


@pytest.mark.parametrize(("target", "case"), TPU_CASES)
def test_compiles_for_tpus_and_copies_no_cache(target, case):
    # None: the backend's own choice, which is to be the kernel.
    compiled = compile_for(target, lambda arrays: decode_attention(**arrays, **case.choices()), case.shapes())
    text = compiled.as_text()
    assert "tpu_custom_call" in text
    lead = case.shapes()["k_cache"].shape[:3]
    cache = "|".join(f"{lead[0]},{lead[1]},{x},{y}" for w in (case.H, case.V) for x, y in ((lead[2], w), (w, lead[2])))
    copies = re.findall(rf"= \w+\[(?:{cache})\]\S* (?!bitcast|parameter)[\w-]+\(", text)
    assert not copies, copies
    assert compiled.memory_analysis().temp_size_in_bytes < case.cache_bytes / 8


@pytest.mark.parametrize("H", [128, pytest.param(64, marks=pytest.mark.slow)])
def test_a_loop_that_writes_and_reads_caches_copies_none(H):
    """Tokens generated in one program: copies of a cache may stand where the loop is entered and left, not in it."""
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
def test_vmem_is_within_what_a_kernel_is_given(case):
    q = case.shapes()["q_BTNH"]
    spec = Spec(case.T, 1.0, case.window, case.softcap, 1, False, case.slots_innermost)
    cut = tpu.plan(spec, q, caches(case))
    assert cut is not None
    used = tpu.vmem_bytes(spec, cut.heads, cut.block, q, caches(case))
    assert used <= tpu.VMEM_BUDGET < 16 << 20
    # Enough in flight to be worth a copy's latency, not so much that short rows read for nothing.
    assert 128 <= cut.block <= tpu.MAX_BLOCK and case.K % cut.heads == 0


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=() if n in (1, 3, 6) else pytest.mark.slow) for n, c in enumerate(SIZES)]
)
@pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated"
)  # jax 0.12; it is there up to 0.12 at least
def test_lowers_for_nvidia(case):
    with on_gpu():
        lowered = jax.jit(lambda arrays: decode_attention(**arrays, **case.choices())).trace(case.shapes())
        text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    assert "triton" in text


def test_parts_fill_the_device():
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
def test_refuses_what_does_not_fit():
    small, int8 = Case("small"), Case("int8", cache="int8")
    shape = lambda *dims, dtype="float32": jax.ShapeDtypeStruct(dims, jnp.dtype(dtype))
    refused(replace(small, N=3, K=2), "2 heads: must divide the 3 heads")
    refused(replace(small, T=17), "T = 17 queries a row: at most 16; use flash_attention")
    refused(small, r"lengths_B of shape \(2,\): must be \(3,\)", given={"lengths_B": shape(2, dtype="int32")})
    refused(small, "lengths_B is float32: must be int32", given={"lengths_B": shape(3)})
    refused(small, "page_table_BP of shape", given={"page_table_BP": shape(2, 4, dtype="int32")})
    refused(small, "do not fit", given={"v_cache": shape(3, 2, 255, 64)})
    refused(small, "must be", given={"q_BTNH": shape(3, 2, 64)})
    refused(small, "no dimension may be empty", given={"q_BTNH": shape(3, 0, 2, 64)})
    refused(small, "must share one of", given={"v_cache": shape(3, 1, 256, 64, dtype="bfloat16")})
    refused(small, "q is float64|q is int32", given={"q_BTNH": shape(3, 1, 2, 64, dtype="int32")})
    refused(small, "k_scales go with caches of 8 bits and only those", given={"k_scales": shape(3, 1, 256)})
    refused(int8, "v_scales go with caches of 8 bits", without=("v_scales",))
    refused(int8, r"k_scales \(3, 1, 255\) float32: must be \(3, 1, 256\)", given={"k_scales": shape(3, 1, 255)})
    refused(small, r"alibi_N of shape \(3,\): must be \(2,\)", given={"alibi_N": shape(3)})
    refused(small, "window = 0: must be at least 1", window=0)
    refused(small, r"softcap = 0.0: must be above 0", softcap=0.0)
    refused(small, "splits = 0: must be at least 1", splits=0)
    refused(small, "unknown; use one of tpu, gpu, reference", implementation="cuda")
    refused(small, "name the kernel to interpret", interpret=True)


def test_refuses_what_a_kernel_cannot_run():
    small = Case("small")
    refused(small, "the reference has no parts", implementation="reference", splits=2)
    refused(replace(small, dtype="float16"), "no float16 arithmetic; use bfloat16", implementation="tpu")
    refused(replace(small, S=250), "slots of a row = 250: must be a multiple of 8", implementation="tpu")
    refused(replace(small, S=240, page=20), "page_size = 20: must be a multiple of 8", implementation="tpu")
    refused(
        replace(small, B=64, S=1 << 15, page=8), "page_table_BP of 1048576 bytes: scalar memory", implementation="tpu"
    )
    refused(replace(small, N=2048, T=16, H=256, V=256), "MiB of VMEM", implementation="tpu")
    refused(replace(small, H=320, V=64), "head dimensions of 320 and 64: at most 256", implementation="gpu")
    refused(replace(small, B=48, S=1 << 20, cache="int8"), "between 2\\*\\*31 and 2\\*\\*32", implementation="gpu")


def test_a_kernel_that_is_not_for_this_machine_does_not_fall_back():
    case = Case("small")
    for name in ("tpu", "gpu"):
        with pytest.raises(ValueError, match=r"[Oo]nly interpret mode is supported"):
            decode_attention(**case.arguments(), implementation=name, splits=1)


def test_a_kernel_that_cannot_run_is_not_chosen():
    """None is the reference where the backend's kernel refuses, and on CPUs."""
    case = Case("small", S=250, lengths=(1, 2, 3))
    assert "custom_call" not in jax.jit(lambda arrays: decode_attention(**arrays)).lower(case.shapes()).as_text()
    compiled = compile_for("v5e", lambda arrays: decode_attention(**arrays), case.shapes())
    assert "tpu_custom_call" not in compiled.as_text()
