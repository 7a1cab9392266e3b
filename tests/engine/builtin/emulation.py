"""What the GPU kernels of attention compute, in plain torch: to test on a CPU what drives them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

SPLIT_KV = "parrot.engine.builtin.attention.split_kv"


class Bias(NamedTuple):
    query_lengths: Sequence[int]
    key_lengths: Sequence[int]


def causal_bias(query_lengths: Sequence[int], key_lengths: Sequence[int], device: torch.device) -> Bias:
    return Bias(query_lengths, key_lengths)


def varlen_attention(queries: Tensor, keys: Tensor, values: Tensor, bias: Bias) -> Tensor:
    assert sum(bias.query_lengths) == len(queries)
    assert sum(bias.key_lengths) == len(keys)
    group = queries.shape[1] // keys.shape[1]
    out, q, k = [], 0, 0
    for count, seen in zip(bias.query_lengths, bias.key_lengths, strict=True):
        mask = torch.ones(count, seen, dtype=torch.bool).tril(seen - count)
        parts = [x[k : k + seen].repeat_interleave(group, 1).transpose(0, 1) for x in (keys, values)]
        query = queries[q : q + count].transpose(0, 1)
        out.append(torch.nn.functional.scaled_dot_product_attention(query, *parts, attn_mask=mask).transpose(0, 1))
        q, k = q + count, k + seen
    return torch.cat(out)


def partial_attention(
    queries: Tensor, kv: Tensor, tables: Tensor, items: Tensor, count: Tensor, first: Tensor, out: Tensor, lse: Tensor,
    *, kv_heads: int, page: int, scale: float, causal: bool, **_: Any,
) -> None:  # fmt: skip
    group = queries.shape[1] // kv_heads
    for row, rows, of, start, stop, ordinal, sees in items[: int(count)].tolist():
        positions = torch.arange(start, stop)
        found = kv[tables[of].long()[positions // page] * page + positions % page]
        keys, values = (x.repeat_interleave(group, 1) for x in (found[:, :kv_heads], found[:, kv_heads:]))
        scores = torch.einsum("qhd,khd->qhk", queries[row : row + rows], keys) * scale
        if causal:
            hidden = positions > sees + torch.arange(rows).unsqueeze(1)
            assert not hidden[:, 0].any(), "a row that sees nothing of its item"
            scores.masked_fill_(hidden.unsqueeze(1), -torch.inf)
        at = first[row : row + rows].long() + ordinal
        assert torch.isnan(lse[at]).all(), "two items have the same place"
        lse[at] = scores.logsumexp(-1) / torch.log(torch.tensor(2.0))
        out[at] = torch.einsum("qhk,khd->qhd", scores.softmax(-1), values)


def merge_partials(partials: Tensor, lse: Tensor, first: Tensor, out: Tensor) -> None:
    for row in range(out.shape[0]):
        a, b = int(first[row]), int(first[row + 1])
        assert not torch.isnan(lse[a:b]).any(), "a place that no item filled"
        weights = (lse[a:b] * torch.log(torch.tensor(2.0))).softmax(0)
        out[row] = (partials[a:b] * weights.unsqueeze(-1)).sum(0)
    lse.fill_(float("nan"))


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulation stands where the kernels would."""
    from parrot.engine.builtin.attention import paged_rows, xformers_library

    module: Any = ModuleType(SPLIT_KV)
    module.partial_attention, module.merge_partials = partial_attention, merge_partials
    monkeypatch.setitem(sys.modules, SPLIT_KV, module)
    monkeypatch.setattr(xformers_library, "causal_bias", causal_bias)
    monkeypatch.setattr(xformers_library, "varlen_attention", varlen_attention)
    prepare = paged_rows.PagedRows.__init__

    def poisoned(self: Any, *arguments: Any, **named: Any) -> None:
        prepare(self, *arguments, **named)
        self._lse.fill_(float("nan"))

    monkeypatch.setattr(paged_rows.PagedRows, "__init__", poisoned)
