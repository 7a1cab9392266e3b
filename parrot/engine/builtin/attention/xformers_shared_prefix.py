"""Paged attention that reads a prefix once for all decode rows that share it, however the prefixes are nested.

Partial attention over each shared part for all its rows, over their own parts for each row, merged by their log-sum-exps.
Without a shared part that is worth it, it is the paged function.
"""

from __future__ import annotations

from collections.abc import Sequence

from parrot.engine.builtin.attention.base import AttentionRow
from parrot.engine.builtin.attention.prefix_groups import Groups, shared_prefixes
from parrot.engine.builtin.attention.xformers_paged import PagedAttention
from parrot.engine.builtin.kv_cache import KVCache
from parrot.engine.builtin.models.config import ModelConfig

#: Bytes of a layer's reading that a shared part must save, for its kernel to be worth its launch: measured with
#: benchmarks/gpu_attention.py.
LEAST_SAVED_BYTES = 32 << 20


class SharedPrefixAttention(PagedAttention):
    """See the module."""

    wants_chains = True
    shares = True

    def __init__(self, config: ModelConfig, cache: KVCache, max_rows: int, max_seq_len: int, graph_tokens: int) -> None:
        super().__init__(config, cache, max_rows, max_seq_len, graph_tokens)
        layer = cache.layers[0]
        self._least_saved = LEAST_SAVED_BYTES // (layer[0].numel() * layer.itemsize)

    def _groups(self, rows: Sequence[AttentionRow]) -> Groups:
        return shared_prefixes(
            [row.chain for row in rows], self._cache.page_tokens, self._least_saved, self._paged.most_partials
        )

    def arrange(self, decode_rows: Sequence[AttentionRow]) -> list[int]:
        return self._groups(decode_rows).order

    def _plan_pages(self, decoding: Sequence[AttentionRow], filling: Sequence[AttentionRow]) -> None:
        groups = self._groups(decoding)  # of arranged rows: they stay in order
        self._paged.update(decoding, groups.segments, groups.own, filling)
