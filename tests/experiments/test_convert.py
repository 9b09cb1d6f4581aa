"""`import` turns a published folder into a run that generate, eval and train accept, and `export` does the reverse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from data.tokenizer import read_tokenizer
from experiments.__main__ import main
from experiments.resolve import find_run, load_experiment
from interop import llama
from interop.families import family_of
from tests.experiments.command_line import call, final_row, printed_bits, refusal, write_folder
from train.records import read_metrics

VALUES = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TINY = {
    "data.sources.0.name": "folder",
    "data.sources.0.path": "corpus",
    "data.cache_dir": "cache",
    "data.holdout_fraction": 0.2,
    "data.sequence_length": 32,
    "data.batch_size": 8,
    "train.steps": 2,
    "optimizer.warmup_steps": 2,
    "train.eval_every": 0,
    "train.eval_windows": 2,
    "train.log_every": 1,
    "samples.count": 0,
}
SETTINGS = [word for name, value in TINY.items() for word in ("--set", f"{name}={value}")]


def write_published(folder: Path) -> None:
    """Write a tiny Llama with random weights and a byte-level BPE tokenizer, with the libraries of their formats."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(["the capital of France is Paris " * 3, Path(__file__).read_text()], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    values = VALUES | {"vocab_size": tokenizer.get_vocab_size() + 5}
    (folder / "config.json").write_text(json.dumps(values))
    config, random = family_of(values)[1], np.random.default_rng(0)
    draw = lambda shape: np.ones(shape) if len(shape) == 1 else random.standard_normal(shape) * shape[-1] ** -0.5
    save_file(
        {p.name: draw(p.shape).astype(np.float32) for p in llama.tensor_map(config)},
        folder / "model.safetensors",
        {"format": "pt"},
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory with a published folder, imported as the run 'tiny'."""
    root = tmp_path_factory.mktemp("place")
    write_folder(root / "corpus")
    write_published(root / "published")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(["import", "published", "--name", "tiny", *SETTINGS]) == 0
    return root


@pytest.fixture(autouse=True)
def working_directory(place, monkeypatch):
    monkeypatch.chdir(place)


def test_an_exported_import_equals_the_published_folder(place, capsys):
    code, out, err = call(capsys, "export", "tiny", "--to", "again")
    assert code == 0 and "verified bit by bit" in out, err
    before, after = (load_file(place / folder / "model.safetensors") for folder in ("published", "again"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(tensor, after[name], err_msg=name)
    values = json.loads((place / "again" / "config.json").read_text())
    assert {key: values.get(key) for key in VALUES} == VALUES
    one, other = (read_tokenizer(place / folder) for folder in ("published", "again"))
    assert (one.special, one.stop_token_ids) == (other.special, other.stop_token_ids) and values[
        "eos_token_id"
    ] == one.special.end


def test_an_export_to_another_dtype_rounds_the_weights(place, capsys):
    code, _, err = call(capsys, "export", "tiny", "--to", "half", "--dtype", "bfloat16")
    assert code == 0, err
    before, after = (load_file(place / folder / "model.safetensors") for folder in ("published", "half"))
    for name, tensor in before.items():
        np.testing.assert_array_equal(tensor.astype(after[name].dtype), after[name], err_msg=name)
    assert {str(x.dtype) for x in after.values()} == {"bfloat16"}


def test_an_import_as_bfloat16_is_stored_and_exported_as_bfloat16(place, capsys):
    assert call(capsys, "import", "published", "--name", "narrow", "--dtype", "bfloat16", *SETTINGS)[0] == 0
    commit = json.loads((place / "runs" / "narrow" / "checkpoints" / "0" / "commit.json").read_text())
    assert {leaf["dtype"] for leaf in commit["body"]["leaves"].values()} == {"bfloat16"}
    assert call(capsys, "export", "narrow", "--to", "narrow_again", "--dtype", "bfloat16")[0] == 0
    before, after = (load_file(place / folder / "model.safetensors") for folder in ("published", "narrow_again"))
    for name, tensor in before.items():
        np.testing.assert_array_equal(tensor.astype(after[name].dtype), after[name], err_msg=name)


def test_a_dry_run_prints_the_plan_and_writes_nothing(place, capsys):
    before = sorted(p for p in place.rglob("*") if "cache" not in p.parts)
    code, out, _ = call(capsys, "import", "published", "--name", "dry", "--dry-run", *SETTINGS)
    assert (
        code == 0
        and "llama" in out
        and "2 layers of width 32" in out
        and "float32" in out
        and "nothing was written" in out
    )
    code, out, _ = call(capsys, "export", "tiny", "--to", "dry", "--dry-run")
    assert code == 0 and "LlamaForCausalLM" in out and "nothing was written" in out
    assert sorted(p for p in place.rglob("*") if "cache" not in p.parts) == before


def test_an_imported_run_can_be_evaluated_and_sampled(capsys):
    code, out, err = call(capsys, "generate", "tiny", "--prompt", "def f", "--max-new-tokens", 5, "--temperature", 0)
    assert code == 0 and out.startswith("def f"), err
    code, out, err = call(capsys, "eval", "tiny")
    assert code == 0, err
    # Random weights: worse than guessing bytes, but a number.
    assert 2 < printed_bits(out) < 40


def test_an_imported_run_is_trained_in_a_copy_with_another_config(place, capsys):
    code, out, err = call(capsys, "train", "tiny", "--run", "tuned", "--set", "optimizer.learning_rate=0.01")
    assert code == 0 and "resuming from step 0" in out, err
    rows = read_metrics(place / "runs" / "tuned" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2] and final_row(place / "runs" / "tuned")[
        "step"
    ] == 2
    assert load_experiment(find_run("tuned")).optimizer.learning_rate == 0.01
    assert [p.name for p in (place / "runs" / "tiny" / "checkpoints").iterdir()] == ["0"]
    # The copy has a copy of the tokenizer, which moves with its folder.
    assert Path(load_experiment(find_run("tuned")).data.tokenizer.path) == Path("runs/tuned/tokenizer")
    refused = refusal(capsys, "train", "tuned", "--set", "optimizer.learning_rate=0.02", "--set", "train.steps=4")
    assert "belongs to another config" in refused
    assert "was trained further" in refusal(capsys, "train", "tuned", "--run", "third")
    code, out, _ = call(capsys, "train", "tiny", "--run", "tuned", "--set", "optimizer.learning_rate=0.01")
    assert code == 0 and "is finished" in out, "the same command again finds the copy"
    assert "model.position.theta" in refusal(capsys, "train", "tiny", "--set", "model.position.theta=5000.0")


def test_a_longer_context_is_accepted_with_a_note(place, capsys):
    code, out, err = call(
        capsys, "import", "published", "--name", "long", "--dry-run", *SETTINGS, "--set", "model.max_length=256"
    )
    shown = " ".join(out.split())
    assert code == 0 and "model.max_length = 256" in shown and "past position 128" in shown, err
    generate = ("generate", "tiny", "--prompt", "def f", "--max-new-tokens", 250)
    assert "more than model.max_length = 128" in refusal(capsys, *generate)
    _, _, err = call(capsys, *generate, "--set", "model.max_length=200")  # gives the note, and is refused as too short
    assert "past position 128" in err and "more than model.max_length = 200" in err
    values = json.loads((place / "published" / "config.json").read_text())
    values["rope_scaling"] = {"rope_type": "dynamic", "factor": 2.0}
    shutil.copytree(place / "published", place / "dynamic")
    (place / "dynamic" / "config.json").write_text(json.dumps(values))
    assert call(capsys, "import", "dynamic", "--name", "far", *SETTINGS, "--set", "model.max_length=256")[0] == 0
    assert load_experiment(find_run("far")).model.max_length == 256
    code, out, _ = call(capsys, "export", "far", "--to", "far_again")
    assert code == 0 and "max_position_embeddings = 128 instead of model.max_length = 256" in " ".join(out.split())
    assert json.loads((place / "far_again" / "config.json").read_text())["max_position_embeddings"] == 128


def test_an_imported_run_answers_through_its_chat_template(capsys):
    code, out, err = call(
        capsys,
        "generate",
        "tiny",
        "--chat",
        "--system",
        "Be short.",
        "--prompt",
        "Hi",
        "--max-new-tokens",
        3,
        "--temperature",
        0,
    )
    assert code == 0 and not out.startswith("Hi") and "finished by" in out, err
    assert "--chat" in refusal(capsys, "generate", "tiny", "--system", "x", "--prompt", "Hi")


def test_another_tokenizer_never_replaces_that_of_a_run(place, capsys):
    before = {p.name: p.read_bytes() for p in (place / "runs" / "tiny" / "tokenizer").iterdir()}
    shutil.copytree(place / "runs" / "tiny" / "tokenizer", place / "other")
    text = json.loads((place / "other" / "huggingface.json").read_text())
    first, second = list(text["model"]["vocab"])[-2:]
    vocabulary = text["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (place / "published_other").mkdir()
    (place / "published_other" / "tokenizer.json").write_text(json.dumps(text))
    shutil.copy(place / "published" / "tokenizer_config.json", place / "published_other")
    read_tokenizer(place / "published_other").save(place / "other")
    assert "trained with another tokenizer" in refusal(capsys, "train", "tiny", "--set", "data.tokenizer.path=other")
    assert {p.name: p.read_bytes() for p in (place / "runs" / "tiny" / "tokenizer").iterdir()} == before


def test_a_published_folder_is_not_a_run_and_its_network_is_fixed(place, capsys):
    assert "is a published model, not a run" in refusal(capsys, "generate", "published", "--prompt", "x")
    for change in (
        "model.num_layers=1",
        "model.vocab_size=512",
        "model.position.theta=5.0",
        "data.tokenizer.kind=byte",
    ):
        message = refusal(capsys, "import", "published", "--name", "new", *SETTINGS, "--set", change)
        assert change.split("=")[0].removesuffix(".kind") in message and not (place / "runs" / "new").exists()


def test_bad_input_is_refused_in_one_paragraph_and_leaves_nothing(place, capsys):
    def broken(name: str, change) -> str:
        shutil.copytree(place / "published", place / name)
        change(place / name)
        code, _, err = call(capsys, "import", name, "--name", "bad", *SETTINGS)  # a table may follow the paragraph
        assert code == 1 and err.startswith("error: ") and "Traceback" not in err
        assert not (place / "runs" / "bad").exists() and not [*(place / "runs").glob("*bad*")]
        return err

    def values(**changes):
        def change(folder: Path) -> None:
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))

        return change

    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"][3] = np.nan
        save_file(tensors, folder / "model.safetensors")

    def cut(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])

    message = broken("unknown", values(architectures=["BertForMaskedLM"]))
    assert "BertForMaskedLM" in message and "LlamaForCausalLM" in message and "MixtralForCausalLM" in message
    assert "hidden_act = 'gelu'" in broken("activation", values(hidden_act="gelu"))
    assert "tie_word_embeddings" in broken("untied", values(tie_word_embeddings=False))
    assert "vocab_size" in broken("vocabulary", values(vocab_size=290))
    assert "model.norm.weight" in broken("nan", damage)
    assert "model.safetensors" in broken("short", cut)
    assert "pytorch_model.bin" in broken("pickle", lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"))
    assert "exists already" in refusal(capsys, "import", "published", "--name", "tiny")
    assert "--name ../x" in refusal(capsys, "import", "published", "--name", "../x")
    assert "nowhere" in refusal(capsys, "import", "nowhere", "--name", "new")
    assert "gemma2" in refusal(capsys, "export", "tiny", "--to", "new", "--family", "gemma2")
