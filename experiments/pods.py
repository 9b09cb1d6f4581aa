"""Mixtures of experts that need a pod for training. Any machine can compile them (`python -m experiments compile`).

On the mesh `expert` x `fsdp`, a layer sends tokens over the `expert` group to the devices that hold their experts, and
each device gathers only the slices of its experts, over the `fsdp` group. Heads and vocabulary are also sharded over
`expert` in storage, so that no large weight is stored on two devices. Every device gathers them for use.
"""

from __future__ import annotations

from dataclasses import replace

from data.config import DataConfig, TokenizerConfig
from model.config import AttentionConfig, InitConfig, MLPConfig, ModelConfig, MoEConfig, NormConfig, PositionConfig
from sharding.config import AxisRules, MeshConfig, ShardingRules
from train.config import Experiment, OptimizerConfig, SampleConfig, TrainConfig

STORED_OVER_ALL = ShardingRules(
    weights=AxisRules(
        embed=("fsdp",), heads=("tensor", "expert"), kv_heads=("tensor", "expert"), vocab=("tensor", "expert")
    )
)


def mixtral_8x7b() -> Experiment:
    """Mixtral 8x7B (Jiang et al. 2024): 46,702,792,704 parameters, 8 experts, top-2, on 64 v5p chips (v5p-128).

    Each chip processes 2 sequences of 4,096 tokens.
    Command: python -m experiments compile mixtral_8x7b --topology v5p:4x4x4
    Expect per chip and step: 8.76 GB of arguments, 11.95 GB of temporaries, and collectives that output 61 GB and send
    66 GB (libtpu 0.0.52, jax 0.10.2).

    The buffer of a chip holds 18,432 pairs, 1.125 times an even share; further pairs are sent in an overflow round. The
    load-balance loss corresponds to 0.02 in transformers, whose loss is k where ours is 1, and which pools the layers
    where we add them.
    """
    return Experiment(
        name="mixtral_8x7b",
        question="How much memory does a step of Mixtral 8x7B use on each of 64 v5p chips, and how much does it send?",
        source="Jiang et al. 2024 (Mixtral), table 1",
        cost="compiles in minutes on 2 CPU cores; trains on 64 v5p chips",
        model=ModelConfig(
            vocab_size=32_000,
            num_layers=32,
            embed_dim=4096,
            max_length=4096,
            attention=AttentionConfig(num_heads=32, num_kv_heads=8, head_dim=128),
            position=PositionConfig(theta=1e6),
            norm=NormConfig(epsilon=1e-5),
            moe=MoEConfig(
                num_experts=8, top_k=2, hidden_dim=14_336, load_balance=0.00125, all_to_all_buffer_factor=1.125
            ),
            init=InitConfig(scheme="normal", scale=0.02),
            dtype="bfloat16",
            remat="full",
        ),
        mesh=MeshConfig(expert=8, fsdp=-1),
        sharding=STORED_OVER_ALL,
        data=DataConfig(tokenizer=TokenizerConfig(vocab_size=32_000), sequence_length=4096, batch_size=128),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
        train=TrainConfig(steps=100_000, loss_chunk=8000, eval_every=1000, checkpoint_every=1000),
        samples=SampleConfig(count=0),
    )


def deepseek_v3_like() -> Experiment:
    """The experts of DeepSeek-V3 (DeepSeek-AI 2024, sec. 4.2), with 16 of its 61 layers, for 64 v5p chips.

    As in the paper: 256 experts of width 2,048, of which each token uses 8 in 4 of 8 groups, one shared expert, sigmoid
    weights scaled by 2.5, balancing by a bias, and three initial dense layers of width 18,432. Unlike the paper:
    grouped-query attention (128 heads of width 128 with 16 key heads) instead of latent attention, no multi-token
    prediction, and AdamW's state in float32.

    At full depth, weights and optimizer state (12 bytes for each of 676 B parameters) take 127 GB on each of 64 chips,
    and a v5p chip has 95 GB; `deepseek_v3_like_full` is for 512 chips.

    Command: python -m experiments compile deepseek_v3_like --topology v5p:4x4x4
    Expect per chip and step: 34.0 GB of arguments, 45.0 GB of temporaries, and collectives that output 166 GB.
    """
    return Experiment(
        name="deepseek_v3_like",
        question="How much memory does a step with 256 experts use on each of 64 v5p chips, and how much does it send?",
        source="DeepSeek-AI 2024 (DeepSeek-V3), sec. 4.2",
        cost="weights and AdamW's state take 34 GB on each of 64 v5p chips",
        model=ModelConfig(
            vocab_size=129_280,
            num_layers=16,
            embed_dim=7168,
            max_length=4096,
            attention=AttentionConfig(num_heads=128, num_kv_heads=16, head_dim=128),
            mlp=MLPConfig(kind="swiglu", hidden_dim=18_432),
            moe=MoEConfig(
                num_experts=256,
                top_k=8,
                hidden_dim=2048,
                shared_experts=1,
                layers=("dense",) * 3 + ("moe",) * 58,
                weights="sigmoid_renormalized",
                scale=2.5,
                groups=(8, 4),
                bias_rate=1e-3,
                load_balance=1e-4,
                balance_scope="sequence",
                z_loss=0.0,
                all_to_all_buffer_factor=1.25,
            ),
            init=InitConfig(scheme="normal", scale=0.006, embedding_std=0.006),
            dtype="bfloat16",
            remat="full",
        ),
        mesh=MeshConfig(expert=16, fsdp=-1),
        sharding=STORED_OVER_ALL,
        data=DataConfig(tokenizer=TokenizerConfig(vocab_size=129_280), sequence_length=4096, batch_size=128),
        optimizer=OptimizerConfig(learning_rate=2.2e-4, warmup_steps=2000),
        train=TrainConfig(steps=100_000, loss_chunk=16_384, eval_every=1000, checkpoint_every=1000),
        samples=SampleConfig(count=0),
    )


def deepseek_v3_like_full() -> Experiment:
    """`deepseek_v3_like` with all 61 layers, for 512 v5p chips.

    Command: python -m experiments compile deepseek_v3_like_full --topology v5p:8x8x8
    """
    base = deepseek_v3_like()
    return replace(
        base,
        name="deepseek_v3_like_full",
        question="Does deepseek_v3_like at its full depth of 61 layers fit on 512 v5p chips?",
        cost="weights and AdamW's state take 17 GB on each of 512 v5p chips",
        model=replace(base.model, num_layers=61),
        data=replace(base.data, batch_size=1024),
    )


PODS = {function.__name__: function for function in (mixtral_8x7b, deepseek_v3_like, deepseek_v3_like_full)}
