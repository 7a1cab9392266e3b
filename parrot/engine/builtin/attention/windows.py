"""Decoding sequences' keys and values laid out for one product: a dense copy beside the paged cache, kept while they decode.

Gathering every page of every sequence anew in each layer and iteration costs as much as the attention itself. What is
kept here is only ever a copy: a row that is not here, or not as long as it should be, is read from the pages again.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from parrot.engine.builtin.attention.base import AttentionRow
from parrot.engine.builtin.kv_cache import KVCache, zeros

#: Tokens of the smallest window; each size is twice the one before, so that at most half of what is read is padding.
SMALLEST = 128


class Load(NamedTuple):
    """A row that must be copied in: the first `tokens` tokens on `pages`."""

    slot: int
    pages: Tensor
    tokens: int


class WindowPlan(NamedTuple):
    """One iteration of a window: row i of it is token `tokens[i]` of the packed ones, at position `positions[i]`."""

    window: Window
    rows: int
    longest: int
    slots: Tensor
    tokens: Tensor
    positions: Tensor
    mask: Tensor | None
    loads: tuple[Load, ...]


class Window:
    """Rows of up to `size` tokens: one tensor a layer, [slots, 2 × kv_heads, size, head_dim]."""

    def __init__(self, cache: KVCache, size: int) -> None:
        self.size = size
        self.slots = 0
        self.layers: list[Tensor] = []
        self._cache = cache
        self._held: dict[Hashable, tuple[int, int]] = {}  # key -> (slot, tokens that are right there)

    def reserve(self, slots: int) -> None:
        """Room for that many rows; what is held stays."""
        if slots <= self.slots:
            return
        like = self._cache.layers[0]
        shape = (slots, like.shape[1], self.size, like.shape[2])
        old, self.layers = self.layers, [zeros(shape, like.dtype, like.device) for _ in self._cache.layers]
        for before, now in zip(old, self.layers, strict=False):
            now[: self.slots] = before
        self.slots = slots

    def plan(self, rows: Sequence[tuple[int, AttentionRow]]) -> WindowPlan:
        """Gives each (packed token, row) a slot below their number, where it stays from iteration to iteration."""
        device = self._cache.layers[0].device
        taken: dict[int, tuple[int, AttentionRow]] = {}
        homeless = []
        for token, row in rows:
            slot, held = self._held.get(row.key, (len(rows), 0))
            if slot < len(rows) and held == row.start:
                taken[slot] = (token, row)
            else:
                homeless.append((token, row))
        free = (slot for slot in range(len(rows)) if slot not in taken)
        loads = []
        for (token, row), slot in zip(homeless, free, strict=False):
            taken[slot] = (token, row)
            if row.start:
                loads.append(Load(slot, torch.tensor(row.pages, device=device), row.start))
        self._held = {row.key: (slot, row.stop) for slot, (_, row) in taken.items()}
        order = [taken[slot] for slot in range(len(rows))]
        positions = torch.tensor([row.start for _, row in order], device=device)
        longest = max(row.stop for _, row in order)
        return WindowPlan(
            window=self,
            rows=len(rows),
            longest=longest,
            slots=torch.arange(len(rows), device=device),
            tokens=torch.tensor([token for token, _ in order], device=device),
            positions=positions,
            mask=self._mask(positions, longest),
            loads=tuple(loads),
        )

    def _mask(self, positions: Tensor, longest: int) -> Tensor | None:
        """[rows, 1, 1, longest], to be added; None when all rows are equally long."""
        if bool((positions == longest - 1).all()):
            return None
        hidden = torch.arange(longest, device=positions.device) > positions.unsqueeze(1)
        mask = torch.zeros(hidden.shape, dtype=self._cache.layers[0].dtype, device=positions.device)
        return mask.masked_fill_(hidden, float("-inf"))[:, None, None, :]

    def update(self, plan: WindowPlan, layer: int, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Copies missing rows in and adds the new tokens, kv [tokens, 2 × kv_heads, head_dim]; then K and V of the rows,
        [rows, kv_heads, longest, head_dim] each."""
        window = self.layers[layer]
        for load in plan.loads:
            window[load.slot, :, : load.tokens] = self._cache.read(layer, load.pages, load.tokens).transpose(0, 1)
        window[plan.slots, :, plan.positions] = kv.index_select(0, plan.tokens)
        used = window[: plan.rows, :, : plan.longest]
        return used[:, : self._cache.kv_heads], used[:, self._cache.kv_heads :]


class Windows:
    """Windows of all sizes, together no larger than `budget_tokens`."""

    def __init__(self, cache: KVCache, budget_tokens: int) -> None:
        self._cache = cache
        self._budget = budget_tokens
        self._windows: dict[int, Window] = {}

    def plan(self, rows: Sequence[tuple[int, AttentionRow]]) -> tuple[list[WindowPlan], list[tuple[int, AttentionRow]]]:
        """Plans for the rows that fit, and the rows that do not."""
        wanted: dict[int, list[tuple[int, AttentionRow]]] = {}
        for token, row in rows:
            wanted.setdefault(window_size(row.stop), []).append((token, row))
        if wanted:  # an iteration that only fills leaves the windows as they are
            self._windows = {size: window for size, window in self._windows.items() if size in wanted}
        plans = []
        left_over = []
        for size, members in sorted(wanted.items()):
            fitting = self._room(size, len(members))
            if fitting:
                plans.append(self._windows[size].plan(members[:fitting]))
            left_over += members[fitting:]
        return plans, left_over

    def _room(self, size: int, rows: int) -> int:
        """Makes the window of `size` hold `rows` rows, or as many as the budget lets it. How many."""
        window = self._windows.setdefault(size, Window(self._cache, size))
        others = sum(w.size * w.slots for w in self._windows.values() if w is not window)
        affordable = max(window.slots, (self._budget - others) // size)
        if rows > window.slots:
            window.reserve(min(affordable, 1 << (rows - 1).bit_length()))
        return min(rows, window.slots)


def window_size(tokens: int) -> int:
    """The smallest window that holds that many."""
    return max(SMALLEST, 1 << (tokens - 1).bit_length())
