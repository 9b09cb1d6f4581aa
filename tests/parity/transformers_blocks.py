"""Run transformers' MoE layers on the weights of `cases.py`: outputs, choices, losses and gradients."""

from __future__ import annotations

import numpy as np
import torch
from transformers.models.deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func
from transformers.models.olmoe import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

from tests.parity.cases import Case, D, draw

MARGIN = 1e-4  # smallest gap between chosen and rejected scores, so that rounding cannot change a choice


def block(case: Case) -> torch.nn.Module:
    """Return transformers' layer for the case, before its weights are set."""
    moe = case.moe
    # The eager implementation loops over experts, the simplest in transformers.
    same = dict(hidden_size=D, num_experts_per_tok=moe.top_k, hidden_act="silu", experts_implementation="eager")
    normalized = moe.weights in ("renormalized", "sigmoid_renormalized")
    if case.family == "mixtral":
        return MixtralSparseMoeBlock(
            MixtralConfig(**same, num_local_experts=moe.num_experts, intermediate_size=moe.hidden_dim)
        )
    if case.family == "qwen3_moe":
        return Qwen3MoeSparseMoeBlock(
            Qwen3MoeConfig(
                **same, num_experts=moe.num_experts, moe_intermediate_size=moe.hidden_dim, norm_topk_prob=normalized
            )
        )
    if case.family == "olmoe":
        return OlmoeSparseMoeBlock(
            OlmoeConfig(
                **same, num_experts=moe.num_experts, intermediate_size=moe.hidden_dim, norm_topk_prob=normalized
            )
        )
    return DeepseekV3MoE(
        DeepseekV3Config(
            **same,
            n_routed_experts=moe.num_experts,
            moe_intermediate_size=moe.hidden_dim,
            n_shared_experts=moe.shared_experts,
            norm_topk_prob=normalized,
            routed_scaling_factor=moe.scale,
            n_group=moe.groups[0],
            topk_group=moe.groups[1],
        )
    )


def reference(case: Case) -> dict[str, np.ndarray]:
    """Return transformers' float32 output, choices, losses and every gradient of `(y * functional).sum()`."""
    drawn = {name: torch.from_numpy(value) for name, value in draw(case).items()}
    layer = block(case).float().eval()
    layer.gate.weight.data.copy_(drawn["router"])
    layer.experts.gate_up_proj.data.copy_(drawn["gate_up"])
    layer.experts.down_proj.data.copy_(drawn["down"])
    weights = {"router": layer.gate.weight, "gate_up": layer.experts.gate_up_proj, "down": layer.experts.down_proj}
    if "bias" in drawn:
        layer.gate.e_score_correction_bias.copy_(drawn["bias"])
    if "shared_up" in drawn:
        for part in ("gate", "up", "down"):
            linear = getattr(layer.shared_experts, f"{part}_proj")
            linear.weight.data.copy_(drawn[f"shared_{part}"])
            weights[f"shared_{part}"] = linear.weight

    x = drawn["x"].clone().requires_grad_()
    y = layer(x)
    (y * drawn["functional"]).sum().backward()
    found = {"y": y, "d_x": x.grad, **{f"d_{name}": weight.grad for name, weight in weights.items()}}
    with torch.no_grad():
        logits, scores, indices = layer.gate(x)
        _refuse_close_calls(case, logits, drawn.get("bias"))
        order = indices.argsort(-1)
        found |= {"logits": logits, "indices": indices.gather(1, order), "weights": scores.gather(1, order)}
    found |= _losses(case, logits, drawn["mask"])
    return {
        name: value.detach().numpy().astype(np.int32 if name == "indices" else np.float32)
        for name, value in found.items()
    }


def _losses(case: Case, logits: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a softmax router's load-balance loss with and without padding and over two layers, its z-loss, and their
    gradients with respect to the logits."""
    if case.moe.weights.startswith("sigmoid"):
        return {}
    logits = logits.clone().requires_grad_()
    E, k = case.moe.num_experts, case.moe.top_k
    losses = {
        "load_balance": load_balancing_loss_func((logits,), E, k),
        "load_balance_masked": load_balancing_loss_func((logits,), E, k, attention_mask=mask),
        "z": router_z_loss_func(logits.view(*mask.shape, E)),
    }
    gradients = {f"d_logits_{name}": torch.autograd.grad(loss, logits)[0] for name, loss in losses.items()}
    second = 2 * logits.roll(1, dims=-1)  # logits of another layer
    layers = {"logits_second": second, "load_balance_layers": load_balancing_loss_func((logits, second), E, k)}
    return losses | gradients | layers


def _refuse_close_calls(case: Case, logits: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raise AssertionError if the last chosen and the first rejected score are nearly equal."""

    def gap(scores: torch.Tensor, chosen: int) -> float:
        ranked = scores.sort(-1, descending=True).values
        return (ranked[:, chosen - 1] - ranked[:, chosen]).min().item()

    n, used = case.moe.groups
    scores = logits.softmax(-1) if bias is None else logits.sigmoid() + bias
    grouped = scores.view(len(scores), n, -1)
    if n > 1:
        best = grouped.topk(2).values.sum(-1)
        assert gap(best, used) > MARGIN, f"{case.name}: groups nearly tie. Try another seed"
        out = torch.ones_like(best).scatter(1, best.topk(used).indices, 0).bool()
        scores = grouped.masked_fill(out[..., None], -1e9).reshape(scores.shape)
    assert gap(scores, case.moe.top_k) > MARGIN, f"{case.name}: experts nearly tie. Try another seed"
