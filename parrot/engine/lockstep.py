"""The decoding tasks of an engine. All of them get one token an iteration, so that what an iteration does to them is kept in
sums: an iteration costs the same whether two tasks decode or two hundred, and so do a thousand iterations at once.

A task whose last row is issued, with which it reaches its max_gen_length, *drains*: it has left, and ends when that iteration
is complete, unless it ends before.

A task's own context is brought up to date (`settle`) when it leaves or when somebody looks at it. The tree's sums of tokens
and the pool's number of free blocks are always right; which blocks they are is decided when a context is settled.
Decides nothing about who decodes.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Final

from mypy_extensions import mypyc_attr

from parrot.engine.contexts import NO_COPY, Context, ContextTree
from parrot.engine.running import DECODING, DRAINING, Task

# By a name of this module's own that never changes: the compiled module need not look it up.
_ticket: Final = attrgetter("ticket")


@mypyc_attr(acyclic=True)
class Lockstep:
    """Decode iterations are numbered from 1 in the order of their issue: `steps` are issued, `done` of them complete.

    `kv`, `kv_unique`: KV tokens that the next iteration's rows read less their own new ones; the second counts a shared
    context once.
    """

    __slots__ = (
        "_block_size", "_contexts", "_copying", "_draining", "_ends", "_fresh", "_next_end", "_phase", "_room", "_tickets",
        "done", "kv", "kv_unique", "members", "rows", "steps",
    )  # fmt: skip

    def __init__(self, contexts: ContextTree) -> None:
        #: The tasks in the order in which they joined: the same object as long as nobody joins or leaves.
        self.members: tuple[Task, ...] = ()
        self.rows = 0  #: how many they are: an edge asks for it, and has no need of them
        self.steps = 0
        self.done = 0
        self.kv = 0
        self.kv_unique = 0
        self._next_end = 0  # of the members, as `next_end` says it of all
        self._draining: tuple[Task, ...] = ()  # in the order of their last rows; some may have ended otherwise
        self._room = 0  # iterations for which there is room: `steps`, or one more (a fill that runs alone came between)
        self._fresh: tuple[Task, ...] = ()  # joined since room was last made: the first token's room is made by itself
        self._ends: list[Task] = []  # by the iteration with their last token as expected, the next last; first who joined first
        # phase[p] tasks take a block with the room of iteration r + 1 when r + p is a multiple of the block size
        self._phase = [0] * contexts.pool.block_size
        self._block_size = contexts.pool.block_size
        self._contexts = contexts
        self._tickets = 0
        self._copying: tuple[Context, ...] = ()  # outputs whose first block begins as a copy, not issued yet

    # ------------------------------------------------------------------------------------------------ who is in it

    def join(self, tasks: tuple[Task, ...]) -> None:
        """Their prompts are computed and first tokens will be sampled: they decode from the next iteration on."""
        steps = self.steps
        for task in tasks:
            gen = task.gen
            assert gen is not None, "a decoding task has an output"
            self._tickets += 1
            task.state = DECODING
            task.ticket = self._tickets
            task.joined = task.settled = steps
            task.ends = steps + task.expected - gen.tokens
            task.last_step = 0
            task.origin = gen.start + gen.computed - steps
            self._ends.insert(self._place(task.ends), task)
            self.kv += gen.start + gen.computed
            for context in task.chain:
                if not context.decoders:
                    self.kv_unique += context.computed
                context.decoders += 1
            task.chain = ()
        self.members += tasks
        self._fresh += tasks
        self.rows += len(tasks)
        self._next_end = self._ends[-1].ends

    def leave(self, task: Task) -> None:
        """The task gets no more rows."""
        self.settle(task)
        gen = task.gen
        assert gen is not None
        members, place = self.members, 0
        while members[place] is not task:
            place += 1
        self.members = members[:place] + members[place + 1 :]
        place = self._place(task.ends)
        while self._ends[place] is not task:
            place += 1
        del self._ends[place]
        self.rows -= 1
        self._next_end = self._ends[-1].ends if self._ends else 0
        if self._fresh and task in self._fresh:
            self._fresh = tuple([other for other in self._fresh if other is not task])
        else:
            self._phase[self._phase_of(task, gen)] -= 1
        if self.steps > task.joined:
            task.last_step = self.steps
        self.kv -= gen.start + gen.computed
        context: Context | None = gen
        while context is not None:
            context.decoders -= 1
            if not context.decoders:
                self.kv_unique -= context.computed
            context = context.parent

    def _place(self, step: int) -> int:
        """Of the first of `_ends` that ends with iteration `step` or before."""
        ends = self._ends
        low, high = 0, len(ends)
        while low < high:
            middle = (low + high) // 2
            if ends[middle].ends > step:
                low = middle + 1
            else:
                high = middle
        return low

    def _phase_of(self, task: Task, gen: Context) -> int:
        return (gen.start + gen.size - task.roomed) % self._block_size

    def next_end(self) -> int:
        """The next iteration that brings a task the last of the tokens expected of it; 0: none decodes or drains."""
        end = self._next_end
        for task in self._draining:
            if task.state == DRAINING and (not end or task.ends < end):
                end = task.ends
        return end

    def ending(self, step: int) -> list[Task]:
        """Those whose last expected token a row of iteration `step` brings, or one before; in the order of their joining."""
        found: list[Task] = []
        if step >= self._next_end:
            ends = self._ends
            place = len(ends) - 1
            while place >= 0 and ends[place].ends <= step:
                if ends[place].ends > ends[place].joined:  # else its fill brings it
                    found.append(ends[place])
                place -= 1
        if self._draining:
            found += [task for task in self._draining if task.state == DRAINING and task.joined < task.ends <= step]
        if len(found) > 1:
            found.sort(key=_ticket)
        return found

    def take_drained(self) -> tuple[Task, ...]:
        """Those whose last row is complete since the last call, less those that ended before it was."""
        drained: tuple[Task, ...] = ()
        while self._draining and self._draining[0].last_step <= self.done:
            task, self._draining = self._draining[0], self._draining[1:]
            if task.state == DRAINING:
                drained = (*drained, task)
        return drained

    def known(self, task: Task) -> int:
        """Tokens of the task's output whose values are known."""
        last = self.steps if task.state == DECODING else task.last_step
        return task.known + max(0, min(self.done, last) - task.joined)

    def settle(self, task: Task) -> None:
        """Brings the task's output context up to date."""
        gen = task.gen
        assert gen is not None
        steps, room = self.steps, self._room
        more = steps - task.settled
        if more:
            gen.computed += more
            gen.tokens += more
            task.settled = steps
        if self._fresh and task in self._fresh:
            return
        grown = room - task.roomed
        if grown:
            gen.size += grown
            task.roomed = room
            start, size = gen.start, self._block_size
            owed = -(-(start + gen.size) // size) - start // size - gen.num_blocks
            if owed:
                gen.add_blocks(owed, self._contexts.pool.take_owed(owed))

    def settle_all(self) -> None:
        for task in self.members:
            self.settle(task)

    # -------------------------------------------------------------------------------------------------- iterations

    def make_room(self, most_held: int) -> bool:
        """Room for one more token of every task, retained contexts evicted for it where need be. False, and nothing is
        changed: there is none, or the tokens held would be more than `most_held`."""
        contexts, fresh = self._contexts, self._fresh
        growing = old = blocks = 0
        if self._room == self.steps:
            growing = self.rows
            old = growing - len(fresh)
            if old:
                blocks = owed = self._phase[-self._room % self._block_size]
        elif fresh:
            growing = len(fresh)
        if not growing:
            return True
        if fresh:
            blocks += contexts.next_blocks([task.gen for task in fresh])  # type: ignore[misc]
        if contexts.held_tokens + growing > most_held or blocks > contexts.pool.free + contexts.retained_blocks:
            return False
        if old:
            if owed:
                contexts.owe(owed)
            contexts.held_tokens += old
            contexts.stored_tokens += old
        if self._room == self.steps:
            self._room += 1
        if fresh:
            for task in fresh:
                gen = task.gen
                assert gen is not None
                contexts.grow(gen, gen.computed + 1)
                if gen.copy_from != NO_COPY:
                    self._copying = (*self._copying, gen)
                task.roomed = self._room
                self._phase[self._phase_of(task, gen)] += 1
            self._fresh = ()
        return True

    def step(self, copies: list[tuple[int, int]]) -> bool:
        """One iteration, for which there is room, is issued; the copies that must precede it go to `copies`. Whether it has
        the last row of somebody, who drains from now on."""
        if self._copying:
            for gen in self._copying:
                gen.begin(copies)
            self._copying = ()
        return self._step(1)

    def advance(self, count: int) -> bool:
        """`count` iterations, at most `horizon`, are issued and as many complete. Whether the last has somebody's last row."""
        if needed := self._blocks(count):
            self._contexts.owe(needed)
        self._room += count
        self._contexts.held_tokens += count * self.rows
        self._contexts.stored_tokens += count * self.rows
        self.done += count
        return self._step(count)

    def _step(self, count: int) -> bool:
        self.steps += count
        self.kv += count * self.rows
        self.kv_unique += count * self.rows
        if self.steps < self._next_end:
            return False
        last: list[Task] = []
        ends = self._ends
        place = len(ends) - 1
        while place >= 0 and ends[place].ends <= self.steps:
            task = ends[place]
            if _last_row(task) <= self.steps:
                last.append(task)
            place -= 1
        if len(last) > 1:
            last.sort(key=_ticket)
        for task in last:
            self.leave(task)
            task.state = DRAINING
            self._draining = (*self._draining, task)
        return bool(last)

    def horizon(self, most: int) -> int:
        """Of the next `most` iterations, how many can be issued before a task gets its last row or room runs out."""
        if self._next_end - self.steps < most:
            ends = self._ends
            place = len(ends) - 1
            while place >= 0 and ends[place].ends - self.steps < most:
                most = min(most, _last_row(ends[place]) - self.steps)
                place -= 1
        if most <= 0:
            return 0
        available = self._contexts.available
        if self.rows * -(-most // self._block_size) <= available:
            return most
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            if self._blocks(middle) <= available:
                low = middle
            else:
                high = middle - 1
        return low

    def _blocks(self, count: int) -> int:
        """Blocks that the room of the next `count` iterations takes."""
        size, phase = self._block_size, self._phase
        whole, rest = count // size, count % size
        blocks = whole * self.rows
        if rest:
            place = -self._room % size  # the phases that take a block lie there and before, around the corner
            for _ in range(rest):
                blocks += phase[place]
                place = place - 1 if place else size - 1
        return blocks


def _last_row(task: Task) -> int:
    """The iteration with which the task reaches its max_gen_length, unless it ends before."""
    return task.ends + task.max_gen - task.expected
