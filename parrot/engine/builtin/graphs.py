"""Decode iterations as CUDA graphs, one a bucket of rows: a replay costs one launch where the layers would cost hundreds.

What changes between replays lies in memory that stays where it is: the inputs here, the attention function's plan there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from parrot.engine.builtin.attention.base import Attention
from parrot.engine.builtin.attention.rows import to_device
from parrot.engine.builtin.models.decoder import Decoder


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    logits: Tensor
    chosen: Tensor


class DecodeGraphs:
    """`tokens`: the tasks' last tokens, by slot, the last slot being padding's. A replay reads each row's token there and
    writes the most probable next one back."""

    def __init__(self, decoder: Decoder, attention: Attention, tokens: Tensor) -> None:
        self._decoder = decoder
        self._attention = attention
        self._tokens = tokens
        self._spare = tokens.shape[0] - 1
        most = attention.buckets[-1]
        self._inputs = torch.zeros((2, most), dtype=torch.int64, device=tokens.device)  # slots, positions
        self._inputs[0] = self._spare
        self._rows = torch.arange(most, device=tokens.device)
        self._graphs: dict[int, _Captured] = {}
        for bucket in reversed(attention.buckets):  # the largest first: smaller ones fit into its memory
            self._graphs[bucket] = self._capture(bucket)

    @torch.inference_mode()
    def _capture(self, bucket: int) -> _Captured:
        plan = self._attention.plan([], 0, bucket)

        def compute() -> tuple[Tensor, Tensor]:
            slots, positions = self._inputs[0, :bucket], self._inputs[1, :bucket]
            logits = self._decoder.forward(
                self._tokens.index_select(0, slots),
                positions,
                lambda layer, heads: self._attention.attend(plan, layer, heads),
                self._rows[:bucket],
            )
            chosen = logits.argmax(dim=-1)
            self._tokens.index_copy_(0, slots, chosen)
            return logits, chosen

        compute()  # compiles kernels and makes libraries ready, which a capture must not do
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values())).graph.pool() if self._graphs else None
        with torch.cuda.graph(graph, pool=pool):
            logits, chosen = compute()
        return _Captured(graph, logits, chosen)

    def replay(self, bucket: int, slots: Sequence[int], positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Logits [bucket, vocab_size] and the most probable tokens [bucket]: right until the next replay. The attention
        function's plan must be that of these rows."""
        staged = np.zeros((2, bucket), dtype=np.int64)
        staged[0] = self._spare
        staged[0, : len(slots)] = slots
        staged[1, : len(positions)] = positions
        self._inputs[:, :bucket].copy_(to_device(staged, self._inputs.device))
        captured = self._graphs[bucket]
        captured.graph.replay()
        return captured.logits, captured.chosen
