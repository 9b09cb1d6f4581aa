"""Mixture of experts: every choice a field with a published meaning. Frozen, JSON-serializable."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

# Routers whose choice for a token depends on later tokens, in scoring too: no decoder can have them.
NONCAUSAL = ("expert_choice", "soft")
SIGMOID = ("sigmoid", "sigmoid_renormalized")
ALWAYS_ONE = (
    "renormalized",
    "softmax_top_k",
    "sigmoid_renormalized",
)  # `weights` that are 1 where one expert is chosen
MOST_EXPERTS = 1_000_000  # far above every published network; checks loop over them
WITHOUT_LOGITS = ("hash", "random")  # routers that have no weights of their own and learn nothing
# Routers that read `weights`; the others weight their experts as their papers do, which is the form that is named here
# where there is one.
WEIGHTED = ("top_k", "sinkhorn")
PAPER_WEIGHTS = {
    "switch": "softmax",
    "gshard": "renormalized",
    "noisy_top_k": "softmax_top_k",
    "dense": "softmax",
    "expert_choice": "softmax",
}


@dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts in place of the MLP (Shazeer et al. 2017); the experts take `mlp.kind` and `mlp.bias`."""

    num_experts: int = 8
    top_k: int = 2  # experts a token goes to; expert_choice: on average; soft: slots of an expert
    hidden_dim: int = 256  # of one expert; fine-grained experts (Dai et al. 2024): small, and many chosen
    shared_experts: int = 0  # experts that every token goes to, beside the chosen ones, unweighted (Dai et al. 2024)
    # Which layers have experts, repeated: ('moe',) all, ('dense', 'moe') every second, ('dense',) * 3 + ('moe',) * 58
    # as DeepSeek-V3. A dense layer's width is `mlp.hidden_dim`.
    layers: tuple[Literal["dense", "moe"], ...] = ("moe",)
    # model/routers.py has the papers. expert_choice and soft see later tokens and are refused in decoders.
    router: Literal[
        "top_k", "switch", "gshard", "noisy_top_k", "expert_choice", "sinkhorn", "hash", "random", "soft", "dense"
    ] = "top_k"
    # How the chosen experts are weighted: softmax over all; that, summing to one over the chosen (Mixtral); softmax
    # over the chosen logits (the same in exact arithmetic; gpt-oss); sigmoid of each logit; that, summing to one
    # (DeepSeek-V3).
    weights: Literal["softmax", "renormalized", "softmax_top_k", "sigmoid", "sigmoid_renormalized"] = "renormalized"
    scale: float = 1.0  # multiplies the weights (DeepSeek-V3: 2.5)
    groups: tuple[int, ...] = (
        1,
        1,
    )  # experts lie in so many groups, and a token uses so many of them (DeepSeek-V3, sec. 2.1.2)
    # Balancing without a loss (Wang et al. 2024): a bias on the choice, moved so much a step; 0: fixed; none: no bias.
    bias_rate: float | None = None
    jitter: float = 0.0  # training: the router's input times uniform(1 - jitter, 1 + jitter) (Fedus et al. 2021)
    router_dropout: float = 0.0  # training: probability that an input of the router is zeroed
    router_dtype: Literal["float32", "bfloat16"] = (
        "float32"  # of the router's matmul and softmax (Fedus et al. 2021, table 2)
    )
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
    # What multiplies the sorted pairs: the best grouped matmul for the device, or one by name.
    implementation: Literal["auto", "tpu", "triton", "xla", "reference"] = "auto"
    # Expert parallelism: room of the all-to-all buffers, as a multiple of an even share (what exceeds it goes in
    # further rounds; nothing is lost). None: tokens are gathered on every device instead.
    exchange: float | None = 2.0

    @property
    def bounded(self) -> bool:
        """Whether an expert has a bounded number of places in a sequence: `capacity` of them."""
        return self.capacity_factor is not None or self.router == "expert_choice"

    def capacity(self, tokens: int) -> int:
        """Places of an expert for a sequence of so many tokens: `capacity_factor` (1 where a router needs one and there
        is none) * top_k * tokens / num_experts, rounded up, at least 1 and at most all. The factor is taken as the
        decimal number that it is written as, so that 1.1 * 100 / 10 is 11 places and not 12."""
        factor = Fraction(1) if self.capacity_factor is None else Fraction(repr(self.capacity_factor))
        return max(1, min(tokens, math.ceil(factor * self.top_k * tokens / self.num_experts)))

    def validate(self, causal: bool) -> None:
        """Raises ValueError that names field, value and fix. `causal`: the model's tokens may not see later ones."""
        if self.num_experts < 1:
            raise ValueError(f"model.moe.num_experts = {self.num_experts}: must be at least 1")
        if self.num_experts > MOST_EXPERTS:
            raise ValueError(f"model.moe.num_experts = {self.num_experts}: use at most {MOST_EXPERTS}")
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
        if self.shared_experts < 0:
            raise ValueError(f"model.moe.shared_experts = {self.shared_experts}: must be 0 or more")
        for name in ("scale", "capacity_factor", "exchange"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"model.moe.{name} = {value}: must be a number above 0")
        for name in ("jitter", "router_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"model.moe.{name} = {getattr(self, name)}: must be in [0, 1); 0 for none")
        self._validate_router(causal)
        self._validate_groups()
        self._validate_places()

    def validate_length(self, tokens: int) -> None:
        """Refuses a capacity below one token in sequences of so many: it would be rounded up to one, which is not what
        was asked for. Raises ValueError."""
        if not self.bounded:
            return
        factor = Fraction(1) if self.capacity_factor is None else Fraction(repr(self.capacity_factor))
        share = factor * self.top_k * tokens / self.num_experts
        if share < 1:
            least = math.ceil(1000 * self.num_experts / (self.top_k * tokens)) / 1000
            raise ValueError(
                f"model.moe.capacity_factor = {self.capacity_factor}: with model.moe.top_k = {self.top_k} of "
                f"{self.num_experts} experts and data.sequence_length = {tokens} an expert has room for "
                f"{float(share):.3g} tokens, less than one; "
                f"use {least:g} or more" + (", or none" if self.router != "expert_choice" else "")
            )

    def _validate_router(self, causal: bool) -> None:
        router, k = self.router, self.top_k
        if causal and router in NONCAUSAL:
            why = (
                "each expert picks its tokens among the whole sequence"
                if router == "expert_choice"
                else ("every expert is given mixtures of the whole sequence")
            )
            raise ValueError(
                f"model.moe.router = {router!r}: {why}, so that a token's output tells of later ones, which a decoder "
                "is to predict; use another router, or model.attention.mask='bidirectional' with "
                "train.objective='masked'"
            )
        for name, needed in (("switch", 1), ("gshard", 2), ("dense", self.num_experts)):
            if router == name and k != needed:
                raise ValueError(
                    f"model.moe.top_k = {k}: model.moe.router = {name!r} sends a token to {needed} of the "
                    f"{self.num_experts} experts; set top_k to {needed}, or router to top_k"
                )
        allowed = ("renormalized", PAPER_WEIGHTS.get(router))  # the default, which says nothing, and its own
        if router not in WEIGHTED and self.weights not in allowed:
            raise ValueError(
                f"model.moe.weights = {self.weights!r}: model.moe.router = {router!r} has weights of its own; leave "
                f"this at renormalized, or use one of the routers {', '.join(WEIGHTED)}"
            )
        if router in WEIGHTED and k == 1 < self.num_experts and self.weights in ALWAYS_ONE:
            raise ValueError(
                f"model.moe.weights = {self.weights!r}: with model.moe.top_k = 1 every weight is 1 and the router "
                "learns nothing from the loss; set weights to softmax (Switch) or sigmoid"
            )
        if self.bias_rate is not None and not 0 <= self.bias_rate < math.inf:
            raise ValueError(f"model.moe.bias_rate = {self.bias_rate}: must be 0 or more, or none for no bias")
        if self.bias_rate is not None and router != "top_k":
            raise ValueError(
                f"model.moe.bias_rate = {self.bias_rate}: only model.moe.router = 'top_k' has a bias on its choice, "
                f"this is {router!r}; set bias_rate to none"
            )
        for name in ("jitter", "router_dropout"):
            if router in WITHOUT_LOGITS and getattr(self, name) > 0:
                raise ValueError(
                    f"model.moe.{name} = {getattr(self, name)}: model.moe.router = {router!r} does not look at its "
                    "input; set it to 0"
                )

    def _validate_groups(self) -> None:
        groups, E, k = self.groups, self.num_experts, self.top_k
        if len(groups) != 2 or min(groups) < 1 or groups[1] > groups[0]:
            raise ValueError(
                f"model.moe.groups = {groups}: give two numbers, how many groups there are and how many a token uses, "
                f"e.g. (8, 4)"
            )
        count, used = groups
        if E % count:
            divisors = ", ".join(str(d) for d in range(1, E + 1) if E % d == 0)
            raise ValueError(
                f"model.moe.groups = {groups}: {count} groups do not divide model.moe.num_experts = {E}; use one of "
                f"{divisors} groups"
            )
        if used * (E // count) < k:
            raise ValueError(
                f"model.moe.groups = {groups}: {used} groups of {E // count} experts hold fewer than model.moe.top_k "
                f"= {k}; use {-(-k // (E // count))} groups or more"
            )
        if count > 1 and self.router != "top_k":
            raise ValueError(
                f"model.moe.groups = {groups}: only model.moe.router = 'top_k' limits the groups of a token, this is "
                f"{self.router!r}; set groups to (1, 1)"
            )

    def _validate_places(self) -> None:
        if self.dispatch in ("gather", "einsum") and not self.bounded:
            raise ValueError(
                f"model.moe.dispatch = {self.dispatch!r}: fills a buffer for each expert, which needs a size; set "
                "model.moe.capacity_factor, or dispatch to sort"
            )
        if self.router == "soft" and (self.capacity_factor is not None or self.dispatch in ("gather", "einsum")):
            raise ValueError(
                "model.moe.router = 'soft': an expert's slots are model.moe.top_k of them, with "
                f"model.moe.capacity_factor = {self.capacity_factor} and model.moe.dispatch = {self.dispatch!r}; set "
                "these to none and auto"
            )
        if self.router == "dense" and self.capacity_factor is not None:
            raise ValueError(
                f"model.moe.capacity_factor = {self.capacity_factor}: model.moe.router = 'dense' sends every token to "
                "every expert; set it to none"
            )
