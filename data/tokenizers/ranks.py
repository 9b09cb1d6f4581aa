"""Tokenizers from tiktoken files, whose lines hold a base64 token and its rank. Nothing is downloaded.

The file contains neither the split pattern nor the special tokens; both depend on its kind.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data.config import DataError
from data.paths import parse_path
from data.tokenizers.description import write_description
from data.tokenizers.extras import needed
from data.tokenizers.protocol import BytesTable, SpecialTokens

FILE = "ranks.tiktoken"  # in a saved folder

# Split patterns of OpenAI's tiktoken (tiktoken_ext/openai_public.py), Meta's llama3/tokenizer.py and Qwen's
# tokenization_qwen.py.
_GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
_CL100K = r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""  # noqa: E501
_LLAMA3 = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""  # noqa: E501
_QWEN = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _CONTRACTED,
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _CONTRACTED,
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


@dataclass(frozen=True)
class Kind:
    """A published tiktoken tokenizer."""

    ranks: int  # number of lines in the file
    pattern: str
    specials: Mapping[str, int]  # ids of special tokens minus the number of ranks
    end: str
    start: str | None = None  # token that opens a prompt
    stop_tokens: tuple[str, ...] = ()  # tokens that end a generation, in addition to `end`
    composed: bool = False  # whether text is first normalized (NFC)


def _reserved(names: Mapping[int, str], count: int, template: str, first: int = 0) -> dict[str, int]:
    """Return `count` special tokens with their offsets; those without a name are numbered in order."""
    rest = iter(range(first, first + count))
    return {names[i] if i in names else template.format(next(rest)): i for i in range(count)}


_LLAMA3_NAMES = {
    0: "<|begin_of_text|>", 1: "<|end_of_text|>", 4: "<|finetune_right_pad_id|>", 6: "<|start_header_id|>",
    7: "<|end_header_id|>", 8: "<|eom_id|>", 9: "<|eot_id|>", 10: "<|python_tag|>",
}  # fmt: skip
_HARMONY_NAMES = {
    0: "<|startoftext|>", 1: "<|endoftext|>", 4: "<|return|>", 5: "<|constrain|>", 7: "<|channel|>", 8: "<|start|>",
    9: "<|end|>", 10: "<|message|>", 14: "<|call|>", 20: "<|endofprompt|>",
}  # fmt: skip
_FIM = {"<|fim_prefix|>": 2, "<|fim_middle|>": 3, "<|fim_suffix|>": 4}

KINDS = {
    "gpt2": Kind(50256, _GPT2, {"<|endoftext|>": 0}, "<|endoftext|>"),
    "cl100k_base": Kind(100256, _CL100K, {"<|endoftext|>": 1, **_FIM, "<|endofprompt|>": 20}, "<|endoftext|>"),
    "o200k_base": Kind(199998, _O200K, {"<|endoftext|>": 1, "<|endofprompt|>": 20}, "<|endoftext|>"),
    "o200k_harmony": Kind(
        199998,
        _O200K,
        {_HARMONY_NAMES.get(i, f"<|reserved_{199998 + i}|>"): i for i in range(1090)},
        "<|endoftext|>",
        stop_tokens=("<|return|>", "<|call|>"),
    ),
    "llama3": Kind(
        128000,
        _LLAMA3,
        _reserved(_LLAMA3_NAMES, 256, "<|reserved_special_token_{}|>"),
        "<|end_of_text|>",
        start="<|begin_of_text|>",
        stop_tokens=("<|eom_id|>", "<|eot_id|>"),
    ),
    "qwen": Kind(
        151643,
        _QWEN,
        {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, **{f"<|extra_{i}|>": 3 + i for i in range(205)}},
        "<|endoftext|>",
        stop_tokens=("<|im_end|>",),
        composed=True,
    ),
}


class TiktokenTokenizer(BytesTable):
    """A tokenizer from the content of a tiktoken file.

    `kind`: key of `KINDS`; None: chosen by the number of ranks. With a given kind the file may have any number of
    ranks, and the kind's special tokens follow them.
    """

    def __init__(
        self,
        content: bytes,
        *,
        kind: str | None = None,
        special: SpecialTokens | None = None,
        stop_token_ids: Sequence[int] = (),
        names: Mapping[str, str] | None = None,
        chat_template: str | None = None,
    ):
        tiktoken = needed("tiktoken")
        self.content, self.chat_template = content, chat_template
        ranks = read_ranks(content)
        self.kind = kind if kind in KINDS else _kind_by_size(len(ranks), kind)
        known = KINDS[self.kind]
        self._special_token_ids = {name: len(ranks) + i for name, i in known.specials.items()}
        table = [b""] * (1 + max(self._special_token_ids.values()))
        for token, rank in ranks.items():
            table[rank] = token
        self._table = tuple(table)
        self._encoding = tiktoken.Encoding(
            self.kind, pat_str=known.pattern, mergeable_ranks=ranks, special_tokens=self._special_token_ids
        )
        ids = self._special_token_ids
        end, start = ids[known.end], ids[known.start] if known.start else -1
        fim = {field: ids.get(f"<|{field}|>", -1) for field in ("fim_prefix", "fim_suffix", "fim_middle")}
        self.special = special or SpecialTokens(
            pad=ids.get("<|finetune_right_pad_id|>", -1), end=end, unk=-1, **fim, system=-1, user=-1, assistant=-1,
            end_of_turn=-1, mask=-1, start=start,
        )  # fmt: skip
        self.names = dict(names or {"eos_token": known.end, "bos_token": known.start or known.end})
        self.stop_token_ids = tuple(stop_token_ids) or (
            end,
            *(self._special_token_ids[name] for name in known.stop_tokens),
        )

    @cached_property
    def identity(self) -> str:
        return hashlib.sha256(f"tiktoken {self.kind} ".encode() + self.content).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._encoding.encode_ordinary(self._normal(text)), np.int32)

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        threads = os.cpu_count() or 1
        found = self._encoding.encode_ordinary_batch([self._normal(text) for text in texts], num_threads=threads)
        return [np.array(ids, np.int32) for ids in found]

    def _normal(self, text: str) -> str:
        return unicodedata.normalize("NFC", text) if KINDS[self.kind].composed else text

    def save(self, directory: str | os.PathLike[str]) -> None:
        folder = parse_path(directory, "tokenizer")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_bytes(self.content)
        write_description(
            directory,
            "tiktoken",
            self,
            special=self.special._asdict(),
            stop_token_ids=self.stop_token_ids,
            names=self.names,
            tiktoken=self.kind,
        )


def is_ranks(content: bytes) -> bool:
    """Return whether the content begins like a tiktoken file, unlike SentencePiece models, which are binary."""
    return re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", content) is not None


def read_ranks(content: bytes) -> dict[bytes, int]:
    """Return ranks by token. Raises DataError with the damaged line or the missing token."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise DataError(
                f"tiktoken file: line {number} is {line[:40]!r}, not a base64 token and its rank. Download it again"
            ) from error
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or sorted(ranks.values()) != list(range(len(ranks))):
        what = f"the byte 0x{missing[0]:02x} is missing" if missing else "its ranks are not consecutive from 0"
        raise DataError(f"tiktoken file of {len(ranks)} ranks is damaged or truncated: {what}. Download it again")
    return ranks


def _kind_by_size(count: int, name: str | None) -> str:
    for kind, known in KINDS.items():
        if known.ranks == count:
            return kind
    raise DataError(
        f"tiktoken file{f' {name!r}' if name else ''} of {count} ranks: unknown kind, and the file does not contain "
        f"its split pattern (known: {', '.join(f'{kind} ({known.ranks})' for kind, known in KINDS.items())}). Pass its "
        "kind, or use a tokenizer.json"
    )
