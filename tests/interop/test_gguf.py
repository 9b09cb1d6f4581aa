"""Tiny GGUF files of Llama, laid out as by llama.cpp's converter, against Hugging Face folders of the same weights."""

import json
import math
import struct
import tracemalloc

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from interop.gguf import open_gguf
from interop.gguf_file import GGUFFile
from interop.load import ModelFilesError, load
from interop.published import open_published
from interop.translate import UnsupportedModelError
from model.positions import inverse_frequencies
from model.transformer import forward, logits
from sharding.rules import ShardingRules

D, F, V, N, K, H, LAYERS = 64, 96, 96, 4, 2, 16, 2
JSON = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": V,
    "num_hidden_layers": LAYERS,
    "hidden_size": D,
    "head_dim": H,
    "max_position_embeddings": 256,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "rms_norm_eps": 1e-5,
    "intermediate_size": F,
    "rope_theta": 10_000.0,
}
METADATA = {
    "block_count": LAYERS,
    "context_length": 256,
    "embedding_length": D,
    "feed_forward_length": F,
    "attention.head_count": N,
    "attention.head_count_kv": K,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "vocab_size": V,
    "rope.dimension_count": H,
}
TYPES = gguf.GGMLQuantizationType
LAYER = {
    "attn_norm": ("input_layernorm", (D,)), "ffn_norm": ("post_attention_layernorm", (D,)),
    "attn_q": ("self_attn.q_proj", (N * H, D)), "attn_k": ("self_attn.k_proj", (K * H, D)),
    "attn_v": ("self_attn.v_proj", (K * H, D)), "attn_output": ("self_attn.o_proj", (D, N * H)),
    "ffn_gate": ("mlp.gate_proj", (F, D)), "ffn_up": ("mlp.up_proj", (F, D)), "ffn_down": ("mlp.down_proj", (D, F)),
}  # fmt: skip
NAMES = {
    "token_embd": ("model.embed_tokens", (V, D)),
    "output_norm": ("model.norm", (D,)),
    "output": ("lm_head", (V, D)),
} | {
    f"blk.{i}.{theirs}": (f"model.layers.{i}.{ours}", shape)
    for i in range(LAYERS)
    for theirs, (ours, shape) in LAYER.items()
}


def permuted(weights, heads):
    """Return rows of queries or keys in the order of llama.cpp's convert_hf_to_gguf.py."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def drawn():
    rng = np.random.default_rng(0)
    return {
        f"{name}.weight": (1.0 + 0.2 * rng.normal(size=s) if len(s) == 1 else rng.normal(size=s) / s[-1] ** 0.5).astype(
            np.float32
        )
        for name, s in NAMES.values()
    }


def write(
    path,
    kind=TYPES.F32,
    *,
    tied=False,
    change=None,
    metadata=None,
    general=None,
    architecture="llama",
    permute=permuted,
    extra=None,
):
    """Write the drawn weights to a GGUF file; return them after quantization, by Hugging Face's names."""
    writer = gguf.GGUFWriter(path, architecture)
    values = {f"{architecture}.{key}": value for key, value in (METADATA | (metadata or {})).items()} | (general or {})
    for key, value in values.items():
        add = writer.add_array if isinstance(value, list) else writer.add_key_value
        add(key, value, *() if isinstance(value, list) else (gguf.GGUFValueType.get_type(value),))
    weights, left = drawn() | (change or {}), {}
    for theirs, (ours, shape) in NAMES.items():
        if tied and theirs == "output":
            continue
        of = kind if len(shape) > 1 else TYPES.F32
        heads = {"attn_q": N, "attn_k": K}.get(theirs.rpartition(".")[2])
        order = lambda w, heads=heads: w if heads is None else permute(w, heads)
        stored = gguf.quantize(order(weights[f"{ours}.weight"]), of)
        writer.add_tensor(f"{theirs}.weight", stored, raw_dtype=of)
        left[f"{ours}.weight"] = (
            gguf.dequantize(gguf.quantize(weights[f"{ours}.weight"], of), of).reshape(shape).astype(np.float32)
        )
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return left


def loaded(path):
    found = open_published(path)
    return load(found.source, found.tensor_map, found.config, ShardingRules())


@jax.jit
def run(model, tokens_BT):
    return logits(model, forward(model, tokens_BT).hidden_BTD)


TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, V, (2, 24)))


@pytest.mark.parametrize(
    ("kind", "tied"),
    [("Q8_0", True), *((kind, False) for kind in ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "F16", "BF16", "F32"))],
)
def test_gguf_matches_a_folder_of_the_dequantized_weights(tmp_path, kind, tied):
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(write(tmp_path / "a.gguf", TYPES[kind], tied=tied), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(JSON | {"tie_word_embeddings": tied}))
    ours, theirs = loaded(tmp_path / "a.gguf"), loaded(folder)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    np.testing.assert_array_equal(run(ours, TOKENS), run(theirs, TOKENS))


def test_unpermuted_rows_change_the_logits(tmp_path):
    write(tmp_path / "a.gguf")
    write(tmp_path / "b.gguf", permute=lambda weights, heads: weights)
    assert np.abs(run(loaded(tmp_path / "a.gguf"), TOKENS) - run(loaded(tmp_path / "b.gguf"), TOKENS)).max() > 0.1


def test_biases_are_read_in_the_order_of_their_rows(tmp_path):
    q_bias = np.arange(N * H, dtype=np.float32)
    write(tmp_path / "a.gguf", extra={"blk.0.attn_q.bias": permuted(q_bias, N)})
    values, source = open_gguf(tmp_path / "a.gguf")
    assert values["attention_bias"]
    np.testing.assert_array_equal(source.read("model.layers.0.self_attn.q_proj.bias"), q_bias)
    with pytest.raises(ModelFilesError, match=r"o_proj\.bias"):  # Llama has all biases or none
        open_published(tmp_path / "a.gguf")


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_decoding_in_slices_equals_decoding_at_once(tmp_path, kind):
    block, size = gguf.GGML_QUANT_SIZES[TYPES[kind]]
    raw = np.random.default_rng(0).integers(0, 64, (700, 2 * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("x", raw, raw_dtype=TYPES[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    rows = np.random.default_rng(1).permutation(700)
    found = GGUFFile(tmp_path / "a.gguf").array("x", rows)
    assert found.shape == (700, 2 * block)
    np.testing.assert_array_equal(found[rows], gguf.dequantize(raw, TYPES[kind]))


def test_reading_needs_little_memory_besides_the_tensor(tmp_path):
    rows, width = 1024, 8192
    large = np.full((rows, width), 0.5, np.float32)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("x", gguf.quantize(large, TYPES.Q8_0), raw_dtype=TYPES.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "a.gguf")
    tracemalloc.start()
    try:
        array = file.array("x", np.arange(rows)[::-1])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert array.nbytes <= peak <= 1.2 * array.nbytes


def test_floats_that_need_no_reordering_are_views_of_the_file(tmp_path):
    write(tmp_path / "a.gguf", TYPES.F16)
    _, source = open_gguf(tmp_path / "a.gguf")
    up = source.read("model.layers.0.mlp.up_proj.weight")
    assert up.dtype == np.float16 and not up.flags.owndata and not up.flags.writeable
    source.release()
    np.testing.assert_array_equal(up, drawn()["model.layers.0.mlp.up_proj.weight"].astype(np.float16))


def divisors(factor, low=1.0, high=4.0, original=8192):
    """Return rope_freqs.weight as llama.cpp's converter writes it for Llama 3.1."""
    found = []
    for i in range(0, H, 2):
        wavelength = 2 * math.pi * 10_000.0 ** (i / H)
        if wavelength < original / high:
            found.append(1.0)
        elif wavelength > original / low:
            found.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.asarray(found, np.float32)


@pytest.mark.parametrize(("factor", "original"), [(8.0, 8192), (32.0, 8192), (4.0, 4096)])
def test_frequency_factors_are_read_as_llama_3_scaling(tmp_path, factor, original):
    written = divisors(factor, original=original)
    write(tmp_path / "a.gguf", extra={"rope_freqs.weight": written})
    scaling = open_published(tmp_path / "a.gguf").config.position.scaling
    assert (
        scaling is not None
        and scaling.kind == "llama3"
        and (scaling.factor, scaling.original_length) == (factor, original)
    )
    np.testing.assert_allclose(
        inverse_frequencies(H, 10_000.0, None) / inverse_frequencies(H, 10_000.0, scaling), written, rtol=1e-6
    )


def test_other_frequency_factors_are_refused(tmp_path):
    for name, wrong in (("a", divisors(8.0, high=3.0)), ("b", divisors(8.0) * 1.01)):
        write(tmp_path / f"{name}.gguf", extra={"rope_freqs.weight": wrong})
        with pytest.raises(UnsupportedModelError, match=r"rope_freqs\.weight"):
            open_published(tmp_path / f"{name}.gguf")


@pytest.mark.parametrize(
    ("metadata", "kind"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, "linear"),
        ({"rope.scale_linear": 2.0}, "linear"),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.original_context_length": 128},
            "yarn",
        ),
        ({"rope.scaling.type": "none"}, None),
    ],
)
def test_rope_scaling_is_read_from_metadata(tmp_path, metadata, kind):
    write(tmp_path / "a.gguf", metadata=metadata)
    scaling = open_published(tmp_path / "a.gguf").config.position.scaling
    assert (scaling and (scaling.kind, scaling.factor)) == (kind and (kind, 2.0))
    assert kind != "yarn" or scaling.original_length == 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "qwen2"}, "general.architecture = 'qwen2'.*'llama'"),
        ({"metadata": {"expert_count": 8}}, "expert_count = 8.*safetensors"),
        ({"metadata": {"attention.sliding_window": 128}}, "sliding_window = 128"),
        ({"metadata": {"rope.dimension_count": 8}}, "dimension_count = 8"),
        ({"metadata": {"rope.scaling.type": "longrope"}}, "longrope.*yarn"),
        ({"metadata": {"attention.new_thing": 3}}, "llama.attention.new_thing = 3"),
        ({"metadata": {"attention.head_count_kv": [2, 4]}}, "head_count_kv differs between layers"),
        ({"general": {"split.count": 2}}, "one of 2 parts.*merge"),
        ({"general": {"general.type": "adapter"}}, "general.type = 'adapter'"),
        (
            {
                "extra": {"rope_freqs.weight": divisors(8.0)},
                "metadata": {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
            },
            "not supported together",
        ),
        ({"extra": {"blk.0.attn_q.steps": np.zeros(4, np.int8)}}, "I8"),
    ],
)
def test_unsupported_files_are_refused_by_name(tmp_path, change, message):
    write(tmp_path / "a.gguf", **change)
    with pytest.raises(UnsupportedModelError, match=message):
        open_published(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metadata": {"vocab_size": 95}}, "vocab_size has 95 tokens.*96 rows"),
        ({"general": {"tokenizer.ggml.tokens": ["a", "b"]}}, "tokens has 2 tokens.*96 rows"),
        ({"metadata": {"block_count": 3}}, r"model\.layers\.2"),
        ({"metadata": {"feed_forward_length": 64}}, r"mlp\.up_proj"),
        ({"extra": {"blk.0.attn_extra.weight": np.zeros(32, np.float32)}}, r"blk\.0\.attn_extra\.weight"),
    ],
)
def test_inconsistent_files_are_refused(tmp_path, change, message):
    write(tmp_path / "a.gguf", **change)
    with pytest.raises(ModelFilesError, match=message):
        open_published(tmp_path / "a.gguf")


def test_a_truncated_file_is_refused(tmp_path):
    write(tmp_path / "a.gguf", TYPES.Q4_0, general={"tokenizer.ggml.tokens": [f"token {i}" for i in range(V)]})
    whole = (tmp_path / "a.gguf").read_bytes()
    cut = tmp_path / "b.gguf"
    for size in [*range(0, 5000, 61), *range(5000, len(whole), 9001), len(whole) - 4096]:
        cut.write_bytes(whole[:size])
        with pytest.raises(ModelFilesError, match=r"b\.gguf: .*(empty|not a GGUF|ends inside|truncated)"):
            open_gguf(cut)


def test_damaged_files_are_refused(tmp_path):
    write(tmp_path / "a.gguf")
    whole, other = (tmp_path / "a.gguf").read_bytes(), tmp_path / "b.gguf"
    for start, new, error, message in (
        (0, b"GGML", ModelFilesError, "not a GGUF file"),
        (4, struct.pack("<I", 1), UnsupportedModelError, "version 1"),
        (4, struct.pack(">I", 3), UnsupportedModelError, "big-endian"),
        (8, struct.pack("<Q", 1 << 60), ModelFilesError, "damaged|ends inside"),
        (16, struct.pack("<Q", 1 << 60), ModelFilesError, "damaged|ends inside"),
        (24, struct.pack("<Q", 1 << 63), ModelFilesError, "ends inside"),
    ):
        other.write_bytes(whole[:start] + new + whole[start + len(new) :])
        with pytest.raises(error, match=message):
            open_gguf(other)
    at = whole.index(b"blk.1.ffn_down.weight") + len(b"blk.1.ffn_down.weight") + 4 + 2 * 8 + 4  # its offset
    other.write_bytes(whole[:at] + struct.pack("<Q", 1 << 30) + whole[at + 8 :])
    with pytest.raises(ModelFilesError, match=r"blk\.1\.ffn_down\.weight ends at byte"):
        open_gguf(other)
    with pytest.raises(ModelFilesError, match=r"missing\.gguf"):
        open_gguf(tmp_path / "missing.gguf")


def offset_of(whole: bytes, name: str, dims: int = 2) -> int:
    """Return the position in the header of a tensor's data offset."""
    return whole.index(name.encode()) + len(name) + 4 + dims * 8 + 4


def test_tensors_that_do_not_tile_the_data_are_refused(tmp_path):
    """ggml's readers require it: a file in which tensors share bytes, or bytes belong to no tensor, is damaged."""
    write(tmp_path / "a.gguf", general={"general.alignment": 32})
    whole, other = (tmp_path / "a.gguf").read_bytes(), tmp_path / "b.gguf"
    up, down = "blk.0.ffn_up.weight", "blk.0.ffn_down.weight"
    at = offset_of(whole, up)
    begins = struct.unpack("<Q", whole[at : at + 8])[0]
    alignment = whole.index(b"general.alignment") + len("general.alignment") + 4
    for change, message in (
        ({offset_of(whole, down): begins}, f"ffn_(up|down)\\.weight begins at byte .* {up}|{down} .* they overlap"),
        ({at: begins - 32}, f"{up} begins at byte .*, but blk.0.ffn_gate.weight ends at byte .*: they overlap"),
        ({at: begins + 32}, f"{up} begins at byte .*, not at .*, the next multiple of 32 after blk.0.ffn_gate.weight"),
        ({at: begins + 1}, f"{up} begins at byte .*, not at"),
        ({alignment: 48}, r"general\.alignment = 48: must be a power of 2"),
        ({alignment: 0}, r"general\.alignment = 0: must be"),
    ):
        damaged = bytearray(whole)
        for place, value in change.items():
            code = "<I" if place == alignment else "<Q"
            struct.pack_into(code, damaged, place, value)
        other.write_bytes(damaged)
        with pytest.raises(ModelFilesError, match=message):
            open_gguf(other)
    other.write_bytes(whole + b"\0" * 32)
    with pytest.raises(ModelFilesError, match=r"32 bytes follow blk\.1\.\w+\.weight, the last tensor"):
        open_gguf(other)


def test_a_damaged_header_is_refused_or_read_as_the_library_reads_it(tmp_path):
    write(tmp_path / "a.gguf", general={"tokenizer.ggml.tokens": [f"token {i}" for i in range(V)]})
    whole, rng, other = (tmp_path / "a.gguf").read_bytes(), np.random.default_rng(0), tmp_path / "b.gguf"
    header, accepted = len(whole) - sum(t.size for t in GGUFFile(tmp_path / "a.gguf").tensors.values()), 0
    for at in rng.integers(0, header, 400):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.integers(8)
        other.write_bytes(damaged)
        try:
            file = GGUFFile(other)
        except (ModelFilesError, UnsupportedModelError):
            continue
        accepted += 1
        theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(other).tensors}
        assert theirs.keys() == file.tensors.keys()
        for name, tensor in file.tensors.items():
            assert (theirs[name].data_offset, theirs[name].n_bytes) == (tensor.offset, tensor.size), name
            assert (
                tuple(theirs[name].shape.tolist()[::-1]) == tensor.shape
                and theirs[name].tensor_type.name == tensor.kind
            )
    assert 0 < accepted < 400


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_weights_that_are_not_finite_are_refused(tmp_path, kind):
    name = "model.layers.1.mlp.down_proj.weight"
    ruined = drawn()[name]
    ruined[3, 5] = np.inf
    with np.errstate(all="ignore"):
        write(tmp_path / "a.gguf", TYPES[kind], change={name: ruined})
    with pytest.raises(ModelFilesError, match=r"model\.layers\.1\.mlp\.down_proj\.weight: .*not finite"):
        loaded(tmp_path / "a.gguf")
