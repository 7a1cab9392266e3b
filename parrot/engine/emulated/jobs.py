"""What the tasks of an emulated engine would generate and have generated, and the gaps between their tokens.

Jobs that decode get one token an iteration, all of them: nobody is counted one by one. It decides nothing about who runs.
"""

from __future__ import annotations

from mypy_extensions import mypyc_attr

from parrot.engine.batches import EngineTask
from parrot.engine.running import Task
from parrot.latency import DecodeRun


@mypyc_attr(acyclic=True)
class Job(Task):
    """The core's task, and the times of its tokens. `expected`: tokens that it generates in all, forced ones included."""

    __slots__ = ("arrives_at", "decodes", "first_at", "last_at", "max_gap_s", "since", "stream")

    def __init__(self, spec: EngineTask, output: int, stream: bool, arrives_at: float) -> None:
        super().__init__(spec, output)
        self.stream = stream
        self.decodes = False
        self.since = 0  # while it decodes: the decode iteration before its first
        self.arrives_at = arrives_at
        self.first_at = -1.0  # of its first token; below 0: it has none
        self.last_at = 0.0  # of its last token; while it decodes, that of the first ones is kept by `Decoding`
        self.max_gap_s = 0.0

    def sampled(self, at: float) -> None:
        """Its fill ended with a token: its first, or one after its room was taken away for a time."""
        if self.first_at < 0.0:
            self.first_at = at
        elif at - self.last_at > self.max_gap_s:
            self.max_gap_s = at - self.last_at
        self.last_at = at


@mypyc_attr(acyclic=True)
class Gap:
    """A time between consecutive iterations up to `step`, and before it the next larger one that came earlier."""

    __slots__ = ("before", "gap_s", "step")

    def __init__(self, step: int, gap_s: float, before: Gap | None) -> None:
        self.step = step
        self.gap_s = gap_s
        self.before = before


def with_gap(gaps: Gap | None, step: int, gap_s: float) -> Gap:
    """`gaps` and the largest of those up to iteration `step` that were not added before. Those that no later one falls short of
    go: nobody can ask for them any more."""
    while gaps is not None and gaps.gap_s <= gap_s:
        gaps = gaps.before
    return Gap(step, gap_s, gaps)


def largest_since(gaps: Gap | None, step: int) -> float:
    """The largest before iterations later than `step`; 0 when there are none."""
    largest_s = 0.0
    while gaps is not None and gaps.step > step:
        largest_s = gaps.gap_s
        gaps = gaps.before
    return largest_s


@mypyc_attr(acyclic=True)
class Decoding:
    """The jobs that decode. Decode iterations are numbered as `EngineCore.decoded` counts them."""

    __slots__ = ("_count", "_gaps", "_last_at", "_newcomers", "streaming")

    def __init__(self) -> None:
        self.streaming = 0  #: how many of them tell each token
        self._count = 0
        self._last_at = 0.0  # when the last decode iteration was
        self._newcomers: tuple[Job, ...] = ()  # their first decode iteration is not complete
        self._gaps: Gap | None = None  # as far as somebody may still ask for the largest

    def join(self, job: Job) -> None:
        """The job decodes from the iteration after `job.joined` on."""
        job.decodes = True
        job.since = job.joined
        self._count += 1
        self._newcomers = (*self._newcomers, job)
        self.streaming += job.stream

    def leave(self, job: Job) -> None:
        """The job decodes no more, for now or for good; nothing when it does not."""
        if not job.decodes:
            return
        job.decodes = False
        if self._newcomers and job in self._newcomers:
            self._newcomers = tuple([other for other in self._newcomers if other is not job])
        else:
            job.last_at = self._last_at
            # its first gap is known already; behind it lie those of all
            job.max_gap_s = max(job.max_gap_s, largest_since(self._gaps, job.since + 1))
        self.streaming -= job.stream
        self._count -= 1
        if not self._count:
            self._gaps = None

    def went(self, step: int, count: int, run: DecodeRun, t0: float, k: int) -> None:
        """`count` decode iterations ended, the first of them `step`: it is the k-th of `run`, which began at `t0`."""
        last = k + count - 1
        if k == 1:
            edge = t0 + run.at(1)
            self._gaps = with_gap(self._gaps, step, edge - self._last_at)
            for job in self._newcomers:
                if edge - job.last_at > job.max_gap_s:
                    job.max_gap_s = edge - job.last_at
            self._newcomers = ()
        if last > 1:  # an iteration is never shorter than the one before it in its run
            self._gaps = with_gap(self._gaps, step + count - 1, run.first_s + run.growth_s * (last - 1))
        self._last_at = t0 + run.at(last)
