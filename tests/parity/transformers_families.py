"""Run transformers on the folders of `families.py`, in float32 with eager attention."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.parity.families import Family, tokens, write_folder

MARGIN = 1e-4  # smallest gap between chosen and rejected scores, so that rounding cannot change a choice
ROUNDING = 8e-6  # largest difference of a logit between float32 and float64, so that rounding cannot hide wrong options


def read(folder: Path) -> PreTrainedModel:
    """Return the model in a folder. Raises AssertionError if a tensor is missing, left over or has another shape."""
    model, problems = AutoModelForCausalLM.from_pretrained(
        folder,
        attn_implementation="eager",
        experts_implementation="eager",
        dtype=torch.float32,
        output_loading_info=True,
    )
    assert not any(problems.values()), problems
    return model.eval()


def on_disk(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """Return the tensors that save_pretrained writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        found = {}
        for path in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(path, framework="np") as file:
                found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


def reference(family: Family) -> dict[str, np.ndarray]:
    """Return `logits`, `loss`, `tensors` (names and shapes as JSON), and `d_NAME` if the family has gradients."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "config.json").write_text(json.dumps(family.config))
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        named = {name: x.shape for name, x in sorted(on_disk(empty).items())}
        model = read(write_folder(family, folder, named))
        _refuse_close_calls(family, model)
        ids = torch.from_numpy(tokens(family)).long()
        out = model(ids, labels=ids)
        found = {"logits": out.logits.detach().numpy(), "loss": out.loss.detach().numpy()}
        if family.gradients:
            out.loss.backward()
            buffers = {name for name, _ in model.named_buffers()}
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(parameter.grad)
            found |= {f"d_{name}": x for name, x in on_disk(model).items() if name not in buffers}
        _refuse_rounding(family, read(folder), found["logits"])
    found["tensors"] = np.frombuffer(json.dumps(named).encode(), np.uint8)
    return found


def logits_of(folder: Path, family: Family) -> np.ndarray:
    """Return the logits of a saved folder's network."""
    with torch.no_grad():
        return read(folder)(torch.from_numpy(tokens(family)).long()).logits.numpy()


def _refuse_rounding(family: Family, model: PreTrainedModel, logits: np.ndarray) -> None:
    """Raise AssertionError if float32 rounding changes the logits too much.

    The comparison is with transformers in double precision, although its norms stay in float32.
    """
    with torch.no_grad():
        exact = model.double()(torch.from_numpy(tokens(family)).long()).logits.numpy()
    far = np.abs(exact - logits).max()
    assert far < ROUNDING, f"{family.name}: rounding changes the logits by {far:.1e}. Try another seed"


def _refuse_close_calls(family: Family, model: PreTrainedModel) -> None:
    """Raise AssertionError if the last chosen and the first rejected score are nearly equal."""
    config = model.config
    top_k = getattr(config, "num_experts_per_tok", None)
    seen = []

    def hook(gate: torch.nn.Module) -> Callable[..., None]:
        return lambda module, inputs, outputs: seen.append((gate, outputs[0]))

    handles = [
        m.register_forward_hook(hook(m)) for name, m in model.named_modules() if name.endswith((".gate", ".router"))
    ]
    with torch.no_grad():
        model(torch.from_numpy(tokens(family)).long())
    for handle in handles:
        handle.remove()
    assert bool(seen) == (top_k is not None), f"{family.name}: {len(seen)} routers"

    def gap(scores: torch.Tensor, chosen: int) -> float:
        ranked = scores.sort(-1, descending=True).values
        return (ranked[:, chosen - 1] - ranked[:, chosen]).min().item()

    for gate, logits in seen:
        scores = logits.reshape(-1, logits.shape[-1])
        bias = getattr(gate, "e_score_correction_bias", None)
        if bias is not None:
            scores = scores.sigmoid() + bias
            best = scores.view(len(scores), config.n_group, -1).topk(2).values.sum(-1)
            assert gap(best, config.topk_group) > MARGIN, f"{family.name}: groups nearly tie. Try another seed"
            out = torch.ones_like(best).scatter(1, best.topk(config.topk_group).indices, 0).bool()
            scores = scores.masked_fill(out.repeat_interleave(scores.shape[1] // config.n_group, 1), -1e9)
        else:
            scores = scores.softmax(-1)
        assert gap(scores, top_k) > MARGIN, f"{family.name}: experts nearly tie. Try another seed"
