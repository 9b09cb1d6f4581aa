"""Compare these kernels with JAX's by the TPU compiler's instruction counts, without a TPU: `python -m
pallas_kernels.flash_attention.static_tpu`.

Counts the bundles (instruction words, at best one per cycle) of a tile's body, times the tiles visited, for one head,
head dimension 128, bfloat16. This is a *static estimate*: it leaves out transfers that are not hidden and code around
the body. Writes results/tpu_static.json. Takes about five minutes, with one process per kernel and generation.
"""

from __future__ import annotations

import argparse
import datetime
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import ahead_of_time
from pallas_kernels.flash_attention import Mask, flash_attention, tpu_pairs
from pallas_kernels.flash_attention.mask import FULL, MaskData

LENGTHS = (2048, 8192, 32768, 131072)
TARGETS = ("v5e", "v5p", "v6e", "7x")
RESULTS = Path(__file__).parent / "results" / "tpu_static.json"
TILE, HEAD_DIM, WINDOW = 1024, 128, 1024
KERNELS = ("ours", "jax splash_attention", "jax flash_attention")


def ours(T: int, window: int | None):
    """Return the gradient of `flash_attention` for one head, with the forward and backward kernels in one program."""
    x = jax.ShapeDtypeStruct((1, T, 1, HEAD_DIM), jnp.bfloat16)

    def run(q, k, v, dout):
        call = lambda q, k, v: flash_attention(q, k, v, mask=Mask(window=window), implementation="tpu")
        return jax.vjp(call, q, k, v)[1](dout)

    return run, (x, x, x, x)


def splash(T: int, window: int | None):
    """Return the same for jax's splash_attention, with tiles of 1024, pieces of 512 keys and the fused backward kernel,
    its best configuration of those tried."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    one = masks.CausalMask((T, T)) if window is None else masks.LocalMask((T, T), (window - 1, 0), 0)
    sizes = kernel.BlockSizes(
        block_q=TILE, block_kv=TILE, block_kv_compute=TILE // 2, block_q_dkv=TILE, block_kv_dkv=TILE,
        block_kv_dkv_compute=TILE, use_fused_bwd_kernel=True,
    )  # fmt: skip
    with jax.ensure_compile_time_eval():
        attend = kernel.make_splash_mha_single_device(masks.MultiHeadMask([one]), block_sizes=sizes)
    x = jax.ShapeDtypeStruct((1, T, HEAD_DIM), jnp.bfloat16)
    return (lambda q, k, v, dout: jax.vjp(lambda q, k, v: attend(q, k, v), q, k, v)[1](dout)), (x, x, x, x)


def flash(T: int, window: int | None):
    """Return the same for jax's flash_attention, with tiles of 1024."""
    from jax.experimental.pallas.ops.tpu import flash_attention as module

    sizes = module.BlockSizes(
        **{f"block_{name}": TILE for name in (
            "q", "k_major", "k", "q_major_dkv", "k_major_dkv", "q_dkv", "k_dkv", "q_dq", "k_major_dq", "k_dq")},
        block_b=1,
    )  # fmt: skip
    x = jax.ShapeDtypeStruct((1, 1, T, HEAD_DIM), jnp.bfloat16)
    attend = lambda q, k, v: module.flash_attention(q, k, v, causal=True, block_sizes=sizes)
    return (lambda q, k, v, dout: jax.vjp(attend, q, k, v)[1](dout)), (x, x, x, x)


def tiles(T: int, window: int | None) -> tuple[int, int]:
    """Return the numbers of FULL and of other visited tiles. With tiles of 1024 all kernels visit the same ones; only
    the cost per tile differs."""
    words = tpu_pairs.pairs(Mask(window=window), MaskData(), T, T, TILE, TILE).words_RCP
    full = int((tpu_pairs.kind(words) == FULL).sum())
    return full, words.size - full


def bodies(target: str, kernel: str, window: int | None) -> dict[str, Any]:
    """Return, for forward and backward, the bundles of a FULL tile and of one at the mask's edge, their spills and
    their multiplications."""
    name = {"ours": "ours", "jax splash_attention": "splash", "jax flash_attention": "flash"}[kernel]
    compiled = ahead_of_time.bundles(target, f"pallas_kernels.flash_attention.static_tpu:{name}", 4 * TILE, window)
    found: dict[str, Any] = {}
    for label, regions in compiled.items():
        work = [r for r in ahead_of_time.body(regions, least=0.1) if r.bundles > 500]
        if not work:
            continue
        direction = "backward" if any(part in label for part in ("backward", "bwd", "dkv", "dq")) else "forward"
        # The other kernels have one body for every tile. Ours has one for FULL tiles, if there are any, and one for
        # each edge.
        full, edges = work[0], work
        if kernel == "ours" and window is None:
            edges = work[1:]
        here = found.setdefault(
            direction, {"full": 0, "edge": 0, "spills": 0, "fills": 0, "multiplications": 0.0, "vmem": 0}
        )
        here["full"] += full.bundles
        here["edge"] += int(np.ceil(np.mean([r.bundles for r in edges])))
        here["spills"] += full.spills
        here["fills"] += full.fills
        here["vmem"] = max(here["vmem"], full.vmem)
        here["multiplications"] += full.occupancy["MATMUL"] * full.bundles
    return found


def rows(targets: tuple[str, ...] = TARGETS) -> list[dict[str, Any]]:
    """Return one row for each generation, kernel, direction, mask and length."""
    made = []
    for target in targets:
        for kernel in KERNELS:
            for window, lengths in ((None, LENGTHS), (WINDOW, (32768,))):
                if window is not None and kernel == "jax flash_attention":
                    continue  # it has no window, and would visit all tiles of causal attention
                for direction, body in bodies(target, kernel, window).items():
                    for T in lengths:
                        full, edge = tiles(T, window)
                        made.append(
                            {
                                "target": target,
                                "kernel": kernel,
                                "direction": direction,
                                "T": T,
                                "window": window,
                                "tiles_full": full,
                                "tiles_edge": edge,
                                "bundles_full": body["full"],
                                "bundles_edge": body["edge"],
                                "bundles_total": full * body["full"] + edge * body["edge"],
                                "matmul_occupancy": round(body["multiplications"] / body["full"], 3),
                                "spills": body["spills"],
                                "fills": body["fills"],
                                "vmem_mib": round(body["vmem"] / 2**20, 1),
                            }
                        )
                        print(json.dumps(made[-1]), flush=True)
    return made


def main() -> None:
    """Write RESULTS."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default=",".join(TARGETS))
    chosen = tuple(parser.parse_args().targets.split(","))
    kept = (
        [row for row in json.loads(RESULTS.read_text())["rows"] if row["target"] not in chosen]
        if RESULTS.exists()
        else []
    )
    head = {
        "what": "static estimate by the compiler, not measured: bundles of a tile's body x tiles, "
        "one head, head dim 128, bfloat16, tiles of 1024",
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "libtpu")},
    }
    found = kept + rows(chosen)
    RESULTS.parent.mkdir(exist_ok=True)
    lines = ",\n  ".join(json.dumps(row) for row in found)
    RESULTS.write_text(json.dumps(head)[:-1] + ',\n "rows": [\n  ' + lines + "\n]}\n")


if __name__ == "__main__":
    main()
