"""`inspect` shows what the network computes: its predictions, attention weights and router choices, and nothing of a
text as markup.

Shapes: N heads, T queries, S keys.
"""

from __future__ import annotations

import base64
import json
import math
import re
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.tokenizer import ByteTokenizer, load_tokenizer
from experiments.__main__ import main
from experiments.inspection import attention_maps, router_choices
from experiments.inspection.capture import Layer, attention_weights, capture
from experiments.inspection.page import Shown, bits_per_byte, inspection_page
from experiments.inspection.pieces import added_text, labels
from experiments.inspection.write import DEFAULT_TOKENS, cut
from experiments.resolve import find_run, load_experiment
from experiments.run import open_trained
from model.cache import WholeRows
from model.config import (
    AttentionConfig,
    LatentConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    PositionConfig,
    RopeScalingConfig,
)
from model.layers import scan_layers
from model.transformer import forward, logits
from model.weights import repeats
from tests.closeness import assert_close
from tests.experiments.command_line import call, refusal
from tests.experiments.test_convert import write_published
from tests.experiments.test_report import Checker
from tests.models import TINY_ATTENTION, random_model, tiny_config

TOKENS = np.random.default_rng(0).integers(0, 64, 14).tolist()
EXPERTS = MoEConfig(num_experts=4, hidden_dim=16)
CONFIGS = {
    "dense, post norms, tied, sliding, softcaps": tiny_config(
        norm=NormConfig(placement="post"), tied_embeddings=True, final_softcap=9.0, num_layers=5,
        attention=replace(TINY_ATTENTION, layers=("sliding", "global"), softcap=5.0, qk_norm="full"),
    ),
    "experts in every second layer, sandwich norms, sinks": tiny_config(
        norm=NormConfig("layernorm", bias=True, placement="sandwich"),
        attention=replace(TINY_ATTENTION, sinks=True), moe=replace(EXPERTS, layers=("dense", "moe"), shared_experts=1),
    ),
    "alibi, block sparse, capacity": tiny_config(
        position=PositionConfig("alibi"), attention=replace(TINY_ATTENTION, layers=("block_sparse",)),
        moe=replace(EXPERTS, capacity_factor=0.75),
    ),
    "latent attention, biased sigmoid router": tiny_config(
        attention=AttentionConfig(
            4, 4, 12, LatentConfig(20, 16, 4, 6), bias="all", layers=("global", "sliding"), window=5
        ),
        moe=replace(EXPERTS, weights="sigmoid_renormalized", bias_rate=0.01, scale=2.5),
    ),
    "dynamic ntk, hashed experts": tiny_config(
        position=PositionConfig(scaling=RopeScalingConfig("dynamic_ntk", 4.0, 6)), moe=replace(EXPERTS, router="hash"),
    ),
    "a user's variant": tiny_config(
        attention=replace(TINY_ATTENTION, layers=("tests.model.differential:DifferentialAttention",))
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CONFIGS)
def case(request):
    config = CONFIGS[request.param]
    config.validate()
    model = random_model(config)
    return config, model, capture(model, TOKENS)


@pytest.fixture(scope="module")
def output(case):
    """(Logarithms of the model's probabilities [T, V], its router statistics) from one program, without `capture`."""

    @jax.jit
    def run(model):
        out = forward(model, jnp.asarray([TOKENS]))
        return jax.nn.log_softmax(logits(model, out.hidden_BTD)[0]), out.router

    logprob_TV, router = run(case[1])
    return np.asarray(logprob_TV), router


# ---- what is captured ----


def test_the_last_row_of_the_lens_is_the_output_of_the_model(case, output):
    config, _, found = case
    assert len(found.predictions) == config.num_layers + 1 and found.tokens_T.tolist() == TOKENS
    (logprob_TV, _), last = output, found.predictions[-1]
    order_TV = np.argsort(-logprob_TV, axis=1, kind="stable")
    assert np.array_equal(last.best_TK, order_TV[:, :5])
    assert_close(last.best_logprob_TK, np.take_along_axis(logprob_TV, order_TV, 1)[:, :5], 1e-6)
    steps = np.arange(len(TOKENS) - 1)
    assert_close(last.next_logprob_T[:-1], logprob_TV[steps, TOKENS[1:]], 1e-6)
    assert np.array_equal(last.next_rank_T[:-1], 1 + np.argmax(order_TV[:-1] == np.c_[TOKENS[1:]], axis=1))
    assert math.isnan(last.next_logprob_T[-1]) and last.next_rank_T[-1] == 0
    p_TV = np.exp(logprob_TV.astype(np.float64))
    assert_close(last.entropy_T, -(p_TV * np.log(p_TV)).sum(1), 1e-6)


@dataclass
class Compared:
    """A layer's cache that lists (weights, weights times values, attention that the layer's kernel computes)."""

    found: list

    def append(self, k, v, ctx):
        self.rows = WholeRows(k, v)
        return self, self

    def attend(self, q_BTNH, ctx, spec):
        weights_BNTS = attention_weights(self.rows, q_BTNH, ctx, spec)
        k, v = (self.rows.k, self.rows.v_BTKV) if spec.latent is None else spec.latent.expand(self.rows.k)
        # Random values, as many for each key as there are keys, so that other weights give another result.
        more = jax.random.normal(jax.random.key(0), (*v.shape[:3], v.shape[1]))
        values_BSKV = jnp.concatenate((v, more), axis=-1)
        values_BSNV = jnp.repeat(values_BSKV, q_BTNH.shape[2] // v.shape[2], axis=2)
        weighted_BTNV = jnp.einsum("bnts,bsnv->btnv", weights_BNTS, values_BSNV, precision="highest")
        self.found.append((weights_BNTS[0], weighted_BTNV, WholeRows(k, values_BSKV).attend(q_BTNH, ctx, spec)))
        return self.rows.attend(q_BTNH, ctx, spec)


@jax.jit
def run_block(block, x_BTD, ctx):
    compared = Compared([])
    out_BTD, _, _ = block(x_BTD, ctx, compared, None)
    return out_BTD, *compared.found[0]


@jax.jit
def read(model, x_BTD):
    return jax.nn.log_softmax(logits(model, model.final_norm(x_BTD))[0])


def test_rows_of_the_lens_and_weights_are_those_of_the_layers(case):
    """The model's own layers, called one by one, give the residual stream. Weights times values are the attention."""
    config, model, found = case
    states, weights = [], []

    def run_layers(config, stacks, x_BTD, ctx, caches, keys):
        states.append(x_BTD)
        for pattern in stacks:
            for i in range(repeats(pattern)):
                for block in pattern:
                    one = jax.tree.map(lambda weight, i=i: weight[i], block)
                    x_BTD, weights_NTS, weighted, attended = run_block(one, x_BTD, ctx)
                    assert_close(weighted, attended, 2e-6)
                    weights.append(weights_NTS)
                    states.append(x_BTD)
        return x_BTD, None, None

    forward(model, jnp.asarray([TOKENS]), run_layers=run_layers)
    assert len(weights) == config.num_layers
    for layer, weights_NTS in zip(found.layers, weights, strict=True):
        assert_close(layer.attention_NTS, weights_NTS, 1e-5)
    for each, x_BTD in zip(found.predictions, states, strict=True):
        logprob_TV = np.asarray(read(model, x_BTD))
        assert_close(each.best_logprob_TK[:, 0], logprob_TV.max(1), 1e-5)
        assert_close(each.next_logprob_T[:-1], logprob_TV[np.arange(len(TOKENS) - 1), TOKENS[1:]], 1e-5)


def test_the_last_row_of_the_lens_equals_the_output_exactly():
    """With the same layers, the lens and the model give the same bits."""
    config = CONFIGS["experts in every second layer, sandwich norms, sinks"]
    model = random_model(config)

    @jax.jit
    def run(model):
        kept = []

        def run_layers(*arguments):
            kept.append(scan_layers(*arguments))
            return kept[-1]

        return forward(model, jnp.asarray([TOKENS]), run_layers=run_layers).hidden_BTD, kept[0][0]

    hidden_BTD, x_BTD = run(model)
    logprob_TV = jax.jit(lambda m, h_BTD: jax.nn.log_softmax(logits(m, h_BTD)[0]))(model, hidden_BTD)
    assert np.array_equal(read(model, x_BTD), logprob_TV)


def test_the_weights_of_a_query_sum_to_one_and_respect_the_mask(case):
    config, _, found = case
    T = len(TOKENS)
    query, key = np.arange(T)[:, None], np.arange(T)
    for layer in found.layers:
        weights_NTS = layer.attention_NTS
        assert (weights_NTS >= 0).all()
        assert (weights_NTS[:, key > query] == 0).all()
        if config.attention.sinks:
            assert (weights_NTS.sum(-1) < 1).all()
        else:
            assert_close(weights_NTS.sum(-1), np.ones(weights_NTS.shape[:2]), 1e-6)
        if layer.kind == "sliding":
            assert (weights_NTS[:, query - key >= config.attention.window] == 0).all()
            assert (weights_NTS[:, (key <= query) & (query - key < config.attention.window)] > 0).all()
        if layer.kind == "block_sparse":
            assert (weights_NTS[:, 9, [0, 1, 2, 3]] == 0).all() and (weights_NTS[:, 9, [4, 7, 8]] > 0).all()


def test_router_choices_are_those_of_the_model(case, output):
    (config, _, found), (_, stats) = case, output
    routed = [layer.choices for layer in found.layers if layer.choices is not None]
    if config.moe is None:
        assert stats is None and not routed
        return
    assert len(routed) == len(stats.choices_BTC)
    for i, choices in enumerate(routed):
        assert np.array_equal(choices.indices_TC, stats.choices_BTC[i, 0])
        assert_close((~choices.kept_TC).mean(), stats.dropped[i], 1e-6, scale=1)
        load_E = router_choices.load(choices, config.moe.num_experts)
        assert_close(load_E / load_E.sum(), stats.load_E[i], 1e-6)
        assert_close(choices.weights_TC.sum(1), np.full(len(TOKENS), config.moe.scale), 1e-6)
    if config.moe.capacity_factor is not None:
        assert any((~choices.kept_TC).any() for choices in routed)


def test_a_bidirectional_network_is_refused():
    config = tiny_config(attention=replace(TINY_ATTENTION, mask="bidirectional"))
    with pytest.raises(ValueError, match=r"model\.attention\.mask = 'bidirectional': .*next"):
        cut(ByteTokenizer(), "text", config)


# ---- the text ----


def test_tokens_of_parts_of_a_character_are_bytes_and_complete_it():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("a €\n").tolist()
    assert added_text(tokenizer, ids) == ["a", " ", "", "", "€", "\n"]
    names = labels(tokenizer, [1, 999, *ids])
    assert [names[token] for token in ids] == ["a", "·", "⟨E2⟩", "⟨82⟩", "⟨AC⟩", "⏎"]
    assert names[1] == "<end>" and names[999] == "⟨unused 999⟩"


def test_a_text_is_cut_with_a_note():
    tokenizer, config = ByteTokenizer(), tiny_config(max_length=8)
    ids, notes = cut(tokenizer, "0123456", config)
    assert ids == [1, *tokenizer.encode("0123456").tolist()] and notes == []
    ids, (note,) = cut(tokenizer, "01234567", config)
    assert len(ids) == 8 and "8 tokens" in note and "the first 7" in note and "model.max_length = 8" in note
    ids, (note,) = cut(tokenizer, "01234567", config, 4)
    assert len(ids) == 4 and "--max-tokens 4" in note
    ids, (note,) = cut(tokenizer, "a" * 999, replace(config, max_length=2000))
    assert len(ids) == DEFAULT_TOKENS and "default of --max-tokens" in note
    wide = replace(config, max_length=2000, num_layers=61, attention=replace(TINY_ATTENTION, num_heads=128))
    ids, (note,) = cut(tokenizer, "a" * 999, wide)
    assert len(ids) == attention_maps.most_tokens(wide) == 90 and "61 layers with 128 heads" in note
    with pytest.raises(ValueError, match=r"--max-tokens 200: the page can show 90, .* Use at most 90"):
        cut(tokenizer, "a", wide, 200)
    _, (note,) = cut(tokenizer, "a", tiny_config(attention=replace(TINY_ATTENTION, mask="prefix")))
    assert "prefix is empty" in note


# ---- the page ----

EVIL = "<script>alert('x')</script> & \"é\"\n"
PAGE = tiny_config(
    vocab_size=320, num_layers=3, moe=replace(EXPERTS, layers=("dense", "moe", "moe"), capacity_factor=1.0),
    attention=replace(TINY_ATTENTION, layers=("sliding", "global"), sinks=True),
)  # fmt: skip


def shown(config: ModelConfig, text: str, title: str = "Inside a run") -> Shown:
    tokenizer = ByteTokenizer()
    ids, notes = cut(tokenizer, text, config)
    return Shown(title, "weights of step 1", notes, config, tokenizer, capture(random_model(config), ids))


def checked(page: bytes) -> tuple[Checker, str]:
    """Return the parsed page, which must be well-formed and fetch nothing, and its source."""
    source = page.decode("utf-8")
    assert "://" not in source and "@import" not in source and "url(" not in source
    found = Checker(source)
    assert not {"link", "iframe", "img"} & set(found.tags) and found.links == []
    return found, source


def block(source: str, name: str):
    """Return the JSON that the page's script reads."""
    (text,) = re.findall(rf'<script id="{name}" type="application/json">(.*?)</script>', source)
    assert "<" not in text
    return json.loads(text)


@pytest.fixture(scope="module")
def routed():
    subject = shown(PAGE, EVIL, title="Inside <b>& a run")
    return subject, *checked(inspection_page(subject))


def test_text_on_the_page_is_never_markup(routed):
    subject, page, source = routed
    assert page.tags.count("script") == 3 and "<b>&" not in source and "<b>& a" in page.text
    spans = re.search(r'<div class="text" id="text">(.*?)</div>', source, re.DOTALL)[1]
    text = Checker(spans).text.removeprefix("<end>").removesuffix("what follows?")
    assert text == EVIL.replace("é", "⟨C3⟩é").replace("\n", "⏎\n")
    assert spans.count("<span") == len(subject.found.tokens_T) + 1


def test_the_page_holds_the_figures_of_the_text_and_of_the_lens(routed):
    subject, page, source = routed
    found, facts = subject.found, block(source, "facts")
    nats = -found.predictions[-1].next_logprob_T[:-1].astype(float).sum()
    expected = nats / math.log(2) / len(EVIL.encode())
    assert bits_per_byte(found, subject.tokenizer) == pytest.approx(expected)
    assert f"{expected:.3f}" in page.text
    T = len(found.tokens_T)
    assert facts["tokens"] == found.tokens_T.tolist() and facts["labels"]["1"] == "<end>"
    assert facts["output"]["next"][:-1] == pytest.approx(np.exp(found.predictions[-1].next_logprob_T[:-1]), rel=6e-3)
    assert facts["output"]["next"][-1] is None and len(facts["output"]["best"][0]) == 5
    lens = re.search(r'id="lens">(.*?)</table>', source, re.DOTALL)[1]
    body = re.search("<tbody>(.*)</tbody>", lens)[1]
    rows = re.findall("<tr>(.*?)</tr>", body)
    assert len(rows) == len(facts["lens"]) == PAGE.num_layers + 1
    assert all(row.count("<td") == T for row in rows) and "layer 0 · sliding" in rows[1] and "embeddings" in rows[0]
    best = [facts["labels"][str(token)] for token in found.predictions[-1].best_TK[:, 0].tolist()]
    assert [Checker(cell).text for cell in re.findall("<td.*?</td>", rows[-1])] == best


def test_the_packed_maps_are_the_attention_weights(routed):
    subject, page, source = routed
    layers, T, heads = subject.found.layers, len(subject.found.tokens_T), PAGE.attention.num_heads
    values = np.frombuffer(zlib.decompress(base64.b64decode(block(source, "maps"))), np.uint8)
    at, size = 0, T * (T + 1) // 2
    for layer, facts in zip(layers, block(source, "facts")["attention"], strict=True):
        assert facts["heads"] == heads and facts["window"] == (5 if layer.kind == "sliding" else 0)
        maps_NP = values[at : at + heads * size].reshape(heads, size)
        sinks_NT = values[at + heads * size : at + heads * (size + T)].reshape(heads, T)
        rows, columns = np.tril_indices(T)
        np.testing.assert_allclose((maps_NP / 255) ** 2, layer.attention_NTS[:, rows, columns], atol=1 / 255)
        np.testing.assert_allclose((sinks_NT / 255) ** 2, 1 - layer.attention_NTS.sum(-1), atol=1 / 255)
        at += heads * (size + T)
    assert at == len(values) and page.tags.count("canvas") == heads * len(layers) + 1
    assert "learned sinks" in page.text and "last 5 tokens" in page.text


def test_habits_of_heads():
    previous = np.eye(5, k=-1, dtype=np.float32)
    first, own = np.zeros((5, 5), np.float32), np.eye(5, dtype=np.float32)
    first[:, 0] = 1
    found = attention_maps.habits(np.stack([previous, first, own]))
    assert found.tolist() == [[0.25, 1, 0, 1], [1, 0.25, 0, 2.5], [0, 0, 1, 0]]


def test_the_page_shows_experts_weights_and_loads(routed):
    subject, page, source = routed
    facts = block(source, "facts")["routers"]
    routed_layers = [layer.choices for layer in subject.found.layers if layer.choices is not None]
    assert [each["layer"] for each in facts] == [1, 2]
    for each, choices in zip(facts, routed_layers, strict=True):
        assert each["chosen"] == choices.indices_TC.tolist() and each["experts"] == 4
        assert each["kept"] == choices.kept_TC.astype(int).tolist()
    loads = re.findall(r"expert (\d+): (\d+) of (\d+) choices", source)
    T = len(subject.found.tokens_T)
    assert sum(int(n) for _, n, _ in loads[:4]) == 2 * T and loads[0][2] == str(2 * T)
    grid = re.search(r'id="routes">(.*?)</table>', source, re.DOTALL)[1]
    assert grid.count("linear-gradient") == 2 * T and "capacity_factor" in page.text


@pytest.fixture(scope="module")
def dense():
    return shown(tiny_config(vocab_size=320), "ab")


def test_a_dense_page_has_no_routers_and_a_variant_without_weights_is_named(dense):
    found = dense.found._replace(layers=(dense.found.layers[0], Layer("mine:Attention", None, None)))
    page, source = checked(inspection_page(dense._replace(found=found)))
    assert "Router choices" not in page.text and "mine:Attention: this variant does not attend" in page.text
    assert block(source, "facts")["attention"][1]["heads"] == 0


def test_weights_that_are_not_finite_make_a_page(dense):
    last = dense.found.predictions[-1]
    broken = last._replace(
        best_logprob_TK=np.full_like(last.best_logprob_TK, np.nan), entropy_T=np.full_like(last.entropy_T, np.nan),
        next_logprob_T=np.full_like(last.next_logprob_T, np.nan),
    )  # fmt: skip
    found = dense.found._replace(predictions=(*dense.found.predictions[:-1], broken))
    page, _ = checked(inspection_page(dense._replace(found=found)))
    assert "not finite" in page.text


# ---- the command ----


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory with an imported run of a tiny Llama: byte-level BPE, tied embeddings, grouped queries."""
    root = tmp_path_factory.mktemp("place")
    write_published(root / "published")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(["import", "published", "--name", "tiny", "--set", "samples.count=0"]) == 0
    return root


def test_the_command_writes_the_page_of_an_imported_run(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    Path("text.txt").write_text("the capital ☃ of France")
    code, out, err = call(capsys, "inspect", "tiny", "--text", "@text.txt")
    assert (code, out) == (0, "runs/tiny/inspect.html\n") and "note" not in err
    page, source = checked(Path("runs/tiny/inspect.html").read_bytes())
    tokenizer = load_tokenizer(find_run("tiny").tokenizer)
    tokens = block(source, "facts")["tokens"]
    assert tokens == [tokenizer.special.document_start, *tokenizer.encode("the capital ☃ of France").tolist()]
    assert "⟨E2" in page.text and "☃" in page.text and "Inside tiny" in page.text

    experiment = load_experiment(find_run("tiny"))
    _, weights = open_trained(find_run("tiny"), experiment, tokenizer, devices=jax.devices()[:1], log=lambda text: None)
    logprob_TV = jax.nn.log_softmax(logits(weights.model, forward(weights.model, jnp.asarray([tokens])).hidden_BTD)[0])
    bits = -float(logprob_TV[jnp.arange(len(tokens) - 1), jnp.asarray(tokens[1:])].sum()) / math.log(2)
    (printed,) = re.findall(r"([\d.]+) bits per byte", err)
    assert float(printed) == pytest.approx(bits / len("the capital ☃ of France".encode()), abs=1e-4)


LONG = ("--text", "the capital of France", "--max-tokens", 3)


def test_a_page_elsewhere_of_a_text_that_is_cut(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    code, out, err = call(capsys, "inspect", "tiny", *LONG, "--to", "pages/a.html", "--step", 0)
    assert (code, out) == (0, "pages/a.html\n") and "note: the text was cut" in err
    page, _ = checked(Path("pages/a.html").read_bytes())
    assert "the text was cut" in page.text


def test_what_cannot_be_shown_is_refused(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    Path("latin").write_bytes(b"caf\xe9")
    assert "'nowhere'" in refusal(capsys, "inspect", "nowhere", "--text", "a")
    assert "holds no tokens" in refusal(capsys, "inspect", "tiny", "--text", "")
    assert "--text @missing: the file cannot be read" in refusal(capsys, "inspect", "tiny", "--text", "@missing")
    assert "byte 3 of the file is not UTF-8" in refusal(capsys, "inspect", "tiny", "--text", "@latin")
    too_many = refusal(capsys, "inspect", "tiny", "--text", "a", "--max-tokens", 129)
    assert "--max-tokens 129" in too_many and "model.max_length = 128" in too_many and "at most 128" in too_many
    assert "step 7" in refusal(capsys, "inspect", "tiny", "--text", "a", "--step", 7)
    Path("folder.html").mkdir(exist_ok=True)
    short = ("--text", "the capital", "--to", "folder.html")
    assert "folder.html: cannot be written" in refusal(capsys, "inspect", "tiny", *short)
