"""Whether a value is a JSON Schema, in form: what a tool's `parameters` must be. It validates no instance against a schema.

The keywords are those of JSON Schema 2020-12 (json-schema.org); unknown ones mean nothing there, and are let through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")
_MOST_DEPTH = 64


class NoSchema(ValueError):
    """The value is no schema. `where`: the way to what is wrong in it."""

    def __init__(self, where: str, message: str) -> None:
        super().__init__(f"{where or 'the schema'}: {message}")
        self.where = where


def check_schema(value: Any, where: str = "", depth: int = 0) -> None:
    """Raises NoSchema when `value` cannot be a JSON Schema."""
    if isinstance(value, bool):
        return
    if not isinstance(value, dict):
        raise NoSchema(where, f"a schema is an object or a boolean, not {_kind(value)}")
    if depth > _MOST_DEPTH:
        raise NoSchema(where, f"it is nested deeper than {_MOST_DEPTH} schemas")
    for key, inner in value.items():
        check = _KEYWORDS.get(key)
        if check is not None:
            check(inner, f"{where}.{key}" if where else key, depth + 1)


def _type(value: Any, where: str, depth: int) -> None:
    names = value if isinstance(value, list) else [value]
    if not names or any(name not in _TYPES for name in names if isinstance(name, str)):
        raise NoSchema(where, f"{value!r} is none of {', '.join(_TYPES)}")
    if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise NoSchema(where, f"{value!r} is no type's name and no list of different ones")


def _schemas_by_name(value: Any, where: str, depth: int) -> None:
    if not isinstance(value, dict):
        raise NoSchema(where, f"expected an object of schemas, got {_kind(value)}")
    for name, inner in value.items():
        check_schema(inner, f"{where}.{name}", depth)


def _schema_list(value: Any, where: str, depth: int) -> None:
    if not isinstance(value, list) or not value:
        raise NoSchema(where, f"expected a list of one schema or more, got {_kind(value)}")
    for place, inner in enumerate(value):
        check_schema(inner, f"{where}[{place}]", depth)


def _schema_or_list(value: Any, where: str, depth: int) -> None:
    (_schema_list if isinstance(value, list) else check_schema)(value, where, depth)


def _names(value: Any, where: str, depth: int) -> None:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value) or len(set(value)) != len(value):
        raise NoSchema(where, "expected a list of different strings")


def _list(value: Any, where: str, depth: int) -> None:
    if not isinstance(value, list):
        raise NoSchema(where, f"expected a list, got {_kind(value)}")


def _string(value: Any, where: str, depth: int) -> None:
    if not isinstance(value, str):
        raise NoSchema(where, f"expected a string, got {_kind(value)}")


def _number(value: Any, where: str, depth: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise NoSchema(where, f"expected a number, got {_kind(value)}")


def _count(value: Any, where: str, depth: int) -> None:
    _number(value, where, depth)
    if value < 0 or value != int(value):
        raise NoSchema(where, f"expected a whole number from 0 up, got {value!r}")


_Check = Callable[[Any, str, int], None]
_KEYWORDS: dict[str, _Check] = {
    "type": _type,
    **dict.fromkeys(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"), _schemas_by_name),
    **dict.fromkeys(("allOf", "anyOf", "oneOf", "prefixItems"), _schema_list),
    **dict.fromkeys(
        (
            "additionalProperties", "unevaluatedProperties", "propertyNames", "contains", "unevaluatedItems",
            "additionalItems", "not", "if", "then", "else",
        ),
        check_schema,
    ),
    "items": _schema_or_list,
    "required": _names,
    "enum": _list,
    **dict.fromkeys(("description", "title", "pattern", "format", "$ref", "$id", "$schema", "$comment"), _string),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"), _number),
    **dict.fromkeys(
        ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "minContains", "maxContains"),
        _count,
    ),
}  # fmt: skip


def _kind(value: Any) -> str:
    """Its type as JSON calls it."""
    if value is None:
        return "null"
    for kind, name in ((bool, "a boolean"), (dict, "an object"), (list, "a list"), (str, "a string")):
        if isinstance(value, kind):
            return name
    return "a number"
