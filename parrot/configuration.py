"""Reads configuration files: JSON with `//` comments, decoded into a Struct, refused in one line when it is wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import msgspec

T = TypeVar("T")

# Keys whose values are told nobody, not even wrong ones.
_SECRET = re.compile(r"(^|\.)(api_keys?|engine_secret)(\[.*)?$")
# A string literal (kept whole, so that "http://..." survives) or a comment up to the end of its line.
_STRING_OR_COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*')


class ConfigurationError(Exception):
    """A configuration that cannot be used. The message names the file, the key, and what is expected."""


def masked(struct: msgspec.Struct, *secrets: str) -> str:
    """What `repr` says of a struct some of whose fields are secrets, which it does not tell."""
    fields = (
        f"{name}={'***' if name in secrets and value is not None else repr(value)}"
        for name in struct.__struct_fields__
        for value in (getattr(struct, name),)
    )
    return f"{type(struct).__name__}({', '.join(fields)})"


def strip_comments(text: str) -> str:
    """`text` without its `//` comments; line numbers stay as they were."""
    return _STRING_OR_COMMENT.sub(lambda match: match[0] if match[0][0] == '"' else "", text)


def read_json(path: str | Path) -> Any:
    """The parsed content of a JSON file with comments. Raises ConfigurationError for a missing or malformed one."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigurationError(f"{path}: cannot be read: {reason}") from error
    try:
        return msgspec.json.decode(strip_comments(text))
    except msgspec.DecodeError as error:
        raise ConfigurationError(f"{path}: not valid JSON: {error}") from error


def parse(data: Any, kind: type[T], path: str | Path) -> T:
    """`data` as a `kind`. Raises ConfigurationError, which names `path`, the key and what is expected there."""
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{path}: {_explain(str(error), data, kind)}") from None


def load(path: str | Path, kind: type[T]) -> T:
    """Reads `path` as a `kind`."""
    return parse(read_json(path), kind, path)


def _explain(message: str, data: Any, kind: Any) -> str:
    """msgspec's message in the reader's terms: where (`a.b`), what was found, what is expected."""
    where = ""
    if match := re.search(r" - at `\$(.*)`$", message):
        where = match[1].lstrip(".")
        message = message[: match.start()]
    while "[...]" in where:
        where = _with_key(where, data, kind)
    if match := re.match(r"Object contains unknown field `(.*)`", message):
        key = f"{where}.{match[1]}" if where else match[1]
        known = ", ".join(_fields_at(kind, where))
        return f"unknown key {key!r}; expected one of: {known}"
    if match := re.match(r"Object missing required field `(.*)`", message):
        key = f"{where}.{match[1]}" if where else match[1]
        return f"missing key {key!r}"
    found = "***" if _SECRET.search(where) else _value_at(data, where)
    choices = _choices_at(kind, where)
    expected = f"expected one of: {', '.join(choices)}" if choices else f"{message[0].lower()}{message[1:]}"
    return f"key {where or '(top level)'!r} is {found!r}: {expected}"


def _with_key(where: str, data: Any, kind: Any) -> str:
    """`where` with the key of a mapping, which msgspec leaves out, in place of its first `[...]`."""
    section, _, rest = where.partition("[...]")
    outer, _, name = section.rpartition(".")
    kinds = get_args({f.encode_name: f.type for f in _struct_fields_at(kind, outer)}.get(name))
    entries = _value_at(data, section)
    for key, value in entries.items() if kinds and isinstance(entries, dict) else ():
        try:
            msgspec.convert(value, kinds[-1])
        except msgspec.ValidationError:
            return f"{section}.{key}{rest}"
    return f"{section}{rest}"


def _choices_at(kind: Any, where: str) -> list[str]:
    """The values that a key may have whose type is a Literal, or one that may be null; none for another type."""
    section, _, name = where.rpartition(".")
    hint = {f.name: f.type for f in _struct_fields_at(kind, section)}.get(name)
    options = [hint, *get_args(hint)]
    return [str(choice) for option in options if get_origin(option) is Literal for choice in get_args(option)]


def _fields_at(kind: Any, where: str) -> list[str]:
    return [f.encode_name for f in _struct_fields_at(kind, where)]


def _struct_fields_at(kind: Any, where: str) -> tuple[msgspec.structs.FieldInfo, ...]:
    for name in filter(None, where.split(".")):
        hints = {f.name: f.type for f in msgspec.structs.fields(kind)}
        kind = hints.get(name, kind)
        # A section may be optional or one of several shapes; the fields of all of them are candidates.
        options = [k for k in getattr(kind, "__args__", (kind,)) if isinstance(k, type) and issubclass(k, msgspec.Struct)]
        kind = options[0] if options else kind
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return msgspec.structs.fields(kind)
    return ()


def _value_at(data: Any, where: str) -> Any:
    for name in re.findall(r"[^.\[\]]+", where):
        if isinstance(data, dict):
            data = data.get(name)
        elif isinstance(data, list) and name.isdigit() and int(name) < len(data):
            data = data[int(name)]
        else:
            return None
    return data
