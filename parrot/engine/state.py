"""The tasks of an engine and what each of them holds: a place in the queue, contexts, room for their tokens. It decides
nothing: when a task is admitted, preempted or ended is EngineCore's affair (`parrot.engine.core`), which goes on from here.

The states of a task (`parrot.engine.running`), and who brings it from one to the next:

    enter           -> waiting                      in the queue, with a claim on its output's id
    _admit          waiting -> filling              it uses the contexts of its chain, and has room for its prompt
    _leave          filling, decoding -> draining   the last row of its fill, or of all, is issued
    Lockstep.join   draining -> decoding            behind its fill: a token an iteration, if it may generate more than one
    Lockstep.step   decoding -> draining            the row with which it reaches its max_gen_length is issued
    _preempt        filling, decoding -> waiting    its room is given back; what it has generated will be filled again
    _end            -> ended                        its output stays, as far as it is kept
    _drop           -> ended                        its output goes too

What an ended task used is let go when no batch in flight touches it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from parrot.engine.admission import Need, check_form, claim_output, found_of, given_links
from parrot.engine.batches import EngineLimits, EngineTask, Link, Refused, Span
from parrot.engine.blocks import BlockPool, NumberedBlocks
from parrot.engine.bounds import bounds_of
from parrot.engine.contexts import NOBODY, Context, ContextTree
from parrot.engine.lockstep import Lockstep
from parrot.engine.running import DECODING, DRAINING, ENDED, FILLING, WAITING, Task


class EngineState:
    """Tasks, contexts and blocks of one engine. What has a leading underscore is EngineCore's too, and nobody else's."""

    def __init__(self, limits: EngineLimits, numbered: bool = True) -> None:
        """numbered: whether blocks have numbers, which only an engine with memory behind them asks for."""
        self.limits = limits
        self.pool: BlockPool = (NumberedBlocks if numbered else BlockPool)(limits.num_blocks, limits.block_size)
        self._contexts = ContextTree(self.pool)
        self._lockstep = Lockstep(self._contexts)
        self._bounds = bounds_of(limits)
        self._tasks: dict[Hashable, Task] = {}
        self._outputs: set[int] = set()
        self._arrivals = 0
        self._waiting: list[Task] | None = None  # None: nobody
        self._stuck = False  # the head of the queue has no room, and nothing was let go since that was found
        # What is empty most of the time is the empty tuple then, which all engines share: an edge looks at each of these, and
        # of a thousand engines none would find its own at hand.
        self._filling: tuple[Task, ...] = ()
        self._lingering: tuple[Task, ...] = ()  # ended, while a batch in flight touches what they used

    # --------------------------------------------------------------------------------------------------- what is told

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
        self._wait(task, behind=True)

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

    # -------------------------------------------------------------------------------------------------- what is asked

    @property
    def largest_task(self) -> int:
        """As `EngineLimits.largest_task`."""
        return self._bounds.task_tokens

    def task(self, key: Hashable) -> Task | None:
        """The core's own task, to be read only."""
        return self._tasks.get(key)

    @property
    def waits(self) -> bool:
        """Whether a task waits for room."""
        return self._waiting is not None

    @property
    def num_total_tasks(self) -> int:
        return len(self._tasks)

    @property
    def num_running_tasks(self) -> int:
        return len(self._tasks) - (len(self._waiting) if self._waiting is not None else 0)

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
        block_size = self.pool.block_size
        for context in self._context(context_id).path():
            if context.num_blocks:
                table[context.start // block_size :] = context.blocks
        return table

    def spans(self, context_id: int) -> list[Span]:
        """Which context each position of a chain belongs to, root first. KeyError: the engine has no such context."""
        return [Span(c.id, c.start, c.end) for c in self._context(context_id).path()]

    def _context(self, context_id: int) -> Context:
        """The context, up to date. KeyError: there is none."""
        context = self._contexts.get(context_id)
        if context is None:
            raise KeyError(f"context {context_id} is not on this engine")
        if context.task is not None:
            task = self._tasks.get(context.task)
            if task is not None and task.gen is context and task.state == DECODING:
                self._lockstep.settle(task)
        return context

    # ------------------------------------------------------------------------------------------------------ the queue

    def _wait(self, task: Task, behind: bool) -> None:
        """Into the queue, behind all others or before them."""
        if self._waiting is None:
            self._waiting = []
        self._waiting.insert(len(self._waiting) if behind else 0, task)

    def _wait_no_more(self, task: Task) -> None:
        """Out of the queue."""
        assert self._waiting is not None
        self._waiting.remove(task)
        if not self._waiting:
            self._waiting = None

    # -------------------------------------------------------------------------------------------------------- running

    def _admit(self, task: Task, need: Need) -> None:
        """The task leaves the queue, makes those contexts of its chain that are not there, and uses all of it."""
        contexts = self._contexts
        self._wait_no_more(task)
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
        task.deepest, task.chain, task.links = chain[-1], tuple(chain), ()
        task.state = FILLING
        self._filling = (*self._filling, task)

    def _leave(self, task: Task) -> None:
        """The task is issued no more rows, or no more of its fill: it drains."""
        if task.state == DECODING:
            self._lockstep.leave(task)
        elif task.state == FILLING:
            self._filling = tuple([other for other in self._filling if other is not task])
            for context in task.chain:
                if context.filler == task.arrival:
                    context.filler = NOBODY
        task.state = DRAINING
        self._stuck = False

    def _preempt(self, task: Task) -> None:
        """Takes a task's room away; no batch in flight has a row of it. What it has generated becomes forced."""
        if task.gen is not None:
            if task.state == DECODING:
                task.known = self._lockstep.known(task)
            task.forced = task.known
        self._leave(task)
        if task.gen is not None:
            task.gen.tokens = task.known
        assert task.deepest is not None
        task.links = tuple([Link(c.id, c.tokens) for c in task.deepest.path() if c is not task.gen])
        self._contexts.release(task.deepest)
        task.deepest, task.chain = None, ()
        task.cursor = 0
        task.state = WAITING
        task.last_step = 0
        self._wait(task, behind=False)

    # ----------------------------------------------------------------------------------------------------------- ends

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
            self._wait_no_more(task)
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
        if task.deepest is not None:
            self._contexts.release(task.deepest)
            task.deepest, task.chain = None, ()
        if task.limbo:
            self.pool.give(task.limbo, task.limbo_blocks)
        self._stuck = False
        return True
