"""The decoding tasks of an engine. All of them get one token an iteration, so that what an iteration does to them is kept in
sums: an iteration costs the same whether two tasks decode or two hundred, and so do a thousand iterations at once.

A task's own context is brought up to date (`settle`) when it leaves or when somebody looks at it. The tree's sums of tokens
and the pool's number of free blocks are always right; which blocks they are is decided when a context is settled.
Decides nothing about who decodes.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Final

from parrot.engine.contexts import STALE_ENTRIES, Context, ContextTree
from parrot.engine.running import DECODING, Task

# By names of this module's own that never change: the compiled module need not look them up.
_push: Final = heappush
_pop: Final = heappop


class Lockstep:
    """Decode iterations are numbered from 1 in the order of their issue: `steps` are issued, `done` of them complete.

    `kv`, `kv_unique`: KV tokens that the next iteration's rows read less their own new ones; the second counts a shared
    context once.
    """

    def __init__(self, contexts: ContextTree) -> None:
        self.tasks: dict[Task, None] = {}
        self.steps = 0
        self.done = 0
        self.kv = 0
        self.kv_unique = 0
        self._contexts = contexts
        self._block_size = contexts.pool.block_size
        self._room = 0  # iterations for which there is room: `steps`, or one more (a fill that runs alone came between)
        self._fresh: dict[Task, None] = {}  # joined since room was last made: the first token's room is made by itself
        self._copying: tuple[Context, ...] = ()  # outputs whose first block begins as a copy, not issued yet
        # phase[p] tasks take a block with the room of iteration r + 1 when r + p is a multiple of the block size
        self._phase = [0] * self._block_size
        self._ends: list[tuple[int, int, Task]] = []  # heap: the iteration after which max_gen_length is reached
        self._tickets = 0
        self._snapshot: tuple[Task, ...] | None = ()

    @property
    def members(self) -> tuple[Task, ...]:
        """The tasks in the order in which they joined: the same object as long as nobody joins or leaves."""
        if self._snapshot is None:
            self._snapshot = tuple(self.tasks)
        return self._snapshot

    # ------------------------------------------------------------------------------------------------ who is in it

    def join(self, task: Task) -> None:
        """The prompt is computed and the first token will be sampled: the task decodes from the next iteration on."""
        gen = task.gen
        assert gen is not None, "a decoding task has an output"
        steps = self.steps
        self._tickets += 1
        task.state = DECODING
        task.ticket = self._tickets
        task.joined = task.settled = steps
        task.last_step = 0
        task.origin = gen.start + gen.computed - steps
        self.tasks[task] = None
        self._fresh[task] = None
        self._snapshot = None
        if len(self._ends) > 2 * len(self.tasks) + STALE_ENTRIES:
            self._ends = [entry for entry in self._ends if entry[2].ticket == entry[1] and entry[2] in self.tasks]
            heapify(self._ends)
        _push(self._ends, (steps + task.max_gen - gen.tokens, task.ticket, task))
        self.kv += gen.start + gen.computed
        for context in task.chain:
            if not context.decoders:
                self.kv_unique += context.computed
            context.decoders += 1

    def leave(self, task: Task) -> None:
        """The task gets no more rows."""
        self.settle(task)
        gen = task.gen
        assert gen is not None
        del self.tasks[task]
        self._snapshot = None
        if not self.tasks:
            self._ends.clear()  # who ended before max_gen_length is in it still
        if task in self._fresh:
            del self._fresh[task]
        else:
            self._phase[task.phase] -= 1
        if self.steps > task.joined:
            task.last_step = self.steps
        self.kv -= gen.start + gen.computed
        for context in task.chain:
            context.decoders -= 1
            if not context.decoders:
                self.kv_unique -= context.computed

    def known(self, task: Task) -> int:
        """Tokens of the task's output whose values are known."""
        last = self.steps if task.state == DECODING else task.last_step
        return task.known + max(0, min(self.done, last) - task.joined)

    def settle(self, task: Task) -> None:
        """Brings the task's output context up to date."""
        gen = task.gen
        assert gen is not None
        more = self.steps - task.settled
        if more:
            gen.computed += more
            gen.tokens += more
            task.settled = self.steps
        if task in self._fresh:
            return
        grown = self._room - task.roomed
        if grown:
            gen.size += grown
            task.roomed = self._room
            size = self._block_size
            owed = -(-(gen.start + gen.size) // size) - gen.start // size - len(gen.blocks)
            if owed:
                gen.add_blocks(self._contexts.pool.take_owed(owed))

    def settle_all(self) -> None:
        for task in self.tasks:
            self.settle(task)

    # -------------------------------------------------------------------------------------------------- iterations

    def make_room(self, most_held: int) -> bool:
        """Room for one more token of every task, retained contexts evicted for it where need be. False, and nothing is
        changed: there is none, or the tokens held would be more than `most_held`."""
        contexts, fresh = self._contexts, self._fresh
        growing = old = blocks = 0
        if self._room == self.steps:
            growing = len(self.tasks)
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
                if gen.copy_from is not None:
                    self._copying = (*self._copying, gen)
                task.roomed = self._room
                task.phase = (gen.start + gen.size - self._room) % self._block_size
                self._phase[task.phase] += 1
            fresh.clear()
        return True

    def step(self, copies: list[tuple[int, int]]) -> list[Task]:
        """One iteration, for which there is room, is issued; the copies that must precede it go to `copies`. Those whose last
        row it has, in the order in which they joined."""
        if self._copying:
            for gen in self._copying:
                if gen.copy_from is not None:
                    copies.append((gen.copy_from, gen.blocks[0]))
                    gen.copy_from = None
            self._copying = ()
        return self._step(1)

    def advance(self, count: int) -> list[Task]:
        """`count` iterations, at most `horizon`, are issued and as many complete."""
        if needed := self._blocks(count):
            self._contexts.owe(needed)
        self._room += count
        self._contexts.held_tokens += count * len(self.tasks)
        self._contexts.stored_tokens += count * len(self.tasks)
        self.done += count
        return self._step(count)

    def _step(self, count: int) -> list[Task]:
        self.steps += count
        self.kv += count * len(self.tasks)
        self.kv_unique += count * len(self.tasks)
        last: list[Task] = []
        ends = self._ends
        while ends and ends[0][0] <= self.steps:
            _, ticket, task = _pop(ends)
            if task.ticket == ticket and task in self.tasks:
                last.append(task)
        return last

    def horizon(self, most: int) -> int:
        """Of the next `most` iterations, how many can be issued before a task gets its last row or room runs out."""
        ends, tasks = self._ends, self.tasks
        while ends and (ends[0][2].ticket != ends[0][1] or ends[0][2] not in tasks):
            _pop(ends)
        if ends:
            most = min(most, ends[0][0] - self.steps)
        if most <= 0:
            return 0
        available = self._contexts.available
        if len(tasks) * -(-most // self._block_size) <= available:
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
        blocks = whole * len(self.tasks)
        if rest:
            place = -self._room % size  # the phases that take a block lie there and before, around the corner
            for _ in range(rest):
                blocks += phase[place]
                place = place - 1 if place else size - 1
        return blocks
