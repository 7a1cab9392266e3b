"""What is in a workload: how many programs and calls arrive when, how long they are, of what shape, and what they share.

A workload is read once and nothing of it is kept, so that a million programs need no more memory than a thousand:
distributions are histograms whose percentiles are right within 0.5 % (`sim.workloads.histogram`), curves over time have at
most 120 points, names beyond the first 32 are counted together, and repeated prefixes are found with a filter of fixed size
(`sim.workloads.sharing`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from sim.workloads.histogram import Histogram, TimeBins
from sim.workloads.program import Call, Program, Read, WorkloadError, Write
from sim.workloads.sharing import SeenPrefixes

MOST_NAMES = 32
OTHERS = "(others)"
PARTS = 20  #: bins of the repeated part of a prompt


class Description:
    """The numbers of a workload, as programs are added in order of arrival."""

    def __init__(self, workload: str) -> None:
        self.workload = workload
        self.programs = self.calls = self.gets = 0
        self.first_s = self.last_s = 0.0
        self.applications: dict[str, int] = {}
        self.tenants: dict[str, int] = {}
        self.models: dict[str, int] = {}
        self.prompt_tokens, self.output_tokens, self.program_tokens = Histogram(), Histogram(), Histogram()
        self.calls_per_program, self.depth, self.width = Histogram(), Histogram(), Histogram()
        self.repeated_tokens = self.repeating_calls = 0
        #: calls by the part of their prompt that is repeated, the last one: all of it
        self.repeated_parts = [0] * (PARTS + 1)
        #: programs, calls, new prompt tokens, repeated ones; a call counts at its program's arrival
        self.over_time = TimeBins(4)
        self._gap_mean = self._gap_squares = 0.0
        self._seen = SeenPrefixes()

    def add(self, program: Program) -> None:
        arrival_s = program.arrival_s
        if self.programs == 0:
            self.first_s = arrival_s
        else:
            gap = arrival_s - self.last_s
            change = gap - self._gap_mean
            self._gap_mean += change / self.programs
            self._gap_squares += change * (gap - self._gap_mean)
        self.last_s = arrival_s
        self.programs += 1
        self.calls += len(program.calls)
        self.gets += len(program.gets)
        _count(self.applications, program.application or "(none)")
        _count(self.tenants, program.tenant or "(none)")
        for call in program.calls:
            _count(self.models, " or ".join(call.models) or "(any)")
        self._add_lengths(program)
        self.calls_per_program.add(len(program.calls))
        levels = depths(program)
        self.depth.add(max(levels, default=0))
        self.width.add(max((levels.count(level) for level in set(levels)), default=0))

    def _add_lengths(self, program: Program) -> None:
        outputs = [s.tokens for call in program.calls for s in call.segments if type(s) is Write]
        prompts = self._seen.prompts(program)
        prompt_tokens = repeated_tokens = 0
        for tokens, repeated in prompts:
            self.prompt_tokens.add(tokens)
            self.repeated_parts[PARTS * repeated // tokens if tokens else 0] += 1
            self.repeating_calls += repeated > 0
            prompt_tokens += tokens
            repeated_tokens += repeated
        for tokens in outputs:
            self.output_tokens.add(tokens)
        self.program_tokens.add(prompt_tokens + sum(outputs))
        self.repeated_tokens += repeated_tokens
        self.over_time.add(
            program.arrival_s - self.first_s, 1, len(program.calls), prompt_tokens - repeated_tokens, repeated_tokens
        )

    @property
    def span_s(self) -> float:
        return self.last_s - self.first_s

    @property
    def repeated_part(self) -> float:
        return self.repeated_tokens / self.prompt_tokens.sum if self.prompt_tokens.sum else 0.0

    def numbers(self) -> dict[str, Any]:
        """All of it, for JSON. Times in seconds, lengths in tokens."""
        gaps = self.programs - 1
        deviation = math.sqrt(self._gap_squares / gaps) if gaps > 0 else 0.0
        return {
            "workload": self.workload,
            "programs": self.programs,
            "calls": self.calls,
            "gets": self.gets,
            "first_arrival_s": self.first_s,
            "span_s": self.span_s,
            "rate_per_s": gaps / self.span_s if self.span_s > 0 else None,
            "gap_cv": deviation / self._gap_mean if self._gap_mean > 0 else None,
            "applications": self.applications,
            "tenants": self.tenants,
            "models": self.models,
            "prompt_tokens": {"sum": self.prompt_tokens.sum, **self.prompt_tokens.numbers()},
            "output_tokens": {"sum": self.output_tokens.sum, **self.output_tokens.numbers()},
            "program_tokens": self.program_tokens.numbers(),
            "calls_per_program": self.calls_per_program.numbers(),
            "dag_depth": self.depth.numbers(),
            "dag_width": self.width.numbers(),
            "sharing": {
                "repeated_prompt_tokens": self.repeated_tokens,
                "repeated_part": self.repeated_part,
                "calls_with_a_repeated_prefix": self.repeating_calls,
                "false_positive_part": self._seen.false_positive_part,
            },
        }


def describe(programs: Iterable[Program], workload: str) -> Description:
    """Reads `programs` to their end. Raises WorkloadError when there are none."""
    description = Description(workload)
    for program in programs:
        description.add(program)
    if description.programs == 0:
        raise WorkloadError(f"workload {workload!r} has no programs")
    return description


def depths(program: Program) -> list[int]:
    """How many calls stand one behind another up to each call, by what it reads and by the gets that it waits for."""
    producer = {s.var: index for index, call in enumerate(program.calls) for s in call.segments if type(s) is Write}
    variable = {get.id: get.var for get in program.gets}
    waits = [_waits(call, index, producer, variable) for index, call in enumerate(program.calls)]
    levels = [1] * len(waits)
    in_order = all(before < index for index, befores in enumerate(waits) for before in befores)
    changed = True
    while changed:  # a second time only where a call waits for one that stands behind it in the file
        changed = False
        for index, befores in enumerate(waits):
            level = 1 + max([levels[before] for before in befores], default=0)
            changed = changed or (level != levels[index] and not in_order)
            levels[index] = level
    return levels


def _waits(call: Call, index: int, producer: dict[str, int], variable: dict[str, str]) -> list[int]:
    """The calls that it waits for."""
    names = [s.var for s in call.segments if type(s) is Read]
    names += [variable[edge.get] for edge in call.after if edge.get is not None]
    return [producer[name] for name in names if name in producer and producer[name] != index]


def _count(counts: dict[str, int], name: str) -> None:
    if name not in counts and len(counts) >= MOST_NAMES:
        name = OTHERS
    counts[name] = counts.get(name, 0) + 1
