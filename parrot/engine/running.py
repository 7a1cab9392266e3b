"""A task inside EngineCore, and how far its fill goes in a batch. It decides nothing about who runs."""

from __future__ import annotations

from typing import Final

from mypy_extensions import mypyc_attr

from parrot.engine.batches import EngineTask, Row
from parrot.engine.blocks import NO_BLOCKS
from parrot.engine.contexts import NO_COPY, NOBODY, Context

# The states of a task: numbers, because an iteration asks for them a dozen times.
WAITING: Final = 0
FILLING: Final = 1
DECODING: Final = 2
DRAINING: Final = 3  #: its last row is issued and not complete
ENDED: Final = 4  #: its contexts are let go when no batch in flight touches them


@mypyc_attr(acyclic=True)
class Task:
    """A task from its submission until its contexts are let go."""

    __slots__ = (
        "admitted", "arrival", "cached", "chain", "cursor", "ends", "expected", "first_token", "forced", "gen", "given",
        "in_flight", "joined", "key", "known", "last_step", "limbo", "limbo_blocks", "links", "max_gen", "origin", "output_id",
        "parent_id", "prompt", "roomed", "settled", "state", "ticket",
    )  # fmt: skip

    def __init__(self, spec: EngineTask, expected: int) -> None:
        """`expected`: tokens of its output with which it ends, as far as anybody knows; at most its max_gen_length."""
        self.key = spec.key
        self.links = spec.links  # its chain, () while it has its contexts
        self.parent_id = spec.parent_context_id
        self.output_id = spec.generate_context_id
        self.max_gen = spec.max_gen_length
        self.expected = expected
        self.forced = spec.forced_tokens if spec.generate_context_id is not None else 0
        self.known = self.forced  # tokens of the output whose values are known, without those of its decode rows
        self.prompt = 0
        self.given = 0  # leading links that the engine must hold: it was never told their tokens
        self.arrival = 0  # its number, from 1 on
        self.state = WAITING
        self.admitted = False
        self.first_token = False
        self.cached = 0  # tokens of its prompt that were found in memory
        self.in_flight = 0  # batches in flight that fill some of it
        self.chain: tuple[Context, ...] = ()
        self.gen: Context | None = None
        self.cursor = 0  # contexts of the chain before it are computed
        self.limbo = 0  # blocks given up that a batch in flight may still write
        self.limbo_blocks = NO_BLOCKS  # these
        # Of its time in the lockstep (parrot.engine.lockstep), in iterations of it:
        self.ticket = 0  # which join it was, of all there were
        self.joined = 0  # issued when it joined
        self.ends = 0  # the one that brings the last of the tokens that are expected
        self.last_step = 0  # the last that has a row of it, once it has left; 0: none
        self.origin = 0  # the position that iteration k computes is origin + k − 1
        self.settled = 0  # up to which its context is up to date
        self.roomed = 0  # up to which its context has its room

    @property
    def target(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return self.prompt + self.forced


def ready_tokens(task: Task, number: int) -> int:
    """Tokens of a fill that can be computed in this batch; 0 while another task computes what comes before them."""
    chain = task.chain
    while task.cursor < len(chain):
        context = chain[task.cursor]
        if context.computed < context.tokens:
            break
        if context.filled_in == number:
            return 0
        task.cursor += 1
    else:
        return 1  # all is there: the last token once more, for what follows it
    if context.filler != NOBODY and context.filler != task.arrival:
        return 0
    ready = context.tokens - context.computed
    for later in chain[task.cursor + 1 :]:
        if later.copy_from != NO_COPY:  # what it copies must be complete in an earlier batch
            break
        ready += later.tokens
    return ready


def fill_row(task: Task, chunk: int, number: int, copies: list[tuple[int, int]]) -> Row:
    """Computes the next `chunk` tokens of a fill in batch `number`; copies that must precede them go to `copies`."""
    chain = task.chain
    if task.cursor == len(chain):
        deepest = next(context for context in reversed(chain) if context.tokens)
        start = task.target - 1
    else:
        start, left = chain[task.cursor].start + chain[task.cursor].computed, chunk
        while left:
            context = chain[task.cursor]
            context.begin(copies)
            count = min(left, context.tokens - context.computed)
            if count:
                deepest, left = context, left - count
                context.computed += count
                context.filled_in = number
            if context.computed < context.tokens:
                context.filler = task.arrival
                break
            context.filler = NOBODY
            task.cursor += 1
    stop = start + chunk
    return Row(task, deepest.id, start, stop, stop == task.target and task.gen is not None, False)
