"""The networks, data, optimizers and scales that the studies share.

The text is Python's standard library, in 1,024 pieces of BPE. At scale `cpu`, a trial takes half a minute on one core.
The optimizer is Muon: with AdamW, a run of this size learns late and at a time that depends on its seed, so that its
result varies four times as much (docs/studies/noise_floor.md). Studies of AdamW's behaviour use `ADAMW`.
"""

from __future__ import annotations

from dataclasses import replace

from data.config import DataConfig, TokenizerConfig
from experiments.study.definition import Scale
from model.config import AttentionConfig, MLPConfig, ModelConfig, MoEConfig
from sharding.config import MeshConfig
from train.config import Experiment, OptimizerConfig, SampleConfig, TrainConfig

ADAMW = {"optimizer.name": "adamw", "optimizer.learning_rate": 4e-3}


def dense() -> Experiment:
    """A dense Transformer of 0.2 M parameters: pre-RMSNorm, RoPE, SwiGLU, tied embeddings, Muon, cosine."""
    return Experiment(
        name="dense",
        model=ModelConfig(
            num_layers=3,
            embed_dim=64,
            max_length=1024,
            attention=AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=32),
            mlp=MLPConfig(kind="swiglu", hidden_dim=192),
            tied_embeddings=True,
            scan_unroll=0,
        ),
        data=DataConfig(
            tokenizer=TokenizerConfig(vocab_size=1024), sequence_length=128, batch_size=8, holdout_fraction=0.05
        ),
        optimizer=OptimizerConfig(
            name="muon", learning_rate=1.6e-2, schedule="cosine", final_fraction=0.05, warmup_steps=40,
            weight_decay=0.1,
        ),
        mesh=MeshConfig(data=-1, fsdp=1),
        train=TrainConfig(steps=500, eval_every=100, eval_windows=256, checkpoint_every=250, keep_last=1, keep_best=0,
                          log_every=10),
        samples=SampleConfig(count=0),
    )  # fmt: skip


def moe(experts: int = 8, top_k: int = 2) -> Experiment:
    """The same network with experts in place of the MLPs, of equal FLOPs per token: the MLP's width over `top_k`."""
    base = dense()
    width = base.model.mlp.hidden_dim // top_k
    return replace(
        base,
        name="moe",
        model=replace(base.model, moe=MoEConfig(num_experts=experts, top_k=top_k, hidden_dim=width)),
    )


def moe_scales(seeds: int = 5, tokens: int = 512_000) -> dict[str, Scale]:
    """Return the scales of `moe()`: on accelerators, the width of the experts follows that of the MLP."""
    wider = {"model.moe.hidden_dim": 512}
    found = scales(seeds, tokens)
    return found | {name: found[name].with_changes(wider) for name in ("gpu", "tpu")}


def scales(seeds: int = 5, tokens: int = 512_000, tune_seeds: int = 1) -> dict[str, Scale]:
    """Return the budgets of a study: `ci` for tests, `cpu` for two cores, `gpu` and `tpu` for accelerators."""
    small = {"model.num_layers": 1, "data.batch_size": 4, "data.sequence_length": 32, "train.eval_windows": 8,
             "train.eval_every": 4, "data.holdout_fraction": 0.002}  # fmt: skip
    large = {
        "model.num_layers": 8, "model.embed_dim": 384, "model.attention.num_heads": 6,
        "model.attention.num_kv_heads": 6, "model.attention.head_dim": 64, "model.mlp.hidden_dim": 1024,
        "data.tokenizer.vocab_size": 4096, "data.sequence_length": 512, "data.batch_size": 64,
        "optimizer.warmup_steps": 100, "train.eval_every": 200,
        "train.checkpoint_every": 500, "model.scan_unroll": 1,
    }  # fmt: skip
    return {
        "ci": Scale(tokens=1_024, seeds=2, changes=small),
        "cpu": Scale(tokens=tokens, seeds=seeds, tune_seeds=tune_seeds),
        "gpu": Scale(tokens=50_000_000, seeds=seeds, tune_seeds=tune_seeds, changes=large),
        "tpu": Scale(tokens=200_000_000, seeds=seeds, tune_seeds=tune_seeds, changes=large),
    }
