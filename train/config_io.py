"""Frozen-dataclass configs: dotted overrides, JSON, differences and hashes.

A config is a tree of frozen dataclasses. Its leaves are int, float, bool, str, Literal, tuples of these, and unions of
these with None. A field may also hold a dataclass, a dataclass or None, or a tuple of dataclasses. The annotations are
the schema: they alone decide how a value is parsed, written and read back. The module imports nothing heavy, so that a
command line starts fast. Every mistake of a user raises `ConfigError` with the field, the value and a fix.
"""

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

from data.paths import parse_path, write_whole

C = TypeVar("C")

EXAMPLES = {bool: "true", int: "4", float: "3e-4", str: "text"}
BOOLS = {"true": True, "false": False}


class ConfigError(ValueError):
    """A config value, name or file is unusable; the message is one paragraph for the user."""


class _Absent:
    """Stands in `diff` for a field that one side does not have."""

    def __repr__(self) -> str:
        return "(absent)"


ABSENT = _Absent()


# ---- the schema: annotations ----


@functools.cache
def _fields(cls: type) -> dict[str, tuple[dataclasses.Field, Any]]:
    hints = typing.get_type_hints(cls)
    return {f.name: (f, hints[f.name]) for f in dataclasses.fields(cls) if f.init}


def _members(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _dataclass_in(annotation: Any) -> type | None:
    return next((m for m in _members(annotation) if isinstance(m, type) and dataclasses.is_dataclass(m)), None)


def _element(annotation: Any) -> Any | None:
    """Return the element annotation of `tuple[X, ...]` (alone or in a union), or None."""
    for member in _members(annotation):
        if typing.get_origin(member) is tuple:
            args = typing.get_args(member)
            if len(args) != 2 or args[1] is not Ellipsis:
                raise TypeError(f"config annotation {member}: write tuple[X, ...]")
            return args[0]
    return None


def _describe(annotation: Any) -> str:
    """Return a description, with an example, of the text that a user may write for this annotation."""
    words = []
    for member in _members(annotation):
        if member is types.NoneType:
            words.append("none")
        elif typing.get_origin(member) is Literal:
            words.append("one of " + ", ".join(map(str, typing.get_args(member))))
        elif (element := _element(member)) is not None:
            words.append(f"a comma-separated list, () when empty, of {_describe(element)}")
        elif member in EXAMPLES:
            words.append(f"{member.__name__} like {EXAMPLES[member]}")
        else:
            raise TypeError(f"config annotation {member} is not supported")
    return " or ".join(words)


def _short(value: object) -> str:
    """Return `value` as text that is short enough for a message."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except (ValueError, RecursionError):  # an int of thousands of digits; lists nested too deep
        text = f"a {type(value).__name__} that is too long to show"
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"


def _encodes(value: object) -> bool:
    """Return False for text that has no UTF-8 encoding, such as a command-line argument of invalid bytes."""
    return not isinstance(value, str) or not any("\ud800" <= letter <= "\udfff" for letter in value)


def _quoted(value: object) -> str:
    return _short(value) if not isinstance(value, str) else _short(repr(value))


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _names(annotation: Any, value: Any, prefix: str) -> Iterator[str]:
    """Yield every dotted name below `prefix` that an override may set."""
    if prefix:
        yield prefix
    if cls := _dataclass_in(annotation):
        for name, (_, hint) in _fields(cls).items():
            yield from _names(hint, getattr(value, name, None), _join(prefix, name))
    elif (element := _element(annotation)) is not None and isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _names(element, item, _join(prefix, str(i)))


def _suggestion(wrong: str, names: Sequence[str]) -> str | None:
    """Return the name most similar to `wrong` as a whole or in its last part (`top_k` finds `model.moe.top_k`)."""
    last = wrong.rpartition(".")[2]

    def likeness(name: str) -> float:
        whole = difflib.SequenceMatcher(None, wrong, name).ratio()
        tail = difflib.SequenceMatcher(None, last, name.rpartition(".")[2]).ratio()
        return max(whole, 0.99 * tail)

    best = max(names, key=likeness, default=None)
    return best if best is not None and likeness(best) > 0.6 else None


def _unknown(dotted: str, names: Sequence[str], here: Sequence[str]) -> ConfigError:
    near = _suggestion(dotted, names)
    hint = f"did you mean '{near}'?" if near else f"the fields here are {', '.join(here)}"
    return ConfigError(f"unknown field '{dotted}'; {hint}")


# ---- overrides ----


def _parse_member(annotation: Any, text: str) -> Any:
    """Return `text` parsed as one leaf annotation that is not a union. Raises ValueError if it does not fit."""
    if annotation is types.NoneType:
        if text.lower() == "none":
            return None
    elif annotation is bool:
        if text.lower() in BOOLS:
            return BOOLS[text.lower()]
    elif annotation is int:
        if re.fullmatch(r"[+-]?[0-9]+(_[0-9]+)*", text):  # int() accepts the digits of every script
            return int(text)
    elif annotation is float:
        if text.isascii() and math.isfinite(number := float(text)):
            return number
    elif annotation is str:
        if _encodes(text):
            return text
    elif typing.get_origin(annotation) is Literal:
        for option in typing.get_args(annotation):
            if str(option) == text:
                return option
    elif (element := _element(annotation)) is not None and not _dataclass_in(element):
        body = text.strip()
        if body.startswith("(") and body.endswith(")"):
            body = body[1:-1]
        items = [item.strip() for item in body.removesuffix(",").split(",")] if body else []
        return tuple(_parse(element, item) for item in items)
    raise ValueError(text)


def _parse(annotation: Any, text: str) -> Any:
    # None first, str last: in `str | tuple[str, ...] | None`, "none" is None and "a,b" is a tuple, but "a" is a str.
    def rank(member: Any) -> int:
        if member is types.NoneType:
            return 0
        if typing.get_origin(member) is tuple:
            return 1 if "," in text or text == "()" else 3
        return 2 if member is str else 1

    for member in sorted(_members(annotation), key=rank):
        try:
            return _parse_member(member, text)
        except ValueError:
            continue
    raise ValueError(text)


def _default(cls: type, dotted: str) -> Any:
    needed = [
        name
        for name, (f, _) in _fields(cls).items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if needed:
        raise ConfigError(
            f"{dotted} is not set and {cls.__name__} has no default for {', '.join(needed)}; "
            f"start from an experiment that sets {dotted}"
        )
    return cls()


def _refuse_whole(dotted: str, text: str, cls: type, first: str) -> ConfigError:
    return ConfigError(
        f"{dotted} = {text}: {cls.__name__} cannot be set as a whole; set one of its fields "
        f"({', '.join(_fields(cls))}), like {_join(first, next(iter(_fields(cls))))}=…"
    )


def _set(annotation: Any, value: Any, path: tuple[str, ...], text: str, done: str, root: tuple[type, Any]) -> Any:
    """Return `value` with the leaf at `path` replaced by `text`. `done` is the dotted name so far."""
    cls, element = _dataclass_in(annotation), _element(annotation)
    if not path:
        if text.lower() == "none" and types.NoneType in _members(annotation):
            return None
        if cls:
            raise _refuse_whole(done, text, cls, done)
        if element is not None and (item_cls := _dataclass_in(element)):
            if text == "()":
                return ()
            raise _refuse_whole(done, text, item_cls, f"{done}.0")
        try:
            return _parse(annotation, text)
        except ValueError:
            raise ConfigError(f"{done} = {_short(text)}: expected {_describe(annotation)}") from None

    head, rest = path[0], path[1:]
    dotted = _join(done, head)
    if cls:
        if head not in _fields(cls):
            raise _unknown(_join(done, ".".join(path)), list(_names(*root, "")), list(_fields(cls)))
        if value is None:
            value = _default(cls, done)
        new = _set(_fields(cls)[head][1], getattr(value, head), rest, text, dotted, root)
        return dataclasses.replace(value, **{head: new})
    if element is not None and isinstance(value, tuple):
        item_cls = _dataclass_in(element)
        # The index one past the end appends, so that the command line can extend a list of sources.
        appended = item_cls if head == str(len(value)) else None
        if appended is None and head not in map(str, range(len(value))):
            raise ConfigError(f"unknown field '{dotted}': {done} has {len(value)} items, numbered from 0")
        items = list(value) if appended is None else [*value, _default(appended, dotted)]
        items[int(head)] = _set(element, items[int(head)], rest, text, dotted, root)
        return tuple(items)
    raise ConfigError(f"unknown field '{dotted}': {done} is a single value ({_describe(annotation)}), set {done}=…")


def apply_overrides(config: C, overrides: Sequence[str]) -> C:
    """Return `config` with each "dotted.name=value" applied in order and typed by the annotations.

    Write true or false for a bool, `none` for an optional field, `a,b,c` or `()` for a tuple, and `sources.0.path=…`
    for an element of a tuple; the index one past the end appends a default element. Setting a field of an optional
    dataclass that is None first sets the dataclass to its default. Raises ConfigError for an unknown name (with the
    nearest valid one) or an ill-typed value.
    """
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"override '{override}': write name=value, like model.num_layers=4")
        config = _set(type(config), config, tuple(name.strip().split(".")), text.strip(), "", (type(config), config))
    return config


def replace_fields(config: C, changes: Mapping[str, Any]) -> C:
    """Return `config` with each dotted name replaced by a value, which may also be a whole dataclass.

    A field of an optional dataclass that is None first sets it to its default, as in `apply_overrides`.
    Raises ConfigError for an unknown name or a value that the annotation does not allow.
    """
    for name, value in changes.items():
        config = _replace_at(type(config), config, tuple(name.split(".")), value, "", (type(config), config))
    return from_dict(type(config), to_dict(config))


def _replace_at(
    annotation: Any, node: Any, path: tuple[str, ...], value: Any, done: str, root: tuple[type, Any]
) -> Any:
    """Return `node` with what is at `path` replaced by `value`. `done` is the dotted name so far."""
    if not path:
        return value
    cls, element = _dataclass_in(annotation), _element(annotation)
    head, rest = path[0], path[1:]
    if cls and head in _fields(cls):
        node = _default(cls, done) if node is None else node
        new = _replace_at(_fields(cls)[head][1], getattr(node, head), rest, value, _join(done, head), root)
        return dataclasses.replace(node, **{head: new})
    if element is not None and isinstance(node, tuple) and head in map(str, range(len(node))):
        items = list(node)
        items[int(head)] = _replace_at(element, items[int(head)], rest, value, _join(done, head), root)
        return tuple(items)
    here = list(_fields(cls)) if cls else [done]
    raise _unknown(_join(done, ".".join(path)), list(_names(*root, "")), here)


# ---- JSON ----


def _encode(annotation: Any, value: Any, dotted: str) -> Any:
    if dataclasses.is_dataclass(value):
        return {
            n: _encode(hint, getattr(value, n), _join(dotted, n)) for n, (_, hint) in _fields(value.__class__).items()
        }
    if isinstance(value, tuple):
        element = _element(annotation)
        return [_encode(element, item, _join(dotted, str(i))) for i, item in enumerate(value)]
    return _decode(annotation, value, dotted)  # checks the leaf, and makes an int a float where a float is declared


def _decode(annotation: Any, data: Any, dotted: str) -> Any:
    for member in _members(annotation):
        if member is types.NoneType:
            if data is None:
                return None
        elif dataclasses.is_dataclass(member):
            if isinstance(data, dict):
                return _decode_dataclass(typing.cast(type, member), data, dotted)
        elif (element := _element(member)) is not None:
            if isinstance(data, list):
                return tuple(_decode(element, item, _join(dotted, str(i))) for i, item in enumerate(data))
        elif typing.get_origin(member) is Literal:
            if any(data == option and type(data) is type(option) for option in typing.get_args(member)):
                return data
        elif type(data) is member and (member is not float or math.isfinite(data)) and _encodes(data):
            return data
    if type(data) is int and float in _members(annotation) and abs(data) < 2**1023:
        return float(data)
    shown = f"{dotted or 'the config'} = {_quoted(data)}"
    if (cls := _dataclass_in(annotation)) or ((e := _element(annotation)) is not None and (cls := _dataclass_in(e))):
        raise ConfigError(f"{shown}: expected the fields of {cls.__name__}: {', '.join(_fields(cls))}")
    raise ConfigError(f"{shown}: expected {_describe(annotation)}")


def _decode_dataclass(cls: type, data: dict[str, Any], dotted: str) -> Any:
    for name in data:
        if name not in _fields(cls):
            here = [_join(dotted, n) for n in _fields(cls)]
            raise _unknown(_join(dotted, name), here, list(_fields(cls)))
    values = {n: _decode(hint, data[n], _join(dotted, n)) for n, (_, hint) in _fields(cls).items() if n in data}
    for name, (f, _) in _fields(cls).items():
        if name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{_join(dotted, name)} is missing and {cls.__name__} has no default for it; add it")
    return cls(**values)


def to_dict(config: Any) -> dict[str, Any]:
    """Return the config as JSON-ready dicts, lists and scalars. `from_dict` inverts it exactly, floats included.

    Raises ConfigError for a value that its annotation does not allow, including NaN and infinity.
    """
    return _encode(type(config), config, "")


def from_dict(cls: type[C], data: dict[str, Any]) -> C:
    """Return the config from which `to_dict` made `data`. A missing key takes its default.

    Raises ConfigError for an unknown key or an ill-typed value.
    """
    return _decode(cls, data, "")


def save_json(config: Any, path: str | os.PathLike) -> None:
    """Write the config as indented JSON, atomically."""
    write_whole(path, json.dumps(to_dict(config), indent=2, ensure_ascii=False) + "\n")


def load_json(cls: type[C], path: str | os.PathLike) -> C:
    """Return the config that `save_json` wrote. Raises ConfigError, naming the file, if it does not hold a `cls`."""
    content = parse_path(path).read_bytes()
    try:
        return from_dict(cls, json.loads(content.decode("utf-8")))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except ValueError as error:  # not JSON, not UTF-8, a number of thousands of digits
        raise ConfigError(f"{path}: not a config in JSON ({error}); restore the file or start a new run") from error
    except RecursionError as error:
        raise ConfigError(
            f"{path}: not a config (brackets nested too deep); restore the file or start a new run"
        ) from error


# ---- inspecting configs ----


def _children(node: Any) -> dict[str, Any] | None:
    if dataclasses.is_dataclass(node):
        return {name: getattr(node, name) for name in _fields(node.__class__)}
    if isinstance(node, dict):
        return node
    if isinstance(node, (tuple, list)) and node and all(_children(item) is not None for item in node):
        return {str(i): item for i, item in enumerate(node)}
    return None


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return every leaf of a config, or of the dict of its JSON, by dotted name. A tuple of leaves is one leaf."""
    children = _children(config)
    if children is None:
        return {prefix: config}
    return {dotted: leaf for n, child in children.items() for dotted, leaf in flatten(child, _join(prefix, n)).items()}


def diff(a: Any, b: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Return (dotted name, value in a, value in b) of every difference, with `ABSENT` for a name that one side lacks.

    A dataclass on one side and None on the other is one row.
    """
    children_a, children_b = _children(a), _children(b)
    if children_a is None or children_b is None:
        return [] if a == b else [(prefix, a, b)]
    rows = []
    for name in {**children_a, **children_b}:
        rows += diff(children_a.get(name, ABSENT), children_b.get(name, ABSENT), _join(prefix, name))
    return rows


def config_hash(config: Any) -> str:
    """Return 16 hex digits of the SHA-256 of the canonical JSON; equal configs have equal hashes on every machine."""
    canonical = json.dumps(to_dict(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
