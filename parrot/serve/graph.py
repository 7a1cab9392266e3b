"""The DAG of calls: a call's completion tasks, their edges through variables, and what policies may ask of them.

The paper's primitives (Parrot, OSDI'24, section 4.2) are `Task.producers`, `Task.consumers`, `Task.prefix_hashes` and the
performance objective: `Task.criteria`, and `Variable.criteria` as its gets gave it. What a get means for the tasks behind it
is deduced in `deduction.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from mypy_extensions import mypyc_attr

from parrot.protocol.api import Criteria, SamplingConfig
from parrot.protocol.engine import CONTINUED, TaskId
from parrot.serve import states
from parrot.serve.events import Constant, Content, Output, Segment
from parrot.serve.prefixes import prefix_hash
from parrot.serve.variables import Variable

if TYPE_CHECKING:
    from parrot.serve.contexts import Context
    from parrot.serve.engines import Engine, Lane
    from parrot.serve.prefixes import PrefixNode
    from parrot.serve.sessions import Session

# By names of this module's own that never change: the compiled module need not look them up.
_LATENCY: Final = Criteria.LATENCY
_THROUGHPUT: Final = Criteria.THROUGHPUT
_TTFT: Final = Criteria.TTFT
_CONSTANT: Final = Constant
_OUTPUT: Final = Output
_TASK_ID: Final = TaskId

NEVER: Final = math.inf  #: a time that has not come


def latency_bound(criteria: Criteria | None) -> bool:
    """Whether all that leads to an output which is wanted so delays what is wanted: its latency, or its first token."""
    return criteria is _LATENCY or criteria is _TTFT


class Call:
    """A submitted semantic call. `variables`: one for each segment, None for constants. `until_s`: its outputs are worthless
    after that; inf: never."""

    __slots__ = (
        "cache_prefix", "func_name", "fuse_fill", "lane", "number", "segments", "session", "submitted_s", "tasks",
        "until_s", "variables",
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
        until_s: float = math.inf,
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
        self.until_s = until_s
        self.tasks: tuple[Task, ...] = ()

    @property
    def state(self) -> str:
        """The state of its least advanced task that matters: failed and cancelled first, then whatever has not ended."""
        found = {task.state for task in self.tasks}
        for state in ("failed", "cancelled", "running", "dispatched", "queued", "waiting"):
            if state in found:
                return state
        return "finished"


class Group:
    """A task group: the tasks of one stage, which run in parallel and matter as a whole. `root`: the fetched output's task
    that they lead to, `depth` tasks from here. `members`: two or more, ended ones included, in no order that means anything;
    `queued`: those that wait for a placement."""

    __slots__ = ("depth", "members", "queued", "root")

    def __init__(self, root: TaskId, depth: int) -> None:
        self.root = root
        self.depth = depth
        self.members: dict[Task, None] = {}
        self.queued: dict[Task, None] = {}

    @property
    def latency_bound(self) -> bool:
        """Whether an output that is wanted for its latency waits for the group. (Its members may batch all the same.)"""
        for member in self.members:
            return latency_bound(member.criteria)
        return False

    def unended(self) -> list[Task]:
        """The members that have not ended. O(members)."""
        return [member for member in self.members if not member.ended]


@mypyc_attr(acyclic=True)
class Link:
    """One context of a chain, engine-independent: the contents that it adds, whether a task generated them, and the role of the
    chat message that begins with it."""

    __slots__ = ("contents", "output", "role")

    def __init__(self, contents: tuple[Content, ...], output: bool, role: str = "") -> None:
        self.contents = contents
        self.output = output
        self.role = role


class Task:
    """A completion task: fills, then one generate. It is also the view of itself that policies read.

    `begin`, `end`: its own segments are call.segments[begin:end], the last of them its output; its chain starts at 0.
    `max_gen_length`: tokens that it may generate: all that a policy knows of its output's length. `criteria`: its performance
    objective. `depth`: the longest way to a fetched output, in tasks: how many come after it, one
    behind the other, until somebody has what they asked for. `group`: its task group, None when nothing runs in parallel with
    it. `deadline_s`: the tightest deadline of what it serves, None without; `wanted_until_s`: nobody wants its output after
    that, None when nobody has set an end (`deadlines.py`). Times are seconds of the core's clock, None while they have not
    come.
    """

    __slots__ = (
        "activated", "aim", "alone", "attempt", "begin", "cached_tokens", "call", "charged", "contexts", "cost", "counted",
        "counted_latency", "counted_under", "criteria", "deadline_s", "decode_s", "depth", "dispatched_at", "end", "engine",
        "finished_at", "first_token_at", "granted", "group", "held", "id", "last_engine", "lends", "level", "links",
        "max_gap_s", "max_gen_length", "missing", "order", "output", "output_tokens", "path", "path_s", "pinned",
        "placed_tokens", "prompt_tokens", "rank", "ready_at", "reason", "refusals", "reserved", "sampling", "sequence",
        "sources", "stage", "started_at", "state", "tokens", "touched", "tries", "wanted_until_s",
    )  # fmt: skip

    def __init__(self, id: TaskId, call: Call, begin: int, end: int, output: Variable, sampling: SamplingConfig) -> None:
        # What an event of an engine looks at stands together: a task that runs has long left the processor's cache.
        self.state = "waiting"
        self.attempt = 0
        self.call = call
        self.output = output
        self.engine: Engine | None = None  # while it is in flight, as the next four
        self.contexts: tuple[Context, ...] | None = None
        self.reserved = 0
        self.placed_tokens = 0  # its whole prompt there, by the core's count
        self.counted_latency = False  # whether its engine counts it among its latency-bound tasks
        self.activated = False
        self.held = False  # for want of its tenant's tokens: it waits beside the queue
        self.lends = False  # for deduction, as from `rank` on
        self.pinned = False
        self.max_gen_length: int = sampling.max_gen_length
        self.started_at = NEVER
        self.first_token_at = NEVER
        self.id = id
        self.sampling = sampling
        self.begin = begin
        self.end = end
        self.missing = 0  # inputs that are not ready
        self.tries = 0  # attempts that count towards max_attempts
        self.criteria: Criteria | None = None
        self.depth = 0
        self.group: Group | None = None
        self.deadline_s: float | None = None
        self.wanted_until_s: float | None = None
        # for deduction alone
        self.rank = 0  # greater than that of any task that it waits for
        self.sources: list[Task] | None = None  # who makes its inputs and had not ended when both were known
        self.aim: Task | None = None  # the fetched task that its stage leads to; None: itself
        self.level = 0  # the longest way there, in tasks
        self.stage: tuple[Task, int] | None = None  # (aim, level) as it is entered in its session's stages
        self.alone = 0  # how many latency-sensitive tasks wait for it and nothing else; `lends`: it is one of those to its only
        self.touched = 0  # source; `pinned`: was latency-sensitive before a get that brought it into a group
        # while it is queued
        self.sequence = 0
        self.order: Any = None
        self.links: list[Link] | None = None
        self.path: list[PrefixNode] | None = None
        self.counted_under: str | None = None  # the first one that its prompt was counted under,
        self.counted = 0  # and the length; BOS is not counted
        self.tokens: dict[str, int] | None = None  # the length by other tokenizers
        # from then on
        self.refusals: dict[int, int] | None = None  # engine id -> its capacity version then; -1: never again
        self.granted = 0  # tokens that count against its tenant's max_tokens_in_flight
        self.charged = 0  # tokens that count against its tokens_per_minute until it is known what it used
        # its life, for reports
        self.last_engine: Engine | None = None  # the one that it was placed on last
        self.ready_at = NEVER
        self.dispatched_at = NEVER
        self.finished_at = NEVER
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.output_tokens = 0
        self.decode_s = 0.0
        self.max_gap_s = 0.0
        self.cost = 0.0
        self.reason = ""
        self.path_s = 0.0  # service along the longest path that led to it, its own included once it ends (`Service`)

    @property
    def engine_name(self) -> str | None:
        """Where it ran, or runs."""
        return None if self.last_engine is None else self.last_engine.name

    # Times as policies and reports see them. What changes them knows the fields: a number there is no object of its own.

    @property
    def ready_s(self) -> float | None:
        return None if self.ready_at == NEVER else self.ready_at

    @property
    def dispatched_s(self) -> float | None:
        return None if self.dispatched_at == NEVER else self.dispatched_at

    @property
    def started_s(self) -> float | None:
        return None if self.started_at == NEVER else self.started_at

    @property
    def first_token_s(self) -> float | None:
        return None if self.first_token_at == NEVER else self.first_token_at

    @property
    def finished_s(self) -> float | None:
        return None if self.finished_at == NEVER else self.finished_at

    @property
    def ended(self) -> bool:
        return self.state in states.ENDED

    @property
    def in_queue(self) -> bool:
        """Whether a policy may place it: it is ready, unplaced, and no limit of its tenant holds it beside the queue. (A
        policy's `order` is asked for held tasks too.)"""
        return self.state == "queued" and not self.held

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
        """Whether its own latency matters. A member of a group may batch, since only the whole group's end counts, unless it
        is wanted for its own, or is all that waits between somebody and an output."""
        criteria = self.criteria
        if criteria is None or criteria is _THROUGHPUT:
            return False
        if self.group is None or self.alone > 0 or self.pinned:
            return True
        own = self.output.criteria
        return own is not None and own is not _THROUGHPUT

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
        """The tasks that make its inputs, or have made them, each once, in template order. An input that was given, or that
        nobody makes yet, has none."""
        return [variable.producer for variable in self.inputs() if variable.producer is not None]

    def awaited(self) -> list[Task]:
        """The tasks that still have to end before it can run, each once."""
        return [source for source in self.sources or () if not source.ended]

    def consumers(self) -> list[Task]:
        """The tasks that read its output, or have read it, in the order of their submission."""
        return list(self.output.consumers or ())

    def prefix_hashes(self) -> list[str]:
        """The prefix hash at each boundary of its prompt, the head first: the last one is its whole prompt's. As far as its
        inputs are known. Hashes are the same wherever the contents are (`prefixes.prefix_hash`)."""
        found: list[str] = []
        reached = ""
        for link in chain_of(self) if self.links is None else self.links:
            reached = prefix_hash(reached, [content.key for content in link.contents])
            found.append(reached)
        return found


def tasks_of(call: Call) -> tuple[Task, ...]:
    """One completion task for each output of the call, each continuing the one before."""
    tasks: list[Task] = []
    begin = 0
    for index, segment in enumerate(call.segments):
        if type(segment) is _OUTPUT:
            output = call.variables[index]
            assert output is not None
            task_id = _TASK_ID(call.session.id, call.number, len(tasks))
            tasks.append(Task(task_id, call, begin, index + 1, output, segment.sampling))
            begin = index + 1
    return tuple(tasks)


def chain_of(task: Task) -> list[Link]:
    """The links of a task, the head first, as far as its inputs are ready. Empty contents make no link.

    One link a segment, so that contexts can be shared at every variable's boundary; with `fuse_fill`, one for each run
    of consecutive fills.
    """
    call = task.call
    links: list[Link] = []
    run: list[Content] = []
    begins = ""  # the role of a message whose first contents were empty
    for place in range(task.end - 1):
        segment, variable = call.segments[place], call.variables[place]
        generated = False
        if type(segment) is _CONSTANT:
            content = segment.content
        else:
            assert variable is not None
            if variable.content is None:
                break
            content = variable.content
            generated = variable.producer is not None and variable.producer.call is call
        role = "" if type(segment) is Output else segment.role
        if begins and role in ("", CONTINUED):
            role = begins
        if _is_empty(content):
            begins = role
            continue
        begins = ""
        if not call.fuse_fill:
            links.append(Link((content,), generated, role))
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


def _is_empty(content: Content) -> bool:
    """No tokens under any tokenizer. (One that no tokenizer has seen yet is not known to be empty.)"""
    lengths = content.lengths
    for tokens in lengths.values():
        if tokens:
            return False
    return bool(lengths)


def depends_on(variables: Iterable[Variable], targets: set[Variable]) -> bool:
    """Whether computing `variables` needs one of `targets`: the check that keeps the graph acyclic. Only tasks that rank no
    lower than a reader of the targets can need it, so that nothing else is looked at."""
    ranks = [reader.rank for target in targets for reader in target.consumers or ()]
    lowest = min(ranks) if ranks else 0
    seen: set[Variable] = set()
    stack = list(variables)
    while stack:
        variable = stack.pop()
        if variable in targets:
            return True
        if variable in seen or not ranks:
            continue
        seen.add(variable)
        producer = variable.producer
        if producer is not None and not variable.settled and producer.rank >= lowest:
            stack.extend(producer.inputs())
    return False
