"""Reading published models: values match an independent writer's, and damage is reported before weights are read."""

import json
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

import interop.check as checking
import interop.load as loading
from interop import llama
from interop.load import ModelFilesError, abstract, load
from interop.published import Renamed, open_published
from interop.safetensors import SafetensorsFolder
from interop.translate import Keys, UnsupportedModelError
from sharding.mesh import MeshConfig, make_mesh
from sharding.rules import ShardingRules
from tests.interop.hf_folder import CONFIG, EMBEDDING, HEAD, D, tensors, write

INDEX = "model.safetensors.index.json"
RULES = ShardingRules()
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
DTYPES = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "int64",
    "int8",
    "uint8",
    "uint16",
    "bool",
)


def same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def test_every_dtype_is_read_as_the_library_wrote_it(tmp_path):
    rng = np.random.default_rng(0)
    held = {name: (4 * rng.standard_normal((3, 5))).clip(-9, 9).astype(jnp.dtype(name)) for name in DTYPES}
    held |= {"scalar": np.full((), 2.5, np.float32), "empty": np.zeros((0, 4), np.float32), "odd": np.ones(3, np.int8)}
    save_file(held, tmp_path / "model.safetensors")
    source = SafetensorsFolder(tmp_path)
    assert source.tensors.keys() == held.keys()
    for name, wanted in held.items():
        assert same(source.read(name), wanted), name
        assert (source.tensors[name].shape, source.tensors[name].dtype) == (wanted.shape, wanted.dtype.name)
        assert source.tensors[name].file == "model.safetensors"
    views = {name: source.read(name) for name in held}
    source.release()
    assert all(same(views[name], held[name]) for name in held)  # released pages are read again


def test_a_folder_with_an_index_is_read_from_its_shards_only(tmp_path):
    held = tensors()
    write(tmp_path, held, shards=3)
    save_file(
        {"tok_embeddings.weight": held[EMBEDDING]}, tmp_path / "consolidated.safetensors"
    )  # as in Mistral's releases
    source = SafetensorsFolder(tmp_path)
    assert all(same(source.read(name), held[name]) for name in held)
    (tmp_path / INDEX).unlink()
    with pytest.raises(ModelFilesError, match=r"4 safetensors files .* but no model.safetensors.index.json"):
        (tmp_path / "extra.safetensors").write_bytes((tmp_path / "consolidated.safetensors").read_bytes())
        (tmp_path / FIRST.replace("2.", "3.")).rename(tmp_path / "a.safetensors")
        (tmp_path / SECOND.replace("2.", "3.")).rename(tmp_path / "b.safetensors")
        (tmp_path / "model-00003-of-00003.safetensors").unlink()
        SafetensorsFolder(tmp_path)


def test_shards_without_an_index_are_read_by_their_numbers(tmp_path):
    held = tensors()
    write(tmp_path, held, shards=2)
    (tmp_path / INDEX).unlink()
    source = SafetensorsFolder(tmp_path)
    assert source.tensors.keys() == held.keys() and "by their numbers" in source.notes[0]
    (tmp_path / SECOND).unlink()
    with pytest.raises(ModelFilesError, match=f"1 of its 2 shards are missing: {SECOND}"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize(
    ("stored", "small_bytes", "slab_bytes", "on_mesh"),
    [("float32", 1 << 20, 700, True), ("bfloat16", 10_000, 5000, True), ("float32", 0, 3000, False)],
    ids=["small, on a mesh", "large, on a mesh", "large, one device"],
)
def test_loaded_weights_match_the_files_for_any_slab_size(
    tmp_path, monkeypatch, stored, small_bytes, slab_bytes, on_mesh
):
    held = tensors(stored)
    write(tmp_path, held, shards=2)
    monkeypatch.setattr(loading, "SLAB_BYTES", slab_bytes)
    monkeypatch.setattr(loading, "SMALL_BYTES", small_bytes)
    published, seen = open_published(tmp_path), []
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)) if on_mesh else None
    found = load(
        published.source,
        published.tensor_map,
        published.config,
        RULES,
        mesh,
        progress=lambda _, size: seen.append(size),
    )
    assert sum(seen) == sum(x.size for x in held.values())
    block = found.stacks[0][0]
    for i in range(2):
        layer = f"model.layers.{i}."
        q = held[layer + "self_attn.q_proj.weight"].astype(np.float32)
        np.testing.assert_array_equal(block.attention.q.value[i], q.reshape(4, 8, D).transpose(2, 0, 1))
        up = [held[f"{layer}mlp.{name}_proj.weight"].astype(np.float32).T for name in ("gate", "up")]
        np.testing.assert_array_equal(block.mlp.up.value[i], np.stack(up, 1))
        np.testing.assert_array_equal(
            block.attention_norm.scale.value[i], held[layer + "input_layernorm.weight"].astype(np.float32)
        )
    np.testing.assert_array_equal(found.head.value, held[HEAD].astype(np.float32).T)
    np.testing.assert_array_equal(found.embedding.value, held[EMBEDDING].astype(np.float32))
    if mesh is not None:
        sharding = found.embedding.value.sharding
        assert sharding.mesh == mesh and not sharding.is_fully_replicated


@pytest.mark.parametrize(
    "config, axes, message",
    [
        (
            {"vocab_size": 97},
            {"tensor": 2},
            r"model.vocab_size = 97: .* 2 devices .*'tensor'.* mesh with 1 devices there",
        ),
        ({"hidden_size": 36}, {"tensor": 1}, r"model.embed_dim = 36: .* 8 devices .*'fsdp'.* with 1, 2, 3, 4 or 6 dev"),
        (
            {"num_key_value_heads": 2},
            {"tensor": 4},
            r"model.attention.num_kv_heads = 2: .* 4 devices .*weights.kv_heads",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_the_network_is_refused(config, axes, message):
    network = llama.to_config(Keys(CONFIG | config))
    mesh = make_mesh(MeshConfig(**axes))
    with pytest.raises(ValueError, match=message):  # `load` calls `abstract` first
        abstract(network, RULES, mesh)


def damage_header(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Return a function that rewrites the header of the first shard."""

    def damage(folder: Path) -> None:
        data = (folder / FIRST).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (folder / FIRST).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return damage


def cut(folder: Path, keep: int | float) -> None:
    data = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])


def index(folder: Path, change: Callable[[dict], object]) -> None:
    values = json.loads((folder / INDEX).read_text())
    change(values)
    (folder / INDEX).write_text(json.dumps(values))


def pickle_alone(folder: Path) -> None:
    for file in folder.glob("*safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")


TWICE = b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
TWICE = len(TWICE).to_bytes(8, "little") + TWICE
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "half a file": (lambda f: cut(f, 0.5), r"model-00001.*truncated: [\d,]+ bytes expected, [\d,]+ found"),
    "one byte less": (lambda f: cut(f, -1), "truncated"),
    "half a header": (lambda f: cut(f, 100), "truncated: [0-9,]+ bytes expected for its header alone, 100 found"),
    "empty file": (lambda f: cut(f, 0), "truncated: 0 bytes found"),
    "garbage": (lambda f: (f / FIRST).write_bytes(b"\xff" * 500), "header claims .* not a safetensors file"),
    "not JSON": (lambda f: (f / FIRST).write_bytes((9).to_bytes(8, "little") + b"{'a': 12}"), "header is not JSON"),
    "a web page": (lambda f: (f / FIRST).write_bytes(b"<!DOCTYPE html><html>"), "not a safetensors file"),
    "git lfs": (lambda f: (f / FIRST).write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "appended": (
        lambda f: (f / FIRST).write_bytes((f / FIRST).read_bytes() + b"\0" * 7),
        "7 bytes follow the last tensor",
    ),
    "a wrong shape": (
        damage_header(lambda h: h[EMBEDDING]["shape"].reverse() or h[EMBEDDING]["shape"].append(2)),
        "does not fit its",
    ),
    "an unknown dtype": (
        damage_header(lambda h: h[EMBEDDING].update(dtype="F31")),
        r"unknown dtype 'F31' \(known: F64",
    ),
    "an overlap": (damage_header(lambda h: h[EMBEDDING].update(data_offsets=h[HEAD]["data_offsets"])), "overlaps"),
    "a hole": (damage_header(lambda h: h.pop(EMBEDDING)), "unused before it|follow the last"),
    "a negative shape": (
        damage_header(lambda h: h[EMBEDDING].update(shape=[-96, -32])),
        r"has the invalid shape \[-96, -32\]",
    ),
    "a name twice": (lambda f: (f / FIRST).write_bytes(TWICE), "header is not JSON .a name occurs twice"),
    "no offsets": (damage_header(lambda h: h[EMBEDDING].pop("data_offsets")), "no valid data_offsets"),
    "a shard missing": (lambda f: (f / SECOND).unlink(), f"1 of 2 files .* missing: {SECOND}"),
    "a tensor elsewhere": (
        lambda f: index(f, lambda i: i["weight_map"].update({EMBEDDING: SECOND})),
        f"{EMBEDDING} should be in {SECOND}",
    ),
    "a tensor nowhere": (
        lambda f: index(f, lambda i: i["weight_map"].update({"x": SECOND})),
        "x should be in .* does not hold it",
    ),
    "a path out of the folder": (
        lambda f: index(f, lambda i: i["weight_map"].update(x="../x.safetensors")),
        "in the same folder",
    ),
    "an index of nothing": (lambda f: (f / INDEX).write_text("{}"), "holds no weight_map"),
    "a tensor twice": (lambda f: save_file(tensors(), f / SECOND), "is both in .* and in"),
    "a pickle": (pickle_alone, "pytorch_model.bin is a pickle, .*save_pretrained"),
    "nothing": (lambda f: [p.unlink() for p in f.glob("*safetensors*")], "holds no model"),
    "no config": (lambda f: (f / "config.json").unlink(), "there is no config.json"),
    "a config that is not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: is not JSON"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_reported_when_opening(tmp_path, damage):
    change, message = DAMAGES[damage]
    write(tmp_path, shards=2)
    open_published(tmp_path)
    change(tmp_path)
    with pytest.raises(ModelFilesError, match=message):
        open_published(tmp_path)


def test_a_wrong_total_size_is_only_noted(tmp_path):
    held = tensors()
    write(tmp_path, held, shards=2)
    assert open_published(tmp_path).notes == ()
    index(tmp_path, lambda i: i["metadata"].update(total_size=7))
    published = open_published(tmp_path)
    assert "total_size = 7" in published.notes[0] and same(published.source.read(HEAD), held[HEAD])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("small") / "x.safetensors"
    rng = np.random.default_rng(0)
    save_file(
        {"a": rng.random((2, 3)), "b": rng.random(4, np.float32), "c": np.arange(6, dtype=np.int8)},
        file,
        metadata={"k": "v"},
    )
    return file.read_bytes()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_header_is_refused_or_read_as_the_library_reads_it(small, tmp_path_factory, data):
    length = int.from_bytes(small[:8], "little")
    bytes_ = bytearray(small)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, 8 + length - 1))
        new = data.draw(
            st.sampled_from([b"", b"0", b"9", b'"', b"[", b"}", b",", b"-", b"e", b"\xff", b"\0", b"F", b"1", b"00"])
        )
        bytes_[at : at + data.draw(st.integers(0, 2))] = new
    folder = tmp_path_factory.mktemp("damaged")
    file = folder / "model.safetensors"
    file.write_bytes(bytes(bytes_[: data.draw(st.sampled_from([len(bytes_), len(bytes_) - 1, 20, 4]))]))
    try:
        source = SafetensorsFolder(folder)
        found = {name: source.read(name).copy() for name in source.tensors}
    except ModelFilesError:
        return
    with safe_open(file, "np") as library:
        assert set(library.keys()) == found.keys()
        assert all(same(library.get_tensor(name), found[name]) for name in found)


def test_mismatched_tensors_are_listed_in_a_table(tmp_path):
    held = tensors()
    q = "model.layers.0.self_attn.q_proj.weight"
    held["model.layers.0.self_attn.q_projj.weight"] = held.pop(q)
    held["model.norm.weight"] = held["model.norm.weight"][:-2]
    held["model.layers.1.mlp.down_proj.weight"] = held["model.layers.1.mlp.down_proj.weight"].astype(np.int8)
    write(tmp_path, held)
    with pytest.raises(ModelFilesError) as error:
        open_published(tmp_path)
    first, *rows = str(error.value).splitlines()
    assert "1 missing, 1 unexpected, 1 of another shape, 1 not floating-point" in first
    table = "\n".join(" ".join(row.split()) for row in rows)
    assert f"missing {q} [32, 32] (found model.layers.0.self_attn.q_projj.weight)" in table
    assert "shape model.norm.weight [32] required, [30] found" in table
    assert "unexpected model.layers.0.self_attn.q_projj.weight [32, 32]" in table
    assert "dtype model.layers.1.mlp.down_proj.weight int8" in table and "quantized in a way" in table


def test_a_long_table_is_cut_and_a_common_prefix_is_reported(tmp_path):
    write(tmp_path, {f"base.{name}": x for name, x in tensors().items()})
    with pytest.raises(ModelFilesError, match=r"exist with the prefix 'base\.'") as error:
        open_published(tmp_path)
    rows = [line for line in str(error.value).splitlines() if line.startswith("  ")]
    assert len(rows) == 21 and rows[-1] == "  ... and 22 more"


def test_old_buffers_are_ignored(tmp_path):
    write(tmp_path, tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)})
    assert len(open_published(tmp_path).tensor_map) == 21


def test_a_vocab_size_other_than_the_embedding_rows_is_refused(tmp_path):
    write(tmp_path, config={"vocab_size": 90})
    with pytest.raises(
        ModelFilesError,
        match=r"vocab_size is 90 in config.json, but model.embed_tokens.weight has 96 rows\. Set vocab_size to 96",
    ):
        open_published(tmp_path)


def test_tied_embeddings_must_equal_a_stored_head(tmp_path, monkeypatch):
    monkeypatch.setattr(checking, "SLAB_ROWS", 16)
    held = tensors()
    write(tmp_path / "two", held, config={"tie_word_embeddings": True})
    with pytest.raises(
        ModelFilesError,
        match=r"tie_word_embeddings is true, but lm_head.weight is not equal to model.embed_tokens.weight .*in row 0",
    ):
        open_published(tmp_path / "two")
    held[EMBEDDING] = held[EMBEDDING].astype(jnp.bfloat16).astype(np.float32)
    write(
        tmp_path / "other dtype",
        held | {HEAD: held[EMBEDDING].astype(jnp.bfloat16)},
        config={"tie_word_embeddings": True},
    )
    assert open_published(tmp_path / "other dtype").config.tied_embeddings
    held[HEAD] = held[EMBEDDING].copy()
    write(tmp_path / "copy", held, config={"tie_word_embeddings": True})
    assert open_published(tmp_path / "copy").config.tied_embeddings
    held[HEAD][70, 3] *= 1.0001
    write(tmp_path / "nearly", held, config={"tie_word_embeddings": True})
    with pytest.raises(ModelFilesError, match="in row 70"):
        open_published(tmp_path / "nearly")
    write(tmp_path / "one", {name: x for name, x in held.items() if name != HEAD})
    with pytest.raises(
        ModelFilesError, match=r"lm_head.weight is missing, but .* tie_word_embeddings = false\. Set it to true"
    ):
        open_published(tmp_path / "one")


@pytest.mark.parametrize("small_bytes", [1 << 20, 0], ids=["small", "large"])
def test_a_weight_that_is_not_finite_is_refused(tmp_path, monkeypatch, small_bytes):
    monkeypatch.setattr(loading, "SMALL_BYTES", small_bytes)
    for bad in (np.nan, np.inf):
        held = tensors()
        held[HEAD][50, 3] = bad
        published = open_published(write(tmp_path, held))
        with pytest.raises(ModelFilesError, match=f"{HEAD}: holds {bad}; 1 of the 3072 values checked are not finite"):
            load(published.source, published.tensor_map, published.config, RULES)


def test_a_weight_beyond_the_range_of_the_dtype_is_refused(tmp_path):
    held = tensors()
    held[HEAD][50, 3] = 7e4
    published = open_published(write(tmp_path, held))
    with pytest.raises(
        ModelFilesError, match=r"lm_head.weight: holds a value of magnitude 70000, above the float16 maximum of 65504"
    ):
        load(published.source, published.tensor_map, published.config, RULES, dtype="float16")


def test_unreadable_models_are_refused_by_name(tmp_path):
    write(tmp_path / "a", config={"architectures": ["T5ForConditionalGeneration"]})
    for file in (tmp_path / "a").glob("*.safetensors"):
        file.unlink()  # an unsupported architecture is reported before missing files
    with pytest.raises(
        UnsupportedModelError, match=r"T5ForConditionalGeneration.*not supported\. Supported: .*LlamaForCausalLM"
    ):
        open_published(tmp_path / "a")
    write(tmp_path / "b", config={"quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(UnsupportedModelError, match=r"quant_method = 'gptq': not supported \(supported: fp8, mxfp4"):
        open_published(tmp_path / "b")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelFilesError, match="adapter"):
        open_published(tmp_path / "c")
    (tmp_path / "e" / "snapshots").mkdir(parents=True)
    with pytest.raises(ModelFilesError, match="Give one of the folders in"):
        open_published(tmp_path / "e")
    with pytest.raises(ModelFilesError, match="does not exist"):
        open_published(tmp_path / "d")
    with pytest.raises(ModelFilesError, match="Give the folder that holds it"):
        open_published(tmp_path / "b" / "model.safetensors")


def test_a_renamed_source_reads_the_same_tensors(tmp_path):
    held = {"wte.weight": np.ones(3, np.float32), "b": np.zeros(2, np.float32)}
    save_file(held, tmp_path / "model.safetensors")
    source = Renamed(SafetensorsFolder(tmp_path), {"wte.weight": "transformer.wte.weight"})
    assert set(source.tensors) == {"transformer.wte.weight", "b"}
    assert same(source.read("transformer.wte.weight"), held["wte.weight"]) and same(source.read("b"), held["b"])
    with pytest.raises(ModelFilesError, match="under two names"):
        Renamed(SafetensorsFolder(tmp_path), {"wte.weight": "b"})
