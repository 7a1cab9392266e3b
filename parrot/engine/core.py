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

from array import array
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping

from parrot.engine.admission import Need, check_form, claim_output, found_of, given_links, need_of
from parrot.engine.batches import Batch, EngineLimits, EngineTask, Link, Progress, Refused, Row, Span
from parrot.engine.blocks import BlockPool
from parrot.engine.contexts import Context, ContextTree
from parrot.engine.running import State, Task, fill_row, ready_tokens, shifted
from parrot.latency import BatchShape

__all__ = ["Batch", "EngineCore", "EngineLimits", "EngineTask", "Link", "Progress", "Refused", "Row", "Span"]


class EngineCore:
    """Contexts, blocks and the local scheduler of one engine. Times are the caller's; nothing here depends on them."""

    def __init__(self, limits: EngineLimits) -> None:
        self.limits = limits
        self.pool = BlockPool(limits.num_blocks, limits.block_size)
        self.contexts = ContextTree(self.pool)
        self._tasks: dict[Hashable, Task] = {}
        self._outputs: set[int] = set()
        self._waiting: deque[Task] = deque()
        self._filling: dict[Task, None] = {}
        self._decoding: dict[Task, None] = {}
        self._in_flight: deque[tuple[Batch, list[Task]]] = deque()
        self._running_most = min(limits.max_batch_size, limits.max_num_batched_tokens)
        self._arrivals = 0
        self._number = 0
        self._stuck = False  # the head of the queue has no room, and nothing was let go since that was found
        self._decode_kv = 0  # KV tokens of the decoding tasks
        self._decode_kv_unique = 0
        self._admitted: list[tuple[Hashable, int]] = []
        self._preempted: list[Hashable] = []
        self._preempted_untold: list[Hashable] = []
        self._failed: list[tuple[Hashable, Refused]] = []

    # ------------------------------------------------------------------------------------------------ what is told

    def submit(self, task: EngineTask, now: float) -> int:
        """Takes a task, which runs when there is room: the tokens of its prompt. Raises Refused: engine_rejected (no place
        in the queue), task_too_large, context_missing, conflict (a context or key is something else already), bad_request."""
        if task.key in self._tasks:
            raise Refused("conflict", f"task {task.key!r} is on this engine already")
        if len(self._tasks) >= self.limits.tasks_capacity:
            raise Refused("engine_rejected", f"the engine has {len(self._tasks)} tasks; its tasks_capacity is no more")
        before = given_links(task.parent_context_id, self.contexts)
        links = (*before, *task.links)
        prompt = sum(link.tokens for link in links)
        check_form(task, links, prompt, self.limits)
        found_of(links, self.contexts)
        output_id = task.generate_context_id
        if output_id is not None:
            claim_output(output_id, links, self._outputs, self.contexts)
            self._outputs.add(output_id)
        self._arrivals += 1
        accepted = Task(task, links, len(before), prompt, self._arrivals)
        self._tasks[task.key] = accepted
        self._waiting.append(accepted)
        return prompt

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
        return self.contexts.free(ids)

    def take_evicted(self) -> tuple[int, ...]:
        """Contexts that the engine gave up by itself since the last call."""
        return self.contexts.take_evicted()

    def take_failed(self) -> tuple[tuple[Hashable, Refused], ...]:
        """Tasks that were accepted and then found impossible while they waited (their parent context was evicted)."""
        failed = tuple(self._failed)
        self._failed.clear()
        return failed

    # ---------------------------------------------------------------------------------------------- what is asked

    @property
    def has_work(self) -> bool:
        return bool(self._tasks or self._in_flight)

    @property
    def num_total_tasks(self) -> int:
        return len(self._tasks)

    @property
    def num_running_tasks(self) -> int:
        return len(self._tasks) - len(self._waiting)

    @property
    def held_tokens(self) -> int:
        """KV tokens held by running tasks, shared ones once."""
        return self.contexts.held_tokens

    @property
    def cached_tokens(self) -> int:
        """KV tokens held by all contexts, retained ones too."""
        return self.contexts.stored_tokens

    @property
    def in_flight(self) -> tuple[Batch, ...]:
        """The batches issued and not complete, oldest first."""
        return tuple(batch for batch, _ in self._in_flight)

    @property
    def limbo_blocks(self) -> int:
        """Blocks that no context holds any more, and that are not free before a batch in flight is complete."""
        return sum(len(task.limbo) for task in dict.fromkeys(task for _, tasks in self._in_flight for task in tasks))

    def block_table(self, context_id: int) -> list[int]:
        """The blocks of a chain's tokens from its head to the end of this context. KeyError: the engine has no such context."""
        table: list[int] = []
        for context in self._context(context_id).path():
            if context.blocks:
                table[context.start // self.limits.block_size :] = context.blocks
        return table

    def spans(self, context_id: int) -> list[Span]:
        """Which context each position of a chain belongs to, root first. KeyError: the engine has no such context."""
        return [Span(c.id, c.start, c.end) for c in self._context(context_id).path()]

    def _context(self, context_id: int) -> Context:
        context = self.contexts.get(context_id)
        if context is None:
            raise KeyError(f"context {context_id} is not on this engine")
        return context

    # ------------------------------------------------------------------------------------------------- iterations

    def next_batch(self, now: float) -> Batch | None:
        """What to compute next; None when there is nothing, or pipeline_depth forbids to issue before a completion."""
        if len(self._in_flight) > self.limits.pipeline_depth or not self._make_decode_room():
            return None
        number = self._number + 1
        decoders = list(self._decoding)
        kv = self._decode_kv + len(decoders), self._decode_kv_unique + len(decoders)
        copies: list[tuple[int, int]] = []
        fills, alone = self._fill_rows(number, copies)
        if alone:
            decoders, kv = [], (0, 0)
        if not decoders and not fills:
            return None
        rows = [self._decode_row(task, copies) for task in decoders]
        rows += [row for _, row in fills]
        shape = BatchShape(len(decoders), len(fills), sum(row.stop - row.start for _, row in fills),
                           sum((row.stop - row.start) * (row.stop + row.start + 1) // 2 for _, row in fills), *kv)  # fmt: skip
        batch = Batch(number, tuple(rows), tuple(copies), tuple(self._admitted), tuple(self._preempted), shape)
        self._number = number
        self._admitted.clear()
        self._preempted_untold += self._preempted
        self._preempted.clear()
        tasks = decoders + [task for task, _ in fills]
        for task in tasks:
            task.in_flight += 1
        self._in_flight.append((batch, tasks))
        return batch

    def complete(self, batch: Batch, ended: Mapping[Hashable, int], now: float) -> Progress:
        """The oldest batch in flight was computed. `ended`: task -> tokens of its output that are kept, forced ones included.
        A task with max_gen_length tokens ends without being named. Raises ValueError for another batch."""
        tasks = self._pop(batch)
        first_tokens: list[Hashable] = []
        finished: list[Hashable] = []
        for row, task in zip(batch.rows, tasks, strict=True):
            task.in_flight -= 1
            if task.state is State.ENDED:
                if not task.in_flight:
                    self._let_go(task)
            elif row.samples:
                task.known += 1
                if not task.first_token:
                    task.first_token = True
                    first_tokens.append(task.key)
                if task.key in ended or task.known >= task.max_gen:
                    self._end(task, ended.get(task.key, task.known))
                    finished.append(task.key)
            elif task.gen is None and row.stop == task.target:
                self._end(task, 0)
                finished.append(task.key)
        preempted = tuple(self._preempted_untold)
        self._preempted_untold.clear()
        return Progress(tuple(first_tokens), tuple(finished), preempted)

    def fail(self, batch: Batch) -> tuple[Hashable, ...]:
        """The oldest batch in flight could not be computed: what it and those issued after it should have filled is not
        there, and all their tasks are given up. Their keys. Later batches are still to be completed."""
        later = [task for _, tasks in self._in_flight for task in tasks]
        tasks = self._pop(batch)
        for task in tasks:
            task.in_flight -= 1
        lost = [task for task in dict.fromkeys(later) if task.state is not State.ENDED]
        for task in lost:
            self._leave(task)
        starts = {task: row.start for row, task in zip(batch.rows, tasks, strict=True)}
        for issued, issued_tasks in self._in_flight:
            for row, task in zip(issued.rows, issued_tasks, strict=True):
                starts.setdefault(task, row.start)
        for task, start in starts.items():
            for context in task.chain:
                if context.filled_in >= batch.number:
                    context.computed = min(context.computed, max(0, start - context.start))
        for task in self._filling:
            task.cursor = 0
        for task in lost:
            self._drop(task)
        for task in tasks:
            if task.state is State.ENDED and not task.in_flight and task.chain:
                self._let_go(task)
        return tuple(task.key for task in lost)

    # ------------------------------------------------------------------------------- the simulator's: many at once

    def decode_horizon(self, batch: Batch, remaining: Mapping[Hashable, int]) -> int:
        """For how many iterations, from the oldest batch in flight on, only the same tasks decode: at least 1, and in all
        but the last nothing can end, be admitted or be preempted. `remaining`: task -> tokens still to be sampled, that
        batch's included."""
        limits = self.limits
        rows = len(self._decoding)
        if len(self._in_flight) <= limits.pipeline_depth or self._filling or (self._waiting and not self._stuck) or not rows:
            return 1
        decoding = list(self._decoding)
        if any(tasks != decoding or issued.shape.prefill_rows for issued, tasks in self._in_flight):
            return 1
        steps = min(min(remaining[task.key] - 1, task.max_gen - task.gen.tokens) for task in decoding)  # type: ignore[union-attr]
        steps = min(steps, (limits.max_total_tokens - self.contexts.held_tokens) // rows)
        if steps <= 0:
            return 1
        return 1 + self.contexts.steps_with_room([task.gen for task in decoding if task.gen is not None], steps)

    def advance(self, batch: Batch, k: int) -> Batch:
        """Applies `k` < decode_horizon completions in which nothing ended, each with the batch issued after it. The batch
        that is the oldest in flight then."""
        if k < 1:
            return batch
        tasks = self._in_flight[0][1]
        self._number += k
        self._decode_kv += k * len(tasks)
        self._decode_kv_unique += k * len(tasks)
        self.contexts.extend([task.gen for task in tasks if task.gen is not None], k)
        for task in tasks:
            gen = task.gen
            assert gen is not None, "a decoding task has an output"
            gen.computed += k
            gen.tokens += k
            task.known += k
            if gen.tokens >= task.max_gen:
                self._leave(task)
        self._in_flight = deque([(shifted(issued, k), issued_tasks) for issued, issued_tasks in self._in_flight])
        return self._in_flight[0][0]

    # ------------------------------------------------------------------------------------------------ decode rows

    def _make_decode_room(self) -> bool:
        """Room for one more token of every decoding task. False: there is none before a batch in flight is complete."""
        contexts = self.contexts
        while True:
            growing = [t.gen for t in self._decoding if t.gen is not None and t.gen.size == t.gen.computed]
            fits = contexts.held_tokens + len(growing) <= self.limits.max_total_tokens
            if fits and contexts.next_blocks(growing) <= contexts.available:
                contexts.extend(growing, 1)
                return True
            if self._in_flight:
                return False
            alone = len(self._filling) + len(self._decoding) == 1
            self._preempt(max((*self._filling, *self._decoding), key=lambda task: task.arrival))
            if alone:  # what it holds is split by copies that it would not need had it come first: it begins anew
                self._evict_all()

    def _evict_all(self) -> None:
        while self.contexts.evict_one():
            pass

    def _decode_row(self, task: Task, copies: list[tuple[int, int]]) -> Row:
        gen = task.gen
        assert gen is not None, "a decoding task has an output"
        position = gen.start + gen.computed
        if gen.copy_from is not None:
            copies.append((gen.copy_from, gen.blocks[0]))
            gen.copy_from = None
        gen.computed += 1
        gen.tokens += 1
        self._decode_kv += 1
        self._decode_kv_unique += 1
        if gen.tokens >= task.max_gen:
            self._leave(task)
        return Row(task.key, gen.id, position, position + 1, True, True)

    def _preempt(self, task: Task) -> None:
        """Takes a task's room away; no batch in flight has a row of it. What it has generated becomes forced."""
        self._leave(task)
        if task.gen is not None:
            task.forced = task.known
            task.gen.tokens = task.known
        self.contexts.release(task.chain)
        task.chain = []
        task.cursor = 0
        task.state = State.WAITING
        self._waiting.appendleft(task)
        self._preempted.append(task.key)
        self._stuck = False

    # ------------------------------------------------------------------------------------------- fills, admission

    def _fill_rows(self, number: int, copies: list[tuple[int, int]]) -> tuple[list[tuple[Task, Row]], bool]:
        """The fills of this iteration, running ones first, then newly admitted ones; whether they run without decode rows."""
        fills: list[tuple[Task, Row]] = []
        budget = self.limits.max_num_batched_tokens - len(self._decoding)
        for task in self._candidates(number, budget, fills):
            ready = ready_tokens(task, number)
            if not ready:
                continue
            left = budget - sum(row.stop - row.start for _, row in fills)
            chunk = self._chunk(ready, left, alone=not fills)
            if not chunk:
                break
            fills.append((task, self._fill(task, chunk, number, copies)))
            if chunk >= left:
                return fills, chunk > left
        return fills, False

    def _candidates(self, number: int, budget: int, fills: list[tuple[Task, Row]]) -> Iterator[Task]:
        """Tasks that may fill, first come first; admits waiting ones as it comes to them."""
        rows = len(self._decoding)
        yield from list(self._filling)
        while self._waiting and rows + len(fills) < self._running_most:
            if self._stuck or len(self._filling) + len(self._decoding) >= self._running_most:
                self._stuck = True
                return
            task = self._waiting[0]
            try:
                need = need_of(task, self.contexts)
            except Refused as refusal:
                self._drop(task)
                self._failed.append((task.key, refusal))
                continue
            if fills and self._chunk(task.target - need.start, budget - sum(r.stop - r.start for _, r in fills), False) == 0:
                return
            if fills or self._filling or self._decoding or self._in_flight:
                if not self._has_room(need):
                    self._stuck = True
                    return
            elif need.blocks > self.contexts.available - need.reclaimed:  # what it would share is split by copies
                self._evict_all()
                continue
            self._admit(task, need)
            yield task

    def _chunk(self, ready: int, budget: int, alone: bool) -> int:
        """How much of a fill of `ready` tokens is computed; more than `budget` means that it runs alone, where it may."""
        if self.limits.fill_chunk_size > 0:
            return min(ready, self.limits.fill_chunk_size, budget)
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
        if gen.tokens >= task.max_gen:
            return
        task.state = State.DECODING
        self._decoding[task] = None
        self._decode_kv += gen.start + gen.computed
        for context in task.chain:
            if not context.decoders:
                self._decode_kv_unique += context.computed
            context.decoders += 1

    def _has_room(self, need: Need) -> bool:
        """Room for a task beside others, and for one more token of each: nothing is admitted to be preempted at once."""
        spare = len(self._filling) + len(self._decoding) + 1
        return (
            need.blocks + spare <= self.contexts.available - need.reclaimed
            and self.contexts.held_tokens + need.tokens + spare <= self.limits.max_total_tokens
        )

    def _admit(self, task: Task, need: Need) -> None:
        contexts = self.contexts
        self._waiting.popleft()
        chain = list(need.found)
        for link in task.links[len(chain) :]:
            chain.append(contexts.create(link.context_id, chain[-1] if chain else None, link.tokens))
        if task.output_id is not None:
            if need.gen is None:
                task.gen = contexts.create(task.output_id, chain[-1], task.forced)
                task.gen.generating = True
            assert task.gen is not None
            chain.append(task.gen)
        contexts.use(chain)
        for context in chain:
            contexts.grow(context, context.tokens)
        task.chain = chain
        task.state = State.FILLING
        self._filling[task] = None
        if not task.admitted:
            task.admitted = True
            self._admitted.append((task.key, min(need.start, task.prompt - 1)))

    # ------------------------------------------------------------------------------------------------------- ends

    def _pop(self, batch: Batch) -> list[Task]:
        if not self._in_flight or self._in_flight[0][0].number != batch.number:
            oldest = self._in_flight[0][0].number if self._in_flight else None
            raise ValueError(f"batch {batch.number} is not the oldest in flight, which is {oldest}")
        return self._in_flight.popleft()[1]

    def _leave(self, task: Task) -> None:
        """The task is issued no more rows: it drains."""
        if task.state is State.FILLING:
            del self._filling[task]
            for context in task.chain:
                if context.filler is task:
                    context.filler = None
        elif task.state is State.DECODING:
            gen = task.gen
            assert gen is not None, "a decoding task has an output"
            del self._decoding[task]
            self._decode_kv -= gen.start + gen.computed
            for context in task.chain:
                context.decoders -= 1
                if not context.decoders:
                    self._decode_kv_unique -= context.computed
        task.state = State.DRAINING
        self._stuck = False

    def _end(self, task: Task, kept: int) -> None:
        """The task is done; its output context is cut to `kept` tokens and stays."""
        if not 0 <= kept <= task.known:
            raise ValueError(f"task {task.key!r} ended with {kept} tokens kept of {task.known}")
        self._leave(task)
        gen = task.gen
        if gen is not None:
            gen.tokens = kept
            gen.computed = min(gen.computed, kept)
            gen.generating = False
            task.limbo = self.contexts.shrink(gen, kept)
        self._forget(task)
        if not task.in_flight:
            self._let_go(task)

    def _drop(self, task: Task) -> None:
        """The task is given up, and its output with it."""
        waits = task.state is State.WAITING
        if waits:
            self._waiting.remove(task)
        else:
            self._leave(task)
        self._forget(task)
        if task.gen is not None and self.contexts.get(task.gen.id) is task.gen:
            if waits:
                self.contexts.free((task.gen.id,))
            self.contexts.forget_id(task.gen)
        if not task.in_flight:
            self._let_go(task)

    def _forget(self, task: Task) -> None:
        task.state = State.ENDED
        del self._tasks[task.key]
        if task.output_id is not None:
            self._outputs.discard(task.output_id)

    def _let_go(self, task: Task) -> None:
        """No batch in flight touches what the task used."""
        self.contexts.release(task.chain)
        self.pool.give(task.limbo)
        task.chain, task.limbo = [], array("i")
        self._stuck = False
