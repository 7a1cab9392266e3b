"""Attention over the paged cache, in place: plans in memory that stays where it is, and the kernels that follow them.

Everything that changes from iteration to iteration (page tables, work items, their number) is one array of int32, written
over in one copy. A captured graph therefore replays `attend` for whatever batch was planned last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from parrot.engine.builtin.attention.base import AttentionRow
from parrot.engine.builtin.attention.prefix_groups import Segment
from parrot.engine.builtin.attention.work_items import BLOCK, FIELDS, Fill, Pace, cut
from parrot.engine.builtin.kv_cache import KVCache
from parrot.engine.builtin.models.config import ModelConfig

#: Queries (rows × heads of a KV head) of a wide item.
WIDE = 64
#: Programs per multiprocessor, and launch options, of narrow and of wide items: measured with benchmarks/gpu_attention.py.
NARROW_PROGRAMS, NARROW_OPTIONS = 8, {"BLOCK_N": BLOCK, "STAGES": 2, "num_warps": 4}
WIDE_PROGRAMS, WIDE_OPTIONS = 2, {"BLOCK_N": BLOCK, "STAGES": 3, "num_warps": 4}


class _Layout(NamedTuple):
    """Views of the int32 array, on one side."""

    counts: Any
    first: Any
    wide: Any
    narrow: Any
    tables: Any


def most_partials(max_rows: int, max_tokens: int) -> int:
    """Partial results that there is room for."""
    return 4096 + max(8 * max_rows, 2 * max_tokens)


class PagedRows:
    """Plans and attends decoding rows, and fills behind them: at most `max_rows` sequences of at most `max_seq_len` tokens, at
    most `max_tokens` packed tokens (or one a sequence, where that is more).

    `shares`: whether plans may have segments; their kernel is then launched (or captured) with every `attend`.
    """

    def __init__(
        self,
        config: ModelConfig,
        cache: KVCache,
        max_rows: int,
        max_seq_len: int,
        shares: bool = False,
        max_tokens: int = 0,
    ) -> None:
        self._shares = shares
        self._cache = cache
        self._heads = config.num_heads
        self._kv_heads = config.num_kv_heads
        self._dim = config.head_dim
        group = config.num_heads // config.num_kv_heads
        self._narrow_m = max(16, 1 << (group - 1).bit_length())
        self._wide_m = max(WIDE, self._narrow_m)
        self.rows_per_item = self._wide_m // group
        device = self._device = cache.layers[0].device
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
        self._processors = processors
        self._pace = Pace(*(max(1, n * processors // self._kv_heads) for n in (WIDE_PROGRAMS, NARROW_PROGRAMS)))
        max_tokens = max(max_rows, max_tokens)
        self.most_partials = most_partials(max_rows, max_tokens)
        pages = -(-max_seq_len // cache.page_tokens)
        parts = ((2,), (max_tokens + 1,), (self.most_partials, FIELDS), (self.most_partials, FIELDS), (max_rows, pages))
        self._shapes = parts
        self._memory = torch.zeros(sum(int(np.prod(shape)) for shape in parts), dtype=torch.int32, device=device)
        self._on_device = self._views(self._memory)
        self._partials = torch.empty((self.most_partials, self._heads, self._dim), dtype=torch.float32, device=device)
        self._lse = torch.empty((self.most_partials, self._heads), dtype=torch.float32, device=device)

    def _views(self, flat: Any) -> _Layout:
        found, first = [], 0
        for shape in self._shapes:
            size = int(np.prod(shape))
            found.append(flat[first : first + size].reshape(shape))
            first += size
        return _Layout(*found)

    def update(
        self,
        rows: Sequence[AttentionRow],
        segments: Sequence[Segment] = (),
        own: Sequence[int] | None = None,
        fills: Sequence[AttentionRow] = (),
    ) -> None:
        """Plans `rows`, which decode, arranged so that those of a segment are neighbours, and `fills` behind them. Queued
        behind what the device still computes."""
        items = cut(
            [row.stop for row in rows],
            segments,
            [0] * len(rows) if own is None else own,
            [Fill(row.start, row.stop - row.start) for row in fills],
            rows_per_item=self.rows_per_item,
            pace=self._pace,
            most_partials=self.most_partials,
        )
        pinned = self._device.type == "cuda"
        staged = torch.empty(self._memory.shape, dtype=torch.int32, pin_memory=pinned)  # what is not written is not read
        host = self._views(staged.numpy())
        host.counts[:] = len(items.wide), len(items.narrow)
        host.first[: len(items.first)] = items.first
        host.first[len(items.first) :] = items.first[-1]
        host.wide[: len(items.wide)] = items.wide
        host.narrow[: len(items.narrow)] = items.narrow
        page_tokens = self._cache.page_tokens
        for index, row in enumerate((*rows, *fills)):
            used = -(-row.stop // page_tokens)
            host.tables[index, :used] = row.pages[:used]
        self._memory.copy_(staged, non_blocking=pinned)

    def attend(self, layer: int, queries: Tensor, fills: bool = False) -> Tensor:
        """queries: [padded tokens, num_heads, head_dim]. Gives [padded tokens, num_heads, head_dim]; zeros for padding.
        `fills`: whether the plan may have any."""
        from parrot.engine.builtin.attention.split_kv import merge_partials, partial_attention

        plan = self._on_device
        kinds = [(plan.narrow, plan.counts[1:2], self._narrow_m, NARROW_PROGRAMS, NARROW_OPTIONS, False)]
        if fills or self._shares:
            kinds.append((plan.wide, plan.counts[0:1], self._wide_m, WIDE_PROGRAMS, WIDE_OPTIONS, fills))
        for items, count, block_m, programs, options, causal in kinds:
            partial_attention(
                queries, self._cache.layers[layer], plan.tables, items, count, plan.first, self._partials, self._lse,
                kv_heads=self._kv_heads, page=self._cache.page_tokens, scale=self._dim**-0.5, block_m=block_m,
                programs=programs * self._processors, causal=causal, options=options,
            )  # fmt: skip
        out = torch.empty((queries.shape[0], self._heads, self._dim), dtype=queries.dtype, device=queries.device)
        merge_partials(self._partials, self._lse, plan.first, out)
        return out
