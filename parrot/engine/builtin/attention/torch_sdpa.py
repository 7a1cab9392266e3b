"""Attention by torch's scaled-dot-product function, on any device.

Decoding rows attend together, from windows (windows.py). A row that computes several tokens attends alone: to its own
tokens when it begins its sequence, else to what its pages hold. Query heads that share a key are batched as queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor

from parrot.engine.builtin.attention.base import AttentionRow
from parrot.engine.builtin.attention.windows import WindowPlan, Windows
from parrot.engine.builtin.kv_cache import KVCache
from parrot.engine.builtin.models.config import ModelConfig


class FillPlan(NamedTuple):
    """A row that attends alone: packed tokens [first, last). `pages` None: it begins its sequence.

    `mask`: [tokens, stop], which positions each token sees; None for a single token, or where `pages` is None.
    """

    first: int
    last: int
    stop: int
    pages: Tensor | None
    mask: Tensor | None


class SdpaPlan(NamedTuple):
    tokens: int
    slots: Tensor  #: [tokens], where each token's KV goes
    windows: list[WindowPlan]
    fills: list[FillPlan]


class SdpaAttention:
    """See the module."""

    wants_chains = False
    buckets: Sequence[int] = ()
    fill_buckets: Sequence[int] = ()

    def __init__(self, config: ModelConfig, cache: KVCache) -> None:
        self._heads = config.num_heads
        self._kv_heads = config.num_kv_heads
        self._group = config.num_heads // config.num_kv_heads
        self._head_dim = config.head_dim
        self._cache = cache
        self._device = cache.layers[0].device
        self._windows = Windows(cache, cache.num_pages * cache.page_tokens)

    def arrange(self, decode_rows: Sequence[AttentionRow]) -> list[int]:
        return list(range(len(decode_rows)))

    def plan(self, rows: Sequence[AttentionRow], decode_rows: int = 0, padded_to: int = 0, fills: bool = False) -> SdpaPlan:
        slots: list[int] = []
        single: list[tuple[int, AttentionRow]] = []
        several: list[tuple[int, AttentionRow]] = []
        for row in rows:
            (single if row.stop - row.start == 1 else several).append((len(slots), row))
            slots += _slots(row, self._cache.page_tokens)
        windows, left_over = self._windows.plan(single)
        return SdpaPlan(
            tokens=len(slots),
            slots=torch.tensor(slots, device=self._device),
            windows=windows,
            fills=[self._fill(first, row) for first, row in (*left_over, *several)],
        )

    def _fill(self, first: int, row: AttentionRow) -> FillPlan:
        count = row.stop - row.start
        if not row.start:
            return FillPlan(first, first + count, row.stop, None, None)
        used = -(-row.stop // self._cache.page_tokens)
        pages = torch.tensor(row.pages[:used], device=self._device)
        mask = None
        if count > 1:
            mask = torch.ones(count, row.stop, dtype=torch.bool, device=self._device).tril_(row.start)
        return FillPlan(first, first + count, row.stop, pages, mask)

    def attend(self, plan: SdpaPlan, layer: int, heads: Tensor) -> Tensor:
        queries, kv = heads[:, : self._heads], heads[:, self._heads :]
        self._cache.write(layer, plan.slots, kv)
        out = torch.empty((plan.tokens, self._heads, self._head_dim), dtype=heads.dtype, device=heads.device)
        for window in plan.windows:
            out.index_copy_(0, window.tokens, self._decode(window, layer, queries, kv))
        for fill in plan.fills:
            out[fill.first : fill.last] = self._attend_alone(fill, layer, queries, kv)
        return out.flatten(1)

    def _decode(self, plan: WindowPlan, layer: int, queries: Tensor, kv: Tensor) -> Tensor:
        """[rows, heads, head_dim], in the window's order."""
        keys, values = plan.window.update(plan, layer, kv)
        query = queries.index_select(0, plan.tokens).view(plan.rows, self._kv_heads, self._group, self._head_dim)
        found = functional.scaled_dot_product_attention(query, keys, values, attn_mask=plan.mask)
        return found.reshape(plan.rows, self._heads, self._head_dim)

    def _attend_alone(self, plan: FillPlan, layer: int, queries: Tensor, kv: Tensor) -> Tensor:
        """[tokens of the row, heads, head_dim]"""
        if plan.pages is None:
            seen = kv[plan.first : plan.last]
        else:
            seen = self._cache.read(layer, plan.pages, plan.stop)
        # [kv_heads, 1 or group, tokens, head_dim]: the heads of a group read the same keys without a copy of them.
        keys, values = (
            part.transpose(0, 1).unsqueeze(1).expand(-1, self._group, -1, -1)
            for part in (seen[:, : self._kv_heads], seen[:, self._kv_heads :])
        )
        grouped = queries[plan.first : plan.last].view(-1, self._kv_heads, self._group, self._head_dim)
        query = grouped.permute(1, 2, 0, 3)
        causal = plan.pages is None
        found = functional.scaled_dot_product_attention(query, keys, values, attn_mask=plan.mask, is_causal=causal)
        return found.permute(2, 0, 1, 3).flatten(1, 2)


def _slots(row: AttentionRow, page_tokens: int) -> list[int]:
    """Where the row's new tokens go."""
    pages = row.pages
    return [pages[p // page_tokens] * page_tokens + p % page_tokens for p in range(row.start, row.stop)]
