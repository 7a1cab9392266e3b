"""Which `model_type` a program's call asks the core for: "text" goes to engines behind remote endpoints, "token_id" to others.

One rule for every backend, so that a program goes to the same engines in simulation and on the real cluster.
"""

from __future__ import annotations

from collections.abc import Iterable

from parrot.protocol.engine import EngineDescription
from sim.workloads.program import Call


def serves(description: EngineDescription, models: tuple[str, ...], model_type: str) -> bool:
    """Whether the core may place such a call on such an engine."""
    kind = "text" if description.engine_type == "openai" else "token_id"
    return kind == model_type and (not models or description.model in models)


class ModelTypes:
    """What a call says; else "text" where its models are to be had behind remote endpoints alone, and "token_id" elsewhere."""

    def __init__(self, engines: Iterable[EngineDescription] = ()) -> None:
        self._engines = tuple(engines)
        self._known: dict[tuple[str, ...], str] = {}

    def of(self, call: Call) -> str:
        """The type that the call is submitted with."""
        if call.model_type is not None:
            return call.model_type
        known = self._known.get(call.models)
        if known is None:
            known = self._known[call.models] = self._found(call.models)
        return known

    def _found(self, models: tuple[str, ...]) -> str:
        elsewhere = any(serves(engine, models, "token_id") for engine in self._engines)
        remote = any(serves(engine, models, "text") for engine in self._engines)
        return "text" if remote and not elsewhere else "token_id"
