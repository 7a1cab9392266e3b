"""Paged attention: fills by xformers' variable-length kernels, decode rows by split-k kernels that read the pages in place.

Decode rows come first, padded to a bucket, in memory that stays where it is, so that a graph can be captured for each bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from parrot.engine.builtin.attention.base import AttentionRow
from parrot.engine.builtin.attention.paged_decode import PagedDecode
from parrot.engine.builtin.attention.rows import new_slots, to_device
from parrot.engine.builtin.attention.varlen import VarlenAttention, VarlenPlan, all_in_order, packed
from parrot.engine.builtin.kv_cache import KVCache
from parrot.engine.builtin.models.config import ModelConfig

#: Decode rows are padded to the next of these, or to the largest batch.
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)


def buckets_up_to(most: int) -> tuple[int, ...]:
    return (*(size for size in BUCKETS if size < most), most)


class PagedPlan(NamedTuple):
    """`slots`: [tokens], where each token's KV goes. Tokens before `fills_at` decode."""

    slots: Tensor
    fills_at: int
    fills: VarlenPlan | None


class PagedAttention:
    """See the module. Padding rows write into the cache's spare page."""

    wants_chains = False
    shares = False  #: whether decode rows are planned with segments

    def __init__(self, config: ModelConfig, cache: KVCache, max_rows: int, max_seq_len: int) -> None:
        self.buckets: Sequence[int] = buckets_up_to(max_rows)
        self._heads = config.num_heads
        self._cache = cache
        self._device = cache.layers[0].device
        self._decode = PagedDecode(config, cache, max_rows, max_seq_len, self.shares)
        self._varlen = VarlenAttention(config, cache)
        self._slots = torch.zeros(max_rows, dtype=torch.int64, device=self._device)

    def arrange(self, decode_rows: Sequence[AttentionRow]) -> list[int]:
        return all_in_order(decode_rows)

    def plan(self, rows: Sequence[AttentionRow], decode_rows: int = 0, padded_to: int = 0) -> PagedPlan:
        single, several = rows[:decode_rows], rows[decode_rows:]
        written = np.full(padded_to, self._cache.spare_slot, dtype=np.int64)
        written[:decode_rows] = new_slots(single, self._cache.page_tokens)
        if single:
            self._plan_decode(single)
        if not several:
            slots = self._slots[:padded_to]
            slots.copy_(to_device(written, self._device))
            return PagedPlan(slots, padded_to, None)
        written = np.concatenate((written, new_slots(several, self._cache.page_tokens)))
        return PagedPlan(to_device(written, self._device), padded_to, self._varlen.plan(several))

    def _plan_decode(self, rows: Sequence[AttentionRow]) -> None:
        self._decode.update(rows)

    def attend(self, plan: PagedPlan, layer: int, heads: Tensor) -> Tensor:
        self._cache.write(layer, plan.slots, heads[:, self._heads :])
        parts = []
        if plan.fills_at:
            parts.append(self._decode.attend(layer, heads[: plan.fills_at, : self._heads]))
        if plan.fills is not None:
            parts.append(self._varlen.attend(plan.fills, layer, heads[plan.fills_at :]))
        return packed(parts)
