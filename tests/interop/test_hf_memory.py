"""Loading needs less memory, besides the shards, than the largest tensor has."""

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent.parent
WIDTH = 512


def write(folder: Path, dtype: str, vocab: int, *, tied: bool, layers: int) -> Path:
    """Write a Llama whose embedding is by far the largest tensor. Values repeat, so that writing is quick."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH, "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 4,
        "max_position_embeddings": 128, "tie_word_embeddings": tied,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    block = np.random.default_rng(0).standard_normal((512, WIDTH), np.float32).astype(jnp.dtype(dtype))

    def matrix(rows: int, columns: int = WIDTH) -> np.ndarray:
        return np.tile(block, (-(-rows // 512), columns // WIDTH))[:rows]

    tensors = {"model.embed_tokens.weight": matrix(vocab), "model.norm.weight": block[0]}
    if not tied:
        tensors["lm_head.weight"] = matrix(vocab)
    for i in range(layers):
        shapes = {
            "self_attn.q_proj": WIDTH,
            "self_attn.k_proj": WIDTH // 2,
            "self_attn.v_proj": WIDTH // 2,
            "self_attn.o_proj": WIDTH,
        }
        shapes |= {"mlp.gate_proj": 2 * WIDTH, "mlp.up_proj": 2 * WIDTH}
        tensors |= {f"model.layers.{i}.{name}.weight": matrix(rows) for name, rows in shapes.items()}
        tensors[f"model.layers.{i}.mlp.down_proj.weight"] = matrix(WIDTH, 2 * WIDTH)
        tensors |= {
            f"model.layers.{i}.{name}.weight": block[0] for name in ("input_layernorm", "post_attention_layernorm")
        }
    save_file(tensors, folder / "model.safetensors")
    return folder


def measure(folder: Path, dtype: str, devices: int) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.interop.hf_memory", str(folder), dtype, str(devices)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="memory peaks are read from Linux's /proc"
)


def hold(found: dict[str, float]) -> None:
    """Check that loading needs less than 0.8 times the largest tensor besides the shards. A bound above 1 would accept
    a loader that reads the whole tensor."""
    over = found["peak"] - found["shards"]
    assert found["largest"] > 1e8
    assert over < 0.8 * found["largest"], (
        f"{over / 1e6:.0f} MB besides the shards, largest tensor {found['largest'] / 1e6:.0f} MB"
    )


@needs_proc
def test_loading_bfloat16_as_float32_needs_less_than_the_largest_tensor(tmp_path):
    hold(measure(write(tmp_path / "m", "bfloat16", 1 << 17, tied=True, layers=1), "float32", 1))


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_loading_each_dtype_needs_less_than_the_largest_tensor(tmp_path, stored, devices):
    folder = write(tmp_path / "m", stored, 1 << (17 if stored == "bfloat16" else 16), tied=False, layers=4)
    for dtype in ("float32", "bfloat16"):
        hold(measure(folder, dtype, devices))
