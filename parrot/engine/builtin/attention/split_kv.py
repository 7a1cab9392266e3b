"""Triton kernels of paged attention: partial attention over work items, and the merge of each row's partial results.

Work items are data in the device's memory (work_items.py), and the programs of a launch share them out among themselves: the
launch is the same for every batch of a size, so that a captured graph replays it whatever the rows have become. A wide
item reads its keys and values once for all its rows.

The softmax is computed as in Flash-Decoding: a partial result is its weighted mean and the log2 of the sum of its weights.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from parrot.engine.builtin.attention.work_items import FIELDS

#: Heads of a row that a program merges.
MERGED_HEADS = 8


@triton.jit
def _partial_kernel(
    queries, kv, tables, items, count, first, out, lse,
    scale, stride_query, stride_table,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, PAGE: tl.constexpr,
    FIELDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """queries [rows, heads, DIM]; kv [tokens, 2 × KV_HEADS, DIM]; float32: out [partials, heads, DIM], lse [partials, heads].

    A program takes an item and a KV head, then the next one that is its own. Its BLOCK_M queries are the item's rows times the
    GROUP heads that share the KV head. CAUSAL: an item's last field says how far its rows see.
    """
    work = tl.program_id(0)
    last = tl.load(count) * KV_HEADS
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, DIM_PADDED)
    while work < last:
        head = work % KV_HEADS
        item = items + (work // KV_HEADS) * FIELDS
        row = tl.load(item) + m // GROUP
        here = m // GROUP < tl.load(item + 1)
        pages = tables + tl.load(item + 2) * stride_table
        start = tl.load(item + 3)
        stop = tl.load(item + 4)
        sees = tl.load(item + 6) + m // GROUP
        place = tl.load(first + row, mask=here, other=0) + tl.load(item + 5)
        own_head = head * GROUP + m % GROUP
        inside = here[:, None] & (d < DIM)[None, :]
        query = tl.load(queries + row[:, None] * stride_query + own_head[:, None] * DIM + d[None, :], mask=inside, other=0.0)
        best = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        weight = tl.zeros([BLOCK_M], dtype=tl.float32)
        mean = tl.zeros([BLOCK_M, DIM_PADDED], dtype=tl.float32)
        for n in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
            position = n + tl.arange(0, BLOCK_N)
            seen = position < stop
            page = tl.load(pages + position // PAGE, mask=seen, other=0)
            token = page.to(tl.int64) * PAGE + position % PAGE
            at = kv + token * (2 * KV_HEADS * DIM) + head * DIM
            key = tl.load(at[None, :] + d[:, None], mask=seen[None, :] & (d < DIM)[:, None], other=0.0)
            value = tl.load(at[:, None] + KV_HEADS * DIM + d[None, :], mask=seen[:, None] & (d < DIM)[None, :], other=0.0)
            score = tl.dot(query, key, input_precision=PRECISION) * scale
            if CAUSAL:
                score = tl.where(seen[None, :] & (position[None, :] <= sees[:, None]), score, float("-inf"))
            else:
                score = tl.where(seen[None, :], score, float("-inf"))
            better = tl.maximum(best, tl.max(score, 1))
            shrunk = tl.exp2(best - better)
            part = tl.exp2(score - better[:, None])
            weight = weight * shrunk + tl.sum(part, 1)
            mean = mean * shrunk[:, None] + tl.dot(part.to(value.dtype), value, input_precision=PRECISION)
            best = better
        where = place.to(tl.int64) * (KV_HEADS * GROUP) + own_head
        tl.store(out + where[:, None] * DIM + d[None, :], mean / weight[:, None], mask=inside)
        tl.store(lse + where, best + tl.log2(weight), mask=here)
        work += tl.num_programs(0)


@triton.jit
def _merge_kernel(
    partials, lse, first, out, HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out [rows, HEADS, DIM]: a program a row and BLOCK heads. A row without partial results (padding) becomes zero."""
    row = tl.program_id(0)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, DIM_PADDED)
    here = head < HEADS
    inside = here[:, None] & (d < DIM)[None, :]
    begin = tl.load(first + row)
    end = tl.load(first + row + 1)
    best = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    weight = tl.zeros([BLOCK], dtype=tl.float32)
    mean = tl.zeros([BLOCK, DIM_PADDED], dtype=tl.float32)
    i = begin
    while i < end:
        at = i.to(tl.int64) * HEADS + head
        this = tl.load(lse + at, mask=here, other=0.0)
        better = tl.maximum(best, this)
        shrunk = tl.exp2(best - better)
        grown = tl.exp2(this - better)
        part = tl.load(partials + at[:, None] * DIM + d[None, :], mask=inside, other=0.0)
        mean = mean * shrunk[:, None] + part * grown[:, None]
        weight = weight * shrunk + grown
        best = better
        i += 1
    mean = tl.where((weight > 0.0)[:, None], mean / weight[:, None], 0.0)
    at = (row.to(tl.int64) * HEADS + head[:, None]) * DIM + d[None, :]
    tl.store(out + at, mean.to(out.dtype.element_ty), mask=inside)


def partial_attention(
    queries: Tensor, kv: Tensor, tables: Tensor, items: Tensor, count: Tensor, first: Tensor, out: Tensor, lse: Tensor,
    *, kv_heads: int, page: int, scale: float, block_m: int, programs: int, causal: bool, options: dict[str, Any],
) -> None:  # fmt: skip
    """Fills `out` and `lse` with the partial results of `count` items; see _partial_kernel."""
    heads, dim = queries.shape[1:]
    _partial_kernel[(programs,)](
        queries, kv, tables, items, count, first, out, lse,
        scale * 1.4426950408889634, queries.stride(0), tables.stride(0),
        KV_HEADS=kv_heads, GROUP=heads // kv_heads, DIM=dim, DIM_PADDED=max(16, triton.next_power_of_2(dim)), PAGE=page,
        FIELDS=FIELDS, BLOCK_M=block_m, CAUSAL=causal, PRECISION="ieee" if kv.dtype == torch.float32 else "tf32", **options,
    )  # fmt: skip


def merge_partials(partials: Tensor, lse: Tensor, first: Tensor, out: Tensor) -> None:
    """Puts each row's attention into `out`, [rows, heads, dim]; `first`: [rows + 1], where its partial results begin."""
    rows, heads, dim = out.shape
    _merge_kernel[(rows, triton.cdiv(heads, MERGED_HEADS))](
        partials, lse, first, out, HEADS=heads, DIM=dim, DIM_PADDED=triton.next_power_of_2(dim), BLOCK=MERGED_HEADS
    )
