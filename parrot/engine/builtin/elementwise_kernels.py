"""Triton kernels of the steps between a layer's products, one pass over memory each: float32 inside, rounded once at the end.

elementwise.py says what they compute and has the same in torch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

#: Heads of a token that one program places, and elements that one program gates or copies.
_HEADS, _ELEMENTS = 16, 1024


@triton.jit
def _add_norm_kernel(x, delta, weight, out, eps, WIDTH: tl.constexpr, PADDED: tl.constexpr, ADDS: tl.constexpr):
    """A program a token. x becomes x + delta; out is its norm, of the sum before it is rounded."""
    d = tl.arange(0, PADDED)
    inside = d < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + d
    total = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        total += tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(x + at, total.to(x.dtype.element_ty), mask=inside)
    scale = tl.rsqrt(tl.sum(total * total, 0) / WIDTH + eps)
    normed = total * scale * tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _place_kernel(
    heads, positions, cos, sin, query_norm, key_norm, eps, stride,
    QUERIES: tl.constexpr, COUNT: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    NORMS: tl.constexpr, ROTATES: tl.constexpr,
):  # fmt: skip
    """A program a token and BLOCK of its COUNT query and key heads; queries come first."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, PADDED)
    inside = (head < COUNT)[:, None] & (d < HALF)[None, :]
    at = heads + token * stride + head[:, None] * (2 * HALF) + d[None, :]
    a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    if NORMS:
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)[:, None]
        query = (head < QUERIES)[:, None]
        for_query = tl.load(query_norm + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
        for_key = tl.load(key_norm + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
        a = a * scale * tl.where(query, for_query, for_key)
        for_query = tl.load(query_norm + HALF + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
        for_key = tl.load(key_norm + HALF + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
        b = b * scale * tl.where(query, for_query, for_key)
    if ROTATES:
        turn = tl.load(positions + token) * HALF + d
        c = tl.load(cos + turn, mask=d < HALF, other=0.0)[None, :]
        s = tl.load(sin + turn, mask=d < HALF, other=0.0)[None, :]
        turned = a * c - b * s
        b = b * c + a * s
        a = turned
    tl.store(at, a.to(heads.dtype.element_ty), mask=inside)
    tl.store(at + HALF, b.to(heads.dtype.element_ty), mask=inside)


@triton.jit
def _gate_kernel(inner, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A program a token and BLOCK of its WIDTH elements."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(inner + token * 2 * WIDTH + d, mask=d < WIDTH, other=0.0).to(tl.float32)
    up = tl.load(inner + token * 2 * WIDTH + WIDTH + d, mask=d < WIDTH, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + token * WIDTH + d, value.to(out.dtype.element_ty), mask=d < WIDTH)


@triton.jit
def _scatter_kernel(rows, slots, out, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A program a row and BLOCK of its WIDTH elements."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    found = tl.load(rows + row * stride + d, mask=d < WIDTH)
    tl.store(out + tl.load(slots + row) * WIDTH + d, found, mask=d < WIDTH)


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> None:
    """x [tokens, width], contiguous, becomes x + delta; `out` the root-mean-square norm of it."""
    tokens, width = x.shape
    padded = triton.next_power_of_2(width)
    _add_norm_kernel[(tokens,)](
        x, x if delta is None else delta, weight, out, eps, WIDTH=width, PADDED=padded, ADDS=delta is not None,
        num_warps=min(16, max(1, padded // 512)),
    )  # fmt: skip


def place(
    heads: Tensor,
    queries: int,
    count: int,
    norms: tuple[Tensor, Tensor, float] | None,
    turns: tuple[Tensor, Tensor, Tensor] | None,
) -> None:
    """The first `count` of heads [tokens, heads, dim], of which `queries` are queries, are normed and rotated in place.

    `norms`: weights for queries and for keys, epsilon. `turns`: positions; cosines and sines [positions, dim / 2], float32.
    """
    dim = heads.shape[2]
    query_norm, key_norm, eps = norms or (heads, heads, 0.0)
    positions, cos, sin = turns or (heads, heads, heads)
    _place_kernel[(heads.shape[0], triton.cdiv(count, _HEADS))](
        heads, positions, cos, sin, query_norm, key_norm, eps, heads.stride(0),
        QUERIES=queries, COUNT=count, HALF=dim // 2, PADDED=triton.next_power_of_2(dim // 2), BLOCK=_HEADS,
        NORMS=norms is not None, ROTATES=turns is not None,
    )  # fmt: skip


def gate(inner: Tensor, out: Tensor) -> None:
    """out [tokens, width]: silu of the first half of inner [tokens, 2 × width], times the second."""
    tokens, width = out.shape
    _gate_kernel[(tokens, triton.cdiv(width, _ELEMENTS))](inner, out, WIDTH=width, BLOCK=_ELEMENTS)


def scatter(rows: Tensor, slots: Tensor, out: Tensor) -> None:
    """Row i of rows, [rows, …], goes to place slots[i] of `out`, [places, …], which is contiguous; each row is too."""
    width = out[0].numel()
    grid = (slots.shape[0], triton.cdiv(width, _ELEMENTS))
    _scatter_kernel[grid](rows, slots, out, rows.stride(0), WIDTH=width, BLOCK=_ELEMENTS)
