"""Where the tokens of rows lie in the cache, as numpy arrays, and how lists and arrays reach a device without a wait."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parrot.engine.builtin.attention.base import AttentionRow


def slots(pages: Sequence[int], start: int, stop: int, page_tokens: int) -> NDArray[np.int64]:
    """The slot of each position in [start, stop) of a sequence on `pages`."""
    positions = np.arange(start, stop)
    if page_tokens == 1:
        return np.asarray(pages, dtype=np.int64)[positions]
    return np.asarray(pages, dtype=np.int64)[positions // page_tokens] * page_tokens + positions % page_tokens


def new_slots(rows: Sequence[AttentionRow], page_tokens: int) -> NDArray[np.int64]:
    """The slots of all tokens that `rows` compute, in their order."""
    if not rows:
        return np.zeros(0, dtype=np.int64)
    return np.concatenate([slots(row.pages, row.start, row.stop, page_tokens) for row in rows])


def to_device(values: Any, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """A tensor of `values` on `device`. A GPU is not waited for: work queued later sees it, work queued before runs on."""
    tensor = torch.as_tensor(values, dtype=dtype)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
