"""Which blocks of the KV cache are free, and how many contexts hold each of the others. It knows no context and no token.

Every block that is not free has one owner; further holders (a descendant that goes on in its ancestor's partly filled
last block) share it. An owner outlives its sharers, so that blocks are taken and given back as whole slices and
only shared ones need a count.

An engine that computes nothing has no use for the blocks themselves: its pool counts them (`BlockPool`), and nobody keeps lists
of them. One that does says which they are too (`NumberedBlocks`). Both say the same of how many are free.
"""

from __future__ import annotations

from array import array
from typing import Final

from mypy_extensions import mypyc_attr

NO_BLOCKS: Final[array[int]] = array("i")  #: shared by all that have none: it is replaced, never added to

_NUMBERED: Final[array[int]] = array("i")  #: each number at its own place, as far as any pool has needed them


def _numbers(first: int, end: int) -> array[int]:
    """The numbers from `first` up to `end`. They are cut from a table, for an array takes numbers one by one slowly."""
    if end > len(_NUMBERED):
        _NUMBERED.extend(range(len(_NUMBERED), max(end, 2 * len(_NUMBERED))))
    return _NUMBERED[first:end]


@mypyc_attr(acyclic=True)
class BlockPool:
    """`num_blocks` blocks of `block_size` tokens each, which are counted: each list of blocks here is empty."""

    __slots__ = ("_owed", "block_size", "free", "num_blocks")

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool of {num_blocks} blocks of {block_size} tokens: both must be at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.free = num_blocks  #: blocks that nobody holds, those owed left out
        self._owed = 0

    def take(self, count: int) -> array[int]:
        """`count` free blocks, now held once. Raises IndexError when there are fewer: a pool is never over-allocated."""
        if count > self.free:
            raise IndexError(f"{count} blocks asked of a pool with {self.free} free")
        self.free -= count
        return NO_BLOCKS

    def owe(self, count: int) -> None:
        """`count` free blocks are spoken for; which they are is decided by `take_owed`. Raises IndexError as `take` does."""
        if count > self.free:
            raise IndexError(f"{count} blocks asked of a pool with {self.free} free")
        self.free -= count
        self._owed += count

    def take_owed(self, count: int) -> array[int]:
        """`count` of the blocks that were spoken for, now held once."""
        if count > self._owed:
            raise IndexError(f"{count} blocks asked of a pool that owes {self._owed}")
        self._owed -= count
        self.free += count
        return self.take(count)

    def give(self, count: int, blocks: array[int]) -> None:
        """The owner gives `count` blocks back, which are `blocks`. Nobody shares them any more."""
        self.free += count

    def share(self, blocks: array[int]) -> array[int]:
        """One more context holds the last of `blocks`: that one."""
        return NO_BLOCKS

    def unshare(self, blocks: array[int]) -> array[int]:
        """One of the sharers of the first of `blocks` lets go of it: the others."""
        return NO_BLOCKS

    def last(self, blocks: array[int]) -> int:
        """The number of the last of `blocks`, where they have numbers."""
        return 0


@mypyc_attr(acyclic=True)
class NumberedBlocks(BlockPool):
    """A pool whose blocks are numbered from 0."""

    __slots__ = ("_fresh", "_returned", "_sharers")

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks, block_size)
        self._fresh = 0  # blocks from here on were never taken: a pool costs memory only for what was used
        self._returned = array("i")
        self._sharers: dict[int, int] = {}

    def take(self, count: int) -> array[int]:
        super().take(count)
        reused = min(count, len(self._returned))
        taken = self._returned[len(self._returned) - reused :]
        del self._returned[len(self._returned) - reused :]
        if fresh := count - reused:
            taken.extend(_numbers(self._fresh, self._fresh + fresh))
            self._fresh += fresh
        return taken

    def give(self, count: int, blocks: array[int]) -> None:
        if not blocks:
            return
        if self._sharers and blocks[-1] in self._sharers:  # only a last block is ever shared
            raise ValueError("a block was given back while a context still shares it")
        self._returned.extend(blocks)
        self.free += count

    def share(self, blocks: array[int]) -> array[int]:
        block = blocks[-1]
        self._sharers[block] = self._sharers.get(block, 0) + 1
        return blocks[-1:]

    def unshare(self, blocks: array[int]) -> array[int]:
        block = blocks[0]
        if self._sharers[block] == 1:
            del self._sharers[block]
        else:
            self._sharers[block] -= 1
        return blocks[1:]

    def last(self, blocks: array[int]) -> int:
        return blocks[-1]

    def references(self, block: int) -> int:
        """How many contexts hold `block`, which must not be free."""
        return 1 + self._sharers.get(block, 0)
