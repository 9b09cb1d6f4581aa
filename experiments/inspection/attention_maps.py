"""The attention maps of the page: small maps of every layer and head, and room for a large one.

The weights travel as bytes: 255 times the square root of each weight, rounded, which keeps small weights apart from
zero. Only keys that are not after the query are kept, since nothing attends to later tokens. The bytes are compressed
with zlib and written in base64; page.js reads them back.

Shapes: T queries, S keys, N heads.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from experiments.html import Html, element, joined
from experiments.inspection.capture import Layer
from experiments.inspection.figures import rounded
from model.config import ModelConfig

MOST_WEIGHTS = 32_000_000  # of a page: about 30 MB before compression

HINT = """\
Each square is one head: rows are the tokens that look (queries, the first at the top), columns are the tokens that they
look at (keys, the first on the left). The stronger the colour of a point, the larger its weight: the colour grows with
the square root of the weight, so that small weights show. The upper right stays empty, because no token sees a later
one. Choose a head to enlarge it, then point at the map or at the text beside it."""
ROWS = " The weights of a row sum to 100 %."
SINKS = """\
 This network has learned sinks (model.attention.sinks): a head may leave part of its weight to a sink that has no
value, so the weights of a row sum to less than 100 %. The text beside the large map names the rest."""
RESTS = """\
 A strong column that most tokens look at, often the first, is common: a head that finds nothing to read rests there
(attention sinks, Xiao et al. 2023)."""


def most_tokens(config: ModelConfig) -> int:
    """Return the largest number of tokens whose attention maps fit a page."""
    heads = config.num_layers * config.attention.num_heads
    return int((math.isqrt(8 * (MOST_WEIGHTS // heads) + 1) - 1) // 2)


def variant(layer: Layer) -> str:
    """Return what to add to a layer's title: its kind of attention, unless it is global."""
    return "" if layer.kind == "global" else f" · {layer.kind.rpartition(':')[2].replace('_', ' ')}"


def facts(layers: Sequence[Layer], config: ModelConfig) -> list[dict[str, Any]]:
    """Return what page.js needs besides the weights: for each layer its heads, its window, and what each head does."""
    return [
        {
            "heads": 0 if layer.attention_NTS is None else len(layer.attention_NTS),
            "window": config.attention.window if layer.kind == "sliding" else 0,
            "sinks": config.attention.sinks,
            "habits": [] if layer.attention_NTS is None else rounded(habits(layer.attention_NTS)),
        }
        for layer in layers
    ]


def habits(attention_NTS: Float[np.ndarray, "N T T"]) -> Float[np.ndarray, "N 4"]:
    """Return for each head, averaged over the queries after the first: the weight of the first token, of the token
    before the query and of the query's own token, and the mean distance of the keys in tokens."""
    weights_NTS = attention_NTS[:, 1:].astype(np.float64)
    T = attention_NTS.shape[1]
    queries = np.arange(1, T)
    own, before = weights_NTS[:, queries - 1, queries], weights_NTS[:, queries - 1, queries - 1]
    distance = (weights_NTS * (queries[:, None] - np.arange(T))).sum(-1) / np.maximum(weights_NTS.sum(-1), 1e-9)
    return np.stack([weights_NTS[:, :, 0].mean(1), before.mean(1), own.mean(1), distance.mean(1)], axis=1)


def quantised(weights: Float[np.ndarray, "*any"]) -> UInt8[np.ndarray, "*any"]:
    """Return weights between 0 and 1 as bytes; not a number becomes 0."""
    return np.rint(255 * np.sqrt(np.clip(np.nan_to_num(weights), 0, 1))).astype(np.uint8)


def packed(layers: Sequence[Layer], config: ModelConfig) -> str:
    """Return all maps in base64: for each layer the heads, the queries and their keys in order. If the network has
    sinks, the maps of a layer are followed by the sink's weight for each head and query."""
    found = []
    for layer in layers:
        if layer.attention_NTS is not None:
            rows, columns = np.tril_indices(layer.attention_NTS.shape[1])
            found.append(quantised(layer.attention_NTS[:, rows, columns]).tobytes())
            if config.attention.sinks:
                found.append(quantised(1 - layer.attention_NTS.sum(-1)).tobytes())
    return base64.b64encode(zlib.compress(b"".join(found))).decode("ascii")


def section(layers: Sequence[Layer], config: ModelConfig) -> Html:
    """Return the grid of maps, a row for each layer and a column for each head, and the place of the large one."""
    heads = max((len(layer.attention_NTS) for layer in layers if layer.attention_NTS is not None), default=0)
    cells = [element("span", "\u00a0", class_="corner")]
    cells += [element("span", f"head {i}", class_="head") for i in range(heads)]
    for i, layer in enumerate(layers):
        cells.append(element("span", f"layer {i}{variant(layer)}", class_="layer"))
        if layer.attention_NTS is None:
            why = f"{layer.kind}: this variant does not attend through its cache (model/cache.py), so it has no maps"
            cells.append(element("span", why, class_="none"))
            continue
        given = len(layer.attention_NTS)
        cells += [
            element("button", element("canvas"), class_="map", type="button", **{"aria-label": f"layer {i}, head {n}"})
            for n in range(given)
        ]
        cells += [element("span", "")] * (heads - given)
    hint = HINT + (SINKS if config.attention.sinks else ROWS) + RESTS
    if any(layer.kind == "sliding" for layer in layers):
        hint += f" A sliding layer sees the last {config.attention.window} tokens; in the large map the rest is shaded."
    large = element(
        "div",
        element("h3", "", id="chosen"),
        element("div", element("canvas", id="map"), class_="scroll"),
        element("div", element("div", id="says", class_="says"), element("div", id="looks", class_="text")),
        class_="large",
    )
    grid = element("div", *cells, class_="maps", id="maps-of-heads", style=f"--heads:{heads}")
    return joined((element("h2", "Attention maps"), element("p", hint, class_="hint"), grid, large))
