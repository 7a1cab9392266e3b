"""The tree of contexts that an engine holds, and the blocks, tokens and uses of each. It decides what is evicted next,
and never evicts what a running task uses.

A context continues its parent's tokens. Its blocks are those that its own tokens lie in; where it begins inside a block,
it goes on in its predecessor's last block (shared by reference) if no other does so already, else in a copy of it.
A context that was freed while children live stays until they are gone.

Terms: `tokens` is how long a context is, `computed` how many of them have their KV, `size` for how many there is room;
computed ≤ size, computed ≤ tokens. A context in use is *held*, any other is *retained*.

A parent is used whenever its child is, and a chain is let go from its deep end: of the retained contexts, the one that was let
go first has no children. So the order of their last uses is that in which they are given up.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Iterator
from operator import attrgetter
from typing import Final

from mypy_extensions import mypyc_attr

from parrot.engine.blocks import NO_BLOCKS, BlockPool

NOBODY: Final = 0  #: no task, by the number of its arrival, which is 1 or more
NO_COPY: Final = -1

# By a name of this module's own that never changes: the compiled module need not look it up.
_last_use: Final = attrgetter("stamp")


@mypyc_attr(acyclic=True)
class Context:
    """A node of the tree. Token positions count from the head of the chain: its own are [start, start + tokens).

    An engine has hundreds of them, each met again when no cache remembers it. Tasks refer to them, and they name tasks, so that
    nothing refers to itself.
    """

    __slots__ = (
        "blocks", "children", "computed", "copy_from", "decoders", "filled_in", "filler", "freed", "id", "lender", "lends",
        "num_blocks", "parent", "size", "stamp", "start", "task", "tokens", "users",
    )  # fmt: skip

    def __init__(self, context_id: int, parent: Context | None, tokens: int) -> None:
        self.id = context_id
        self.parent = parent
        self.start: int = parent.end if parent is not None else 0
        self.tokens: int = tokens
        self.computed = 0
        self.size = 0
        self.users = 0  # running tasks whose chain it is in
        self.children = 0
        self.stamp = 0  # when it was last used; below 0: it is gone
        self.num_blocks = 0
        self.lender: Context | None = None  # the predecessor whose last block is our first
        self.freed = False  # nobody will ask for it again: it goes with its last user and child
        self.lends = False  # a context goes on in our last block
        self.task: Hashable = None  # the key of the task whose output it is, until that ends
        self.decoders = 0  # those of its users that decode
        self.filler = NOBODY  # who computes it at present
        self.filled_in = -1  # the batch that last computed some of it
        self.copy_from = NO_COPY  # our first block begins as a copy of this one, still to be made
        self.blocks = NO_BLOCKS  # where they are numbered

    @property
    def end(self) -> int:
        return self.start + self.tokens

    @property
    def generating(self) -> bool:
        """It is the output of a task that has not ended."""
        return self.task is not None

    @property
    def owned(self) -> int:
        """Its blocks that nobody held before it."""
        return self.num_blocks - (self.lender is not None)

    def add_blocks(self, count: int, blocks: array[int]) -> None:
        """They come behind those that it has; `blocks` is the context's from now on."""
        self.num_blocks += count
        if self.blocks:
            self.blocks.extend(blocks)
        else:
            self.blocks = blocks

    def begin(self, copies: list[tuple[int, int]]) -> None:
        """It is computed now: the copy that must precede this, if any, goes to `copies`."""
        if self.copy_from != NO_COPY:
            if self.blocks:
                copies.append((self.copy_from, self.blocks[0]))
            self.copy_from = NO_COPY

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


@mypyc_attr(acyclic=True)
class ContextTree:
    """All contexts of an engine. Sums are kept as they change: no question costs a walk."""

    __slots__ = (
        "_clock", "_evicted", "_index", "_looked", "_nameless", "_oldest", "held_tokens", "pool", "retained_blocks",
        "stored_tokens",
    )  # fmt: skip

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.held_tokens = 0  # room held by contexts in use, shared ones once
        self.stored_tokens = 0  # room held by all
        self.retained_blocks = 0  # what evicting every context that is not in use would free
        self._index: dict[int, Context] = {}
        self._nameless: dict[Context, None] = {}  # their id may name another by now
        self._evicted: list[int] | None = None
        # Those that were retained at `_looked`, the least recently used last. It is made when one must be given up and nothing
        # is left of the one before: what was let go since comes behind, so that its cost is one of letting go.
        self._oldest: list[Context] = []
        self._looked = 0
        self._clock = 0

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
        return -(-context.end // block_size) - context.start // block_size - context.num_blocks

    def grow(self, context: Context, size: int) -> None:
        """Makes room in a context in use for `size` tokens; evicts what it must. Raises IndexError when nothing is left
        to evict."""
        if size <= context.size:
            return
        block_size = self.pool.block_size
        first = context.start // block_size
        if not context.num_blocks and context.start % block_size:
            before = context.predecessor()
            assert before is not None, "a context that starts inside a block has a predecessor"
            if not before.lends:
                before.lends, context.lender = True, before
                context.add_blocks(1, self.pool.share(before.blocks))
            else:
                context.add_blocks(1, self._take(1))
                context.copy_from = self.pool.last(before.blocks)
        if more := -(-(context.start + size) // block_size) - first - context.num_blocks:
            context.add_blocks(more, self._take(more))
        self._resize(context, size)

    def cut(self, context: Context, size: int) -> None:
        """Gives up the room beyond `size` tokens, and its blocks. Never called for a retained context, whose blocks are
        counted."""
        if size < context.size:
            owned = context.owned
            dropped = self.shrink(context, size)
            self.pool.give(owned - context.owned, dropped)

    def shrink(self, context: Context, size: int) -> array[int]:
        """As `cut`, but the blocks that this frees, by how many it `owned` fewer, are the caller's to give back."""
        if size >= context.size:
            return NO_BLOCKS
        block_size = self.pool.block_size
        keep = -(-(context.start + size) // block_size) - context.start // block_size if size else 0
        dropped, context.num_blocks = context.blocks, keep
        if keep:
            if dropped:
                dropped = dropped[keep:]
                del context.blocks[keep:]
        else:
            context.blocks = NO_BLOCKS
            context.copy_from = NO_COPY
            if context.lender is not None:
                dropped = self.pool.unshare(dropped)
                context.lender.lends = False
                context.lender = None
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
            if gen.num_blocks or gen.start % block_size == 0:
                blocks += (gen.start + gen.size) % block_size == 0
                continue
            before = gen.predecessor()
            assert before is not None, "a context that starts inside a block has a predecessor"
            blocks += before.lends or before in claimed
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

    def release(self, chain: tuple[Context, ...]) -> None:
        """A running task no longer uses these contexts, head first. What was not computed is given up; the rest stays."""
        for place in range(len(chain) - 1, -1, -1):
            context = chain[place]
            self._clock += 1
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
            self.cut(context, context.computed)
            self.retained_blocks += context.owned

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
        while self._oldest or self._look():
            context = self._oldest.pop()
            if 0 <= context.stamp <= self._looked and not context.users and not context.children:
                self.retained_blocks -= context.owned
                self._report(context)
                self._remove(context)
                return True
        return False

    def _look(self) -> bool:
        """Puts the retained contexts in the order of their last uses. Whether there are any."""
        self._oldest = [context for context in self if not context.users]
        self._oldest.sort(key=_last_use, reverse=True)
        self._looked = self._clock
        return bool(self._oldest)

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
            self.cut(context, 0)
            parent, context.parent, context.stamp = context.parent, None, -1
            if parent is None:
                return
            parent.children -= 1
            if parent.users or parent.children or not parent.freed:
                return
            self.retained_blocks -= parent.owned
            context = parent

    def _report(self, context: Context) -> None:
        if not context.freed and not context.generating:
            if self._evicted is None:
                self._evicted = []
            self._evicted.append(context.id)


def _incomplete(context: Context | None) -> bool:
    return context is not None and context.computed < context.tokens
