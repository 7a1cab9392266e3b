"""EngineCore under random forks, aborts, frees, ends, failures and tight memory: blocks, capacity, content, liveness.

A device of the test's own executes every batch on labels instead of tensors: each slot of a block holds which token of
which context was computed into it. Whatever the core shares, copies, evicts or computes again, a row must find the
labels of its own chain in front of it.
"""

from __future__ import annotations

from collections import Counter, deque

import hypothesis.strategies as st
from hypothesis import HealthCheck, assume, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from parrot.engine.blocks import NumberedBlocks
from parrot.engine.core import Batch, EngineCore, EngineLimits, EngineTask, Link, Refused

LIMITS = st.builds(
    EngineLimits,
    num_blocks=st.integers(4, 24),
    block_size=st.sampled_from([1, 2, 3, 4, 8]),
    max_batch_size=st.integers(1, 5),
    max_num_batched_tokens=st.integers(2, 24),
    max_total_tokens=st.integers(8, 96),
    tasks_capacity=st.integers(1, 8),
    max_seq_len=st.integers(8, 64),
    fill_chunk_size=st.sampled_from([-1, -1, 1, 3, 7]),
    pipeline_depth=st.integers(0, 2),
)


class Device:
    """Executes batches in the order of their issue, and finds any row whose prefix is not what the chain says."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.size = core.limits.block_size
        self.slots: dict[int, list[tuple[int, int] | None]] = {}
        self.new: dict[int, list[tuple[int, int]]] = {}  # batch -> slots that it changed

    def execute(self, batch: Batch) -> None:
        for source, target in batch.copies:
            self.slots[target] = list(self._block(source))
        tables = [self.core.block_table(row.context_id) for row in batch.rows]
        labels = [self._labels(row.context_id) for row in batch.rows]
        for row, table, label in zip(batch.rows, tables, labels, strict=True):
            for position in range(row.start):
                block, slot = divmod(position, self.size)
                assert self._block(table[block])[slot] == label[position], f"{row}: position {position} is not computed"
        written: dict[tuple[int, int], tuple[int, int]] = {}
        for row, table, label in zip(batch.rows, tables, labels, strict=True):
            for position in range(row.start, row.stop):
                block, slot = divmod(position, self.size)
                assert written.setdefault((table[block], slot), label[position]) == label[position], "two rows, one slot"
        self.new[batch.number] = [place for place, label in written.items() if self._block(place[0])[place[1]] != label]
        for (block, slot), label in written.items():
            self._block(block)[slot] = label

    def lose(self, first: int) -> None:
        """The batches from this number on computed nothing."""
        for number in [number for number in self.new if number >= first]:
            for block, slot in self.new.pop(number):
                self._block(block)[slot] = None

    def _block(self, number: int) -> list[tuple[int, int] | None]:
        return self.slots.setdefault(number, [None] * self.size)

    def _labels(self, context_id: int) -> list[tuple[int, int]]:
        return [(span.context_id, i) for span in self.core.spans(context_id) for i in range(span.stop - span.start)]


def check_blocks(core: EngineCore) -> None:
    """Invariant 2, from the contexts themselves, and the sums that the core keeps of them."""
    contexts = list(core.contexts)
    holders = Counter(block for context in contexts for block in context.blocks)
    for context in contexts:
        assert len(set(context.blocks)) == len(context.blocks)
        assert context.computed <= min(context.size, context.tokens)
        room = -(-(context.start + context.size) // core.limits.block_size) - context.start // core.limits.block_size
        assert len(context.blocks) == context.num_blocks == (room if context.size else 0)
    assert isinstance(core.pool, NumberedBlocks)
    assert all(core.pool.references(block) == count for block, count in holders.items())
    assert core.pool.free + len(holders) + core.limbo_blocks == core.limits.num_blocks
    unused = {block for context in contexts if not context.users for block in context.blocks}
    unused -= {block for context in contexts if context.users for block in context.blocks}
    assert core.contexts.retained_blocks == len(unused)
    assert core.held_tokens == sum(context.size for context in contexts if context.users)
    assert core.cached_tokens == sum(context.size for context in contexts)


def check_counted(core: EngineCore, counted: EngineCore) -> None:
    """A core whose blocks are only counted, told the same, has come to the same."""
    for one, other in zip(core.contexts, counted.contexts, strict=True):
        assert (one.id, one.size, one.computed, one.num_blocks) == (other.id, other.size, other.computed, other.num_blocks)
        assert not other.blocks
    assert (core.pool.free, core.limbo_blocks) == (counted.pool.free, counted.limbo_blocks)
    assert (core.held_tokens, core.contexts.available) == (counted.held_tokens, counted.contexts.available)


def check_batch(core: EngineCore, batch: Batch) -> None:
    """Invariant 8 for one iteration, and that its shape says what its rows are."""
    limits, rows = core.limits, batch.rows
    decodes, fills = [r for r in rows if r.decode], [r for r in rows if not r.decode]
    tokens = sum(row.stop - row.start for row in rows)
    assert 0 < len(rows) <= limits.max_batch_size
    assert tokens <= limits.max_num_batched_tokens or len(rows) == 1
    assert len({row.key for row in rows}) == len(rows)
    assert rows == (*decodes, *fills)
    if limits.fill_chunk_size > 0:
        assert all(row.stop - row.start <= limits.fill_chunk_size for row in fills)
    shape = batch.shape
    assert (shape.decode_rows, shape.prefill_rows) == (len(decodes), len(fills))
    assert shape.prefill_tokens == tokens - len(decodes)
    assert shape.prefill_pairs == sum(position + 1 for row in fills for position in range(row.start, row.stop))
    assert shape.decode_kv == sum(row.stop for row in decodes)
    read = {
        (s.context_id, i) for row in decodes for s in core.spans(row.context_id) for i in range(s.start, min(s.stop, row.stop))
    }
    assert shape.decode_kv_unique == len(read)


class EngineCoreMachine(RuleBasedStateMachine):
    """Submits, ends and takes away at random. Ids are never used twice for different content, as ServeCore promises."""

    @initialize(limits=LIMITS)
    def start(self, limits: EngineLimits) -> None:
        self.core = EngineCore(limits)
        self.counted = EngineCore(limits, numbered=False)
        self.device = Device(self.core)
        self.issued: deque[tuple[Batch, Batch]] = deque()  # of both cores
        self.chains: list[tuple[Link, ...]] = []  # chains that exist or did
        self.tasks: dict[int, EngineTask] = {}
        self.known: Counter[int] = Counter()
        self.submitted = self.finished = self.gone = self.next_id = 0

    def new_id(self) -> int:
        self.next_id += 1
        return self.next_id

    @rule(data=st.data())
    def submit(self, data: st.DataObject) -> None:
        """A task behind a chain that exists or once did, cut anywhere, or behind none."""
        base = data.draw(st.sampled_from([(), *self.chains[-8:]]))
        cut = data.draw(st.integers(0, len(base)))
        sizes = data.draw(st.lists(st.integers(0, 9), max_size=3))
        links = (*base[:cut], *(Link(self.new_id(), size) for size in sizes))
        output = self.new_id() if data.draw(st.booleans()) or data.draw(st.booleans()) else None
        most = data.draw(st.integers(1, 10))
        forced = data.draw(st.sampled_from([0, 0, 0, most - 1]))
        task = EngineTask(self.new_id(), links, output, most, forced)
        prompt = sum(link.tokens for link in links)
        codes = []
        for core in (self.core, self.counted):
            code = ""
            try:
                assert core.submit(task, 0.0) == prompt
            except Refused as refusal:
                code = refusal.code
            codes.append(code)
        assert codes == [code, code]
        full = len(self.tasks) >= self.core.limits.tasks_capacity
        large = prompt + (most if output else 0) > self.core.limits.largest_task
        assert code in ("engine_rejected" * full, "task_too_large" * large, "bad_request" * (not prompt))
        if code:
            return
        self.submitted += 1
        self.tasks[task.key] = task
        self.known[task.key] = forced
        self.chains.append(links)

    @rule()
    def issue(self) -> None:
        batch, counted = self.core.next_batch(0.0), self.counted.next_batch(0.0)
        assert batch is not None or self.issued or not self.tasks, "work, nothing in flight, and nothing to do"
        assert (batch is None) == (counted is None)
        if batch is not None and counted is not None:
            assert list(map(repr, batch.rows)) == list(map(repr, counted.rows))
            assert (batch.shape, batch.admitted) == (counted.shape, counted.admitted)
            assert len(self.issued) <= self.core.limits.pipeline_depth
            check_batch(self.core, batch)
            self.device.execute(batch)
            self.issued.append((batch, counted))

    @precondition(lambda self: self.issued)
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        ended: dict[int, int] = {}
        for row in self.issued[0][0].rows:
            if row.samples and row.key in self.tasks:
                self.known[row.key] += 1
                if data.draw(st.integers(0, 4)) == 0:
                    ended[row.key] = data.draw(st.integers(0, self.known[row.key]))
        self.settle(ended)

    def settle(self, ended: dict[int, int]) -> None:
        batch, counted = self.issued.popleft()
        progress = self.core.complete(batch, ended, 0.0)
        same = self.counted.complete(counted, ended, 0.0)
        assert (progress.first_tokens, progress.finished) == (same.first_tokens, same.finished)
        for key in progress.finished:
            task = self.tasks.pop(key)
            self.finished += 1
            if task.generate_context_id is not None:
                kept = ended.get(key, self.known[key])
                assert key in ended or kept == task.max_gen_length
                self.chains.append((*task.links, Link(task.generate_context_id, kept)))
        assert set(ended) <= set(progress.finished)

    @precondition(lambda self: self.issued)
    @rule()
    def fail(self) -> None:
        batch, counted = self.issued.popleft()
        lost = self.core.fail(batch)
        assert lost == self.counted.fail(counted)
        self.device.lose(batch.number)
        for key in lost:
            del self.tasks[key]
        self.gone += len(lost)

    @precondition(lambda self: self.tasks)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.tasks)))
        assert self.core.abort(key)
        assert self.counted.abort(key)
        assert not self.core.abort(key)
        del self.tasks[key]
        self.gone += 1

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        assume(self.chains)
        chain = data.draw(st.sampled_from(self.chains))
        ids = [link.context_id for link in chain[data.draw(st.integers(0, len(chain))) :]]
        assert self.core.free_contexts(ids) == self.counted.free_contexts(ids)

    @rule()
    def take_evicted(self) -> None:
        evicted = self.core.take_evicted()
        assert evicted == self.counted.take_evicted()
        for context_id in evicted:
            assert context_id <= self.next_id

    @invariant()
    def blocks(self) -> None:
        check_blocks(self.core)
        check_counted(self.core, self.counted)

    @invariant()
    def conservation(self) -> None:
        assert self.submitted == self.finished + self.gone + len(self.tasks)
        assert self.core.num_total_tasks == len(self.tasks) <= self.core.limits.tasks_capacity

    @invariant()
    def capacity(self) -> None:
        assert self.core.held_tokens <= self.core.limits.max_total_tokens

    def teardown(self) -> None:
        """Liveness: with no further event but completions, everything ends; then every block can be free."""
        if not hasattr(self, "core"):
            return
        for _ in range(5000):
            if not self.core.has_work:
                break
            self.issue()
            if self.issued:
                for row in self.issued[0][0].rows:
                    self.known[row.key] += row.samples and row.key in self.tasks
                self.settle({})
        assert not self.core.has_work
        assert not self.tasks
        assert self.core.held_tokens == 0
        assert not self.core.take_failed()
        self.core.free_contexts(range(self.next_id + 1))
        assert self.core.pool.free == self.core.limits.num_blocks
        assert self.core.cached_tokens == 0


TestEngineCore = EngineCoreMachine.TestCase
TestEngineCore.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
