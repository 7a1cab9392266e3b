"""EngineCore: which tasks an engine computes in its next iteration, and where their KV lies. It decides and does nothing:
no clock, no token values, no tensors; the same code batches for a GPU and for a latency model.

The rules, in the order in which `next_batch` applies them:

1. Every decoding task gets room for one more token. When there is none, retained contexts are evicted, least recently
   used first; then the youngest task is preempted (its tokens so far become forced) once no batch is in flight.
2. Fills go first come, first served, in chunks, behind the decode rows, up to max_num_batched_tokens. A fill that may not
   be cut and does not fit beside the decode rows runs alone in its iteration.
3. A waiting task is admitted when its whole prompt has room and one more token of every task too. A task alone always is.
4. A context that two tasks need is computed by the first; the others wait for it, and take over when that one goes away.

With `pipeline_depth` batches issued ahead, rows are issued as if nothing had ended; `complete` discards surplus ones.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from functools import lru_cache
from operator import attrgetter
from typing import Final

from mypy_extensions import mypyc_attr

from parrot.engine.admission import Need, check_form, claim_output, found_of, given_links, need_of
from parrot.engine.batches import Batch, EngineLimits, EngineTask, Link, Progress, Refused, Row, Span
from parrot.engine.blocks import BlockPool, NumberedBlocks
from parrot.engine.contexts import NOBODY, Context, ContextTree
from parrot.engine.lockstep import Lockstep
from parrot.engine.running import DECODING, DRAINING, ENDED, FILLING, WAITING, Task, fill_row, ready_tokens

# By a name of this module's own that never changes: the compiled module need not look it up.
_ticket: Final = attrgetter("ticket")

__all__ = ["Batch", "EngineCore", "EngineLimits", "EngineTask", "Link", "Progress", "Refused", "Row", "Span"]


@mypyc_attr(acyclic=True)
class _Bounds:
    """What limits come to, read a dozen times an iteration."""

    __slots__ = ("batched", "chunk", "depth", "held", "running", "task_tokens", "tasks")

    def __init__(self, limits: EngineLimits) -> None:
        self.running = min(limits.max_batch_size, limits.max_num_batched_tokens)
        self.depth = limits.pipeline_depth
        self.held = limits.max_total_tokens
        self.batched = limits.max_num_batched_tokens
        self.chunk = limits.fill_chunk_size
        self.tasks = limits.tasks_capacity
        self.task_tokens = limits.largest_task


@lru_cache(maxsize=64)
def _bounds_of(limits: EngineLimits) -> _Bounds:
    """Engines with the same limits share them: of a thousand, none would find its own at hand."""
    return _Bounds(limits)


class EngineCore:
    """Contexts, blocks and the local scheduler of one engine. Times are the caller's; nothing here depends on them."""

    def __init__(self, limits: EngineLimits, numbered: bool = True) -> None:
        """numbered: whether blocks have numbers, which only an engine with memory behind them asks for."""
        self.limits = limits
        self.pool: BlockPool = (NumberedBlocks if numbered else BlockPool)(limits.num_blocks, limits.block_size)
        self._contexts = ContextTree(self.pool)
        self._lockstep = Lockstep(self._contexts)
        self._tasks: dict[Hashable, Task] = {}
        self._outputs: set[int] = set()
        self._waiting: list[Task] = []
        # What is empty most of the time is the empty tuple then, which all engines share: an edge looks at each of these, and
        # of a thousand engines none would find its own at hand.
        self._filling: tuple[Task, ...] = ()
        self._maxed: tuple[Task, ...] = ()  # tasks at max_gen_length; their last_step ends each
        self._joining: tuple[Task, ...] = ()  # decode from the batch after the one that is being made on
        self._lingering: tuple[Task, ...] = ()  # ended, while a batch in flight touches what they used
        self.in_flight: tuple[Batch, ...] = ()  #: issued and not complete, oldest first; to be read only
        self._bounds = _bounds_of(limits)
        self._arrivals = 0
        self._number = 0
        self._stuck = False  # the head of the queue has no room, and nothing was let go since that was found
        self._admitted: tuple[Task, ...] = ()
        self._preempted: tuple[Hashable, ...] = ()
        self._preempted_untold: tuple[Hashable, ...] = ()
        self.failed: tuple[tuple[Hashable, Refused], ...] = ()  #: for `take_failed`

    # ------------------------------------------------------------------------------------------------ what is told

    def submit(self, task: EngineTask, now: float) -> int:
        """Takes a task, which runs when there is room: the tokens of its prompt. Raises Refused: engine_rejected (no place
        in the queue), task_too_large, context_missing, conflict (a context or key is something else already), bad_request."""
        accepted = Task(task, task.max_gen_length)
        self.enter(accepted)
        return accepted.prompt

    def enter(self, task: Task) -> None:
        """As `submit`, for who keeps more of a task than the core does."""
        if task.key in self._tasks:
            raise Refused("conflict", f"task {task.key!r} is on this engine already")
        if len(self._tasks) >= self._bounds.tasks:
            raise Refused("engine_rejected", f"the engine has {len(self._tasks)} tasks; its tasks_capacity is no more")
        if task.parent_id is not None:
            before = given_links(task.parent_id, self._contexts)
            task.links, task.given = (*before, *task.links), len(before)
        for link in task.links:
            task.prompt += link.tokens
        check_form(task, self.limits, self._bounds.task_tokens)
        found_of(task.links, self._contexts)
        if task.output_id is not None:
            claim_output(task.output_id, task.links, self._outputs, self._contexts)
            self._outputs.add(task.output_id)
        self._arrivals += 1
        task.arrival = self._arrivals
        self._tasks[task.key] = task
        self._waiting.append(task)

    def abort(self, key: Hashable) -> bool:
        """Gives a task up; what it has filled stays. False: there is no such task."""
        task = self._tasks.get(key)
        if task is None:
            return False
        self._drop(task)
        return True

    def free_contexts(self, ids: Iterable[int]) -> int:
        """Nobody will ask for these again: tokens that they added. Unknown ids are ignored; those in use go later."""
        self._stuck = False
        return self._contexts.free(ids)

    def take_evicted(self) -> tuple[int, ...]:
        """Contexts that the engine gave up by itself since the last call."""
        return self._contexts.take_evicted()

    @property
    def has_evicted(self) -> bool:
        """Whether `take_evicted` has something to say."""
        return self._contexts.has_evicted

    def take_failed(self) -> tuple[tuple[Hashable, Refused], ...]:
        """Tasks that were accepted and then found impossible while they waited (their parent context was evicted)."""
        failed, self.failed = self.failed, ()
        return failed

    # ---------------------------------------------------------------------------------------------- what is asked

    @property
    def largest_task(self) -> int:
        """As `EngineLimits.largest_task`."""
        return self._bounds.task_tokens

    def task(self, key: Hashable) -> Task | None:
        """The core's own task, to be read only."""
        return self._tasks.get(key)

    @property
    def has_work(self) -> bool:
        return bool(self._tasks or self.in_flight)

    @property
    def can_issue(self) -> bool:
        """Whether `pipeline_depth` lets another batch be issued now."""
        return len(self.in_flight) <= self._bounds.depth

    @property
    def waits(self) -> bool:
        """Whether a task waits for room."""
        return bool(self._waiting)

    @property
    def num_total_tasks(self) -> int:
        return len(self._tasks)

    @property
    def num_running_tasks(self) -> int:
        return len(self._tasks) - len(self._waiting)

    @property
    def held_tokens(self) -> int:
        """KV tokens held by running tasks, shared ones once."""
        return self._contexts.held_tokens

    @property
    def cached_tokens(self) -> int:
        """KV tokens held by all contexts, retained ones too."""
        return self._contexts.stored_tokens

    @property
    def contexts(self) -> ContextTree:
        """The tree of contexts, all of them up to date; to be read only."""
        self._lockstep.settle_all()
        return self._contexts

    @property
    def decoded(self) -> int:
        """Decode iterations that are complete. They are numbered from 1, and every task that decodes has a row in each."""
        return self._lockstep.done

    def known(self, task: Task) -> int:
        """Tokens of the task's output that exist, forced ones included."""
        return self._lockstep.known(task)

    @property
    def limbo_blocks(self) -> int:
        """Blocks that no context holds any more, and that are not free before a batch in flight is complete."""
        return sum(task.limbo for task in self._lingering)

    def block_table(self, context_id: int) -> list[int]:
        """The numbers of the blocks of a chain's tokens, from its head to the end of this context. KeyError: the engine has no
        such context."""
        table: list[int] = []
        for context in self._context(context_id).path():
            if context.blocks:
                table[context.start // self.limits.block_size :] = context.blocks
        return table

    def spans(self, context_id: int) -> list[Span]:
        """Which context each position of a chain belongs to, root first. KeyError: the engine has no such context."""
        return [Span(c.id, c.start, c.end) for c in self._context(context_id).path()]

    def _context(self, context_id: int) -> Context:
        context = self._contexts.get(context_id)
        if context is None:
            raise KeyError(f"context {context_id} is not on this engine")
        if context.generating:
            task = self._tasks.get(context.task)
            if task is not None and task.state == DECODING and task.gen is context:
                self._lockstep.settle(task)
        return context

    # ------------------------------------------------------------------------------------------------- iterations

    def next_batch(self, now: float) -> Batch | None:
        """What to compute next; None when there is nothing, or pipeline_depth forbids to issue before a completion."""
        if len(self.in_flight) > self._bounds.depth or not self._make_decode_room():
            return None
        number = self._number + 1
        lockstep = self._lockstep
        decoders = lockstep.members
        kv, kv_unique = lockstep.kv + len(decoders), lockstep.kv_unique + len(decoders)
        copies: list[tuple[int, int]] = []
        fills: tuple[Row, ...] = ()
        if self._filling or (self._waiting and not self._stuck):
            fills, alone = self._fill_rows(number, copies)
            if alone:
                decoders, kv, kv_unique = (), 0, 0
        if decoders:
            for task in lockstep.step(copies):
                self._drain(task)
        elif not fills:
            return None
        if self._joining:
            lockstep.join(self._joining)
            self._joining = ()
        for row in fills:
            row.task.in_flight += 1
        step = lockstep.steps if decoders else 0
        batch = Batch(number, step, decoders, fills, tuple(copies) if copies else (), kv, kv_unique)
        self._number = number
        if self._admitted:
            batch.begun, self._admitted = self._admitted, ()
        if self._preempted:
            batch.preempted, self._preempted = self._preempted, ()
            self._preempted_untold += batch.preempted
        self.in_flight = (*self.in_flight, batch)
        return batch

    def complete(self, batch: Batch, ended: Mapping[Hashable, int], now: float) -> Progress:
        """The oldest batch in flight was computed. `ended`: task -> tokens of its output that are kept, forced ones included.
        A task with max_gen_length tokens ends without being named. Raises ValueError for another batch."""
        named: dict[Task, int] = {}
        for key, kept in ended.items():
            if (task := self._tasks.get(key)) is not None:
                named[task] = kept
        return self.complete_tasks(batch, named)

    def complete_tasks(self, batch: Batch, ended: dict[Task, int]) -> Progress:
        """As `complete`, for who has the core's own tasks."""
        self._pop(batch)
        begun: list[Task] = []
        finished: list[Task] = []
        if batch.decoders:
            self._lockstep.done += 1
        filling: list[Task] = []
        for row in batch.fills:
            task = row.task
            task.in_flight -= 1
            if row.samples and task.state != ENDED:
                filling.append(task)
                task.known += 1
                if not task.first_token:
                    task.first_token = True
                    begun.append(task)
        for task, kept in ended.items():
            if task.state != ENDED and task not in filling:
                self._end(task, kept)
                finished.append(task)
        while self._maxed and self._maxed[0].last_step <= self._lockstep.done:
            task, self._maxed = self._maxed[0], self._maxed[1:]
            if task.state == DRAINING:
                self._end(task, task.max_gen)
                finished.append(task)
        for row in batch.fills:
            task = row.task
            if task.state == ENDED:
                continue
            if row.samples:
                if task in ended or task.known >= task.max_gen:
                    self._end(task, ended.get(task, task.known))
                    finished.append(task)
            elif task.gen is None and row.stop == task.target:
                self._end(task, 0)
                finished.append(task)
        self._sweep()
        preempted, self._preempted_untold = self._preempted_untold, ()
        return Progress(tuple(begun), tuple(finished), preempted)

    def fail(self, batch: Batch) -> tuple[Hashable, ...]:
        """The oldest batch in flight could not be computed: what it and those issued after it should have filled is not
        there, and all their tasks are given up. Their keys. Later batches are still to be completed."""
        issued = self.in_flight
        self._pop(batch)
        if batch.decoders:
            self._lockstep.done += 1
        for row in batch.fills:
            row.task.in_flight -= 1
        lost = [t for t in dict.fromkeys(t for b in issued for t in b.tasks) if t.state != ENDED]
        for task in lost:
            self._leave(task)
        starts: dict[Task, int] = {}
        for unfilled in issued:
            for row in unfilled.rows:
                starts.setdefault(row.task, row.start)
        for task, start in starts.items():
            for context in task.chain:
                if context.filled_in >= batch.number:
                    context.computed = min(context.computed, max(0, start - context.start))
        for task in self._filling:
            task.cursor = 0
        for task in lost:
            self._drop(task)
        self._sweep()
        return tuple(task.key for task in lost)

    # ------------------------------------------------------------------------------- the simulator's: many at once

    def next_end(self) -> int:
        """The next decode iteration that brings a task the last of the tokens that are expected of it; 0: none decodes."""
        end = self._lockstep.next_end()
        for task in self._maxed:
            if task.state == DRAINING and (not end or task.ends < end):
                end = task.ends
        return end

    def ending(self, step: int) -> list[Task]:
        """The tasks whose last expected token decode iteration `step` brings, in the order in which they began to decode."""
        found = self._lockstep.ending(step)
        if self._maxed:
            found += [task for task in self._maxed if task.state == DRAINING and task.joined < task.ends <= step]
            found.sort(key=_ticket)
        return found

    def decode_horizon(self, remaining: int) -> int:
        """For how many iterations, from the oldest batch in flight on, only the same tasks decode: at least 1, and in all
        but the last nothing can end, be admitted or be preempted. `remaining`: tokens still to be sampled by that of them
        which ends first, that batch's included."""
        lockstep = self._lockstep
        rows = len(lockstep.members)
        if len(self.in_flight) <= self._bounds.depth or self._filling or (self._waiting and not self._stuck) or not rows:
            return 1
        members = lockstep.members
        for issued in self.in_flight:
            if issued.decoders is not members or issued.fills:
                return 1
        steps = min(remaining - 1, (self._bounds.held - self._contexts.held_tokens) // rows)
        return 1 + lockstep.horizon(steps) if steps > 0 else 1

    def advance(self, k: int) -> None:
        """Applies `k` < decode_horizon completions in which nothing ended, each with the batch issued after it."""
        self._number += k
        for task in self._lockstep.advance(k):
            self._drain(task)
        for issued in self.in_flight:
            issued.shift(k)

    # ------------------------------------------------------------------------------------------------ decode rows

    def _make_decode_room(self) -> bool:
        """Room for one more token of every decoding task. False: there is none before a batch in flight is complete."""
        while not self._lockstep.make_room(self._bounds.held):
            if self.in_flight:
                return False
            alone = self._running == 1
            self._preempt(max((*self._filling, *self._lockstep.members), key=lambda task: task.arrival))
            if alone:  # what it holds is split by copies that it would not need had it come first: it begins anew
                self._evict_all()
        return True

    def _evict_all(self) -> None:
        while self._contexts.evict_one():
            pass

    def _drain(self, task: Task) -> None:
        """The row that brings the task to max_gen_length is issued."""
        self._leave(task)
        self._maxed = (*self._maxed, task)

    def _preempt(self, task: Task) -> None:
        """Takes a task's room away; no batch in flight has a row of it. What it has generated becomes forced."""
        if task.gen is not None:
            if task.state == DECODING:
                task.known = self._lockstep.known(task)
            task.forced = task.known
        self._leave(task)
        if task.gen is not None:
            task.gen.tokens = task.known
        task.links = tuple([Link(context.id, context.tokens) for context in task.chain if context is not task.gen])
        self._contexts.release(task.chain)
        task.chain = ()
        task.cursor = 0
        task.state = WAITING
        task.last_step = 0
        self._waiting.insert(0, task)
        self._preempted = (*self._preempted, task.key)
        self._stuck = False

    # ------------------------------------------------------------------------------------------- fills, admission

    def _fill_rows(self, number: int, copies: list[tuple[int, int]]) -> tuple[tuple[Row, ...], bool]:
        """The fills of this iteration, running ones first, then newly admitted ones, and whether one runs alone."""
        left = self._bounds.batched - len(self._lockstep.members)
        running, place = self._filling, 0
        fills: list[Row] = []
        while True:
            if place < len(running):
                task = running[place]
                place += 1
            elif (admitted := self._admit_next(left, len(fills))) is not None:
                task = admitted
            else:
                break
            ready = ready_tokens(task, number)
            if not ready:
                continue
            chunk = self._chunk(ready, left, alone=not fills)
            if not chunk:
                break
            fills.append(self._fill(task, chunk, number, copies))
            left -= chunk
            if left <= 0:
                break
        return tuple(fills), left < 0

    def _admit_next(self, left: int, fills: int) -> Task | None:
        """The first of the waiting tasks, admitted to this iteration, which has so many fills and room for `left` more tokens.
        None: nobody waits, or who comes next must go on waiting."""
        rows = len(self._lockstep.members)
        while self._waiting and rows + fills < self._bounds.running:
            if self._stuck or self._running >= self._bounds.running:
                self._stuck = True
                return None
            task = self._waiting[0]
            try:
                need = need_of(task, self._contexts)
            except Refused as refusal:
                self._drop(task)
                self.failed = (*self.failed, (task.key, refusal))
                continue
            if fills and self._chunk(task.target - need.start, left, False) == 0:
                return None
            if fills or self._filling or rows or self._joining or self.in_flight:
                if not self._has_room(need):
                    self._stuck = True
                    return None
            elif need.blocks > self._contexts.available - need.reclaimed:  # what it would share is split by copies
                self._evict_all()
                continue
            self._admit(task, need)
            return task
        return None

    @property
    def _running(self) -> int:
        """Tasks that fill or decode."""
        return len(self._filling) + len(self._lockstep.members) + len(self._joining)

    def _chunk(self, ready: int, budget: int, alone: bool) -> int:
        """How much of a fill of `ready` tokens is computed; more than `budget` means that it runs alone, where it may."""
        if self._bounds.chunk > 0:
            chunk = self._bounds.chunk if self._bounds.chunk < ready else ready
            return chunk if chunk < budget else budget
        return ready if ready <= budget or alone else 0

    def _fill(self, task: Task, chunk: int, number: int, copies: list[tuple[int, int]]) -> Row:
        row = fill_row(task, chunk, number, copies)
        if row.stop == task.target:
            self._leave(task)
            if row.samples:
                self._sampled_first(task)
        return row

    def _sampled_first(self, task: Task) -> None:
        """The prompt is computed: from the next batch on the task decodes, if it may generate more than one token."""
        gen = task.gen
        assert gen is not None
        gen.tokens += 1
        if gen.tokens < task.max_gen:
            self._joining = (*self._joining, task)

    def _has_room(self, need: Need) -> bool:
        """Room for a task beside others, and for one more token of each: nothing is admitted to be preempted at once."""
        spare = self._running + 1
        return (
            need.blocks + spare <= self._contexts.available - need.reclaimed
            and self._contexts.held_tokens + need.tokens + spare <= self._bounds.held
        )

    def _admit(self, task: Task, need: Need) -> None:
        contexts = self._contexts
        del self._waiting[0]
        chain = need.found
        parent = chain[-1] if chain else None
        for place in range(len(chain), len(task.links)):
            link = task.links[place]
            parent = contexts.create(link.context_id, parent, link.tokens)
            chain.append(parent)
        if task.output_id is not None:
            if need.gen is None:
                task.gen = contexts.create(task.output_id, parent, task.forced)
                task.gen.task = task.key
            assert task.gen is not None
            chain.append(task.gen)
        contexts.use(chain)
        for context in chain:
            contexts.grow(context, context.tokens)
        task.chain, task.links = tuple(chain), ()
        task.state = FILLING
        self._filling = (*self._filling, task)
        if not task.admitted:
            task.admitted = True
            task.cached = min(need.start, task.prompt - 1)
            self._admitted = (*self._admitted, task)

    # ------------------------------------------------------------------------------------------------------- ends

    def _pop(self, batch: Batch) -> None:
        if not self.in_flight or self.in_flight[0].number != batch.number:
            oldest = self.in_flight[0].number if self.in_flight else None
            raise ValueError(f"batch {batch.number} is not the oldest in flight, which is {oldest}")
        self.in_flight = self.in_flight[1:]

    def _leave(self, task: Task) -> None:
        """The task is issued no more rows: it drains."""
        if task.state == DECODING:
            self._lockstep.leave(task)
        elif task.state == FILLING:
            self._filling = tuple([other for other in self._filling if other is not task])
            for context in task.chain:
                if context.filler == task.arrival:
                    context.filler = NOBODY
        task.state = DRAINING
        self._stuck = False

    def _end(self, task: Task, kept: int) -> None:
        """The task is done; its output context is cut to `kept` tokens and stays."""
        known = self._lockstep.known(task)
        if not 0 <= kept <= known:
            raise ValueError(f"task {task.key!r} ended with {kept} tokens kept of {known}")
        self._leave(task)
        gen = task.gen
        if gen is not None:
            gen.tokens = kept
            gen.computed = min(gen.computed, kept)
            gen.task = None
            owned = gen.owned
            task.limbo_blocks = self._contexts.shrink(gen, kept)
            task.limbo = owned - gen.owned
        self._forget(task)

    def _drop(self, task: Task) -> None:
        """The task is given up, and its output with it."""
        waits = task.state == WAITING
        if waits:
            self._waiting.remove(task)
        else:
            self._leave(task)
        if task.gen is not None and self._contexts.get(task.gen.id) is task.gen:
            if waits:
                self._contexts.free((task.gen.id,))
            self._contexts.forget_id(task.gen)
        self._forget(task)

    def _forget(self, task: Task) -> None:
        """The task has ended: what it used is let go when no batch in flight touches it."""
        task.state = ENDED
        del self._tasks[task.key]
        if task.output_id is not None:
            self._outputs.discard(task.output_id)
        if not self._let_go(task):
            self._lingering = (*self._lingering, task)

    def _sweep(self) -> None:
        """A batch is complete: perhaps the last that touches what ended tasks used."""
        if self._lingering:
            self._lingering = tuple([task for task in self._lingering if not self._let_go(task)])

    def _let_go(self, task: Task) -> bool:
        """Lets go of what an ended task used. False: a batch in flight touches it."""
        if task.in_flight or task.last_step > self._lockstep.done:
            return False
        self._contexts.release(task.chain)
        if task.limbo:
            self.pool.give(task.limbo, task.limbo_blocks)
        task.chain = ()
        self._stuck = False
        return True
