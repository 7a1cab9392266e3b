"""How a template and its parameters fit together. The server and the frontend both refuse by these rules, in these words.

A template is text with placeholders `{{name}}`. Parsing decides nothing about how it will be run, and never looks at
values: a value that holds braces is text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NoReturn

import msgspec

from parrot.protocol.api import PLACEHOLDER_NAME, ParameterSpec
from parrot.protocol.errors import ParrotError

_PLACEHOLDER = re.compile(r"\{\{(" + PLACEHOLDER_NAME + r")\}\}")

#: Pieces of a template; a call that reads more variables than this reads them in several calls.
MAX_PIECES = 8192


class Text(msgspec.Struct, frozen=True, gc=False):
    """A constant piece of a template; never empty."""

    text: str


class Placeholder(msgspec.Struct, frozen=True, gc=False):
    """An occurrence of a parameter. `position`: offset in characters of its first brace in the template."""

    name: str
    is_output: bool
    position: int


Piece = Text | Placeholder


def parse_template(template: str, parameters: Sequence[ParameterSpec], *, func_name: str | None = None) -> list[Piece]:
    """The pieces of `template` in order; adjacent placeholders have no Text between them.

    Raises ParrotError: `bad_sampling` for a sampling configuration without meaning, else `bad_template`. Its details name
    the function (`func_name`, when given), the parameter (`parameter`) and, where there is one, the place in the template:
    `offset` (characters from 0), `line` and `column` (from 1).
    """
    problem = _Problem(template, func_name)
    specs = _checked(parameters, problem)
    pieces = _split(template, specs, problem)
    _check_use(pieces, specs, problem)
    return pieces


def pieces_for(
    template: str,
    parameters: Sequence[ParameterSpec],
    *,
    remove_pure_fill: bool = True,
    func_name: str | None = None,
) -> list[Piece]:
    """What a call runs: `parse_template`, without what follows the last output when `remove_pure_fill` says so.

    Inputs behind the last output go with the text: nothing would ever read them.
    """
    pieces = parse_template(template, parameters, func_name=func_name)
    if remove_pure_fill:
        while not (isinstance(pieces[-1], Placeholder) and pieces[-1].is_output):
            pieces.pop()
    return pieces


class _Problem:
    """Builds the refusals of one template."""

    def __init__(self, template: str, func_name: str | None) -> None:
        self._template = template
        self._func_name = func_name

    def refuse(self, message: str, offset: int | None = None, parameter: str | None = None) -> NoReturn:
        """Raises `bad_template` with the place of `offset` in words and in the details."""
        details: dict[str, Any] = {}
        if self._func_name:
            message = f"function {self._func_name!r}: {message}"
            details["func_name"] = self._func_name
        if parameter is not None:
            details["parameter"] = parameter
        if offset is not None:
            line = self._template.count("\n", 0, offset) + 1
            column = offset - (self._template.rfind("\n", 0, offset) + 1) + 1
            message += f" (line {line}, column {column} of the template)"
            details.update(offset=offset, line=line, column=column)
        raise ParrotError("bad_template", message, **details)

    def place(self, name: str) -> int | None:
        """Where `name` first stands in the template, if it does."""
        offset = self._template.find("{{" + name + "}}")
        return offset if offset >= 0 else None


def _checked(parameters: Sequence[ParameterSpec], problem: _Problem) -> dict[str, ParameterSpec]:
    """The parameters by name; each is whole in itself."""
    specs: dict[str, ParameterSpec] = {}
    for spec in parameters:
        name = spec.name
        if name in specs:
            problem.refuse(f"parameter {name!r} is given twice; names are unique", problem.place(name), name)
        specs[name] = spec
        if spec.is_output:
            if spec.value is not None:
                problem.refuse(f"output parameter {name!r} has a value; an output is generated", problem.place(name), name)
            if spec.sampling_config is not None:
                _check_sampling(spec)
            continue
        if (spec.var_id is None) == (spec.value is None):
            found = "neither var_id nor value" if spec.var_id is None else "both var_id and value"
            problem.refuse(f"input parameter {name!r} has {found}; give exactly one", problem.place(name), name)
        if spec.sampling_config is not None:
            problem.refuse(
                f"input parameter {name!r} has a sampling_config; only an output is sampled", problem.place(name), name
            )
    return specs


def _check_sampling(spec: ParameterSpec) -> None:
    assert spec.sampling_config is not None
    try:
        spec.sampling_config.check()
    except ParrotError as error:
        message = f"parameter {spec.name!r}: {error.info.message}"
        raise ParrotError(error.code, message, **{**error.info.details, "parameter": spec.name}) from None


def _split(template: str, specs: dict[str, ParameterSpec], problem: _Problem) -> list[Piece]:
    pieces: list[Piece] = []
    end = 0
    for match in _PLACEHOLDER.finditer(template):
        _add_text(pieces, template, end, match.start(), problem)
        name = match[1]
        if name not in specs:
            known = ", ".join(specs) or "none"
            problem.refuse(f"placeholder {{{{{name}}}}} is no parameter; parameters: {known}", match.start(), name)
        pieces.append(Placeholder(name, specs[name].is_output, match.start()))
        if len(pieces) > MAX_PIECES:
            problem.refuse(f"the template has more than {MAX_PIECES} placeholders and texts between them", match.start())
        end = match.end()
    _add_text(pieces, template, end, len(template), problem)
    return pieces


def _add_text(pieces: list[Piece], template: str, start: int, end: int, problem: _Problem) -> None:
    """A lone `}}` is text, as JSON has it; a `{{` that opens no placeholder is a mistake."""
    if start == end:
        return
    stray = template.find("{{", start, end)
    if stray >= 0:
        found = template[stray : stray + 24]
        problem.refuse(f"{found!r} opens no placeholder; write {{{{name}}}}, a name of letters, digits and _, no spaces", stray)
    pieces.append(Text(template[start:end]))


def _check_use(pieces: Sequence[Piece], specs: dict[str, ParameterSpec], problem: _Problem) -> None:
    """Every parameter occurs, every output once, and something stands before the first."""
    used: set[str] = set()
    for index, piece in enumerate(pieces):
        if isinstance(piece, Text):
            continue
        if piece.is_output and index == 0:
            problem.refuse(f"output {piece.name!r} stands before any text; a model needs a prompt", piece.position, piece.name)
        if piece.is_output and piece.name in used:
            problem.refuse(f"output {piece.name!r} is used twice; it has one content", piece.position, piece.name)
        used.add(piece.name)
    for name in specs:
        if name not in used:
            problem.refuse(f"parameter {name!r} is not used in the template; write {{{{{name}}}}} where it belongs", None, name)
    if not any(spec.is_output for spec in specs.values()):
        problem.refuse("there is no output; a call without one generates nothing")
