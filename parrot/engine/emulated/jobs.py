"""What the tasks of an emulated engine would generate and have generated, and the gaps between their tokens.

Jobs that decode get one token an iteration, all of them: nobody is counted one by one. It decides nothing about who runs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable
from heapq import heapify, heappop, heappush
from typing import Final

from mypy_extensions import mypyc_attr

from parrot.engine.contexts import STALE_ENTRIES
from parrot.latency import DecodeRun

# By names of this module's own that never change: the compiled module need not look them up.
_push: Final = heappush
_pop: Final = heappop


@mypyc_attr(acyclic=True)
class Job:
    """What a task would generate, and what it has generated.

    While it decodes, `generated` is what it had when it joined the others, less the decode iterations before its first.
    """

    __slots__ = (
        "cached", "decodes", "first_at", "generated", "joined", "key", "last_at", "max_gap_s", "output", "prompt", "stream",
        "ticket",
    )  # fmt: skip

    def __init__(self, key: Hashable, output: int, forced: int, stream: bool) -> None:
        self.key = key
        self.output = output  # tokens that it generates in all, forced ones included
        self.generated = forced
        self.stream = stream
        self.prompt = 0
        self.cached = 0
        self.decodes = False
        self.joined = 0  # the decode iteration before its first
        self.ticket = 0
        self.first_at = -1.0  # of its first token; below 0: it has none
        self.last_at = 0.0  # of its last token; while it decodes, that of the first ones is kept by `Decoding`
        self.max_gap_s = 0.0

    def sampled(self, at: float) -> None:
        """Its fill ended with a token: its first, or one after its room was taken away for a time."""
        self.generated += 1
        if self.first_at < 0.0:
            self.first_at = at
        elif at - self.last_at > self.max_gap_s:
            self.max_gap_s = at - self.last_at
        self.last_at = at


class Gaps:
    """The times between consecutive decode iterations, as far as somebody may still ask for the largest since one of them."""

    def __init__(self) -> None:
        self._steps: list[int] = []  # of the gaps that no later one exceeds, falling
        self._gaps: list[float] = []

    def add(self, step: int, gap_s: float) -> None:
        """The largest of the gaps up to decode iteration `step` that were not added before."""
        steps, gaps = self._steps, self._gaps
        while gaps and gaps[-1] <= gap_s:
            gaps.pop()
            steps.pop()
        gaps.append(gap_s)
        steps.append(step)

    def largest_since(self, step: int) -> float:
        """The largest before iterations later than `step`; 0 when there are none."""
        place = bisect_right(self._steps, step)
        return self._gaps[place] if place < len(self._gaps) else 0.0

    def clear(self) -> None:
        """Nobody decodes."""
        self._steps.clear()
        self._gaps.clear()


class Decoding:
    """The jobs that decode. Decode iterations are numbered as `EngineCore.decoded` counts them."""

    def __init__(self) -> None:
        self.streaming: dict[Hashable, Job] = {}  #: those of them that tell each token
        self._ends: list[tuple[int, int, Job]] = []  # heap: the decode iteration with a job's last token, a ticket
        self._tickets = 0
        self._count = 0
        self._newcomers: tuple[Job, ...] = ()  # their first decode iteration is not complete
        self._last_at = 0.0  # when the last decode iteration was
        self._gaps = Gaps()

    def join(self, job: Job, decoded: int) -> None:
        """The job decodes from the iteration after `decoded` on."""
        job.joined = decoded
        job.generated -= decoded
        job.decodes = True
        self._count += 1
        self._tickets += 1
        job.ticket = self._tickets
        if len(self._ends) > 2 * self._count + STALE_ENTRIES:
            self._ends = [entry for entry in self._ends if entry[2].decodes and entry[2].ticket == entry[1]]
            heapify(self._ends)
        _push(self._ends, (job.output - job.generated, job.ticket, job))
        self._newcomers = (*self._newcomers, job)
        if job.stream:
            self.streaming[job.key] = job

    def leave(self, job: Job, decoded: int) -> None:
        """The job decodes no more, for now or for good; nothing when it does not."""
        if not job.decodes:
            return
        job.decodes = False
        job.generated += decoded
        if self._newcomers and job in self._newcomers:
            self._newcomers = tuple([other for other in self._newcomers if other is not job])
        else:
            job.last_at = self._last_at
            # its first gap is known already; behind it lie those of all
            job.max_gap_s = max(job.max_gap_s, self._gaps.largest_since(job.joined + 1))
        if job.stream:
            self.streaming.pop(job.key, None)
        self._count -= 1
        if not self._count:
            self._gaps.clear()

    def went(self, step: int, count: int, run: DecodeRun, t0: float, k: int) -> None:
        """`count` decode iterations ended, the first of them `step`: it is the k-th of `run`, which began at `t0`."""
        last = k + count - 1
        if k == 1:
            edge = t0 + run.at(1)
            self._gaps.add(step, edge - self._last_at)
            for job in self._newcomers:
                if edge - job.last_at > job.max_gap_s:
                    job.max_gap_s = edge - job.last_at
            self._newcomers = ()
        if last > 1:  # an iteration is never shorter than the one before it in its run
            self._gaps.add(step + count - 1, run.first_s + run.growth_s * (last - 1))
        self._last_at = t0 + run.at(last)

    def next_end(self) -> int:
        """The decode iteration with the next last token of a job; 0: none decodes."""
        ends = self._ends
        while ends:
            number, ticket, job = ends[0]
            if job.decodes and job.ticket == ticket:
                return number
            _pop(ends)
        return 0

    def end(self, step: int, ended: dict[Hashable, int]) -> None:
        """Adds to `ended` the jobs whose last token decode iteration `step` brought, with their tokens."""
        ends = self._ends
        while ends and ends[0][0] <= step:
            _, ticket, job = _pop(ends)
            if job.decodes and job.ticket == ticket:
                ended[job.key] = job.output
