"""Saving published models: an independent reader reads them, they are complete or absent, and they verify."""

import errno
import json
import math
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import interop.load as loading
import interop.save as saving
import interop.verify as verifying
from interop import llama
from interop.load import ModelFilesError, abstract, load, named
from interop.plan import plan
from interop.published import open_published
from interop.save import save_published, staged
from interop.slabs import _part, check_cover, fetch, slabs
from interop.tensor_map import TensorEntry
from interop.translate import UnsupportedModelError
from interop.verify import Verified, verify, verify_saved
from sharding.mesh import MeshConfig, make_mesh, use_mesh
from sharding.rules import ShardingRules
from tests.interop.hf_folder import EMBEDDING, HEAD, D, V, tensors, write
from tests.models import put

RULES = ShardingRules()
ELEMENTS = sum(x.size for x in tensors().values())


@pytest.fixture
def published(tmp_path):
    return open_published(write(tmp_path / "published", shards=2))


@pytest.fixture
def model(published):
    return load(published.source, published.tensor_map, published.config, RULES)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_library_reads_a_saved_model(tmp_path, published, model, dtype):
    assert save_published(model, published.config, tmp_path / "out", dtype=dtype, shard_bytes=20_000) == "llama"
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    found, held = {}, tensors()
    for file in files:
        with safe_open(file, "np") as f:
            assert f.metadata() == {"format": "pt"}
        mine = load_file(file)
        assert sum(x.nbytes for x in mine.values()) <= 20_000
        found |= mine
    assert files[-1].name == f"model-{len(files):05d}-of-{len(files):05d}.safetensors" and len(files) > 2
    assert found.keys() == held.keys()
    for name, wanted in held.items():
        assert found[name].tobytes() == wanted.astype(jnp.dtype(dtype)).tobytes(), name
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == ELEMENTS * jnp.dtype(dtype).itemsize
    assert all(name in load_file(tmp_path / "out" / file) for name, file in index["weight_map"].items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype
    assert verify_saved(model, tmp_path / "out", dtype) == Verified(len(held), len(jax.tree.leaves(model)), ELEMENTS)
    assert not list(tmp_path.glob(".*.writing"))


def test_a_mesh_writes_the_same_bytes_as_one_device(tmp_path, published, model):
    mesh, seen = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), []
    spread = load(published.source, published.tensor_map, published.config, RULES, mesh)
    save_published(model, published.config, tmp_path / "one")
    save_published(spread, published.config, tmp_path / "eight", progress=lambda _, size: seen.append(size))
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["config.json", "model.safetensors"]
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "eight" / file.name).read_bytes()
    assert sum(seen) == ELEMENTS
    assert verify(spread, published, "float32").elements == ELEMENTS


def test_saving_and_verifying_work_within_use_mesh(tmp_path, published, monkeypatch):
    monkeypatch.setattr(loading, "SMALL_BYTES", 20_000)  # one weight is loaded in slabs
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    with use_mesh(mesh):
        spread = load(published.source, published.tensor_map, published.config, RULES, mesh)
        assert verify(spread, published, "float32").elements == ELEMENTS
        save_published(spread, published.config, tmp_path / "out")
        verify_saved(spread, tmp_path / "out", "float32")


def test_weights_on_several_hosts_are_refused(tmp_path, published, model, monkeypatch):
    elsewhere = {path: namedtuple("Weight", "is_fully_addressable")(path != "head") for path in named(model)}
    monkeypatch.setattr(saving, "named", lambda _: elsewhere)
    monkeypatch.setattr(verifying, "named", lambda _: elsewhere)
    with pytest.raises(ModelFilesError, match="the weights are spread over several hosts"):
        save_published(model, published.config, tmp_path / "out")
    with pytest.raises(ModelFilesError, match="the weights are spread over several hosts"):
        verify(model, published, "float32")


def test_a_part_of_a_weight_is_fetched_from_its_shards(model):
    rng, mesh = np.random.default_rng(0), make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    whole = rng.standard_normal((4, 6, 8)).astype(np.float32)
    spec = jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    spread = jax.device_put(whole, jax.sharding.NamedSharding(mesh, spec))
    for low, high in (((1, 0, 0), (2, 6, 8)), ((0, 2, 3), (4, 5, 5)), ((0, 0, 0), (4, 6, 8)), ((3, 4, 0), (4, 5, 3))):
        np.testing.assert_array_equal(fetch(spread, low, high), whole[tuple(map(slice, low, high))])
    for on_host in (True, False):
        with use_mesh(None if on_host else mesh):  # an export on an accelerator runs within use_mesh
            found = _part(spread.addressable_shards[3].data, (1, 2, 1), (2, 1, 2), on_host)
        np.testing.assert_array_equal(found, np.asarray(spread.addressable_shards[3].data)[1:3, 2:3, 1:3])
        np.testing.assert_array_equal(_part(jnp.asarray(whole), (1, 2, 3), (2, 3, 4), on_host), whole[1:3, 2:5, 3:7])


def test_verify_names_the_differing_tensor(published, model):
    assert verify(model, published, "float32") == Verified(21, 11, ELEMENTS)
    mlp = model.stacks[0][0].mlp
    put(mlp, "up", mlp.up.value.at[1, 3, 1, 7].add(0.5).at[1, 4, 1, 8].add(0.25))
    with pytest.raises(
        ModelFilesError,
        match=r"layers.1.mlp.up_proj.weight \(model-0000.*\): 2 of 1536 .* stacks/0/0/mlp/up .* up to 0\.5",
    ):
        verify(model, published, "float32")


def test_verify_compares_exactly_the_bits_of_the_dtype(published, model):
    scale = np.asarray(model.final_norm.scale.value)
    put(model.final_norm, "scale", jnp.asarray(np.nextafter(scale, np.float32(np.inf))))
    with pytest.raises(ModelFilesError, match=r"model.norm.weight .*32 of 32"):
        verify(model, published, "float32")
    rounded = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16), load(published.source, published.tensor_map, published.config, RULES)
    )
    assert verify(rounded, published, "bfloat16").elements == ELEMENTS


def test_verify_detects_a_changed_file(tmp_path, published, model):
    save_published(model, published.config, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ModelFilesError, match=r"1 of \d+ elements"):
        verify_saved(model, tmp_path / "out", "float32")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_export_leaves_nothing(tmp_path, published, model, error):
    def stop(entry, size):
        if entry.name == "model.norm.weight":
            assert list(tmp_path.glob(".out.*.writing")) and not (tmp_path / "out").exists()
            raise error

    with pytest.raises(error):
        save_published(model, published.config, tmp_path / "out", progress=stop, shard_bytes=5000)
    assert [p.name for p in tmp_path.iterdir()] == ["published"]


def test_leftovers_of_a_killed_export_are_not_a_model_and_are_removed(tmp_path, published, model, capsys):
    save_published(model, published.config, tmp_path / "out")
    left = tmp_path / ".again.0123abcd.writing"
    inner = tmp_path / f".{left.name}.89abcdef.writing"  # the command line stages twice
    for folder in (left, inner):
        shutil.copytree(tmp_path / "out", folder)
        (folder / "config.json").unlink()  # written last
    with pytest.raises(ModelFilesError, match=r"there is no config.json"):
        open_published(left)
    others = [tmp_path / name for name in (".again.12.writing", ".again2.0123abcd.writing", ".again.0123abcd")]
    for folder in others:
        folder.mkdir()
    capsys.readouterr()
    save_published(model, published.config, tmp_path / "again")
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == ["config.json", "model.safetensors"]
    assert not left.exists() and not inner.exists() and all(folder.exists() for folder in others)
    out = capsys.readouterr().out
    assert f"removed {left}, which a killed process left" in out and f"removed {inner}" in out


def test_the_folder_of_a_running_process_is_not_removed(tmp_path):
    logged: list[str] = []
    with staged(tmp_path / "out", logged.append) as first:
        (first / "x").write_text("1")
        with staged(tmp_path / "out", logged.append) as second:
            (second / "x").write_text("2")
        assert first.exists()
        shutil.rmtree(tmp_path / "out")
    assert (tmp_path / "out" / "x").read_text() == "1" and logged == []


def test_saving_in_a_staging_folder_keeps_its_lock(tmp_path, published, model):
    """The command line then adds a tokenizer and verifies, while another export to the same name may start."""
    logged: list[str] = []
    with staged(tmp_path / "out", logged.append) as first:
        save_published(model, published.config, first)
        with staged(tmp_path / "out", logged.append):
            assert (first / "config.json").exists()
        shutil.rmtree(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists() and logged == []


def test_an_interrupted_export_empties_an_existing_folder(tmp_path, published, model):
    def stop(entry, size):
        raise KeyboardInterrupt

    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        save_published(model, published.config, tmp_path / "out", progress=stop)
    assert list((tmp_path / "out").iterdir()) == []


def test_the_folder_of_a_killed_process_is_removed(tmp_path):
    code = "import sys; from pathlib import Path; from interop.save import _locked_staging_folder; import os, signal\n"
    code += "_locked_staging_folder(Path(sys.argv[1])); os.kill(os.getpid(), signal.SIGKILL)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False)
    (left,), logged = list(tmp_path.iterdir()), []
    assert done.returncode == -9
    with staged(tmp_path / "out", logged.append):
        assert not left.exists() and logged == [f"removed {left}, which a killed process left"]


def test_config_json_is_written_last(tmp_path, published, model, monkeypatch):
    seen, write_json = [], saving._write_json

    def spy(path, values):
        seen.append(sorted(p.name for p in path.parent.iterdir()))
        write_json(path, values)

    monkeypatch.setattr(saving, "_write_json", spy)
    save_published(model, published.config, tmp_path / "out", shard_bytes=60_000)
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert seen == [shards, [*shards, "model.safetensors.index.json"]]


def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path, published, model, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(ModelFilesError, match="the disk is full: the weights need 0 MB"),
    ):
        patch.setattr(saving, "_write", full)
        save_published(model, published.config, tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(ModelFilesError, match="the disk is full"):
        patch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(80_000))
        save_published(model, published.config, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["published"]


def test_unsupported_exports_are_refused(tmp_path, published, model):
    (tmp_path / "taken").mkdir()
    save_published(model, published.config, tmp_path / "taken")  # an empty folder may be used
    with pytest.raises(ModelFilesError, match="already exists and is not empty"):
        save_published(model, published.config, tmp_path / "taken")
    with pytest.raises(ModelFilesError, match=r"dtype = 'int8': .* float32, bfloat16, float16"):
        save_published(model, published.config, tmp_path / "out", dtype="int8")
    with pytest.raises(UnsupportedModelError, match="which cannot express"):
        save_published(
            model,
            replace(published.config, norm=replace(published.config.norm, kind="layer")),
            tmp_path / "out",
            family="llama",
        )
    put(model, "head", model.head.value.at[3, 50].set(7e4))
    with pytest.raises(
        ModelFilesError, match=r"lm_head.weight: holds a value of magnitude 70000, above the float16 maximum"
    ):
        save_published(model, published.config, tmp_path / "out", dtype="float16")
    put(model, "head", model.head.value.at[3, 50].set(jnp.nan))
    with pytest.raises(ModelFilesError, match=r"lm_head.weight: holds nan"):
        save_published(model, published.config, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["published", "taken"]


def test_slabs_follow_the_order_of_the_file(published):
    weights, held = named(abstract(published.config, RULES, None)), tensors()
    for entry in published.tensor_map:
        tensor = held[entry.name]
        at = np.lib.array_utils.byte_bounds(tensor)[0]
        for slab in slabs(entry, tensor, weights[entry.leaf].shape, 1000):
            start, stop = np.lib.array_utils.byte_bounds(slab.values)
            assert start == at and stop - start == slab.values.nbytes, entry.name
            at = stop
        assert at == np.lib.array_utils.byte_bounds(tensor)[1]


def test_pieces_must_cover_each_weight_and_tensor_once(published):
    weights = named(abstract(published.config, RULES, None))
    check_cover(published.tensor_map, weights)
    wrong = {
        "the entries hold 0 of its 3072": [p for p in published.tensor_map if p.leaf != "head"],
        "two entries hold the same": [
            p if p.at != (1, slice(None), 1) else p._replace(at=(1, slice(None), 0)) for p in published.tensor_map
        ],
        "there is no weight": [*published.tensor_map, TensorEntry("x", (1,), "x")],
        "the entries take 3072 of its 3104": [
            p._replace(shape=(V + 1, D), take=(slice(0, V),)) if p.leaf == "embedding" else p
            for p in published.tensor_map
        ],
    }
    for message, tensor_map in wrong.items():
        with pytest.raises(AssertionError, match=message):
            check_cover(tensor_map, weights)


def test_the_plan_matches_the_loaded_model(tmp_path, published, model):
    held = tensors("bfloat16")
    held[EMBEDDING] = held[EMBEDDING].astype(np.float32)
    source = open_published(write(tmp_path / "mixed", held, shards=2))
    found = plan(source, "float32", RULES)
    assert (found.family, found.parameters.total) == ("llama", ELEMENTS)
    assert found.tensors == {"bfloat16": 20, "float32": 1} and found.disk == sum(x.nbytes for x in held.values())
    assert found.weights == found.device == 4 * ELEMENTS and found.largest == 4 * V * D and len(found.files) == 2
    assert found.summary == "2 layers of width 32, 4 heads of 8 (2 of keys), vocabulary 96"
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    spread = load(source.source, source.tensor_map, source.config, RULES, mesh, dtype="bfloat16")
    largest = max(
        sum(s.data.nbytes for x in jax.tree.leaves(spread) for s in x.addressable_shards if s.device == d)
        for d in mesh.devices.flat
    )
    assert plan(source, "bfloat16", RULES, mesh).device == largest < 2 * ELEMENTS
    assert math.prod(held[HEAD].shape) == V * D


def test_an_opened_llama_has_the_pieces_of_its_family(published):
    assert llama.tensor_map(published.config) == published.tensor_map
