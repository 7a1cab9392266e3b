"""The DAG of calls: a call's completion tasks, their edges through variables, and what follows from each get.

Deduction (Parrot, OSDI'24, section 4.2) walks backward from a fetched output: every task that the output needs is
activated, gets the criteria of what it serves, its depth (the longest way to a fetched output, in tasks) and, where
several tasks feed one consumer in parallel, a task group, whose completion as a whole is what matters. Calls and gets
may come in any order; the work of each is proportional to what it changes. A later get tightens, never loosens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any

from parrot.protocol.api import Criteria, SamplingConfig
from parrot.protocol.engine import TaskId
from parrot.serve import states
from parrot.serve.events import Constant, Content, Output, Segment
from parrot.serve.variables import Variable

if TYPE_CHECKING:
    from parrot.serve.contexts import Context, PrefixNode
    from parrot.serve.engines import Engine, Lane
    from parrot.serve.sessions import Session

_RANK = {Criteria.THROUGHPUT: 0, Criteria.TPOT: 1, Criteria.TTFT: 2, Criteria.LATENCY: 3}


def tighter(a: Criteria | None, b: Criteria | None) -> Criteria | None:
    """The criteria that satisfies both: the stricter of two; TTFT and TPOT together are latency."""
    if a is None or b is None or a is b:
        return a if b is None else b
    if {a, b} == {Criteria.TTFT, Criteria.TPOT}:
        return Criteria.LATENCY
    return a if _RANK[a] >= _RANK[b] else b


class Call:
    """A submitted semantic call. `variables`: one for each segment, None for constants."""

    __slots__ = (
        "cache_prefix", "func_name", "fuse_fill", "lane", "number", "segments", "session", "submitted_s", "tasks", "variables",
    )  # fmt: skip

    def __init__(
        self,
        number: int,
        session: Session,
        func_name: str,
        segments: tuple[Segment, ...],
        variables: tuple[Variable | None, ...],
        lane: Lane,
        cache_prefix: bool,
        fuse_fill: bool,
        submitted_s: float,
    ) -> None:
        self.number = number
        self.session = session
        self.func_name = func_name
        self.segments = segments
        self.variables = variables
        self.lane = lane
        self.cache_prefix = cache_prefix
        self.fuse_fill = fuse_fill
        self.submitted_s = submitted_s
        self.tasks: list[Task] = []

    @property
    def state(self) -> str:
        """The state of its least advanced task that matters: failed and cancelled first, then whatever has not ended."""
        found = {task.state for task in self.tasks}
        for state in ("failed", "cancelled", "running", "dispatched", "queued", "waiting"):
            if state in found:
                return state
        return "finished"


class Group:
    """Tasks of one stage that feed `root` in parallel. `queued`: those of its members that wait for a placement."""

    __slots__ = ("depth", "queued", "root")

    def __init__(self, root: TaskId, depth: int) -> None:
        self.root = root
        self.depth = depth
        self.queued: dict[Task, None] = {}


class Link:
    """One context of a chain, engine-independent: the contents that it adds, and whether a task generated them."""

    __slots__ = ("contents", "output")

    def __init__(self, contents: tuple[Content, ...], output: bool) -> None:
        self.contents = contents
        self.output = output


class Task:
    """A completion task: fills, then one generate. It is also the view of itself that policies read.

    `begin`, `end`: its own segments are call.segments[begin:end], the last of them its output; its chain starts at 0.
    Times are seconds of the core's clock, None while they have not come.
    """

    __slots__ = (
        "activated", "attempt", "begin", "cached_tokens", "call", "contexts", "counted_latency", "criteria", "decode_s",
        "depth", "dispatched_s", "end", "engine", "engine_name", "finished_s", "first_token_s", "group", "id", "links",
        "max_gap_s", "missing", "order", "output", "output_tokens", "path", "placed_tokens", "prompt_tokens", "ready_s",
        "refusals", "reserved", "sampling", "sequence", "started_s", "state", "tokens", "tries",
    )  # fmt: skip

    def __init__(self, id: TaskId, call: Call, begin: int, end: int, output: Variable, sampling: SamplingConfig) -> None:
        self.id = id
        self.call = call
        self.begin = begin
        self.end = end
        self.output = output
        self.sampling = sampling
        self.missing = 0  # inputs that are not ready
        self.state = "waiting"
        self.attempt = 0
        self.tries = 0  # attempts that count towards max_attempts
        self.activated = False
        self.criteria: Criteria | None = None
        self.depth = 0
        self.group: Group | None = None
        # from the moment it is queued
        self.sequence = 0
        self.order: Any = None
        self.links: list[Link] | None = None
        self.path: list[PrefixNode] | None = None
        self.tokens: dict[str, int] | None = None  # prompt length by tokenizer
        self.refusals: dict[int, int] | None = None  # engine id -> its capacity version then; -1: never again
        # while it is in flight
        self.engine: Engine | None = None
        self.contexts: list[Context] | None = None
        self.reserved = 0
        self.placed_tokens = 0  # its whole prompt there, by the core's count
        self.counted_latency = False  # whether its engine counts it among its latency-bound tasks
        # its life, for reports
        self.engine_name: str | None = None
        self.ready_s: float | None = None
        self.dispatched_s: float | None = None
        self.started_s: float | None = None
        self.first_token_s: float | None = None
        self.finished_s: float | None = None
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.output_tokens = 0
        self.decode_s = 0.0
        self.max_gap_s = 0.0

    @property
    def ended(self) -> bool:
        return self.state in states.ENDED

    @property
    def max_gen_length(self) -> int:
        """Tokens that it may generate: all that a policy knows of its output's length."""
        return self.sampling.max_gen_length

    @property
    def session_id(self) -> int:
        return self.id.session_id

    @property
    def program_sequence(self) -> int:
        """The order in which programs (sessions) arrived."""
        return self.call.session.sequence

    @property
    def tenant(self) -> str:
        return self.call.session.tenant

    @property
    def latency_sensitive(self) -> bool:
        """Whether its own latency matters; a member of a group may batch, since only the whole group's end counts."""
        return self.group is None and self.criteria is not None and self.criteria is not Criteria.THROUGHPUT

    def inputs(self) -> dict[Variable, None]:
        """The variables that must be ready before it can run, each once, in template order; the output that it continues
        included."""
        first = self.begin - 1 if self.begin else 0
        found: dict[Variable, None] = {}
        for variable in self.call.variables[first : self.end - 1]:
            if variable is not None:
                found[variable] = None
        return found

    def producers(self) -> list[Task]:
        """The tasks that still have to end before it can run, each once."""
        if not self.missing:
            return []
        found: dict[Task, None] = {}
        for variable in self.inputs():
            if variable.producer is not None and not variable.settled:
                found[variable.producer] = None
        return list(found)


def tasks_of(call: Call) -> list[Task]:
    """One completion task for each output of the call, each continuing the one before."""
    tasks: list[Task] = []
    begin = 0
    for index, segment in enumerate(call.segments):
        if type(segment) is Output:
            output = call.variables[index]
            assert output is not None
            task_id = TaskId(call.session.id, call.number, len(tasks))
            tasks.append(Task(task_id, call, begin, index + 1, output, segment.sampling))
            begin = index + 1
    return tasks


def chain_of(task: Task) -> list[Link]:
    """The links of a task whose inputs are all ready, the head first. Empty contents make no link.

    One link a segment, so that contexts can be shared at every variable's boundary; with `fuse_fill`, one for each run
    of consecutive fills.
    """
    call = task.call
    links: list[Link] = []
    run: list[Content] = []
    for segment, variable in zip(call.segments[: task.end - 1], call.variables, strict=False):
        generated = False
        if type(segment) is Constant:
            content = segment.content
        else:
            assert variable is not None
            assert variable.content is not None
            content = variable.content
            generated = variable.producer is not None and variable.producer.call is call
        if content.empty:
            continue
        if not call.fuse_fill:
            links.append(Link((content,), generated))
        elif generated:
            if run:
                links.append(Link(tuple(run), False))
                run = []
            links.append(Link((content,), True))
        else:
            run.append(content)
    if run:
        links.append(Link(tuple(run), False))
    return links


def depends_on(variables: Iterable[Variable], targets: set[Variable]) -> bool:
    """Whether computing `variables` needs one of `targets`: the check that keeps the graph acyclic."""
    seen: set[Variable] = set()
    stack = list(variables)
    while stack:
        variable = stack.pop()
        if variable in targets:
            return True
        if variable in seen:
            continue
        seen.add(variable)
        if variable.producer is not None and not variable.settled:
            stack.extend(variable.producer.inputs())
    return False


class Deduction:
    """Backward propagation of activation, criteria, depth and groups. `changed` is called once for each task that was
    activated or whose place in a queue may have moved."""

    def __init__(self, changed: Callable[[Task], None]) -> None:
        self._changed = changed

    def fetch(self, task: Task, criteria: Criteria) -> None:
        """A get (or a call's own output_criteria) wants `task`'s output."""
        if task.state == "waiting" and not task.missing and not task.activated:  # nothing stands behind it: the common case
            task.activated = True
            task.criteria = criteria
            self._changed(task)
            return
        self._spread(task, criteria, 0, None)

    def connect(self, task: Task) -> None:
        """`task` was just added and something that is already wanted may read its output."""
        for consumer in task.output.consumers or ():
            if consumer.activated and not consumer.ended:
                self._spread_to_producers(consumer)

    def _spread(self, task: Task, criteria: Criteria, depth: int, group: Group | None) -> None:
        """Later calls first, and of what reaches a task the longest way first: so a task passes on what it learns once,
        not once for every way to it (but where calls were submitted before what they read)."""
        pushed = 0
        heap = [(-task.id.call, -task.id.output, -depth, pushed, task, criteria, group)]
        while heap:
            _, _, depth, _, task, criteria, group = heappop(heap)
            depth = -depth
            if task.state in states.ENDED:
                continue
            wanted = tighter(task.criteria, criteria)
            joins = group is not None and task.group is None and task.depth <= depth
            if task.activated and wanted is task.criteria and depth <= task.depth and not joins:
                continue
            task.activated = True
            task.criteria = wanted
            task.depth = max(task.depth, depth)
            if joins and group is not None:
                task.group = group
                if task.state == "queued":
                    group.queued[task] = None
            for producer, wants, below, joined in self._producers_of(task):
                pushed -= 1
                heappush(heap, (-producer.id.call, -producer.id.output, -below, pushed, producer, wants, joined))
            self._changed(task)

    def _spread_to_producers(self, consumer: Task) -> None:
        for item in self._producers_of(consumer):
            self._spread(*item)

    @staticmethod
    def _producers_of(task: Task) -> list[tuple[Task, Criteria, int, Group | None]]:
        """What `task` passes on to the tasks that it waits for. Latency of any kind makes what leads to it
        latency-bound: an output's first token waits for its inputs' last."""
        producers = task.producers()
        if not producers:
            return []
        criteria = Criteria.THROUGHPUT if task.criteria is Criteria.THROUGHPUT else Criteria.LATENCY
        depth = task.depth + 1
        group: Group | None = None
        if task.group is not None or len(producers) > 1:
            root = task.group.root if task.group is not None else task.id
            siblings = [p.group for p in producers if p.group is not None and p.group.root == root]
            group = siblings[0] if siblings else task.call.session.group(root, depth)
        return [(producer, criteria, depth, group) for producer in producers]
