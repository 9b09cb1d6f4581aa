"""The page of `inspect`: one self-contained HTML file with what the network computed for a text.

The text, the table of the logit lens and the tables of the routers are plain HTML. page.js draws the attention maps,
and fills the box beside the pointer from a block of JSON.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.tokenizer import Tokenizer
from experiments.html import Html, data, element, joined, page, script
from experiments.inspection import attention_maps, router_choices
from experiments.inspection.capture import Capture, Prediction
from experiments.inspection.figures import in_bits, legend, percent, rounded, strength
from experiments.inspection.pieces import added_text, hexadecimal, labels
from experiments.report import noted
from model.config import ModelConfig

MOST_BITS = 12  # cost of a token with the strongest colour: one in 4096
LENS_BEST = 3  # tokens that the box shows for a cell of the logit lens
HERE = Path(__file__).parent

TEXT_HINT = """\
The stronger the colour of a token, the less probable the model found it after it had read everything before it. Point
at a token, or tap it, to see what the model expected instead. A token of probability p costs −log₂ p bits."""
LENS_HINT = """\
Every layer adds to a running sum, the residual stream. The logit lens (nostalgebraist 2020) reads this sum early: it
applies the final norm and the output head after each layer, as if the later layers did not exist. A cell shows the
token that would then be predicted after the token at the top of its column, in a stronger colour the more probable it
is, and underlined where the text continues with it. Read a column downwards to watch a prediction form. The last row is
the model's output. The first rows may mean little, because a layer need not keep what it knows in the terms of the
head."""


class Shown(NamedTuple):
    """What a page shows."""

    title: str
    about: str  # one line about the run and its weights
    notes: Sequence[str]  # what a reader must know, such as that the text was cut
    config: ModelConfig
    tokenizer: Tokenizer
    found: Capture


def inspection_page(shown: Shown) -> bytes:
    """Return the page in UTF-8."""
    config, found, tokenizer = shown.config, shown.found, shown.tokenizer
    tokens: list[int] = found.tokens_T.tolist()
    names = labels(tokenizer, [*tokens, *(int(i) for each in found.predictions for i in each.best_TK.flat)])
    columns = [names[token] for token in tokens]
    facts = {
        "labels": names,
        "tokens": tokens,
        "output": _predictions(found.predictions[-1], None),
        "entropy": rounded(found.predictions[-1].entropy_T / math.log(2)),
        "lens": [_predictions(each, LENS_BEST) for each in found.predictions],
        "attention": attention_maps.facts(found.layers, config),
        "routers": router_choices.facts(found.layers, config),
    }
    parts = [
        element("h1", shown.title),
        element("p", shown.about, class_="faint"),
        noted(shown.notes),
        element("noscript", element("p", "Attention maps and details need JavaScript, which is off.", class_="alarm")),
        _summary(found, tokenizer),
        _text(found, tokenizer, names),
        _lens(found, names, columns),
        attention_maps.section(found.layers, config),
        router_choices.section(found.layers, config, columns),
        element("div", id="tip", class_="tip", hidden=""),
        data("facts", facts),
        data("maps", attention_maps.packed(found.layers, config)),
        script((HERE / "page.js").read_text(encoding="utf-8")),
    ]
    style = (HERE / "page.css").read_text(encoding="utf-8") + router_choices.colours(config)
    return page(shown.title, joined(part for part in parts if part is not None), style)


def size_of(found: Capture, tokenizer: Tokenizer) -> int:
    """Return the bytes of the text. The token that opens it is not predicted and has none."""
    return sum(len(tokenizer.token_bytes(token)) for token in found.tokens_T[1:].tolist())


def bits_per_byte(found: Capture, tokenizer: Tokenizer) -> float:
    """Return the bits of all predicted tokens per byte of the text; NaN if the tokens have no bytes."""
    size = size_of(found, tokenizer)
    nats = -float(found.predictions[-1].next_logprob_T[:-1].astype(np.float64).sum())
    return nats / math.log(2) / size if size else math.nan


def _summary(found: Capture, tokenizer: Tokenizer) -> Html:
    """Return the figures of the whole text."""
    last, bits, predicted = found.predictions[-1], bits_per_byte(found, tokenizer), len(found.tokens_T) - 1
    ranks = last.next_rank_T[:-1]
    figures = [
        ("bits per byte", f"{bits:.3f}" if math.isfinite(bits) else "not finite"),
        ("bits per token", in_bits(-last.next_logprob_T[:-1].mean())),
        ("entropy, bits per token", in_bits(last.entropy_T[:-1].mean())),
        ("were the first guess", f"{(ranks == 1).mean():.0%}"),
        ("were in the first five", f"{(ranks <= 5).mean():.0%}"),
        ("tokens predicted", f"{predicted:,}"),
        ("bytes per token", f"{size_of(found, tokenizer) / predicted:.2f}"),
    ]
    boxes = (element("div", element("b", value), element("span", name)) for name, value in figures)
    return element("div", *boxes, class_="facts", style="margin-top: 26px")


def _text(found: Capture, tokenizer: Tokenizer, names: dict[int, str]) -> Html:
    """Return the text, each token in the colour of its cost. page.js finds token t as the element's child t."""
    tokens, logprob_T = found.tokens_T.tolist(), found.predictions[-1].next_logprob_T[:-1]
    costs = np.clip(np.nan_to_num(-logprob_T / math.log(2), nan=MOST_BITS), 0, MOST_BITS) / MOST_BITS
    first = element("span", names[tokens[0]], class_="token start")
    spans = [
        element("span", *_spelled(text, token, tokenizer, names), class_="token", style=strength(cost))
        for token, text, cost in zip(tokens[1:], added_text(tokenizer, tokens[1:]), costs.tolist(), strict=True)
    ]
    end = element("span", "what follows?", class_="token end")
    steps = [(percent(2.0**-bits), bits / MOST_BITS) for bits in range(0, MOST_BITS + 1, 2)]
    return joined(
        (
            element("h2", "Token probabilities"),
            element("p", TEXT_HINT, class_="hint"),
            legend("probability of the token", "var(--line1)", steps),
            element("div", first, *spans, end, class_="text", id="text"),
        )
    )


def _spelled(text: str, token: int, tokenizer: Tokenizer, names: dict[int, str]) -> Iterator[object]:
    """Yield what the page shows of a token: its text with a sign before each line break, or the bytes of a part of a
    character, or the name of a special token."""
    if not text:
        spelled = tokenizer.token_bytes(token)
        yield element("i", hexadecimal(spelled) if spelled else names[token])
        return
    first, *rest = text.split("\n")
    yield first
    for part in rest:
        yield element("i", "⏎")
        yield f"\n{part}"


def _lens(found: Capture, names: dict[int, str], columns: Sequence[str]) -> Html:
    """Return the table of the logit lens: a row for each layer, a column for each token that the model reads."""
    titles = ["embeddings", *(f"layer {i}{attention_maps.variant(layer)}" for i, layer in enumerate(found.layers))]
    rows = []
    for title, each in zip(titles, found.predictions, strict=True):
        best_T, hit_T = each.best_TK[:, 0].tolist(), (each.next_rank_T == 1).tolist()
        p_T = np.nan_to_num(np.exp(each.best_logprob_TK[:, 0])).tolist()
        cells = (
            element("td", names[best], class_="hit" if hit else "", style=strength(p))
            for best, p, hit in zip(best_T, p_T, hit_T, strict=True)
        )
        mean = element("b", in_bits(-each.next_logprob_T[:-1].mean()))
        rows.append(element("tr", element("th", title, mean), *cells))
    head = element("tr", element("th", "read", element("b", "bits/token")), *(element("th", c) for c in columns))
    foot = element("tr", element("th", "what follows"), *(element("td", c) for c in [*columns[1:], "?"]))
    table = element("table", element("thead", head), element("tbody", *rows), element("tfoot", foot))
    steps = [(f"{p:.0%}", p) for p in (0, 0.25, 0.5, 0.75, 1)]
    return joined(
        (
            element("h2", "Logit lens"),
            element("p", LENS_HINT, class_="hint"),
            legend("probability of the token shown", "var(--model)", steps),
            element("div", table, class_="wide lens", id="lens"),
        )
    )


def _predictions(each: Prediction, best: int | None) -> dict[str, Any]:
    """Return predictions for page.js, with the `best` most likely tokens. Those of the token at t are at t - 1."""
    return {
        "best": each.best_TK[:, :best].tolist(),
        "p": rounded(np.exp(each.best_logprob_TK[:, :best])),
        "next": rounded(np.exp(each.next_logprob_T)),
        "rank": each.next_rank_T.tolist(),
    }
