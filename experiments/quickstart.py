"""The first experiments: a small language model learns Python from the standard library of the interpreter that runs
it."""

from __future__ import annotations

from dataclasses import replace

from data.config import DataConfig, TokenizerConfig
from model.config import AttentionConfig, MLPConfig, ModelConfig, MoEConfig
from sharding.config import MeshConfig
from train.config import Experiment, OptimizerConfig, SampleConfig, TrainConfig


def quickstart() -> Experiment:
    """A mixture-of-experts Transformer, 8 experts, top-2, trained for minutes on two CPU cores.

    Command: python -m experiments train quickstart
    Expect: 1.68 bits per byte on the held-out files, beside gzip -9 2.10, xz -9e 1.96, bz2 -9 1.92 on each file by
    itself.
    """
    return Experiment(
        name="quickstart",
        question="How well does a small mixture of experts model Python after minutes on two CPU cores?",
        source="Fedus et al. 2021; Jiang et al. 2024 (Mixtral)",
        cost="7 min on 2 CPU cores",
        model=ModelConfig(
            num_layers=4,
            embed_dim=128,
            max_length=1024,
            attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32, qk_norm="head"),
            mlp=MLPConfig(kind="swiglu", hidden_dim=512),
            moe=MoEConfig(num_experts=8, top_k=2, hidden_dim=256),
            tied_embeddings=True,
            scan_unroll=0,
        ),
        data=DataConfig(
            tokenizer=TokenizerConfig(vocab_size=4096), sequence_length=256, batch_size=16, holdout_fraction=0.1
        ),
        # Muon learns more per token than AdamW, and its cost per step is smaller next to a larger batch.
        optimizer=OptimizerConfig(
            name="muon", learning_rate=1.6e-2, schedule="linear", final_fraction=0.02, warmup_steps=30, weight_decay=0.1
        ),
        mesh=MeshConfig(data=-1, fsdp=1),  # so small that every device holds whole weights
        train=TrainConfig(steps=340, eval_every=100, checkpoint_every=100, eval_windows=128, eval_stride=128),
        samples=SampleConfig(),
    )


def quickstart_dense() -> Experiment:
    """The same network with one MLP in place of the experts, of equal FLOPs per token: the ablation of the mixture."""
    base = quickstart()
    assert base.model.moe is not None
    active = base.model.moe.top_k * base.model.moe.hidden_dim
    return replace(
        base,
        name="quickstart_dense",
        question="What do the experts bring over a dense MLP of equal FLOPs per token?",
        source="Fedus et al. 2021, table 1",
        model=replace(base.model, moe=None, mlp=replace(base.model.mlp, hidden_dim=active)),
    )


def quickstart_fim() -> Experiment:
    """The same network trained to fill in the middle as well as to continue."""
    base = quickstart()
    return replace(
        base,
        name="quickstart_fim",
        question="What does filling in the middle cost in left-to-right bits per byte?",
        source="Bavarian et al. 2022, sec. 3",
        train=replace(base.train, objective="fill_in_middle"),
    )


def smoke() -> Experiment:
    """A minute's run of every part of the machine; its losses are of no interest."""
    base = quickstart()
    return replace(
        base,
        name="smoke",
        question="Does everything run?",
        source="",
        cost="1 min on 2 CPU cores",
        model=replace(
            base.model,
            num_layers=2,
            embed_dim=64,
            max_length=256,
            attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=32),
            moe=MoEConfig(num_experts=4, top_k=2, hidden_dim=64),
        ),
        data=replace(base.data, tokenizer=TokenizerConfig(vocab_size=1024), sequence_length=128, batch_size=8),
        optimizer=OptimizerConfig(
            learning_rate=4e-3, schedule="linear", final_fraction=0.02, warmup_steps=10, weight_decay=0.1
        ),
        train=TrainConfig(steps=100, eval_every=50, checkpoint_every=50, eval_windows=32, log_every=5),
        samples=SampleConfig(prompt_tokens=32, new_tokens=32),
    )


EXPERIMENTS = {function.__name__: function for function in (quickstart, quickstart_dense, quickstart_fim, smoke)}
