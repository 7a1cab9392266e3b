"""Rows of any number of tokens, attended together by xformers: over their own keys where they begin their sequences, else over
what is gathered from the pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from parrot.engine.builtin.attention import xformers_library
from parrot.engine.builtin.attention.base import AttentionRow
from parrot.engine.builtin.attention.rows import slots
from parrot.engine.builtin.kv_cache import KVCache, to_device
from parrot.engine.builtin.models.config import ModelConfig


class VarlenPlan(NamedTuple):
    """`gathered`: the slots of all keys of all rows; None: every row begins its sequence."""

    bias: Any
    gathered: Tensor | None


class VarlenAttention:
    def __init__(self, config: ModelConfig, cache: KVCache) -> None:
        self._heads = config.num_heads
        self._cache = cache
        self._device = cache.layers[0].device

    def plan(self, rows: Sequence[AttentionRow]) -> VarlenPlan:
        stops = [row.stop for row in rows]
        bias = xformers_library.causal_bias([row.stop - row.start for row in rows], stops, self._device)
        if not any(row.start for row in rows):
            return VarlenPlan(bias, None)
        keys = [slots(row.pages, 0, row.stop, self._cache.page_tokens) for row in rows]
        return VarlenPlan(bias, to_device(np.concatenate(keys), self._device))

    def attend(self, plan: VarlenPlan, layer: int, heads: Tensor) -> Tensor:
        """heads: [tokens, heads + 2 × kv_heads, dim], written to the cache already. Gives [tokens, heads, dim]."""
        queries, kv = heads[:, : self._heads], heads[:, self._heads :]
        if plan.gathered is not None:
            kv = self._cache.layers[layer].index_select(0, plan.gathered)
        kv_heads = kv.shape[1] // 2
        return xformers_library.varlen_attention(queries, kv[:, :kv_heads], kv[:, kv_heads:], plan.bias)


def all_in_order(rows: Sequence[AttentionRow]) -> list[int]:
    """For functions that do not care in which order decode rows come."""
    return list(range(len(rows)))


def packed(parts: Sequence[Tensor]) -> Tensor:
    """[tokens, heads × dim] of the parts' [tokens, heads, dim]."""
    return parts[0].flatten(1) if len(parts) == 1 else torch.cat([part.flatten(1) for part in parts])
