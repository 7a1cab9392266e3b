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
from enum import Enum
from typing import NamedTuple

from parrot.engine.batches import Batch, EngineLimits, EngineTask, Link, Progress, Refused, Row, Span
from parrot.engine.blocks import BlockPool
from parrot.engine.contexts import Context, ContextTree
from parrot.latency import BatchShape

__all__ = ["Batch", "EngineCore", "EngineLimits", "EngineTask", "Link", "Progress", "Refused", "Row", "Span"]


class _State(Enum):
    WAITING = "waiting"
    FILLING = "filling"
    DECODING = "decoding"
    DRAINING = "draining"  # its last row is issued and not complete
    ENDED = "ended"  # its contexts are let go when no batch in flight touches them


class _Task:
    """A task from its submission until its contexts are let go."""

    __slots__ = (
        "admitted", "arrival", "chain", "cursor", "first_token", "forced", "gen", "given", "in_flight", "key", "known",
        "limbo", "links", "max_gen", "output_id", "prompt", "state",
    )  # fmt: skip

    def __init__(self, spec: EngineTask, links: tuple[Link, ...], given: int, prompt: int, arrival: int) -> None:
        self.key = spec.key
        self.links = links
        self.given = given  # leading links that the engine must hold: it was never told their tokens
        self.prompt = prompt
        self.output_id = spec.generate_context_id
        self.max_gen = spec.max_gen_length
        self.forced = spec.forced_tokens if spec.generate_context_id is not None else 0
        self.known = self.forced  # tokens of the output whose values are known
        self.arrival = arrival
        self.state = _State.WAITING
        self.admitted = False
        self.first_token = False
        self.in_flight = 0  # batches that have a row of it
        self.chain: list[Context] = []
        self.gen: Context | None = None
        self.cursor = 0  # contexts of the chain before it are computed
        self.limbo: array[int] = array("i")  # blocks given up that a batch in flight may still write

    @property
    def target(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return self.prompt + self.forced


class _Need(NamedTuple):
    """What a waiting task needs to run: the contexts that it finds, and room beyond them."""

    found: list[Context]
    gen: Context | None
    blocks: int
    reclaimed: int  # retained blocks that it uses itself
    tokens: int
    start: int  # the first position to compute


class EngineCore:
    """Contexts, blocks and the local scheduler of one engine. Times are the caller's; nothing here depends on them."""

    def __init__(self, limits: EngineLimits) -> None:
        self.limits = limits
        self.pool = BlockPool(limits.num_blocks, limits.block_size)
        self.contexts = ContextTree(self.pool)
        self._tasks: dict[Hashable, _Task] = {}
        self._outputs: set[int] = set()
        self._waiting: deque[_Task] = deque()
        self._filling: dict[_Task, None] = {}
        self._decoding: dict[_Task, None] = {}
        self._in_flight: deque[tuple[Batch, list[_Task]]] = deque()
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
        """Takes a task, which runs when there is room: the tokens of its prompt. Raises Refused: engine_rejected (no place in the queue),
        task_too_large, context_missing, conflict (a context or key is something else already), bad_request."""
        if task.key in self._tasks:
            raise Refused("conflict", f"task {task.key!r} is on this engine already")
        if len(self._tasks) >= self.limits.tasks_capacity:
            raise Refused("engine_rejected", f"the engine has {len(self._tasks)} tasks; its tasks_capacity is no more")
        before = self._given(task.parent_context_id)
        links = (*before, *task.links)
        prompt = sum(link.tokens for link in links)
        self._check_form(task, links, prompt)
        self._found(links, None)
        output_id = task.generate_context_id
        if output_id is not None:
            self._claim_output(output_id, links)
            self._outputs.add(output_id)
        self._arrivals += 1
        accepted = _Task(task, links, len(before), prompt, self._arrivals)
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
            if task.state is _State.ENDED:
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
        lost = [task for task in dict.fromkeys(later) if task.state is not _State.ENDED]
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
            if task.state is _State.ENDED and not task.in_flight and task.chain:
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
        return 1 + self._steps_with_room([task.gen for task in decoding if task.gen is not None], steps)

    def advance(self, batch: Batch, k: int) -> Batch:
        """Applies `k` < decode_horizon completions in which nothing ended, each with the batch issued after it. The batch
        that is the oldest in flight then."""
        if k < 1:
            return batch
        tasks = self._in_flight[0][1]
        self._number += k
        self._decode_kv += k * len(tasks)
        self._decode_kv_unique += k * len(tasks)
        for task in tasks:
            gen = task.gen
            assert gen is not None, "a decoding task has an output"
            self.contexts.grow(gen, gen.size + k)
            gen.computed += k
            gen.tokens += k
            task.known += k
            if gen.tokens >= task.max_gen:
                self._leave(task)
        self._in_flight = deque([(_shifted(issued, k), issued_tasks) for issued, issued_tasks in self._in_flight])
        return self._in_flight[0][0]

    def _steps_with_room(self, gens: list[Context], most: int) -> int:
        """The most iterations, up to `most`, for which all of `gens` can grow without a preemption."""
        block_size, available = self.limits.block_size, self.contexts.available
        if len(gens) * -(-most // block_size) <= available:
            return most
        used = [(gen.start + gen.size - 1) % block_size + 1 for gen in gens]  # of each one's last block

        def blocks(steps: int) -> int:
            return sum((n + steps - 1) // block_size for n in used)

        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            if blocks(middle) <= available:
                low = middle
            else:
                high = middle - 1
        return low

    # ------------------------------------------------------------------------------------------------ decode rows

    def _make_decode_room(self) -> bool:
        """Room for one more token of every decoding task. False: there is none before a batch in flight is complete."""
        contexts = self.contexts
        while True:
            growing = [t.gen for t in self._decoding if t.gen is not None and t.gen.size == t.gen.computed]
            fits = contexts.held_tokens + len(growing) <= self.limits.max_total_tokens
            if fits and self._next_blocks(growing) <= contexts.available:
                for gen in growing:
                    contexts.grow(gen, gen.size + 1)
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

    def _next_blocks(self, gens: list[Context]) -> int:
        """Blocks that one more token of each of `gens` needs."""
        block_size, blocks = self.limits.block_size, 0
        claimed: set[Context] = set()
        for gen in gens:
            if gen.blocks or gen.start % block_size == 0:
                blocks += (gen.start + gen.size) % block_size == 0
                continue
            before = gen.predecessor()
            assert before is not None, "a context that starts inside a block has a predecessor"
            blocks += before.tail is not None or before in claimed
            claimed.add(before)
        return blocks

    def _decode_row(self, task: _Task, copies: list[tuple[int, int]]) -> Row:
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

    def _preempt(self, task: _Task) -> None:
        """Takes a task's room away; no batch in flight has a row of it. What it has generated becomes forced."""
        self._leave(task)
        if task.gen is not None:
            task.forced = task.known
            task.gen.tokens = task.known
        self.contexts.release(task.chain)
        task.chain = []
        task.cursor = 0
        task.state = _State.WAITING
        self._waiting.appendleft(task)
        self._preempted.append(task.key)
        self._stuck = False

    # ------------------------------------------------------------------------------------------- fills, admission

    def _fill_rows(self, number: int, copies: list[tuple[int, int]]) -> tuple[list[tuple[_Task, Row]], bool]:
        """The fills of this iteration, running ones first, then newly admitted ones; whether they run without decode rows."""
        fills: list[tuple[_Task, Row]] = []
        budget = self.limits.max_num_batched_tokens - len(self._decoding)
        for task in self._candidates(number, budget, fills):
            ready = self._ready(task, number)
            if not ready:
                continue
            left = budget - sum(row.stop - row.start for _, row in fills)
            chunk = self._chunk(ready, left, alone=not fills)
            if not chunk:
                break
            fills.append((task, self._fill_row(task, chunk, number, copies)))
            if chunk >= left:
                return fills, chunk > left
        return fills, False

    def _candidates(self, number: int, budget: int, fills: list[tuple[_Task, Row]]) -> Iterator[_Task]:
        """Tasks that may fill, first come first; admits waiting ones as it comes to them."""
        rows = len(self._decoding)
        yield from list(self._filling)
        while self._waiting and rows + len(fills) < self._running_most:
            if self._stuck or len(self._filling) + len(self._decoding) >= self._running_most:
                self._stuck = True
                return
            task = self._waiting[0]
            try:
                need = self._need(task)
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

    def _ready(self, task: _Task, number: int) -> int:
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
        if context.filler is not None and context.filler is not task:
            return 0
        ready = context.tokens - context.computed
        for later in chain[task.cursor + 1 :]:
            if later.copy_from is not None:  # what it copies must be complete in an earlier batch
                break
            ready += later.tokens
        return ready

    def _fill_row(self, task: _Task, chunk: int, number: int, copies: list[tuple[int, int]]) -> Row:
        chain = task.chain
        if task.cursor == len(chain):
            deepest = next(context for context in reversed(chain) if context.tokens)
            start = task.target - 1
        else:
            start, left = chain[task.cursor].start + chain[task.cursor].computed, chunk
            while left:
                context = chain[task.cursor]
                if context.copy_from is not None:
                    copies.append((context.copy_from, context.blocks[0]))
                    context.copy_from = None
                count = min(left, context.tokens - context.computed)
                if count:
                    deepest, left = context, left - count
                    context.computed += count
                    context.filled_in = number
                if context.computed < context.tokens:
                    context.filler = task
                    break
                context.filler = None
                task.cursor += 1
        stop = start + chunk
        samples = stop == task.target and task.gen is not None
        if stop == task.target:
            self._leave(task)
        if samples:
            self._sampled_first(task)
        return Row(task.key, deepest.id, start, stop, samples, False)

    def _sampled_first(self, task: _Task) -> None:
        """The prompt is computed: from the next batch on the task decodes, if it may generate more than one token."""
        gen = task.gen
        assert gen is not None
        gen.tokens += 1
        if gen.tokens >= task.max_gen:
            return
        task.state = _State.DECODING
        self._decoding[task] = None
        self._decode_kv += gen.start + gen.computed
        for context in task.chain:
            if not context.decoders:
                self._decode_kv_unique += context.computed
            context.decoders += 1

    def _need(self, task: _Task) -> _Need:
        """What a waiting task would take. Raises Refused when it can no longer run."""
        block_size = self.limits.block_size
        found = self._found(task.links, task)
        gen = task.gen if task.gen is not None and self.contexts.get(task.gen.id) is task.gen else None
        existing = [*found, gen] if gen is not None else found
        blocks = reclaimed = tokens = end = 0
        start: int | None = None
        last: Context | None = None  # with tokens
        for context in existing:
            blocks += self.contexts.growth(context, context.tokens)
            tokens += context.tokens - context.size
            if not context.users:
                reclaimed += context.owned
                tokens += context.size
            if start is None and context.computed < context.tokens:
                start = context.start + context.computed
            if context.tokens:
                last = context
            end = context.end
        if end < task.target:
            tokens += task.target - end
            blocks += -(-task.target // block_size) - -(-end // block_size)
            blocks += end % block_size > 0 and last is not None and last.tail is not None
        return _Need(found, gen, blocks, reclaimed, tokens, min(end if start is None else start, task.target - 1))

    def _has_room(self, need: _Need) -> bool:
        """Room for a task beside others: for one more token of each too, so that nothing is admitted to be preempted at once."""
        spare = len(self._filling) + len(self._decoding) + 1
        return (
            need.blocks + spare <= self.contexts.available - need.reclaimed
            and self.contexts.held_tokens + need.tokens + spare <= self.limits.max_total_tokens
        )

    def _admit(self, task: _Task, need: _Need) -> None:
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
        task.state = _State.FILLING
        self._filling[task] = None
        if not task.admitted:
            task.admitted = True
            self._admitted.append((task.key, min(need.start, task.prompt - 1)))

    # --------------------------------------------------------------------------------------------------- refusals

    def _given(self, parent_id: int | None) -> tuple[Link, ...]:
        """The chain down to the context that a task continues."""
        if parent_id is None:
            return ()
        parent = self.contexts.get(parent_id)
        if parent is None:
            raise Refused("context_missing", f"parent context {parent_id} is not on this engine")
        if parent.generating:
            raise Refused("conflict", f"parent context {parent_id} is still being generated")
        return tuple(Link(context.id, context.tokens) for context in parent.path())

    def _check_form(self, task: EngineTask, links: tuple[Link, ...], prompt: int) -> None:
        if prompt < 1 or any(link.tokens < 0 for link in links):
            raise Refused("bad_request", f"task {task.key!r} has a prompt of {prompt} tokens; at least 1 is needed")
        if len({link.context_id for link in links}) < len(links):
            raise Refused("conflict", f"task {task.key!r} names a context twice in its chain")
        if task.generate_context_id is not None and not 0 <= task.forced_tokens < task.max_gen_length:
            raise Refused(
                "bad_request",
                f"task {task.key!r} has max_gen_length {task.max_gen_length} and {task.forced_tokens} forced tokens; "
                "at least one token must be left to generate",
            )
        output = task.max_gen_length if task.generate_context_id is not None else 0
        if prompt + output > self.limits.largest_task:
            raise Refused(
                "task_too_large",
                f"a prompt of {prompt} tokens and an output of up to {output} are more than this engine can ever hold: "
                f"max_seq_len {self.limits.max_seq_len}, max_total_tokens {self.limits.max_total_tokens}, "
                f"KV capacity {self.limits.num_blocks * self.limits.block_size}",
            )

    def _claim_output(self, output_id: int, links: tuple[Link, ...]) -> None:
        """Refuses an output context that is something else; an unused one of an earlier attempt goes."""
        held = self.contexts.get(output_id)
        if output_id in self._outputs or any(link.context_id == output_id for link in links):
            raise Refused("conflict", f"context {output_id} is the output or a part of another task")
        if held is not None:
            if held.users or held.children:
                raise Refused("conflict", f"context {output_id} exists already and is in use")
            self.contexts.free((output_id,))

    def _found(self, links: tuple[Link, ...], task: _Task | None) -> list[Context]:
        """The leading contexts of a chain that are on this engine, found from its deep end. Raises Refused when one of
        them is not what the chain says, or when one that the engine was never told is gone."""
        path: list[Context] = []
        for link in reversed(links):
            context = self.contexts.get(link.context_id)
            if context is not None:
                path = context.path()
                break
        for context, link in zip(path, links, strict=False):
            if context.id != link.context_id or context.tokens != link.tokens or context.generating:
                raise Refused(
                    "conflict",
                    f"context {link.context_id} of {link.tokens} tokens is, on this engine, context {context.id} of "
                    f"{context.tokens} tokens{', still being generated' if context.generating else ''}",
                )
        if len(path) > len(links) or (path and path[-1].id != links[len(path) - 1].context_id):
            raise Refused("conflict", f"context {path[-1].id} lies deeper on this engine than in the chain")
        if task is not None and len(path) < task.given:
            raise Refused("context_missing", f"context {task.links[task.given - 1].context_id} was evicted while a task waited")
        return path

    # ------------------------------------------------------------------------------------------------------- ends

    def _pop(self, batch: Batch) -> list[_Task]:
        if not self._in_flight or self._in_flight[0][0].number != batch.number:
            oldest = self._in_flight[0][0].number if self._in_flight else None
            raise ValueError(f"batch {batch.number} is not the oldest in flight, which is {oldest}")
        return self._in_flight.popleft()[1]

    def _leave(self, task: _Task) -> None:
        """The task is issued no more rows: it drains."""
        if task.state is _State.FILLING:
            del self._filling[task]
            for context in task.chain:
                if context.filler is task:
                    context.filler = None
        elif task.state is _State.DECODING:
            gen = task.gen
            assert gen is not None, "a decoding task has an output"
            del self._decoding[task]
            self._decode_kv -= gen.start + gen.computed
            for context in task.chain:
                context.decoders -= 1
                if not context.decoders:
                    self._decode_kv_unique -= context.computed
        task.state = _State.DRAINING
        self._stuck = False

    def _end(self, task: _Task, kept: int) -> None:
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

    def _drop(self, task: _Task) -> None:
        """The task is given up, and its output with it."""
        waits = task.state is _State.WAITING
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

    def _forget(self, task: _Task) -> None:
        task.state = _State.ENDED
        del self._tasks[task.key]
        if task.output_id is not None:
            self._outputs.discard(task.output_id)

    def _let_go(self, task: _Task) -> None:
        """No batch in flight touches what the task used."""
        self.contexts.release(task.chain)
        self.pool.give(task.limbo)
        task.chain, task.limbo = [], array("i")
        self._stuck = False


def _shifted(batch: Batch, k: int) -> Batch:
    """The batch that follows an all-decode one after `k` iterations of the same tasks."""
    shape = batch.shape
    more = k * shape.decode_rows
    return batch._replace(
        number=batch.number + k,
        rows=tuple([row._replace(start=row.start + k, stop=row.stop + k) for row in batch.rows]),
        copies=(),
        admitted=(),
        preempted=(),
        shape=shape._replace(decode_kv=shape.decode_kv + more, decode_kv_unique=shape.decode_kv_unique + more),
    )
