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
What tasks hold, and what becomes of it, is kept by `EngineState`; what an iteration does to all that decode, by `Lockstep`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from parrot.engine.admission import Need, need_of
from parrot.engine.batches import Batch, EngineLimits, EngineTask, Link, Progress, Refused, Row, Span
from parrot.engine.running import ENDED, Task, fill_row, ready_tokens
from parrot.engine.state import EngineState

__all__ = ["Batch", "EngineCore", "EngineLimits", "EngineTask", "Link", "Progress", "Refused", "Row", "Span"]


class EngineCore(EngineState):
    """The local scheduler of one engine, with its contexts and blocks. Times are the caller's; nothing here depends on them."""

    def __init__(self, limits: EngineLimits, numbered: bool = True) -> None:
        """As EngineState."""
        super().__init__(limits, numbered)
        self.oldest: Batch | None = None  #: of the batches that are issued and not complete; to be read only
        self._later: tuple[Batch, ...] = ()  # the others of these
        self._number = 0  # of the last batch
        self._joining: tuple[Task, ...] = ()  # decode from the batch after the one that is being made on
        # To be told: by the next batch, and by the next completion.
        self._admitted: tuple[Task, ...] = ()
        self._preempted: tuple[Hashable, ...] = ()
        self._preempted_untold: tuple[Hashable, ...] = ()
        self.failed: tuple[tuple[Hashable, Refused], ...] = ()  #: for `take_failed`

    # ----------------------------------------------------------------------------------------- an iteration is issued

    def next_batch(self, now: float) -> Batch | None:
        """What to compute next; None when there is nothing, or pipeline_depth forbids to issue before a completion."""
        if not self.can_issue or not self._make_decode_room():
            return None
        number = self._number + 1
        copies: list[tuple[int, int]] = []
        fills: tuple[Row, ...] = ()
        alone = False
        if self._may_fill:
            fills, alone = self._fill_rows(number, copies)
        if self._lockstep.rows and not alone:
            batch = self._decode(number, fills, copies)
        elif fills:
            batch = Batch(number, 0, 0, (), fills, tuple(copies), 0, 0)
        else:
            return None
        if self._joining:
            self._lockstep.join(self._joining)
            self._joining = ()
        self._issue(batch)
        return batch

    def _make_decode_room(self) -> bool:
        """Rule 1: room for one more token of every decoding task. False: there is none before a batch in flight is complete."""
        while not self._lockstep.make_room(self._bounds.held):
            if self.oldest is not None:
                return False
            alone = self._running == 1
            youngest = max((*self._filling, *self._lockstep.members), key=lambda task: task.arrival)
            self._preempt(youngest)
            self._preempted = (*self._preempted, youngest.key)
            if alone:  # what it holds is split by copies that it would not need had it come first: it begins anew
                self._evict_all()
        return True

    def _decode(self, number: int, fills: tuple[Row, ...], copies: list[tuple[int, int]]) -> Batch:
        """The next token of every decoding task, and the fills beside them."""
        lockstep = self._lockstep
        rows, decoders = lockstep.rows, lockstep.members
        kv, kv_unique = lockstep.kv + rows, lockstep.kv_unique + rows
        if lockstep.step(copies):
            self._stuck = False
        return Batch(number, lockstep.steps, rows, decoders, fills, tuple(copies) if copies else (), kv, kv_unique)

    def _fill_rows(self, number: int, copies: list[tuple[int, int]]) -> tuple[tuple[Row, ...], bool]:
        """Rule 2: the fills of this iteration, running ones first, then newly admitted ones, and whether one runs alone."""
        left = self._bounds.batched - self._lockstep.rows
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
            if not ready:  # rule 4
                continue
            chunk = self._chunk(ready, left, alone=not fills)
            if not chunk:
                break
            fills.append(self._fill(task, chunk, number, copies))
            left -= chunk
            if left <= 0:
                break
        return tuple(fills), left < 0

    def _chunk(self, ready: int, budget: int, alone: bool) -> int:
        """How much of a fill of `ready` tokens is computed; more than `budget` means that it runs alone, where it may."""
        if self._bounds.chunk > 0:
            chunk = self._bounds.chunk if self._bounds.chunk < ready else ready
            return chunk if chunk < budget else budget
        return ready if ready <= budget or alone else 0

    def _fill(self, task: Task, chunk: int, number: int, copies: list[tuple[int, int]]) -> Row:
        """The next `chunk` tokens of a fill. When they are its last, the task decodes from the next batch on, if it may
        generate more than the one token that they bring."""
        row = fill_row(task, chunk, number, copies)
        if row.stop == task.target:
            self._leave(task)
            if row.samples:
                gen = task.gen
                assert gen is not None
                gen.tokens += 1
                if gen.tokens < task.max_gen:
                    self._joining = (*self._joining, task)
        return row

    def _admit_next(self, left: int, fills: int) -> Task | None:
        """Rule 3: the first of the waiting tasks, admitted to this iteration, which has so many fills and room for `left` more
        tokens. None: nobody waits, or who comes next must go on waiting."""
        while self._waiting is not None and self._lockstep.rows + fills < self._bounds.running:
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
            if fills or self._running or self.oldest is not None:
                if not self._has_room(need):
                    self._stuck = True
                    return None
            elif need.blocks > self._contexts.available - need.reclaimed:  # what it would share is split by copies
                self._evict_all()
                continue
            self._admit(task, need)
            if not task.admitted:
                task.admitted = True
                task.cached = min(need.start, task.prompt - 1)
                self._admitted = (*self._admitted, task)
            return task
        return None

    def _has_room(self, need: Need) -> bool:
        """Room for a task beside others, and for one more token of each: nothing is admitted to be preempted at once."""
        spare = self._running + 1
        return (
            need.blocks + spare <= self._contexts.available - need.reclaimed
            and self._contexts.held_tokens + need.tokens + spare <= self._bounds.held
        )

    def _evict_all(self) -> None:
        while self._contexts.evict_one():
            pass

    @property
    def _may_fill(self) -> bool:
        return bool(self._filling) or (self._waiting is not None and not self._stuck)

    @property
    def _running(self) -> int:
        """Tasks that fill or decode."""
        return len(self._filling) + self._lockstep.rows + len(self._joining)

    # --------------------------------------------------------------------------------------- an iteration is complete

    def complete(self, batch: Batch, ended: Mapping[Hashable, int], now: float) -> Progress:
        """The oldest batch in flight was computed. `ended`: task -> tokens of its output that are kept, forced ones included.
        A task with max_gen_length tokens ends without being named. Raises ValueError for another batch."""
        named: dict[Task, int] = {}
        for key, kept in ended.items():
            if (task := self._tasks.get(key)) is not None:
                named[task] = kept
        return self.complete_tasks(batch, named)

    def complete_tasks(self, batch: Batch, ended: dict[Task, int]) -> Progress:
        """As `complete`, for who has the core's own tasks. Those that decoded end first, then those at their max_gen_length,
        then those whose fills were computed."""
        self._retire(batch)
        begun: list[Task] = []
        sampled: list[Task] = []
        for row in batch.fills:
            task = row.task
            if row.samples and task.state != ENDED:
                sampled.append(task)
                task.known += 1
                if not task.first_token:
                    task.first_token = True
                    begun.append(task)
        finished: list[Task] = []
        for task, kept in ended.items():
            if task.state != ENDED and task not in sampled:
                self._end(task, kept)
                finished.append(task)
        for task in self._lockstep.take_drained():
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
        issued = (batch, *self._later)
        self._retire(batch)
        lost = [t for t in dict.fromkeys(t for b in issued for t in b.tasks) if t.state != ENDED]
        for task in lost:
            self._leave(task)
        self._unfill(issued)
        for task in lost:
            self._drop(task)
        self._sweep()
        return tuple(task.key for task in lost)

    def _unfill(self, batches: tuple[Batch, ...]) -> None:
        """What these batches, all that were issued from the first of them on, should have filled is to be computed again."""
        starts: dict[Task, int] = {}
        for batch in batches:
            for row in batch.rows:
                starts.setdefault(row.task, row.start)
        for task, start in starts.items():
            for context in task.deepest.path() if task.deepest is not None else ():
                if context.filled_in >= batches[0].number:
                    context.computed = min(context.computed, max(0, start - context.start))
        for task in self._filling:
            task.cursor = 0

    def take_failed(self) -> tuple[tuple[Hashable, Refused], ...]:
        """Tasks that were accepted and then found impossible while they waited (their parent context was evicted)."""
        failed, self.failed = self.failed, ()
        return failed

    # ---------------------------------------------------------------------------------------------- batches in flight

    @property
    def has_work(self) -> bool:
        return bool(self._tasks) or self.oldest is not None

    @property
    def can_issue(self) -> bool:
        """Whether `pipeline_depth` lets another batch be issued now."""
        return self.oldest is None or len(self._later) < self._bounds.depth

    def _issue(self, batch: Batch) -> None:
        """The batch is in flight, behind all others. It tells who was admitted and preempted for it."""
        self._number = batch.number
        for row in batch.fills:
            row.task.in_flight += 1
        if self._admitted:
            batch.begun, self._admitted = self._admitted, ()
        if self._preempted:
            batch.preempted, self._preempted = self._preempted, ()
            self._preempted_untold += batch.preempted
        if self.oldest is None:
            self.oldest = batch
        else:
            self._later = (*self._later, batch)

    def _retire(self, batch: Batch) -> None:
        """The oldest batch is in flight no more. Raises ValueError for another one."""
        if self.oldest is None or self.oldest.number != batch.number:
            oldest = self.oldest.number if self.oldest is not None else None
            raise ValueError(f"batch {batch.number} is not the oldest in flight, which is {oldest}")
        if self._later:
            self.oldest, self._later = self._later[0], self._later[1:]
        else:
            self.oldest = None
        if batch.step:
            self._lockstep.done += 1
        for row in batch.fills:
            row.task.in_flight -= 1

    # ----------------------------------------------------------------------- the simulator's: many iterations at once

    def next_end(self) -> int:
        """The next decode iteration that brings a task the last of the tokens that are expected of it; 0: none decodes."""
        return self._lockstep.next_end()

    def ending(self, step: int) -> list[Task]:
        """The tasks whose last expected token decode iteration `step` brings, in the order in which they began to decode."""
        return self._lockstep.ending(step)

    def decode_horizon(self, remaining: int) -> int:
        """For how many iterations, from the oldest batch in flight on, only the same tasks decode: at least 1, and in all
        but the last nothing can end, be admitted or be preempted. `remaining`: tokens still to be sampled by that of them
        which ends first, that batch's included."""
        lockstep = self._lockstep
        rows, members, oldest = lockstep.rows, lockstep.members, self.oldest
        if oldest is None or self.can_issue or self._may_fill or not rows:
            return 1
        if oldest.decoders is not members or oldest.fills:
            return 1
        for issued in self._later:
            if issued.decoders is not members or issued.fills:
                return 1
        steps = min(remaining - 1, (self._bounds.held - self._contexts.held_tokens) // rows)
        return 1 + lockstep.horizon(steps) if steps > 0 else 1

    def advance(self, k: int) -> None:
        """Applies `k` < decode_horizon completions in which nothing ended, each with the batch issued after it."""
        self._number += k
        if self._lockstep.advance(k):
            self._stuck = False
        if self.oldest is not None:
            self.oldest.shift(k)
        for issued in self._later:
            issued.shift(k)
