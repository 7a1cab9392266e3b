"""The tree of contexts that an engine holds, and the blocks, tokens and uses of each. It decides what is evicted next,
and never evicts what a running task uses.

A context continues its parent's tokens. Its blocks are those that its own tokens lie in; where it begins inside a block,
it goes on in its predecessor's last block (shared by reference) if no other does so already, else in a copy of it.
A context that was freed while children live stays until they are gone.

Terms: `tokens` is how long a context is, `computed` how many of them have their KV, `size` for how many there is room;
computed ≤ size, computed ≤ tokens. A context in use is *held*, any other is *retained*.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heappush
from typing import Any, Final

from parrot.engine.blocks import BlockPool

# By names of this module's own that never change: the compiled module need not look them up.
_push: Final = heappush
_pop: Final = heappop

NO_BLOCKS: Final[array[int]] = array("i")  #: shared by all that have none: it is replaced, never added to

#: Entries of a heap that no longer hold, beside as many as hold: each engine has its heaps, and what they keep alive is not
#: made anew from memory that is at hand.
STALE_ENTRIES: Final = 8


class Context:
    """A node of the tree. Token positions count from the head of the chain: its own are [start, start + tokens)."""

    __slots__ = (
        "blocks", "children", "computed", "copy_from", "decoders", "filled_in", "filler", "freed", "generating", "id",
        "lender", "parent", "size", "stamp", "start", "tail", "task", "tokens", "users",
    )  # fmt: skip

    def __init__(self, context_id: int, parent: Context | None, tokens: int) -> None:
        self.id = context_id
        self.parent = parent
        self.start: int = parent.end if parent is not None else 0
        self.tokens: int = tokens
        self.computed = 0
        self.size = 0
        self.blocks = NO_BLOCKS
        self.lender: Context | None = None  # the predecessor whose last block is our first
        self.tail: Context | None = None  # the context that goes on in our last block
        self.copy_from: int | None = None  # our first block begins as a copy of this one, still to be made
        self.users = 0  # running tasks whose chain it is in
        self.decoders = 0  # those of them that decode
        self.children = 0
        self.freed = False  # nobody will ask for it again: it goes with its last user and child
        self.generating = False  # the output of a task that has not ended
        self.task: Any = None  # that task
        self.filler: Any = None  # the task that computes it at present
        self.filled_in = -1  # the batch that last computed some of it
        self.stamp = 0  # when it was last used

    @property
    def end(self) -> int:
        return self.start + self.tokens

    @property
    def owned(self) -> int:
        """Its blocks that nobody held before it."""
        return len(self.blocks) - (self.lender is not None)

    def add_blocks(self, blocks: array[int]) -> None:
        """They come behind those that it has; `blocks` is the context's from now on."""
        if self.blocks:
            self.blocks.extend(blocks)
        else:
            self.blocks = blocks

    def predecessor(self) -> Context | None:
        """The nearest ancestor with tokens."""
        node = self.parent
        while node is not None and not node.tokens:
            node = node.parent
        return node

    def path(self) -> list[Context]:
        """The contexts from the head of the chain down to this one."""
        nodes, node = [self], self.parent
        while node is not None:
            nodes.append(node)
            node = node.parent
        nodes.reverse()
        return nodes


class ContextTree:
    """All contexts of an engine. Sums are kept as they change: no question costs a walk."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.held_tokens = 0  # room held by contexts in use, shared ones once
        self.stored_tokens = 0  # room held by all
        self.retained_blocks = 0  # what evicting every context that is not in use would free
        self._index: dict[int, Context] = {}
        self._nameless: dict[Context, None] = {}  # their id may name another by now
        self._evicted: list[int] | None = None
        # Retained leaves by their last use; stale entries are passed over. Most come in that order; a heap has the others.
        self._leaves: deque[tuple[int, int, Context]] = deque()
        self._last_stamp = 0  # of the last of these
        self._older: list[tuple[int, int, Context]] = []
        self._clock = 0
        self._pushed = 0

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[Context]:
        yield from self._index.values()
        yield from self._nameless

    def get(self, context_id: int) -> Context | None:
        return self._index.get(context_id)

    @property
    def available(self) -> int:
        """Blocks that are free or can be freed by evicting."""
        return self.pool.free + self.retained_blocks

    def create(self, context_id: int, parent: Context | None, tokens: int) -> Context:
        """A new context without room, which its creator uses at once."""
        context = self._index[context_id] = Context(context_id, parent, tokens)
        if parent is not None:
            parent.children += 1
        return context

    def forget_id(self, context: Context) -> None:
        """The id may be given to another context; this one goes with its last user."""
        context.freed = True
        if self._index.get(context.id) is context:
            del self._index[context.id]
            self._nameless[context] = None

    # ---------------------------------------------------------------------------------------------------- room

    def growth(self, context: Context) -> int:
        """Blocks that `grow` would take for the tokens of a context that has lost or never had the room for its last ones."""
        if context.tokens <= context.size:
            return 0
        block_size = self.pool.block_size
        return -(-context.end // block_size) - context.start // block_size - len(context.blocks)

    def grow(self, context: Context, size: int) -> None:
        """Makes room in a context in use for `size` tokens; evicts what it must. Raises IndexError when nothing is left
        to evict."""
        if size <= context.size:
            return
        block_size = self.pool.block_size
        first = context.start // block_size
        if not context.blocks and context.start % block_size:
            before = context.predecessor()
            assert before is not None, "a context that starts inside a block has a predecessor"
            if before.tail is None:
                before.tail, context.lender = context, before
                context.blocks = before.blocks[-1:]
                self.pool.share(before.blocks[-1])
            else:
                context.blocks = self._take(1)
                context.copy_from = before.blocks[-1]
        if more := -(-(context.start + size) // block_size) - first - len(context.blocks):
            context.add_blocks(self._take(more))
        self._resize(context, size)

    def shrink(self, context: Context, size: int) -> array[int]:
        """Gives up the room beyond `size` tokens; the blocks that this frees are the caller's to give back. Never called
        for a retained context, whose blocks are counted."""
        if size >= context.size:
            return NO_BLOCKS
        keep = -(-(context.start + size) // self.pool.block_size) - context.start // self.pool.block_size if size else 0
        if not keep:
            context.copy_from = None
            if context.lender is not None:
                self.pool.unshare(context.blocks[0])
                context.lender.tail = None
                context.lender = None
                del context.blocks[0]
        if keep:
            dropped = context.blocks[keep:]
            del context.blocks[keep:]
        else:
            dropped, context.blocks = context.blocks, NO_BLOCKS
        self._resize(context, size)
        return dropped

    def _resize(self, context: Context, size: int) -> None:
        self.stored_tokens += size - context.size
        if context.users:
            self.held_tokens += size - context.size
        context.size = size

    def _take(self, count: int) -> array[int]:
        self._evict_for(count)
        return self.pool.take(count)

    def owe(self, count: int) -> None:
        """Speaks for `count` blocks of the pool; evicts what it must."""
        self._evict_for(count)
        self.pool.owe(count)

    def _evict_for(self, blocks: int) -> None:
        while self.pool.free < blocks and self.evict_one():
            pass

    def next_blocks(self, gens: list[Context]) -> int:
        """Blocks that one more token of each of `gens` needs."""
        block_size, blocks = self.pool.block_size, 0
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

    # ---------------------------------------------------------------------------------------------------- uses

    def use(self, chain: Iterable[Context]) -> None:
        """A running task uses these contexts."""
        for context in chain:
            if not context.users:
                self.retained_blocks -= context.owned
                self.held_tokens += context.size
                context.freed = False
            context.users += 1

    def release(self, chain: list[Context]) -> None:
        """A running task no longer uses these contexts, head first. What was not computed is given up; the rest stays."""
        self._clock += 1
        for context in reversed(chain):
            context.users -= 1
            context.stamp = self._clock
            if context.users:
                continue
            self.held_tokens -= context.size
            worthless = not context.computed and (context.tokens > 0 or _incomplete(context.parent))
            if not context.children and (context.freed or worthless):
                self._report(context)
                self._remove(context)
                continue
            self.pool.give(self.shrink(context, context.computed))
            self.retained_blocks += context.owned
            if not context.children:
                self._push(context)

    def free(self, context_ids: Iterable[int]) -> int:
        """These are asked for no more: they go now, or with their last user and child. The tokens that they added."""
        tokens = 0
        for context_id in context_ids:
            context = self._index.get(context_id)
            if context is None or context.freed:
                continue
            tokens += context.tokens
            context.freed = True
            if not context.users and not context.children:
                self.retained_blocks -= context.owned
                self._remove(context)
        return tokens

    def evict_one(self) -> bool:
        """Gives up the least recently used of the contexts that nobody uses and that have no children. False: there is none."""
        leaves, older = self._leaves, self._older
        while leaves or older:
            if not older or (leaves and leaves[0] < older[0]):
                stamp, _, context = leaves.popleft()
            else:
                stamp, _, context = _pop(older)
            if self._is_entry(stamp, context):
                self.retained_blocks -= context.owned
                self._report(context)
                self._remove(context)
                return True
        return False

    @property
    def has_evicted(self) -> bool:
        """Whether `take_evicted` has something to say."""
        return self._evicted is not None

    def take_evicted(self) -> tuple[int, ...]:
        """Ids of the contexts given up since the last call that nobody had freed."""
        evicted = () if self._evicted is None else tuple(self._evicted)
        self._evicted = None
        return evicted

    def _remove(self, context: Context) -> None:
        """Takes a context that is counted nowhere any more out of the tree, and the freed ancestors that it kept alive."""
        while True:
            if self._nameless and context in self._nameless:
                del self._nameless[context]
            else:
                del self._index[context.id]
            self.pool.give(self.shrink(context, 0))
            parent, context.parent, context.stamp = context.parent, None, -1
            if parent is None:
                return
            parent.children -= 1
            if parent.users or parent.children:
                return
            if not parent.freed:
                self._push(parent)
                return
            self.retained_blocks -= parent.owned
            context = parent

    def _report(self, context: Context) -> None:
        if not context.freed and not context.generating:
            if self._evicted is None:
                self._evicted = []
            self._evicted.append(context.id)

    def _push(self, context: Context) -> None:
        if len(self._leaves) + len(self._older) > 2 * len(self._index) + STALE_ENTRIES:
            self._leaves = deque([e for e in self._leaves if self._is_entry(e[0], e[2])])
            self._older = [e for e in self._older if self._is_entry(e[0], e[2])]
            heapify(self._older)
        self._pushed += 1
        stamp = context.stamp
        if stamp >= self._last_stamp:
            self._last_stamp = stamp
            self._leaves.append((stamp, self._pushed, context))
        else:
            _push(self._older, (stamp, self._pushed, context))

    @staticmethod
    def _is_entry(stamp: int, context: Context) -> bool:
        return stamp == context.stamp and not context.users and not context.children


def _incomplete(context: Context | None) -> bool:
    return context is not None and context.computed < context.tokens
