"""A policy's parameters: what `global_scheduler.params` may hold for it, checked before the policy is built."""

from __future__ import annotations

import math
from typing import Any

from parrot.protocol.errors import ParrotError


class Parameter:
    """One parameter. `kind`: bool, int, float or str; an int is taken for a float. A `default` of None admits null.

    Numbers lie within `at_least` and `at_most`, both included and both None for no bound; a str is one of `choices`, where
    there are any.
    """

    __slots__ = ("at_least", "at_most", "choices", "default", "kind", "meaning")

    def __init__(
        self,
        kind: type,
        default: Any,
        meaning: str,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        choices: tuple[str, ...] = (),
    ) -> None:
        self.kind = kind
        self.default = default
        self.meaning = meaning
        self.at_least = at_least
        self.at_most = at_most
        self.choices = choices

    def check(self, where: str, value: Any) -> Any:
        """`value`, converted to its kind. Raises `bad_request`, which begins with `where` and says what is accepted."""
        if value is None and self.default is None:
            return None
        numbers = (int, float) if self.kind is float else self.kind
        accepted = isinstance(value, numbers) and (self.kind is bool or not isinstance(value, bool))
        if accepted and self.kind is float:
            accepted = math.isfinite(value)
        if accepted and self.at_least is not None:
            accepted = value >= self.at_least
        if accepted and self.at_most is not None:
            accepted = value <= self.at_most
        if accepted and self.choices:
            accepted = value in self.choices
        if not accepted:
            raise ParrotError("bad_request", f"{where} is {value!r}; expected {self.expected()}")
        return self.kind(value)

    def expected(self) -> str:
        """What is accepted, in words."""
        if self.choices:
            words = "one of " + ", ".join(self.choices)
        else:
            words = self.kind.__name__
            bounds = [
                f"{word} {bound:g}"
                for word, bound in (("at least", self.at_least), ("at most", self.at_most))
                if bound is not None
            ]
            if bounds:
                words += " of " + " and ".join(bounds)
        return f"{words}, or null" if self.default is None else words
