"""Iterations that are padded to a bucket, as CUDA graphs: a replay costs one launch where the layers would cost hundreds.

What changes between replays lies in memory that stays where it is: the inputs here, the attention function's plan there. On a
device without graphs the same is computed step by step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parrot.engine.builtin.attention.base import Attention
from parrot.engine.builtin.kv_cache import to_device
from parrot.engine.builtin.models.decoder import Decoder

#: (logits [rows, vocab_size], the most probable tokens [rows])
Computed = tuple[Tensor, Tensor]


class Bucket(NamedTuple):
    """`tokens`: packed ones, with padding. `fills`: some of them may be given; else each is decoded and sampled."""

    tokens: int
    fills: bool


class Inputs:
    """Of one iteration, staged on the host, with padding that does no harm. Where a token is given as −1, the last one of the
    slot beside it is meant. Each sampled row names a packed token and the slot for the next one."""

    def __init__(self, bucket: Bucket, spare_slot: int) -> None:
        self.staged = np.zeros((5, bucket.tokens), dtype=np.int64)
        self.given, self.slots, self.positions, self.sampled, self.targets = self.staged
        self.slots[:] = self.targets[:] = spare_slot
        if not bucket.fills:
            self.given[:] = -1
            self.sampled[:] = np.arange(bucket.tokens)


class Graphs:
    """`tokens`: the tasks' last tokens, by slot, the last slot being padding's. An iteration reads tokens there and writes the
    most probable next ones back. `capture`: whether there are graphs; they are captured at once, for all buckets."""

    def __init__(self, decoder: Decoder, attention: Attention, tokens: Tensor, capture: bool) -> None:
        self._decoder = decoder
        self._attention = attention
        self._tokens = tokens
        self.spare_slot = tokens.shape[0] - 1
        self._most_rows = attention.buckets[-1]
        self.buckets = [
            *(Bucket(size, False) for size in attention.buckets),
            *(Bucket(size, True) for size in attention.fill_buckets),
        ]
        most = max(bucket.tokens for bucket in self.buckets)
        self._inputs = torch.zeros((5, most), dtype=torch.int64, device=tokens.device)
        # One for all: what a graph gives is kept as long as the graph.
        vocab = decoder.config.vocab_size
        self._logits = torch.empty((self._most_rows, vocab), dtype=torch.float32, device=tokens.device)
        self._captured: dict[Bucket, tuple[torch.cuda.CUDAGraph, Computed]] = {}
        for bucket in sorted(self.buckets, reverse=True) if capture else ():  # smaller ones fit into the largest one's memory
            self._captured[bucket] = self._capture(bucket)

    def bucket(self, tokens: int, fills: bool) -> Bucket | None:
        """That of an iteration of so many packed tokens; None: it is too large for any."""
        return next((b for b in self.buckets if b.fills is fills and b.tokens >= tokens), None)

    def inputs(self, bucket: Bucket) -> Inputs:
        return Inputs(bucket, self.spare_slot)

    @torch.inference_mode()
    def _capture(self, bucket: Bucket) -> tuple[torch.cuda.CUDAGraph, Computed]:
        self._take(self.inputs(bucket).staged)
        compute = self._iteration(bucket, self._attention.plan([], 0, bucket.tokens, bucket.fills))
        compute()  # compiles kernels and makes libraries ready, which a capture must not do
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._captured.values()))[0].pool() if self._captured else None
        with torch.cuda.graph(graph, pool=pool):
            computed = compute()
        return graph, computed

    def _iteration(self, bucket: Bucket, plan: object) -> Callable[[], Computed]:
        rows = min(bucket.tokens, self._most_rows)
        given, slots, positions = self._inputs[:3, : bucket.tokens]
        sampled, targets = self._inputs[3:, :rows]

        def compute() -> Computed:
            found = self._decoder.forward(
                torch.where(given < 0, self._tokens.index_select(0, slots), given),
                positions,
                lambda layer, heads: self._attention.attend(plan, layer, heads),
                sampled,
            )
            logits = self._logits[:rows].copy_(found)
            chosen = logits.argmax(dim=-1)
            self._tokens.index_copy_(0, targets, chosen)
            return logits, chosen

        return compute

    def _take(self, staged: NDArray[np.int64]) -> None:
        self._inputs[:, : staged.shape[1]].copy_(to_device(staged, self._inputs.device))

    def run(self, bucket: Bucket, plan: object, inputs: Inputs) -> Computed:
        """Right until the next run. `plan`: the attention function's, of this iteration, padded to the bucket."""
        self._take(inputs.staged)
        if bucket not in self._captured:
            return self._iteration(bucket, plan)()
        graph, computed = self._captured[bucket]
        graph.replay()
        return computed
