"""Configuration of a mixture of experts. Every field has a published meaning; the class is frozen and
JSON-serializable."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

# Routers whose choice for a token depends on later tokens, also in scoring: decoders cannot use them.
NONCAUSAL = ("expert_choice", "soft")
SIGMOID = ("sigmoid", "sigmoid_renormalized")
# Values of `weights` that always give 1 if a token has one expert.
ALWAYS_ONE = ("renormalized", "softmax_top_k", "sigmoid_renormalized")
MOST_EXPERTS = 1_000_000  # far above every published network; checks loop over the experts
WITHOUT_LOGITS = ("hash", "random")  # routers without parameters, which learn nothing
# Routers that read `weights`. The others weight experts as in their papers; PAPER_WEIGHTS names that form if `weights`
# has a value for it.
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
    """Mixture of experts in place of the MLP (Shazeer et al. 2017). The experts use `mlp.kind` and `mlp.bias`."""

    num_experts: int = 8
    top_k: int = 2  # experts per token; expert_choice: on average; soft: slots per expert
    hidden_dim: int = 256  # hidden width of one expert; fine-grained experts (Dai et al. 2024): small, with many chosen
    shared_experts: int = 0  # experts that every token also uses, unweighted (Dai et al. 2024)
    # Kinds of the layers, as a repeated pattern: ('moe',) puts experts in all, ('dense', 'moe') in every second one,
    # ('dense',) * 3 + ('moe',) * 58 as DeepSeek-V3 does. The hidden width of a dense layer is `mlp.hidden_dim`.
    layers: tuple[Literal["dense", "moe"], ...] = ("moe",)
    # model/routers.py cites the papers. Decoders cannot use expert_choice and soft, which read later tokens.
    router: Literal[
        "top_k", "switch", "gshard", "noisy_top_k", "expert_choice", "sinkhorn", "hash", "random", "soft", "dense"
    ] = "top_k"
    # Accept these two routers in a causal network, to measure how much they leak. It cannot generate.
    allow_leak: bool = False
    # Weights of the chosen experts: softmax over all experts; that, renormalized over the chosen ones (Mixtral);
    # softmax over the chosen logits (equal in exact arithmetic; gpt-oss); sigmoid of each logit; that, renormalized
    # over the chosen ones (DeepSeek-V3).
    weights: Literal["softmax", "renormalized", "softmax_top_k", "sigmoid", "sigmoid_renormalized"] = "renormalized"
    scale: float = 1.0  # multiplies the weights (DeepSeek-V3: 2.5)
    # (number of groups of experts, number of groups that a token may use) (DeepSeek-V3, sec. 2.1.2).
    groups: tuple[int, ...] = (1, 1)
    # Balancing without a loss (Wang et al. 2024): change per step of a bias on the choice. 0: fixed bias; none: no
    # bias.
    bias_rate: float | None = None
    jitter: float = 0.0  # training: multiply the router's input by uniform(1 - jitter, 1 + jitter) (Fedus et al. 2021)
    router_dropout: float = 0.0  # training: probability of zeroing an input of the router
    # Dtype of the router's matmul and softmax (Fedus et al. 2021, table 2).
    router_dtype: Literal["float32", "bfloat16"] = "float32"
    # Coefficient of a loss that is 1 at perfect balance; the loss of transformers is top_k times as large.
    load_balance: float = 0.01
    # Tokens balanced together: those of the global batch, of each device's rows, or of each sequence.
    balance_scope: Literal["batch", "device", "sequence"] = "batch"
    z_loss: float = 0.001  # coefficient of mean logsumexp(router logits)^2 (Zoph et al. 2022, eq. 5)
    # An expert takes the first ceil(capacity_factor * top_k * T / num_experts) of a sequence's T tokens and drops later
    # choices. None: no limit (dropless).
    capacity_factor: float | None = None
    # How experts run. sort: sort the pairs by expert and use a grouped matmul. gather, einsum: fill a buffer of
    # `capacity(T)` rows per expert, by gathers or by one-hot matmuls (GShard). dense: every expert on every token (the
    # oracle).
    dispatch: Literal["auto", "sort", "gather", "einsum", "dense"] = "auto"
    # Grouped matmul of the sorted pairs: the best for the device, or one by name.
    implementation: Literal["auto", "tpu", "triton", "xla", "reference"] = "auto"
    # Expert parallelism: size of the all-to-all buffers, as a multiple of an even share. Pairs beyond it go in overflow
    # rounds; none is dropped. None: gather the tokens on every device instead.
    all_to_all_buffer_factor: float | None = 2.0

    @property
    def bounded(self) -> bool:
        """Whether an expert takes a bounded number of tokens of a sequence: `capacity` of them."""
        return self.capacity_factor is not None or self.router == "expert_choice"

    def capacity(self, tokens: int) -> int:
        """Return the tokens that an expert takes from a sequence of `tokens` tokens: capacity_factor * top_k * tokens /
        num_experts, rounded up, from 1 to `tokens`.

        If the factor is None, 1 is used. The factor counts as the decimal number in which it is written, so 1.1 * 100 /
        10 gives 11 and not 12.
        """
        factor = Fraction(1) if self.capacity_factor is None else Fraction(repr(self.capacity_factor))
        return max(1, min(tokens, math.ceil(factor * self.top_k * tokens / self.num_experts)))

    def validate(self, causal: bool) -> None:
        """Raise ValueError with the field, its value and a fix if the config is invalid. `causal`: tokens may not
        depend on later ones."""
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
            raise ValueError(f"model.moe.layers = {self.layers}: must contain 'moe'. Add it, or set model.moe to none")
        if self.hidden_dim < 1:
            raise ValueError(f"model.moe.hidden_dim = {self.hidden_dim}: must be at least 1")
        if self.shared_experts < 0:
            raise ValueError(f"model.moe.shared_experts = {self.shared_experts}: must be 0 or more")
        for name in ("scale", "capacity_factor", "all_to_all_buffer_factor"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"model.moe.{name} = {value}: must be a number above 0")
        for name in ("jitter", "router_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"model.moe.{name} = {getattr(self, name)}: must be in [0, 1). Use 0 for none")
        self._validate_router(causal)
        self._validate_groups()
        self._validate_places()

    def validate_length(self, tokens: int) -> None:
        """Raise ValueError if the capacity for sequences of `tokens` tokens is below one token. It would be rounded up
        to one, contrary to the config."""
        if not self.bounded:
            return
        factor = Fraction(1) if self.capacity_factor is None else Fraction(repr(self.capacity_factor))
        share = factor * self.top_k * tokens / self.num_experts
        if share < 1:
            least = math.ceil(1000 * self.num_experts / (self.top_k * tokens)) / 1000
            raise ValueError(
                f"model.moe.capacity_factor = {self.capacity_factor}: with model.moe.top_k = {self.top_k} of "
                f"{self.num_experts} experts and data.sequence_length = {tokens}, an expert would take "
                f"{float(share):.3g} tokens, less than one. "
                f"Use {least:g} or more" + (", or none" if self.router != "expert_choice" else "")
            )

    def _validate_router(self, causal: bool) -> None:
        router, k = self.router, self.top_k
        if causal and router in NONCAUSAL and not self.allow_leak:
            why = (
                "each expert picks its tokens from the whole sequence"
                if router == "expert_choice"
                else "every expert receives mixtures of the whole sequence"
            )
            raise ValueError(
                f"model.moe.router = {router!r}: {why}, so a token's output depends on later ones, which a decoder "
                "must predict. Use another router, or model.attention.mask='bidirectional' with "
                "train.objective='masked', or model.moe.allow_leak=true to measure the leak"
            )
        for name, needed in (("switch", 1), ("gshard", 2), ("dense", self.num_experts)):
            if router == name and k != needed:
                raise ValueError(
                    f"model.moe.top_k = {k}: model.moe.router = {name!r} sends a token to {needed} of the "
                    f"{self.num_experts} experts. Set top_k to {needed}, or router to top_k"
                )
        allowed = ("renormalized", PAPER_WEIGHTS.get(router))  # the default, and the form of the router's paper
        if router not in WEIGHTED and self.weights not in allowed:
            raise ValueError(
                f"model.moe.weights = {self.weights!r}: model.moe.router = {router!r} ignores this field. Leave it "
                f"at renormalized, or use one of the routers {', '.join(WEIGHTED)}"
            )
        if router in WEIGHTED and k == 1 < self.num_experts and self.weights in ALWAYS_ONE:
            raise ValueError(
                f"model.moe.weights = {self.weights!r}: with model.moe.top_k = 1 every weight is 1, and the router "
                "learns nothing from the loss. Set weights to softmax (Switch) or sigmoid"
            )
        if self.bias_rate is not None and not 0 <= self.bias_rate < math.inf:
            raise ValueError(f"model.moe.bias_rate = {self.bias_rate}: must be 0 or more, or none for no bias")
        if self.bias_rate is not None and router != "top_k":
            raise ValueError(
                f"model.moe.bias_rate = {self.bias_rate}: needs model.moe.router = 'top_k', not {router!r}. Set "
                "bias_rate to none"
            )
        for name in ("jitter", "router_dropout"):
            if router in WITHOUT_LOGITS and getattr(self, name) > 0:
                raise ValueError(
                    f"model.moe.{name} = {getattr(self, name)}: model.moe.router = {router!r} does not read its "
                    "input. Set it to 0"
                )

    def _validate_groups(self) -> None:
        groups, E, k = self.groups, self.num_experts, self.top_k
        if len(groups) != 2 or min(groups) < 1 or groups[1] > groups[0]:
            raise ValueError(
                f"model.moe.groups = {groups}: must be two numbers, the groups of experts and the groups that a token "
                "may use. Try (8, 4)"
            )
        count, used = groups
        if E % count:
            divisors = ", ".join(str(d) for d in range(1, E + 1) if E % d == 0)
            raise ValueError(
                f"model.moe.groups = {groups}: {count} groups do not divide model.moe.num_experts = {E}. Use one of "
                f"{divisors} groups"
            )
        if used * (E // count) < k:
            raise ValueError(
                f"model.moe.groups = {groups}: {used} groups of {E // count} experts have fewer than model.moe.top_k "
                f"= {k} experts. Use {-(-k // (E // count))} groups or more"
            )
        if count > 1 and self.router != "top_k":
            raise ValueError(
                f"model.moe.groups = {groups}: needs model.moe.router = 'top_k', not {self.router!r}. Set groups to "
                "(1, 1)"
            )

    def _validate_places(self) -> None:
        if self.dispatch in ("gather", "einsum") and not self.bounded:
            raise ValueError(
                f"model.moe.dispatch = {self.dispatch!r}: fills a buffer per expert, which needs a size. Set "
                "model.moe.capacity_factor, or set dispatch to sort"
            )
        if self.router == "soft" and (self.capacity_factor is not None or self.dispatch in ("gather", "einsum")):
            raise ValueError(
                "model.moe.router = 'soft': has model.moe.top_k slots per expert and ignores "
                f"model.moe.capacity_factor = {self.capacity_factor} and model.moe.dispatch = {self.dispatch!r}. Set "
                "these to none and auto"
            )
        if self.router == "dense" and self.capacity_factor is not None:
            raise ValueError(
                f"model.moe.capacity_factor = {self.capacity_factor}: model.moe.router = 'dense' sends every token to "
                "every expert. Set it to none"
            )
