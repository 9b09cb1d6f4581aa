"""Mixture of experts: every choice a field with a published meaning. Frozen, JSON-serializable."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

# Routers whose choice for a token depends on later tokens, in scoring too: no decoder can have them.
NONCAUSAL = ("expert_choice", "soft")
SIGMOID = ("sigmoid", "sigmoid_renormalized")


@dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts in place of the MLP (Shazeer et al. 2017); the experts take `mlp.kind`, without biases."""

    num_experts: int = 8
    top_k: int = 2  # experts a token goes to; expert_choice: on average; soft: slots of an expert
    hidden_dim: int = 256  # of one expert; fine-grained experts (Dai et al. 2024): small, and many chosen
    shared_experts: int = 0  # experts that every token goes to, beside the chosen ones, unweighted (Dai et al. 2024)
    # Which layers have experts, repeated: ('moe',) all, ('dense', 'moe') every second, ('dense',) * 3 + ('moe',) * 58 as
    # DeepSeek-V3. A dense layer's width is `mlp.hidden_dim`.
    layers: tuple[Literal["dense", "moe"], ...] = ("moe",)
    # model/routers.py has the papers. expert_choice and soft see later tokens and are refused in decoders.
    router: Literal[
        "top_k", "switch", "gshard", "noisy_top_k", "expert_choice", "sinkhorn", "hash", "random", "soft", "dense"
    ] = "top_k"
    # How the chosen experts are weighted: softmax over all; that, summing to one over the chosen (Mixtral); softmax over the
    # chosen logits (the same in exact arithmetic; gpt-oss); sigmoid of each logit; that, summing to one (DeepSeek-V3).
    weights: Literal["softmax", "renormalized", "softmax_top_k", "sigmoid", "sigmoid_renormalized"] = "renormalized"
    scale: float = 1.0  # multiplies the weights (DeepSeek-V3: 2.5)
    groups: tuple[int, ...] = (1, 1)  # experts lie in so many groups, and a token uses so many of them (DeepSeek-V3, sec. 2.1.2)
    # Balancing without a loss (Wang et al. 2024): a bias on the choice, moved so much a step; 0: fixed; none: no bias.
    bias_rate: float | None = None
    jitter: float = 0.0  # training: the router's input times uniform(1 - jitter, 1 + jitter) (Fedus et al. 2021)
    router_dropout: float = 0.0  # training: probability that an input of the router is zeroed
    router_dtype: Literal["float32", "bfloat16"] = "float32"  # of the router's matmul and softmax (Fedus et al. 2021, table 2)
    load_balance: float = 0.01  # coefficient of a loss that is 1 at perfect balance; transformers' is top_k times it
    # Tokens that are balanced together: the global batch's, those of each device's rows, or each sequence's.
    balance_scope: Literal["batch", "device", "sequence"] = "batch"
    z_loss: float = 0.001  # coefficient of mean logsumexp(router logits)^2 (Zoph et al. 2022, eq. 5)
    # An expert takes ceil(capacity_factor * top_k * T / num_experts) of a sequence's T tokens, the first that come; the
    # others pass it by. None: dropless.
    capacity_factor: float | None = None
    # What runs the experts: pairs sorted by expert and a grouped matmul; a buffer of `capacity_factor` places for each
    # expert, filled by gathers or by one-hot matmuls (GShard); every expert on every token (the oracle).
    dispatch: Literal["auto", "sort", "gather", "einsum", "dense"] = "auto"
    # Expert parallelism: room of the all-to-all buffers, as a multiple of an even share (what exceeds it goes in further
    # rounds; nothing is lost). None: tokens are gathered on every device instead.
    exchange: float | None = 2.0

    def capacity(self, tokens: int) -> int:
        """Places of an expert for a sequence of so many tokens: `capacity_factor` (1 where a router needs one and there
        is none) * top_k * tokens / num_experts, rounded up, at least 1 and at most all."""
        factor = 1.0 if self.capacity_factor is None else self.capacity_factor
        return max(1, min(tokens, math.ceil(factor * self.top_k * tokens / self.num_experts)))

    def validate(self, causal: bool) -> None:
        """Raises ValueError that names field, value and fix. `causal`: the model's tokens may not see later ones."""
        if self.num_experts < 1:
            raise ValueError(f"model.moe.num_experts = {self.num_experts}: must be at least 1")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"model.moe.top_k = {self.top_k}: must be between 1 and model.moe.num_experts = {self.num_experts}"
            )
        if not (self.load_balance >= 0 and self.z_loss >= 0):
            raise ValueError(
                f"model.moe.load_balance = {self.load_balance} and model.moe.z_loss = {self.z_loss}: must be 0 or more"
            )
        if "moe" not in self.layers:
            raise ValueError(f"model.moe.layers = {self.layers}: name 'moe' at least once, or set model.moe to none")
        if self.hidden_dim < 1:
            raise ValueError(f"model.moe.hidden_dim = {self.hidden_dim}: must be at least 1")
