"""An objective requires its special tokens from a saved tokenizer."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from data.config import DataError, TokenizerConfig
from data.tokenizer import ByteTokenizer, special_tokens, write_published
from model.config import ModelConfig
from train.config import Experiment
from train.objectives import first_text_id


def experiment(folder: Path, objective: str, ids: int = 267) -> Experiment:
    base, network = Experiment(name="x"), ModelConfig()
    mask = "bidirectional" if objective == "masked" else "causal"
    return replace(
        base,
        model=replace(network, vocab_size=384, attention=replace(network.attention, mask=mask)),
        data=replace(base.data, tokenizer=TokenizerConfig(kind="saved", path=str(folder), vocab_size=ids)),
        train=replace(base.train, objective=objective),
        samples=replace(base.samples, count=0),
    )


@pytest.fixture
def marked(tmp_path):
    """The folder of a tokenizer that has all special tokens."""
    ByteTokenizer().save(tmp_path / "marked")
    return tmp_path / "marked"


@pytest.fixture
def plain(tmp_path):
    """The folder of a published tokenizer that lacks some special tokens."""
    folder = tmp_path / "plain"
    write_published(ByteTokenizer(), folder)
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    for name in ("fim_suffix", "mask"):
        text = text.replace(f"<{name}>", f"<other_{name}>")
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    return folder


def test_missing_special_tokens_are_named(marked, plain):
    for objective in ("masked", "fill_in_middle"):
        experiment(marked, objective).validate(1)
    with pytest.raises(ValueError, match=r"train.objective = 'masked': the tokenizer in .* lacks the .* \(mask\)"):
        experiment(plain, "masked").validate(1)
    with pytest.raises(ValueError, match=r"lacks the special tokens that it needs \(fim_suffix\)"):
        experiment(plain, "fill_in_middle").validate(1)
    experiment(plain, "next_token").validate(1)


def test_the_folder_is_read_only_for_objectives_with_special_tokens(tmp_path):
    experiment(tmp_path / "elsewhere", "next_token").validate(1)
    with pytest.raises(DataError, match="no tokenizer at"):
        experiment(tmp_path / "elsewhere", "masked").validate(1)


def test_the_first_text_id_follows_only_our_special_tokens(marked, plain):
    special = special_tokens(experiment(plain, "next_token").data.tokenizer)
    assert special.fim_prefix == 3 and special.fim_suffix == -1 and first_text_id(special) == 0
    assert first_text_id(special_tokens(experiment(marked, "next_token").data.tokenizer)) == 11
    assert json.loads((marked / "tokenizer.json").read_text())["kind"] == "byte"
