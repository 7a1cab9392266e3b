"""The keys and values of all contexts, in pages. Which page belongs to whom is EngineCore's affair alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parrot.engine.builtin.elementwise import scatter_rows
from parrot.engine.builtin.models.config import ModelConfig


class KVCache:
    """One tensor a layer: [pages × page_tokens, 2 × kv_heads, head_dim]; the heads of K, then those of V.

    A token's slot is page × page_tokens + its offset in the page. `spare_page`: one more page, which belongs to nobody: what
    padding writes lands there.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_pages: int,
        page_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        spare_page: bool = False,
    ) -> None:
        self.spare_slot = num_pages * page_tokens if spare_page else -1
        num_pages += spare_page
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self.kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        shape = (num_pages * page_tokens, 2 * config.num_kv_heads, config.head_dim)
        self.layers = [zeros(shape, dtype, device) for _ in range(config.num_layers)]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def write(self, layer: int, slots: Tensor, kv: Tensor) -> None:
        """Puts the new tokens' K and V heads, [tokens, 2 × kv_heads, head_dim], into their slots."""
        scatter_rows(self.layers[layer], slots, kv)

    def read(self, layer: int, pages: Tensor, tokens: int) -> Tensor:
        """The first `tokens` tokens that lie on `pages`, in order: [tokens, 2 × kv_heads, head_dim]."""
        whole = self.layers[layer]
        found = whole.view(self.num_pages, -1).index_select(0, pages)
        return found.view(-1, *whole.shape[1:])[:tokens]

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copies whole pages, (source, destination); sources are read before any destination is written."""
        if not copies:
            return
        device = self.layers[0].device
        sources, destinations = (to_device(side, device) for side in zip(*copies, strict=True))
        for layer in self.layers:
            pages = layer.view(self.num_pages, -1)
            scatter_rows(pages, destinations, pages.index_select(0, sources))


def to_device(values: Any, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """A tensor of `values` on `device`. A GPU is not waited for: work queued later sees it, work queued before runs on."""
    tensor = torch.as_tensor(values, dtype=dtype)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU the memory is taken from the system page by page, when it is first written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    count = int(np.prod(shape))
    return torch.from_numpy(np.zeros(count * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
