"""What follows from each get for the tasks behind it: activation, criteria, depth, task groups, what must not wait.

The rules (Parrot, OSDI'24, section 5.2), each the strictest of what reaches a task, so that the order in which calls and
gets come is of no consequence, and a later get tightens and never loosens:

- **Activation.** A fetched output's task runs, and so does all that it needs.
- **Criteria.** Whatever leads to an output that is wanted with `latency` or `TTFT` has `latency`: its first token waits for
  the last token of each input. `throughput` makes all that leads there `throughput`. So does `TPOT`, which constrains the
  time between the tokens of the output that it names, and nothing before.
- **Depth.** The longest way to a fetched output, in tasks.
- **Stage.** The longest way counts among outputs of the task's own class (latency-bound or not); where it leads, and how long
  it is, is the task's stage. Tasks of one stage run in parallel: none can need another. Two or more are a task group, whose
  end as a whole matters, so that its members may batch.
- **Alone.** A task that is wanted for its own latency, or is all that such a task waits for, stays latency-sensitive in a
  group of other outputs too. So does whatever was latency-sensitive before a get that brought it into a group.

Each task is visited once a change, after all that it could learn from, in the order of `rank`: a topological order of the
session's graph, kept as calls come in. So the work of a call or a get is in proportion to the tasks that it changes and their
edges (`visited` counts it).
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Final

from parrot.protocol.api import Criteria
from parrot.serve.graph import Group, Task, latency_bound

if TYPE_CHECKING:
    from parrot.serve.sessions import Session

_RANK: Final = {Criteria.THROUGHPUT: 0, Criteria.TPOT: 1, Criteria.TTFT: 2, Criteria.LATENCY: 3}

#: What ranks of tasks are apart that came after all they read, so that others can be put between.
_STRIDE: Final = 1 << 16

# What a task that waits to be visited has learnt at the most.
_NOTHING: Final = 0
_ALONE: Final = 1
_STAGE: Final = 2


def tighter(a: Criteria | None, b: Criteria | None) -> Criteria | None:
    """The criteria that satisfies both: the stricter of two; TTFT and TPOT together are latency."""
    if a is None or b is None or a is b:
        return a if b is None else b
    if {a, b} == {Criteria.TTFT, Criteria.TPOT}:
        return Criteria.LATENCY
    return a if _RANK[a] >= _RANK[b] else b


class Deduction:
    """Keeps what is deduced of all sessions' tasks. `changed` is called for each task that was activated or whose place in
    a queue may have moved, when everything is settled. `visited` counts the tasks that were looked at, once an edge."""

    def __init__(self, changed: Callable[[Task], None]) -> None:
        self._changed = changed
        self._heap: list[tuple[int, int, Task]] = []
        self._pushed = 0
        self._settled: list[Task] = []  # visited in this run, in order
        self._before: dict[Task, bool] | None = None  # in a get's run: which tasks were latency-sensitive
        self.visited = 0

    def add(self, task: Task) -> None:
        """`task` was just submitted; its inputs' producers that have not ended are its `sources`. Who reads its output may
        wait for it already, and a get too."""
        try:
            self._add(task)
        finally:
            self._settle()

    def _add(self, task: Task) -> None:
        output = task.output
        if output.consumers is None:
            session = task.call.session
            session.top_rank += _STRIDE
            task.rank = session.top_rank
            if output.criteria is not None:
                self.fetch(task)
            return
        waiting = [consumer for consumer in output.consumers if not consumer.ended]
        self._rank(task, waiting)
        for consumer in waiting:
            self.visited += 1
            sources = consumer.sources
            if sources is None:
                sources = consumer.sources = []
            sources.append(task)
            if consumer.activated:
                self._teach(consumer, task)
                self._lend(consumer)
        if output.criteria is not None:
            self._learn(task, output.criteria, 0, None, 0)

    def fetch(self, task: Task) -> None:
        """Somebody wants `task`'s output, with what its `criteria` has become by that."""
        criteria = task.output.criteria
        assert criteria is not None
        self.visited += 1
        if task.state == "waiting" and not task.missing and not task.activated:  # nothing stands behind it: the common case
            task.activated = True
            task.criteria = criteria
            self._changed(task)
        elif not task.ended:
            self._before = {task: task.latency_sensitive}
            try:
                self._learn(task, criteria, 0, None, 0)
                self._touch(task, _ALONE)
            finally:
                self._settle()

    # ------------------------------------------------------------------------------------------- passing on

    def _settle(self) -> None:
        """Visits all that was touched, consumers before what they need, and tells of it. What fails, a bug of ours, costs the
        one task that it failed at: the others are visited and told of all the same, and nothing is left for the next run;
        then the first error is raised."""
        if not self._heap and self._before is None:
            return
        error: Exception | None = None
        settled = self._settled
        while self._heap:
            task = heappop(self._heap)[2]
            learnt, task.touched = task.touched, _NOTHING
            if task.ended:
                continue
            settled.append(task)
            try:
                self._visit(task, learnt)
            except Exception as failure:
                error = error or failure
        self._settled = []
        before, self._before = self._before, None
        if before is not None:
            for task, sensitive in before.items():
                if sensitive and not task.latency_sensitive:
                    task.pinned = True
        for task in settled:
            try:
                self._changed(task)
            except Exception as failure:
                error = error or failure
        if error is not None:
            raise error

    def _visit(self, task: Task, learnt: int) -> None:
        self._lend(task)
        if learnt == _STAGE:
            self._enter_stage(task)
            for source in task.sources or ():
                if not source.ended:
                    self._teach(task, source)

    def _touch(self, task: Task, learnt: int) -> None:
        if not task.touched:
            self._pushed -= 1
            heappush(self._heap, (-task.rank, self._pushed, task))
        if learnt > task.touched:
            task.touched = learnt

    def _teach(self, consumer: Task, source: Task) -> None:
        """Passes on to a task what a consumer of its output knows."""
        self.visited += 1
        criteria = Criteria.LATENCY if latency_bound(consumer.criteria) else Criteria.THROUGHPUT
        aim = consumer.aim if consumer.aim is not None else consumer
        self._learn(source, criteria, consumer.depth + 1, aim, consumer.level + 1)

    def _learn(self, task: Task, criteria: Criteria, depth: int, aim: Task | None, level: int) -> None:
        """Something reaches `task`: `aim` (None: itself) is to be served with `criteria`, `level` tasks from here."""
        wanted, deeper = tighter(task.criteria, criteria), depth > task.depth
        urgent, was_urgent = latency_bound(criteria), latency_bound(task.criteria)
        other = not task.activated or urgent > was_urgent  # outputs of another class count from now on
        farther = other or (urgent == was_urgent and _farther(aim, level, task))
        if not farther and not deeper and wanted is task.criteria:
            return
        self._remember(task)
        if farther:
            task.aim, task.level = aim, level
        if deeper:
            task.depth = depth
        task.criteria = wanted
        task.activated = True
        self._touch(task, _STAGE)

    def _lend(self, task: Task) -> None:
        """Whatever hurries `task` hurries what it waits for, if that is one task alone."""
        sources = task.sources
        if sources is None:
            return
        lends = len(sources) == 1 and (task.alone > 0 or latency_bound(task.output.criteria))
        if lends != task.lends:
            task.lends = lends
            source = sources[0]
            self._remember(source)
            source.alone += 1 if lends else -1
            self.visited += 1
            if not source.ended:
                self._touch(source, _ALONE)

    def _remember(self, task: Task) -> None:
        """What `task` is before a get changes it."""
        if self._before is not None and task not in self._before:
            self._before[task] = task.latency_sensitive

    # ------------------------------------------------------------------------------------------- stages

    def _enter_stage(self, task: Task) -> None:
        """Moves the task to the stage that it belongs to now. The first task of a stage stands there for itself; with the
        second one a group is made."""
        aim, level = task.aim, task.level
        stage = None if aim is None else (aim, level)
        if stage == task.stage:
            return
        session = task.call.session
        if task.stage is not None:
            self._leave_stage(task, task.stage, session)
        task.stage = stage
        if stage is None or aim is None:
            return
        if session.stages is None:
            session.stages = {}
        found = session.stages.get(stage)
        if found is None:
            session.stages[stage] = task
            return
        if isinstance(found, Task):
            group = session.stages[stage] = Group(aim.id, level)
            self._remember(found)
            self._join(found, group)
            self._settled.append(found)  # it may batch from now on
        else:
            group = found
        self._join(task, group)

    def _leave_stage(self, task: Task, stage: tuple[Task, int], session: Session) -> None:
        stages, group = session.stages, task.group
        assert stages is not None
        if group is None:
            del stages[stage]
            return
        task.group = None
        del group.members[task]
        group.queued.pop(task, None)
        if len(group.members) == 1:
            for last in group.members:
                stages[stage] = last
                last.group = None
                self._settled.append(last)

    @staticmethod
    def _join(task: Task, group: Group) -> None:
        task.group = group
        group.members[task] = None
        if task.in_queue:
            group.queued[task] = None

    # ------------------------------------------------------------------------------------------- order

    def _rank(self, task: Task, consumers: list[Task]) -> None:
        """Gives a new task its rank: above what it reads, below who reads it."""
        session = task.call.session
        if not consumers:
            session.top_rank += _STRIDE
            task.rank = session.top_rank
            return
        above = min([consumer.rank for consumer in consumers])
        below = max([source.rank for source in task.sources or () if not source.ended], default=above - 2 * _STRIDE)
        task.rank = (above + below) // 2 if below < above else above - 1
        if task.rank <= below:
            task.rank = above - 1
            self._lower(task)

    def _lower(self, task: Task) -> None:
        """What `task` reads must stand below it: moves down what does not, each once, in the order that held so far."""
        heap: list[tuple[int, int, Task]] = []
        bounds: dict[Task, int] = {}
        pushed = 0
        while True:
            for source in task.sources or ():
                if source.rank >= task.rank and not source.ended:
                    if source not in bounds:
                        pushed += 1
                        heappush(heap, (-source.rank, pushed, source))
                    bounds[source] = min(bounds.get(source, task.rank), task.rank)
            if not heap:
                return
            task = heappop(heap)[2]
            task.rank = bounds[task] - 1
            self.visited += 1


def _farther(aim: Task | None, level: int, task: Task) -> bool:
    """Whether `aim`, `level` tasks from `task`, says more of its stage than what is known; of two equally far the first
    submitted."""
    if level != task.level:
        return level > task.level
    known = task.aim
    return aim is not known and aim is not None and known is not None and aim.id < known.id
