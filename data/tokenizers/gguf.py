"""Read the tokenizer of a GGUF file as a tokenizer.json for the `tokenizers` package, with its special tokens.

Supports two kinds of llama.cpp: 'gpt2', byte-level BPE with a list of merges, and 'llama', SentencePiece BPE with
scores of pieces.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.config import DataError

# Token types (llama.cpp: llama_token_type).
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
_SPACE_MARK = "\u2581"
_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # the pattern of cl100k_base, with digits in threes (Llama 3) or single (Qwen 2)


class GGUFTokenizer(NamedTuple):
    """A tokenizer of a GGUF file. Ids are None if the file does not have them."""

    json: str  # tokenizer.json of the package tokenizers
    bos: int | None
    eos: int | None
    pad: int | None
    add_bos: bool  # whether a prompt begins with bos
    chat_template: str | None  # Jinja2 source
    stop_token_ids: tuple[int, ...]  # ids that end a generation: eos, end of turn and end of message


def read_gguf_tokenizer(path: str | Path) -> GGUFTokenizer:
    """Return the tokenizer of a GGUF file. Raises DataError if it is damaged, missing or of an unsupported kind."""
    values = _metadata(Path(path))
    kinds = {"gpt2": _byte_level, "llama": _sentencepiece}
    kind = values.get("tokenizer.ggml.model")
    if kind not in kinds:
        raise DataError(
            f"{path}: tokenizer.ggml.model = {kind!r}: not supported (supported: {', '.join(kinds)}). Use the "
            "tokenizer.json of the original model"
        )
    tokens: list[str] = values.get("tokenizer.ggml.tokens") or []
    types = np.asarray(values.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens))
    if not tokens or len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise DataError(
            f"{path}: the tokenizer has {len(tokens)} tokens ({len(set(tokens))} different) and {len(types)} types. "
            f"The file is damaged"
        )
    found, add_bos = kinds[kind](path, values, tokens, types)
    bos, eos, pad, *ends = (
        _special(path, values, name, len(tokens))
        for name in ("bos_token_id", "eos_token_id", "padding_token_id", "eot_token_id", "eom_token_id")
    )
    add_bos = bool(values.get("tokenizer.ggml.add_bos_token", add_bos)) and bos is not None
    found["post_processor"] = _start_token_processor(tokens[bos], bos) if add_bos and bos is not None else None
    found |= {"version": "1.0", "truncation": None, "padding": None}
    found["added_tokens"] = [
        {"id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": bool(types[i] in (_CONTROL, _UNKNOWN))}
        for i in np.flatnonzero(np.isin(types, (_CONTROL, _USER, _UNKNOWN))).tolist()
    ]  # fmt: skip
    stop_token_ids = tuple(dict.fromkeys(i for i in (eos, *ends) if i is not None))
    return GGUFTokenizer(
        json.dumps(found, ensure_ascii=False), bos, eos, pad, add_bos, values.get("tokenizer.chat_template"),
        stop_token_ids,
    )  # fmt: skip


def _special(path: str | Path, values: dict[str, Any], name: str, size: int) -> int | None:
    token = values.get(f"tokenizer.ggml.{name}")
    if token is not None and not 0 <= token < size:
        raise DataError(
            f"{path}: tokenizer.ggml.{name} = {token}: outside the vocabulary of {size}. The file is damaged"
        )
    return token


def _byte_level(
    path: str | Path, values: dict[str, Any], tokens: list[str], types: np.ndarray
) -> tuple[dict[str, Any], bool]:
    """Return byte-level BPE; the file names the pre-tokenizer, which splits text into words."""
    digits = {"type": "Digits", "individual_digits": True}
    words: dict[str, list[dict[str, Any]]] = {
        "gpt-2": [_GPT2],
        "smollm": [digits, _GPT2],
        "llama-bpe": _split(_WORDS % "{1,3}"),
        "qwen2": _split(_WORDS % ""),
    }
    pre = values.get("tokenizer.ggml.pre", "default")
    if pre not in words:
        raise DataError(
            f"{path}: tokenizer.ggml.pre = {pre!r}: not supported (supported: {', '.join(words)}). Use the "
            "tokenizer.json of the original model"
        )
    merges = [merge.split(" ") for merge in values.get("tokenizer.ggml.merges") or []]
    ids = {token: i for i, token in enumerate(tokens)}
    wrong = next((m for m in merges if len(m) != 2 or not {*m, "".join(m)} <= ids.keys()), None)
    if wrong is not None:
        raise DataError(f"{path}: the tokenizer's merge {' '.join(wrong)!r} uses unknown tokens. The file is damaged")
    return {
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": words[pre]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(ids, merges, ignore_merges=pre == "llama-bpe"),
    }, pre == "llama-bpe"


def _split(pattern: str) -> list[dict[str, Any]]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [split, _GPT2 | {"use_regex": False}]


def _sentencepiece(
    path: str | Path, values: dict[str, Any], tokens: list[str], types: np.ndarray
) -> tuple[dict[str, Any], bool]:
    """Return SentencePiece's BPE, which first merges the neighbors that make the piece with the best score.

    As in llama.cpp and in Llama 2's tokenizer.json, text after a special token gets a leading space like any text.
    """
    scores = values.get("tokenizer.ggml.scores") or []
    if len(scores) != len(tokens):
        raise DataError(f"{path}: the tokenizer has {len(tokens)} tokens and {len(scores)} scores. The file is damaged")
    changed = [
        key for key in ("remove_extra_whitespaces", "precompiled_charsmap") if values.get(f"tokenizer.ggml.{key}")
    ]
    if changed:
        raise DataError(
            f"{path}: tokenizer.ggml.{changed[0]} is set, but normalization of text is not supported. Use the "
            "tokenizer.model of the original model"
        )
    ids = {token: i for i, token in enumerate(tokens)}
    pieces = {tokens[i] for i in np.flatnonzero(types == _NORMAL).tolist()}
    merges: list[tuple[float, int, list[str]]] = []
    for token in pieces:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in pieces and right in pieces:
                merges.append((-scores[ids[token]], len(merges), [left, right]))
    merges.sort(key=lambda merge: (merge[0], ids["".join(merge[2])], ids[merge[2][0]], ids[merge[2][1]]))
    unknown = np.flatnonzero(types == _UNKNOWN).tolist()
    fallback = all(f"<0x{byte:02X}>" in ids for byte in range(256))
    if not fallback and not unknown:
        raise DataError(
            f"{path}: the tokenizer has neither byte tokens nor an unknown token for text outside its pieces. The file "
            f"is damaged"
        )
    prefix = values.get("tokenizer.ggml.add_space_prefix", True)
    spaces: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": _SPACE_MARK}]
    back: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE_MARK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        spaces.insert(0, {"type": "Prepend", "prepend": _SPACE_MARK})
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": spaces},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": back},
        "model": _bpe(ids, [m for *_, m in merges], unknown=tokens[unknown[0]] if unknown else None, fallback=fallback),
    }, True


def _bpe(
    ids: dict[str, int],
    merges: list[list[str]],
    *,
    ignore_merges: bool = False,
    unknown: str | None = None,
    fallback: bool = False,
) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": fallback,
        "ignore_merges": ignore_merges,
        "vocab": ids,
        "merges": merges,
    }


def _start_token_processor(token: str, index: int) -> dict[str, Any]:
    """Return a post-processor that adds a special token before a text."""
    mark, text, other = (
        {"SpecialToken": {"id": token, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"Sequence": {"id": "B", "type_id": 1}},
    )
    return {
        "type": "TemplateProcessing", "single": [mark, text], "pair": [mark, text, other],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }  # fmt: skip


def _metadata(path: Path) -> dict[str, Any]:
    """Return numbers, strings and lists of the file's header, read by the gguf package."""
    try:
        import gguf
    except ImportError as error:
        raise DataError(f"{path}: GGUF files require the gguf package: pip install 'meshwork[interop]'") from error

    class Reader(gguf.GGUFReader):
        """A reader of whole lists. The package's reader makes several arrays per string, which takes seconds for a
        vocabulary."""

        def _get_field_parts(self, orig_offs, raw_type):
            if raw_type != gguf.GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            inner, count = int(self._get(orig_offs, np.uint32)[0]), int(self._get(orig_offs + 4, np.uint64)[0])
            at, types = orig_offs + 12, [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType(inner)]
            if inner != gguf.GGUFValueType.STRING:
                values = self._get(at, self.gguf_scalar_to_np[gguf.GGUFValueType(inner)], count)
                return 12 + values.nbytes, [values], [0], types
            strings = []
            for _ in range(count):
                size = int.from_bytes(self.data[at : at + 8], "little")
                if size > len(self.data) - at - 8:
                    raise ValueError("a string extends past the end of the file")
                strings.append(self.data[at + 8 : at + 8 + size].tobytes().decode("utf-8"))
                at += 8 + size
            return at - orig_offs, [strings], [0], types

    try:
        fields = Reader(path).fields.values()
        return {
            f.name: list(f.parts[-1]) if f.types[:1] == [gguf.GGUFValueType.ARRAY] else f.contents() for f in fields
        }
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}. Give a readable GGUF file") from error
    except Exception as error:  # the package has no error class; a damaged file can raise anything
        raise DataError(f"{path}: not a GGUF file, truncated or damaged ({error}). Download it again") from error
