"""A MoE layer against the number of experts and the way they are run, as multiples of an MLP of equal active FLOPs
(forward and backward, shapes of `quickstart`): python -m experiments.bench.experts [--rounds N] [--processor-time]
[--only TEXT]
"""

from __future__ import annotations

import argparse

from experiments.bench.contest import Contestant, compete

ACTIVE = 512  # hidden columns that a token goes through: top_k * hidden_dim


def cases() -> dict[str, tuple[str, ...]]:
    """Arguments of experiments.bench.layer by the name of a row."""
    rows: dict[str, tuple[str, ...]] = {}
    for experts in (8, 16, 64, 128, 256):
        rows[f"{experts} experts, top-2, width {ACTIVE // 2}"] = (str(experts), "2", str(ACTIVE // 2))
    for experts in (16, 64, 128, 256):
        k = experts // 4
        rows[f"{experts} experts, top-{k}, width {ACTIVE // k}"] = (str(experts), str(k), str(ACTIVE // k))
    for experts, k in ((8, 2), (64, 8)):
        shape = str(experts), str(k), str(ACTIVE // k)
        for how in ("sort", "gather", "einsum"):
            rows[f"{experts} experts, top-{k}, capacity factor 1.25, {how}"] = (*shape, how, "1.25")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.experts", description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=7, help="turns of each contestant; the medians are reported (default 7)"
    )
    parser.add_argument(
        "--processor-time", action="store_true", help="compare processor seconds, on a machine that others use"
    )
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    args = parser.parse_args()
    if args.processor_time:
        Contestant.clock = "processor"
    dense = Contestant("experiments.bench.layer", "dense")
    print("| layer | times an MLP | quartiles |\n|---|---|---|", flush=True)
    for name, words in cases().items():
        if args.only in name:
            layer = Contestant("experiments.bench.layer", "moe", *words)
            (result,) = compete(dense, layer, rounds=args.rounds)
            layer.close()
            print(f"| {name} | **{result.ratio:.2f}** | {result.spread[0]:.2f} to {result.spread[1]:.2f} |", flush=True)
    dense.close()


if __name__ == "__main__":
    main()
