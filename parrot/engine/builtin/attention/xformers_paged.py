"""Paged attention, by kernels that read the pages in place: split-k for decode rows, tiles of rows for fills.

Iterations up to GRAPH_TOKENS are padded to a bucket, in memory that stays where it is, so that a graph can be captured for each
bucket. Larger ones fill by xformers' variable-length kernels, which multiply faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from parrot.engine.builtin.attention.base import AttentionRow
from parrot.engine.builtin.attention.paged_rows import PagedRows
from parrot.engine.builtin.attention.rows import new_slots
from parrot.engine.builtin.attention.varlen import VarlenAttention, VarlenPlan, all_in_order, packed
from parrot.engine.builtin.kv_cache import KVCache, to_device
from parrot.engine.builtin.models.config import ModelConfig

#: Decode rows are padded to the next of these, or to the largest batch.
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
#: Tokens of iterations with fills: below the first, a product takes as long as reading its weights; above, multiples of what
#: it computes at a time.
FILL_BUCKETS = (64, *range(128, 1024, 64), *range(1024, 8192, 128))
#: A GPU computes an iteration of more tokens for longer than the processor needs to launch it kernel by kernel (some 30 ms),
#: and there xformers' kernels, which are launched so, multiply faster than ours.
GRAPH_TOKENS = 2560


def buckets_up_to(most: int, sizes: Sequence[int] = BUCKETS) -> tuple[int, ...]:
    return (*(size for size in sizes if size < most), most)


class PagedPlan(NamedTuple):
    """`slots`: [tokens], where each token's KV goes. `paged`: the tokens that are attended to page by page, the first ones;
    `mixed`: there may be fills among them. `rest`: those behind them, all of fills."""

    slots: Tensor
    paged: int
    mixed: bool
    rest: VarlenPlan | None


class PagedAttention:
    """See the module. Padding rows write into the cache's spare page."""

    wants_chains = False
    shares = False  #: whether decode rows are planned with segments

    def __init__(self, config: ModelConfig, cache: KVCache, max_rows: int, max_seq_len: int, graph_tokens: int) -> None:
        self.buckets: Sequence[int] = buckets_up_to(max_rows)
        self.fill_buckets: Sequence[int] = buckets_up_to(graph_tokens, FILL_BUCKETS)
        self._heads = config.num_heads
        self._cache = cache
        self._device = cache.layers[0].device
        self._paged = PagedRows(config, cache, max_rows, max_seq_len, self.shares, graph_tokens)
        self._varlen = VarlenAttention(config, cache)
        self._slots = torch.zeros(max(max_rows, graph_tokens), dtype=torch.int64, device=self._device)

    def arrange(self, decode_rows: Sequence[AttentionRow]) -> list[int]:
        return all_in_order(decode_rows)

    def plan(self, rows: Sequence[AttentionRow], decode_rows: int = 0, padded_to: int = 0, fills: bool = False) -> PagedPlan:
        decoding, filling = rows[:decode_rows], rows[decode_rows:]
        page_tokens = self._cache.page_tokens
        if not padded_to:
            if decoding:
                self._plan_pages(decoding, ())
            rest = self._varlen.plan(filling) if filling else None
            return PagedPlan(to_device(new_slots(rows, page_tokens), self._device), decode_rows, False, rest)
        if rows:
            self._plan_pages(decoding, filling)
        written = np.full(padded_to, self._cache.spare_slot, dtype=np.int64)
        found = new_slots(rows, page_tokens)
        written[: len(found)] = found
        slots = self._slots[:padded_to]
        slots.copy_(to_device(written, self._device))
        return PagedPlan(slots, padded_to, fills, None)

    def _plan_pages(self, decoding: Sequence[AttentionRow], filling: Sequence[AttentionRow]) -> None:
        self._paged.update(decoding, fills=filling)

    def attend(self, plan: PagedPlan, layer: int, heads: Tensor) -> Tensor:
        self._cache.write(layer, plan.slots, heads[:, self._heads :])
        parts = []
        if plan.paged:
            parts.append(self._paged.attend(layer, heads[: plan.paged, : self._heads], plan.mixed))
        if plan.rest is not None:
            parts.append(self._varlen.attend(plan.rest, layer, heads[plan.paged :]))
        return packed(parts)
