"""Which blocks of the KV cache are free, and how many contexts hold each of the others. It knows no context and no token.

Every block that is not free has one owner; further holders (a descendant that goes on in its ancestor's partly filled
last block) share it. An owner outlives its sharers, so that blocks are taken and given back as whole slices and
only shared ones need a count.
"""

from __future__ import annotations

from array import array
from typing import Final

_NUMBERED: Final[array[int]] = array("i")  #: each number at its own place, as far as any pool has needed them


def _numbers(first: int, end: int) -> array[int]:
    """The numbers from `first` up to `end`. They are cut from a table, for an array takes numbers one by one slowly."""
    if end > len(_NUMBERED):
        _NUMBERED.extend(range(len(_NUMBERED), max(end, 2 * len(_NUMBERED))))
    return _NUMBERED[first:end]


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens each, numbered from 0."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool of {num_blocks} blocks of {block_size} tokens: both must be at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._fresh = 0  # blocks from here on were never taken: a pool costs memory only for what was used
        self._returned = array("i")
        self._sharers: dict[int, int] = {}
        self.free = num_blocks  #: blocks that nobody holds, those owed left out
        self._owed = 0

    def take(self, count: int) -> array[int]:
        """`count` free blocks, now held once. Raises IndexError when there are fewer: a pool is never over-allocated."""
        if count > self.free:
            raise IndexError(f"{count} blocks asked of a pool with {self.free} free")
        reused = min(count, len(self._returned))
        taken = self._returned[len(self._returned) - reused :]
        del self._returned[len(self._returned) - reused :]
        if fresh := count - reused:
            taken.extend(_numbers(self._fresh, self._fresh + fresh))
            self._fresh += fresh
        self.free -= count
        return taken

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

    def give(self, blocks: array[int]) -> None:
        """The owner gives `blocks` back. Nobody shares them any more."""
        if not blocks:
            return
        if self._sharers and blocks[-1] in self._sharers:  # only a last block is ever shared
            raise ValueError("a block was given back while a context still shares it")
        self._returned.extend(blocks)
        self.free += len(blocks)

    def share(self, block: int) -> None:
        """One more context holds `block`."""
        self._sharers[block] = self._sharers.get(block, 0) + 1

    def unshare(self, block: int) -> None:
        """One of the sharers of `block` lets go."""
        if self._sharers[block] == 1:
            del self._sharers[block]
        else:
            self._sharers[block] -= 1

    def references(self, block: int) -> int:
        """How many contexts hold `block`, which must not be free."""
        return 1 + self._sharers.get(block, 0)
