"""Our greedy decoding as a contestant, 32-token prompts and 128 new tokens: python -m experiments.bench.decode BATCH FILE

FILE receives the weights, named and laid out as transformers' Llama has them, and the logits of the prompts, so that the
other side decodes the same network and can prove it.
"""

from __future__ import annotations

import sys

import jax
import numpy as np

from decode.generate import generate
from decode.sampling import SamplingParams
from experiments.bench.contest import serve
from experiments.bench.models import DENSE, NEW_TOKENS, prompts
from model.transformer import Transformer, forward, logits, unstack
from sharding.rules import ShardingRules


def llama_weights(model: Transformer) -> dict[str, np.ndarray]:
    """Names and layouts of transformers' LlamaForCausalLM: matrices [outputs, inputs]."""
    D = DENSE.embed_dim
    (block,) = model.stacks[0]
    assert model.head is not None and model.final_norm is not None
    assert block.attention_norm is not None and block.mlp_norm is not None
    weights = {
        "model.embed_tokens.weight": model.embedding[...],
        "model.norm.weight": model.final_norm.scale[...],
        "lm_head.weight": model.head[...].T,
    }
    for i in range(DENSE.num_layers):
        layer = {
            "input_layernorm": block.attention_norm.scale[i],
            "self_attn.q_proj": block.attention.q[i].reshape(D, -1).T,
            "self_attn.k_proj": block.attention.k[i].reshape(D, -1).T,
            "self_attn.v_proj": block.attention.v[i].reshape(D, -1).T,
            "self_attn.o_proj": block.attention.out[i].reshape(-1, D).T,
            "post_attention_layernorm": block.mlp_norm.scale[i],
            "mlp.gate_proj": block.mlp.up[i][:, 0].T,
            "mlp.up_proj": block.mlp.up[i][:, 1].T,
            "mlp.down_proj": block.mlp.down[i].T,
        }
        weights |= {f"model.layers.{i}.{name}.weight": value for name, value in layer.items()}
    return {name: np.asarray(value) for name, value in weights.items()}


def main(batch: int, file: str) -> None:
    model = jax.jit(lambda: Transformer(jax.random.key(0), DENSE, ShardingRules()))()
    ids = prompts(batch)
    predictions = jax.jit(lambda model, ids: logits(model, forward(model, ids).hidden_BTD))(model, ids)
    arrays = {"prompt_logits": np.asarray(predictions), **llama_weights(model)}
    np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's stub takes any keyword for allow_pickle
    flat, params = jax.jit(unstack)(model), SamplingParams(temperature=0.0, max_new_tokens=NEW_TOKENS)

    def work() -> None:
        rows = generate(flat, ids.tolist(), params)
        assert all(len(row.tokens) == NEW_TOKENS for row in rows)

    serve(work, {})


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
