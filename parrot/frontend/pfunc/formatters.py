"""Formatters: what is done to a docstring before it is a template. Each is a function of text; they compose."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

Formatter = Callable[[str], str]


class RemoveIndentation:
    """Takes the indentation of Python code off each line: tabs, and groups of four spaces, where the line begins."""

    _indentation = re.compile(r"^(?:\t| {4})+", re.MULTILINE)

    def __call__(self, text: str) -> str:
        return self._indentation.sub("", text)


class SquashIntoOneLine:
    """Joins all lines with a space."""

    _line_break = re.compile(r"\r\n|\r|\n")

    def __call__(self, text: str) -> str:
        return self._line_break.sub(" ", text)


class CollapseSpaces:
    """Makes one space of a run of them."""

    _run = re.compile(" {2,}")

    def __call__(self, text: str) -> str:
        return self._run.sub(" ", text)


class Sequential:
    """Applies formatters one after the other."""

    def __init__(self, formatters: Sequence[Formatter]) -> None:
        self._formatters = tuple(formatters)

    def __call__(self, text: str) -> str:
        for formatter in self._formatters:
            text = formatter(text)
        return text


standard_formatter = Sequential([RemoveIndentation(), SquashIntoOneLine(), CollapseSpaces()])
allowing_newline = Sequential([RemoveIndentation(), CollapseSpaces()])
