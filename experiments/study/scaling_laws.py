"""Published scaling laws: the loss in nats per token as a function of parameters and training tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DenseLaw:
    """L(N, D) = floor + A / N^alpha + B / D^beta for N parameters and D tokens (Hoffmann et al. 2022, sec. 3.3).

    A training run of N parameters and D tokens costs 6 N D FLOPs. N is the number of parameters that the authors of the
    fit counted; Hoffmann et al. include embeddings.
    """

    floor: float  # nats per token: the loss of an infinite network after infinitely many tokens
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Return the loss in nats per token."""
        return self.floor + self.A / parameters**self.alpha + self.B / tokens**self.beta

    def optimal_parameters(self, flops: float) -> float:
        """Return the parameters with the lowest loss for `flops` training FLOPs (Hoffmann et al. 2022, eq. 4)."""
        total = self.alpha + self.beta
        scale = (self.alpha * self.A / (self.beta * self.B)) ** (1 / total)
        return scale * (flops / 6) ** (self.beta / total)

    def optimal_tokens(self, flops: float) -> float:
        """Return the tokens that go with `optimal_parameters`."""
        return flops / 6 / self.optimal_parameters(flops)


# Hoffmann et al. 2022, sec. 3.3, as printed: two digits of the exponents.
HOFFMANN_ROUNDED = DenseLaw(floor=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
# The same fit with the four digits in the TeX source of the paper. Rounding the exponents changes the optimal number of
# parameters of Chinchilla's budget by 25 %, and only these digits give the 40 B of the paper.
HOFFMANN = DenseLaw(floor=1.69, A=406.4, B=410.7, alpha=0.3392, beta=0.2849)
# Besiroglu et al. 2024: a fit of data read from the figures of Hoffmann et al., which gives about 20 tokens per
# parameter, like their other two approaches.
BESIROGLU = DenseLaw(floor=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)


@dataclass(frozen=True)
class GranularityLaw:
    """L(N, D, G) = floor + (g / G^gamma + a) / N^alpha + b / D^beta (Krajewski et al. 2024, eq. 9).

    N counts the parameters of all experts and of attention, without embeddings; `total_parameters` gives it. The
    granularity G is the hidden width of a dense network's MLP over that of one expert; a token uses G experts.
    """

    floor: float
    a: float
    b: float
    g: float
    alpha: float
    beta: float
    gamma: float

    def loss(self, parameters: float, tokens: float, granularity: float) -> float:
        """Return the loss in nats per token."""
        by_size = (self.g / granularity**self.gamma + self.a) / parameters**self.alpha
        return self.floor + by_size + self.b / tokens**self.beta


def total_parameters(active: float, expansion: int) -> float:
    """Return N from the parameters that a token uses, which the paper's tables give. `expansion`: parameters of all
    experts over those of the experts that a token uses.

    A block has 4 d^2 parameters in attention and 8 d^2 active ones in experts, so N = active * (8 E + 4) / 12.
    """
    return active * (8 * expansion + 4) / 12


# Krajewski et al. 2024, table 1, mixtures of experts with an expansion of 64. Root mean square error of the fit: 0.015.
KRAJEWSKI = GranularityLaw(floor=0.47, a=18.1, b=30.8, g=2.1, alpha=0.115, beta=0.147, gamma=0.58)
