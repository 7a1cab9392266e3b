"""The synthetic applications by name, with their parameters, and programs of them without end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import repeat
from typing import Any

from sim.workloads import applications as apps
from sim.workloads.arrivals import stream
from sim.workloads.program import Program
from sim.workloads.source import Row, Source, parameters_of, settle

#: name -> (parameters, what builds one program)
GENERATORS: dict[str, tuple[type[Any], Callable[..., Program]]] = {
    "chain": (apps.ChainParameters, apps.chain),
    "map_reduce": (apps.MapReduceParameters, apps.map_reduce),
    "chat": (apps.ChatParameters, apps.chat),
    "tree_of_thought": (apps.TreeOfThoughtParameters, apps.tree_of_thought),
    "multi_agent": (apps.MultiAgentParameters, apps.multi_agent),
    "agent": (apps.AgentParameters, apps.agent),
    "shared_prompts": (apps.SharedPromptsParameters, apps.shared_prompts),
}


def generator_source(name: str, options: Mapping[str, Any], *, seed: int, label: str = "") -> Source:
    """Programs of the application `name`, without end and with no arrivals recorded.

    Raises WorkloadError for an option that the application has not, or a value that it cannot take.
    """
    kind, build = GENERATORS[name]
    parameters = parameters_of(name, kind, dict(options))
    lengths, times, choices = (stream(seed, f"{label}{name}.{what}") for what in ("lengths", "times", "choices"))
    draw = apps.Draw(lengths, times, choices, label)

    def program(index: int, arrival_s: float, _: Row) -> Program:
        return build(f"{label}{name}{index}", arrival_s, parameters, draw)

    return Source(name, lambda: repeat((0.0,)), program, recorded=False, endless=True)


def generate(name: str, options: Mapping[str, Any], *, rate: float | None, seed: int, count: int | None) -> Iterator[Program]:
    """`count` programs (100) of the application `name`, with Poisson arrivals at `rate` programs per second (1)."""
    return settle(generator_source(name, options, seed=seed), rate=rate, arrivals=None, seed=seed, count=count)
