"""The interface of attention functions: how new tokens are written to the paged cache and read all before them.

One iteration is planned once and attended to in every layer. A function may keep what helps it from one iteration to
the next; it must give the same values without.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from parrot.engine.batches import Span


class AttentionRow(NamedTuple):
    """A sequence's part of the iteration: positions [start, stop), whose tokens are the next stop − start of the packed
    ones. `pages`: its pages from position 0 on. `key`: whose it is, the same from iteration to iteration and nobody else's.
    `chain`: which context each position belongs to, root first; only for functions that ask for it."""

    key: Hashable
    start: int
    stop: int
    pages: Sequence[int]
    chain: Sequence[Span] = ()


class Attention(Protocol):
    """Made for one KV cache and one model's heads."""

    #: whether rows come with their chains
    wants_chains: bool
    #: numbers of tokens that it can be captured for in a graph: of iterations that only decode, and of those with fills; empty:
    #: it cannot
    buckets: Sequence[int]
    fill_buckets: Sequence[int]

    def arrange(self, decode_rows: Sequence[AttentionRow]) -> list[int]:
        """The order in which it wants decode rows, by their indices."""

    def plan(self, rows: Sequence[AttentionRow], decode_rows: int = 0, padded_to: int = 0, fills: bool = False) -> Any:
        """What `attend` needs in this iteration. Called once an iteration, in the order in which they are computed.

        The first `decode_rows` rows compute one token each; 0: rows of all kinds lie in any order. `padded_to`: the packed
        tokens are padded to so many, one of `buckets` or, with `fills`, of `fill_buckets`. Plans that are padded alike are in
        the same memory: a captured `attend` follows them. 0: as many tokens as there are.
        """

    def attend(self, plan: Any, layer: int, heads: Tensor) -> Tensor:
        """Writes the new keys and values, then attends causally.

        heads: [tokens, num_heads + 2 × num_kv_heads, head_dim], positions applied. Gives [tokens, num_heads × head_dim].
        """
