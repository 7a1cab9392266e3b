"""What happens between a layer's products: residual sum and norm, norm and rotation of heads, gated activation, cache write.

Each is bound by reading and writing its tokens: where Triton is, one kernel each (elementwise_kernels.py), else torch. Heads
are normed and rotated in float32 whatever their type, and rounded once.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor


@dataclass(frozen=True)
class Turns:
    """Rotary positions of an iteration's tokens: positions [tokens]; cosines and sines [positions, head_dim / 2], float32."""

    positions: Tensor
    cos: Tensor
    sin: Tensor

    @functools.cached_property
    def by_token(self) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines for whole heads: [tokens, 1, head_dim] each."""
        cos, sin = (table.index_select(0, self.positions).unsqueeze(1) for table in (self.cos, self.sin))
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


class HeadNorms(NamedTuple):
    """Root-mean-square norms of single heads: weights [head_dim]."""

    query: Tensor
    key: Tensor
    eps: float


@functools.cache
def _triton() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from parrot.engine.builtin import elementwise_kernels

    return elementwise_kernels


def kernels(x: Tensor) -> Any:
    """The kernels, where they can work on `x`; None: torch does."""
    return _triton() if x.is_cuda else None


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta, which may be in the place of x, and its norm: [tokens, width] each."""
    if found := kernels(x):
        out = torch.empty_like(x)
        found.add_norm(x, delta, weight, eps, out)
        return x, out
    if delta is not None:
        x = x + delta
    return x, functional.rms_norm(x, (x.shape[-1],), weight, eps)


def place_heads_(heads: Tensor, queries: int, keys: int, norms: HeadNorms | None, turns: Turns | None) -> None:
    """Norms and rotates, in place, the query heads, which come first, and the key heads behind them; heads: [tokens, heads,
    dim]. The first half of a head is paired with the second."""
    if norms is None and turns is None:
        return
    if found := kernels(heads):
        found.place(heads, queries, queries + keys, norms, turns and (turns.positions, turns.cos, turns.sin))
        return
    placed = heads[:, : queries + keys]
    exact = placed.float()  # itself, in float32
    if norms is not None:
        exact = torch.cat((_normed(exact[:, :queries], norms.query, norms), _normed(exact[:, queries:], norms.key, norms)), 1)
    if turns is not None:
        rotate_(exact, turns)
    if exact.data_ptr() != placed.data_ptr():
        placed.copy_(exact)


def _normed(heads: Tensor, weight: Tensor, norms: HeadNorms) -> Tensor:
    return functional.rms_norm(heads, (heads.shape[-1],), weight.float(), norms.eps)


def rotate_(heads: Tensor, turns: Turns) -> None:
    """Rotates heads [tokens, heads, dim], float32, in place."""
    tokens, count, dim = heads.shape
    cos, sin = turns.by_token
    swapped = heads.view(tokens, count, 2, dim // 2).flip(-2).view(tokens, count, dim)
    heads.mul_(cos).addcmul_(swapped, sin)


def gated_silu(inner: Tensor) -> Tensor:
    """silu(gate) × up, [tokens, width]; inner: [tokens, 2 × width], gate first."""
    if found := kernels(inner):
        out = torch.empty((inner.shape[0], inner.shape[1] // 2), dtype=inner.dtype, device=inner.device)
        found.gate(inner, out)
        return out
    gate, up = inner.chunk(2, dim=-1)
    return functional.silu(gate) * up


def scatter_rows(out: Tensor, slots: Tensor, rows: Tensor) -> None:
    """Row i of `rows`, [rows, …], goes to place slots[i] of `out`, [places, …]."""
    if found := kernels(out):
        found.scatter(rows, slots, out)
    else:
        out.index_copy_(0, slots, rows)
