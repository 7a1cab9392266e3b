"""The prototype's attention: every row's keys and values are gathered from the pages into a buffer, then attended to.

It reads and writes what it gathers once more than the paged functions do; it is here to be compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from parrot.engine.builtin.attention.base import AttentionRow
from parrot.engine.builtin.attention.rows import new_slots
from parrot.engine.builtin.attention.varlen import VarlenAttention, VarlenPlan, all_in_order
from parrot.engine.builtin.kv_cache import KVCache, to_device
from parrot.engine.builtin.models.config import ModelConfig


class BufferPlan(NamedTuple):
    slots: Tensor  #: [tokens], where each token's KV goes
    rows: VarlenPlan


class BufferedAttention:
    """See the module."""

    wants_chains = False
    buckets: Sequence[int] = ()
    fill_buckets: Sequence[int] = ()

    def __init__(self, config: ModelConfig, cache: KVCache) -> None:
        self._heads = config.num_heads
        self._cache = cache
        self._varlen = VarlenAttention(config, cache)

    def arrange(self, decode_rows: Sequence[AttentionRow]) -> list[int]:
        return all_in_order(decode_rows)

    def plan(self, rows: Sequence[AttentionRow], decode_rows: int = 0, padded_to: int = 0, fills: bool = False) -> BufferPlan:
        device = self._cache.layers[0].device
        return BufferPlan(to_device(new_slots(rows, self._cache.page_tokens), device), self._varlen.plan(rows))

    def attend(self, plan: BufferPlan, layer: int, heads: Tensor) -> Tensor:
        self._cache.write(layer, plan.slots, heads[:, self._heads :])
        return self._varlen.attend(plan.rows, layer, heads).flatten(1)
