"""Read the tokenizers of published models: find their files, and read special tokens from the JSON files with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data.config import SPECIAL_PIECES, DataError
from data.tokenizers.huggingface import HFTokenizer, open_json, read_json
from data.tokenizers.protocol import SpecialTokens, Tokenizer
from data.tokenizers.ranks import TiktokenTokenizer, is_ranks
from data.tokenizers.sentencepieces import PublishedSentencePiece

_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
# Fill-in-the-middle tokens of StarCoder and SmolLM, Qwen and OpenAI, Code Llama, DeepSeek Coder.
_FIM = {
    "fim_prefix": ("<fim_prefix>", "<|fim_prefix|>", "▁<PRE>", "<|fim▁begin|>"),
    "fim_suffix": ("<fim_suffix>", "<|fim_suffix|>", "▁<SUF>", "<|fim▁hole|>"),
    "fim_middle": ("<fim_middle>", "<|fim_middle|>", "▁<MID>", "<|fim▁end|>"),
}
_Find = Callable[[str], int | None]  # id of a special token's name


def of_folder(folder: Path) -> Tokenizer:
    """Return the tokenizer of a published folder. Raises DataError or OSError."""
    files = _PublishedFiles(folder)
    if (folder / "tokenizer.json").is_file():
        text = (folder / "tokenizer.json").read_bytes().decode("utf-8")
        return _of_json(text, files)
    for path in sorted(folder.glob("*.tiktoken")) + [folder / "tokenizer.model"]:
        if path.is_file():
            content = path.read_bytes()
            if is_ranks(content):
                tiktoken = TiktokenTokenizer(content, kind=files.tiktoken(path), chat_template=files.chat_template)
                return tiktoken.with_stop_tokens(files.stop_token_ids(tiktoken.vocab_size))
            model = PublishedSentencePiece.published(content, files.add_bos, (), files.chat_template)
            return model.with_stop_tokens(files.stop_token_ids(model.vocab_size))
    raise DataError(
        f"no tokenizer in {folder}: expected tokenizer.json, *.tiktoken or tokenizer.model. If the tokenizer consists "
        "of vocab.json and merges.txt, write its tokenizer.json with transformers: "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )


def of_gguf(path: Path) -> Tokenizer:
    """Return the tokenizer of a GGUF file."""
    from data.tokenizers.gguf import read_gguf_tokenizer

    found = read_gguf_tokenizer(path)
    opened = open_json(found.json)
    by_name = {"bos_token": found.bos, "eos_token": found.eos, "pad_token": found.pad}
    names = {name: opened.id_to_token(i) for name, i in by_name.items() if i is not None and i >= 0}
    start = found.bos if found.add_bos and found.bos is not None else -1
    special = _specials(names, opened.token_to_id, start, str(path))
    return HFTokenizer(
        found.json, special, stop_token_ids=found.stop_token_ids, names=names, chat_template=found.chat_template
    )


def _of_json(text: str, files: _PublishedFiles) -> HFTokenizer:
    read_json(text)
    opened = open_json(text)
    size = 1 + max(opened.get_vocab().values(), default=-1)
    stop_token_ids = files.stop_token_ids(size)
    names = dict(files.names)
    for name, i in files.ids.items():  # without tokenizer_config.json, other files still have the ids
        if name not in names and i is not None and 0 <= i < size and opened.id_to_token(i) is not None:
            names[name] = opened.id_to_token(i)
    bos = opened.token_to_id(names["bos_token"]) if "bos_token" in names else None
    if files.add_bos is None:
        start = opened_by(opened)
    else:
        start = bos if files.add_bos and bos is not None else -1
    special = _specials(names, opened.token_to_id, start, str(files.folder))
    return HFTokenizer(text, special, stop_token_ids=stop_token_ids, names=names, chat_template=files.chat_template)


def opened_by(opened: Any) -> int:
    """Return the special token that the post-processor adds before a text, or -1."""
    bare, framed = (opened.encode("a", add_special_tokens=add).ids for add in (False, True))
    added = opened.get_added_tokens_decoder()
    return framed[0] if framed[: len(bare)] != bare and framed and framed[0] in added else -1


def _specials(names: Mapping[str, str], find: _Find, start: int, where: str) -> SpecialTokens:
    def of(name: str) -> int:
        found = find(names[name]) if name in names else None
        return -1 if found is None else found

    if all(find(piece) == i for i, piece in enumerate(SPECIAL_PIECES)):  # written by write_published
        return SpecialTokens(start=start)
    end = of("eos_token")
    if end < 0:
        raise DataError(
            f"tokenizer of {where}: no end-of-text token. Set eos_token in tokenizer_config.json, or eos_token_id in "
            "generation_config.json or config.json"
        )
    marks = {
        field: next((i for name in spelled if (i := find(name)) is not None), -1) for field, spelled in _FIM.items()
    }
    return SpecialTokens(
        pad=of("pad_token"), end=end, unk=of("unk_token"), **marks,
        system=-1, user=-1, assistant=-1, end_of_turn=-1, mask=of("mask_token"), start=start,
    )  # fmt: skip


class _PublishedFiles:
    """The tokenizer's entries in a folder's JSON files, which may be missing. Raises DataError with file and key."""

    def __init__(self, folder: Path):
        self.folder = folder
        tokenizer, special, generation, model = (
            _json(folder / name)
            for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")
        )
        inner = model.get("text_config", {})  # in models that take images
        if not isinstance(inner, dict):
            raise _invalid(folder / "config.json", "text_config", inner, "an object")
        found = {
            name: (tokenizer[name], "tokenizer_config.json")
            if name in tokenizer
            else (special.get(name), "special_tokens_map.json")
            for name in _NAMES
        }
        self.names = {
            name: _token_text(value, folder / file, name) for name, (value, file) in found.items() if value is not None
        }
        sources = [
            (folder / "generation_config.json", "", generation),
            (folder / "config.json", "", model),
            (folder / "config.json", "text_config.", inner),
        ]
        ids = {
            name: [
                [(path, where + name, i) for i in _id_list(said.get(name), path, where + name)]
                for path, where, said in sources
            ]
            for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        }
        of_generation, of_model, of_inner = ids["eos_token_id"]
        self._stop_token_ids = of_generation + (of_model or of_inner)
        self.ids = {
            name.removesuffix("_id"): next((i for said in (of_model, of_inner, of_generation) for *_, i in said), None)
            for name, (of_generation, of_model, of_inner) in ids.items()
        }
        self.add_bos: bool | None = tokenizer.get("add_bos_token")
        if self.add_bos not in (None, False, True):
            raise _invalid(folder / "tokenizer_config.json", "add_bos_token", self.add_bos, "true or false")
        self.model_type = model.get("model_type", "")
        self.chat_template = self._template(tokenizer.get("chat_template"))

    def stop_token_ids(self, vocab_size: int) -> tuple[int, ...]:
        """Return the ids that end a generation. Raises DataError if one is not below `vocab_size`."""
        for path, key, i in self._stop_token_ids:
            if not 0 <= i < vocab_size:
                raise _invalid(path, key, i, f"ids from 0 to {vocab_size - 1}")
        return tuple(dict.fromkeys(i for *_, i in self._stop_token_ids))

    def _template(self, given: Any) -> str | None:
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            return path.read_bytes().decode("utf-8")
        found = given
        if isinstance(given, list) and all(isinstance(entry, dict) for entry in given):  # several named templates
            found = next((entry.get("template") for entry in given if entry.get("name") == "default"), None)
        if not isinstance(found, str | None):
            expected = 'a string, or a list of {"name", "template"}'
            raise _invalid(self.folder / "tokenizer_config.json", "chat_template", given, expected)
        return found

    def tiktoken(self, path: Path) -> str | None:
        """Return the kind of a tiktoken file if its name or the model's type gives it, else None."""
        return "o200k_harmony" if self.model_type == "gpt_oss" else path.stem if path.suffix == ".tiktoken" else None


def _id_list(value: Any, path: Path, key: str) -> list[int]:
    found = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(i) is not int for i in found):  # refuses bools too
        raise _invalid(path, key, value, "an integer or a list of integers")
    return found


def _token_text(value: Any, path: Path, key: str) -> str:
    found = value.get("content") if isinstance(value, dict) else value
    if not isinstance(found, str):
        raise _invalid(path, key, value, 'a string, or an object with the string "content"')
    return found


def _invalid(path: Path, key: str, value: Any, expected: str) -> DataError:
    return DataError(f"{path}: {key} = {repr(value)[:80]}: expected {expected}. Fix the file or download it again")


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}. Download it again") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} is damaged: it holds a {type(found).__name__}, not an object. Download it again")
    return found
