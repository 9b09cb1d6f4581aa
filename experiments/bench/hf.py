"""transformers as a contestant: `decode BATCH FOLDER` generates greedily with the model in FOLDER; `moe
eager|grouped_mm` is the train step of a Mixtral of our MoE's dimensions. python -m experiments.bench.hf ..."""

from __future__ import annotations

import sys

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from experiments.bench.contest import serve
from experiments.bench.models import CLIP, LEARNING_RATE, MOE, NEW_TOKENS, WEIGHT_DECAY, prompts, tokens
from model.config import ModelConfig


def shape(config: ModelConfig) -> dict:
    """Return the fields of a MixtralConfig that do not concern experts."""
    a = config.attention
    return dict(
        vocab_size=config.vocab_size, hidden_size=config.embed_dim, num_hidden_layers=config.num_layers,
        num_attention_heads=a.num_heads, num_key_value_heads=a.num_kv_heads, head_dim=a.head_dim,
        max_position_embeddings=config.max_length, rms_norm_eps=config.norm.epsilon, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": config.position.theta},
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip


def decode(batch: int, folder: str) -> None:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = np.load(f"{folder}/prompt_logits.npy")
    ids = torch.from_numpy(prompts(batch)).long()
    with torch.inference_mode():
        difference = float(np.abs(model(ids).logits.numpy() - expected).max())

    def work() -> None:
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
            )
        assert out.shape[1] == ids.shape[1] + NEW_TOKENS

    serve(work, {"logit_difference": difference})


def moe(implementation: str) -> None:
    assert MOE.moe is not None
    config = MixtralConfig(
        intermediate_size=MOE.moe.hidden_dim,
        num_local_experts=MOE.moe.num_experts,
        num_experts_per_tok=MOE.moe.top_k,
        **shape(MOE),
    )
    model = MixtralForCausalLM._from_config(config, experts_implementation=implementation).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    ids = torch.from_numpy(tokens()).long()

    def work() -> None:
        optimizer.zero_grad(set_to_none=True)
        predictions = model(ids[:, :-1], use_cache=False).logits
        F.cross_entropy(predictions.flatten(0, 1), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    serve(work, {"parameters": sum(p.numel() for p in model.parameters())})


if __name__ == "__main__":
    if sys.argv[1] == "decode":
        decode(int(sys.argv[2]), sys.argv[3])
    else:
        moe(sys.argv[2])
