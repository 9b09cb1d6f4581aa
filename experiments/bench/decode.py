"""Our greedy decoding as a contestant, 32-token prompts and 128 new tokens: python -m experiments.bench.decode BATCH
FOLDER

FOLDER becomes the model as transformers reads it, with the logits of the prompts in it, so that the rival
decodes the same network and can prove it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np

from decode.generate import generate
from decode.sampling import SamplingParams
from experiments.bench.contest import serve
from experiments.bench.models import DENSE, NEW_TOKENS, prompts
from interop.save import save_published
from model.transformer import Transformer, forward, logits, unstack
from sharding.rules import ShardingRules


def main(batch: int, folder: str) -> None:
    model = jax.jit(lambda: Transformer(jax.random.key(0), DENSE, ShardingRules()))()
    ids = prompts(batch)
    predictions = jax.jit(lambda model, ids: logits(model, forward(model, ids).hidden_BTD))(model, ids)
    save_published(model, DENSE, Path(folder), family="llama")
    np.save(Path(folder) / "prompt_logits.npy", np.asarray(predictions))
    flat, params = jax.jit(unstack)(model), SamplingParams(temperature=0.0, max_new_tokens=NEW_TOKENS)

    def work() -> None:
        rows = generate(flat, ids.tolist(), params)
        assert all(len(row.tokens) == NEW_TOKENS for row in rows)

    serve(work, {})


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
