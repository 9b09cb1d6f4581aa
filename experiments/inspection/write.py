"""Write the page of `inspect` for a run's weights and a text.

ids, notes = cut(tokenizer, "def fib(n):", experiment.model)
path = write_inspection(run, experiment, tokenizer, ids, notes)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from etils import epath

from data.paths import write_whole
from data.tokenizer import Tokenizer
from experiments.inspection.attention_maps import most_tokens
from experiments.inspection.capture import capture, refuse
from experiments.inspection.page import Shown, bits_per_byte, inspection_page
from experiments.report import folder_name
from experiments.run import open_trained
from model.config import ModelConfig
from train.config import Experiment
from train.records import RunFolder, RunFolderError

DEFAULT_TOKENS = 256  # of a page, if not asked for another number


def read_text(argument: str) -> str:
    """Return the text of `--text`; '@FILE' names a file in UTF-8. Raises ValueError."""
    if not argument.startswith("@"):
        return argument
    try:
        return Path(argument[1:]).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {argument}: byte {error.start} of the file is not UTF-8; convert the file") from error
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--text {argument}: the file cannot be read ({error}). Give a path after the '@', or, for a text that "
            "begins with '@', write it to a file"
        ) from error


def cut(tokenizer: Tokenizer, text: str, config: ModelConfig, most: int | None = None) -> tuple[list[int], list[str]]:
    """Return (the token that opens a document and the text's first tokens, notes for the reader of the page).

    `most`: number of tokens, the opening one included; None: DEFAULT_TOKENS, or fewer if the network or the page holds
    fewer. Raises ValueError for a network that does not predict the next token, for a text without tokens, and for a
    `most` that is too large.
    """
    refuse(config)
    encoded: list[int] = tokenizer.encode(text).tolist()
    if not encoded:
        raise ValueError(f"--text {text!r}: holds no tokens to predict; give at least one character")
    limit, why = min(
        (config.max_length, f"model.max_length = {config.max_length}"),
        (most_tokens(config), f"the attention maps of {config.num_layers} layers with {config.attention.num_heads} "
                              "heads, of which a browser can show no more"),
    )  # fmt: skip
    if limit < 2:
        raise ValueError(f"{why}: the page needs two tokens, but can show {limit}. Inspect a run of another size")
    if most is not None and most > limit:
        raise ValueError(f"--max-tokens {most}: the page can show {limit}, because of {why}. Use at most {limit}")
    if most is not None:
        limit, why = most, f"--max-tokens {most}"
    elif limit > DEFAULT_TOKENS:
        limit, why = DEFAULT_TOKENS, f"the default of --max-tokens, {DEFAULT_TOKENS}"
    notes = []
    if len(encoded) > limit - 1:
        notes.append(
            f"the text was cut: it has {len(encoded):,} tokens, and the page shows the first {limit - 1:,} and the one "
            f"that opens a text, because of {why}"
        )
    if config.attention.mask == "prefix":
        notes.append("model.attention.mask = 'prefix': the prefix is empty here, so no token sees later ones")
    return [tokenizer.special.document_start, *encoded[: limit - 1]], notes


def write_inspection(
    run: RunFolder,
    experiment: Experiment,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    notes: Sequence[str] = (),
    *,
    step: int | None = None,
    path: str | os.PathLike[str] | None = None,
    log: Callable[[str], None] = print,
) -> epath.Path:
    """Write the page for the tokens of `cut`, by default to RUN/inspect.html, and return its path.

    The network runs on one device. `log` receives the notes and the bits per byte. Raises CheckpointError, or
    RunFolderError if the page cannot be written.
    """
    config = experiment.model
    _, weights = open_trained(run, experiment, tokenizer, step, log=log, devices=jax.devices()[:1])
    found = capture(weights.model, ids)
    for note in notes:
        log(f"note: {note}")
    shown = Shown(f"Inside {folder_name(run)}", _about(config, weights.step), notes, config, tokenizer, found)
    target = epath.Path(run.path / "inspect.html" if path is None else path)
    content = inspection_page(shown)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, content)
    except OSError as error:
        raise RunFolderError(f"--to {target}: cannot be written ({error}); choose another file") from error
    log(f"weights of step {weights.step}: {bits_per_byte(found, tokenizer):.4f} bits per byte of this text")
    return target


def _about(config: ModelConfig, step: int) -> str:
    a, moe = config.attention, config.moe
    heads = f"{a.num_heads} heads" + ("" if a.num_kv_heads == a.num_heads else f" ({a.num_kv_heads} of keys)")
    parts = [f"weights of step {step:,}", f"{config.num_layers} layers", f"width {config.embed_dim:,}", heads]
    if moe is not None:
        parts.append(f"{moe.num_experts} experts, {moe.top_k} for each token")
    return " · ".join(parts)
