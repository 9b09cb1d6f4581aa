"""Ahead-of-time compilation for TPUs: refusals, compiled objects and bundle counts."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import ahead_of_time
from pallas_kernels.target import target

pytest.importorskip("libtpu")
SHAPE = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)


@pytest.mark.parametrize("name", ahead_of_time.TOPOLOGIES)
def test_each_target_compiles_and_is_the_target_during_tracing(name):
    seen = []

    def product(x):
        seen.append(target())
        return x @ x

    compiled = ahead_of_time.compile_for(name, product, SHAPE)
    assert compiled.memory_analysis().output_size_in_bytes == 256 * 256 * 2
    assert seen[0][0] == "tpu" and "TPU" in seen[0][1]


def test_an_unknown_target_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'v3'.*v4, v5e, v5p, v6e, 7x"):
        ahead_of_time.mesh_of("v3")


def product():
    """Return a function and its arguments, for `bundles`."""
    return (lambda x: x @ x), (SHAPE,)


def test_bundles_of_a_product_have_multiplications():
    kernels = ahead_of_time.bundles("v5e", "tests.pallas_kernels.test_ahead_of_time:product")
    whole = [regions[0] for regions in kernels.values() if regions]
    assert any(r.occupancy["MATMUL"] > 0 and r.bundles > 16 for r in whole)


def test_bundles_reports_the_error_of_its_process():
    with pytest.raises(RuntimeError, match="no_such_function"):
        ahead_of_time.bundles("v5e", "tests.pallas_kernels.test_ahead_of_time:no_such_function")


def test_read_dump_returns_ranges_occupancy_and_spills_of_regions(tmp_path):
    (tmp_path / "1-kernel.1-00-post-bundle-packing-post-ra.txt").write_text(
        "$region0: #{kernel.1}\n  // region range: [0, 4)\n  $region7: #{kernel.1} parent=0 // loop_body\n"
        "    #allocation5 [shape = 'u8[16]{0}', space=vmem, size = 0x10, offset = 0x20, scoped]\n    // region range: "
        "[1, 3)\n"
    )
    rows = ["0 0 0 0 0 0 0 0 0 0 2", "2 0 0 4 0 0 1 1 0 0 0", "0 0 0 2 0 0 0 0 1 1 0", "0 0 0 0 0 0 0 0 0 0 0"]
    (tmp_path / "1-kernel.1-01-pre-delay_hlo-static-per-bundle-utilization.txt").write_text(
        "== CAPACTIY:\n"
        + ", ".join(ahead_of_time.SLOTS)
        + "\n 2 2 2 4 2 1 3 3 2 2 2\n== UTILIZATION:\n"
        + "\n".join(rows)
    )
    (regions,) = ahead_of_time.read_dump(tmp_path).values()
    whole, loop = regions
    assert (whole.bundles, whole.parent, loop.bundles, loop.first, loop.parent, loop.kind) == (
        4,
        None,
        2,
        1,
        0,
        "loop_body",
    )
    assert loop.occupancy["MATMUL"] == 0.5 and loop.occupancy["VALU"] == 0.75 and (loop.fills, loop.spills) == (1, 1)
    assert whole.vmem == loop.vmem == 0x30
    assert ahead_of_time.body(regions) == [loop]
