"""The networks that are measured, as this project builds them, and one batch for their train step.

Dense: RMSNorm, RoPE, SwiGLU, untied head, 9.3 M parameters. MoE: the same with 8 experts, top-2, in place of each MLP.
"""

from __future__ import annotations

import numpy as np

from data.batch import Batch
from data.config import DataConfig
from model.config import AttentionConfig, MLPConfig, ModelConfig, MoEConfig
from sharding.config import MeshConfig
from train.config import Experiment, OptimizerConfig, TrainConfig

BATCH, LENGTH, VOCABULARY = 8, 256, 8192
PROMPT_TOKENS, NEW_TOKENS = 32, 128
DENSE = ModelConfig(
    vocab_size=VOCABULARY,
    num_layers=6,
    embed_dim=256,
    max_length=512,
    attention=AttentionConfig(num_heads=8, num_kv_heads=8, head_dim=32),
    mlp=MLPConfig("swiglu", 768),
    dtype="float32",
    scan_unroll=0,
)
MOE = ModelConfig(
    vocab_size=VOCABULARY,
    num_layers=6,
    embed_dim=256,
    max_length=512,
    attention=AttentionConfig(num_heads=8, num_kv_heads=8, head_dim=32),
    moe=MoEConfig(num_experts=8, top_k=2, hidden_dim=384),
    dtype="float32",
    scan_unroll=0,
)
LEARNING_RATE, WEIGHT_DECAY, CLIP = 3e-4, 0.1, 1.0


def experiment(model: ModelConfig) -> Experiment:
    """A run with AdamW and clipping, of the network `model`."""
    optimizer = OptimizerConfig(
        learning_rate=LEARNING_RATE, schedule="constant", warmup_steps=0, weight_decay=WEIGHT_DECAY, clip_norm=CLIP
    )
    data, mesh = DataConfig(sequence_length=LENGTH, batch_size=BATCH), MeshConfig(data=-1, fsdp=1)
    return Experiment(
        name="bench", model=model, data=data, optimizer=optimizer, mesh=mesh, train=TrainConfig(steps=1000)
    )


def tokens() -> np.ndarray:
    """Int32 [BATCH, LENGTH + 1], the same for every contestant."""
    return np.random.default_rng(0).integers(0, VOCABULARY, (BATCH, LENGTH + 1)).astype(np.int32)


def batch() -> Batch:
    """`tokens` as the train step takes them: one document a row."""
    ids = tokens()
    return Batch.of_windows(ids, np.ones_like(ids))


def prompts(rows: int) -> np.ndarray:
    """Int32 [rows, PROMPT_TOKENS], the same for every contestant."""
    return np.random.default_rng(1).integers(0, VOCABULARY, (rows, PROMPT_TOKENS)).astype(np.int32)
