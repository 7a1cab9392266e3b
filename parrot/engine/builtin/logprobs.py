"""Log-probabilities of chosen tokens and of the most probable ones: of the model's own distribution, before penalties, bias,
temperature and truncation. Natural logarithms, float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from parrot.engine.builtin.kv_cache import to_device
from parrot.protocol.engine import TokenLogprob
from parrot.tokenizer import Tokenizer


class Logprobs:
    """Of some rows of an iteration. `counts`: how many of the most probable tokens each row wants, by row. It keeps those rows'
    logits as they are when it is made."""

    def __init__(self, logits: Tensor, counts: Mapping[int, int]) -> None:
        self._counts = dict(counts)
        self._places = to_device(list(counts), logits.device)
        self._logits = logits.index_select(0, self._places)
        self._ready: torch.cuda.Event | None = None

    def send_home(self, chosen: Tensor, aside: torch.cuda.Stream | None) -> None:
        """The tokens were chosen, one a row of the iteration: what is told of them begins its way to the host. `aside`: where a
        GPU computes it, so that the next iteration does not wait; what that overwrites is copied before."""
        ids = chosen.index_select(0, self._places)
        if aside is None:
            self._find(ids)
            return
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for used in (self._logits, ids):
                used.record_stream(aside)
            self._find(ids)
            self._ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._ready.record()

    def _find(self, ids: Tensor) -> None:
        every = self._logits.float().log_softmax(dim=-1)
        top = every.topk(min(max(self._counts.values()), every.shape[1]), dim=-1)
        self._found = [_copied(values) for values in (every.gather(1, ids.unsqueeze(1)).squeeze(1), top.values, top.indices)]

    def tokens(self, chosen: Sequence[int], tokenizer: Tokenizer) -> dict[int, TokenLogprob]:
        """By row; `chosen`: the chosen token of each row of the iteration. Waits for the device."""
        if self._ready is not None:
            self._ready.synchronize()
        values, top_values, top_ids = (found.tolist() for found in self._found)
        return {
            row: TokenLogprob(
                _text(tokenizer, chosen[row]),
                values[place],
                tuple(
                    [
                        (_text(tokenizer, token_id), value)
                        for token_id, value in zip(top_ids[place][:count], top_values[place][:count], strict=True)
                    ]
                ),
            )
            for place, (row, count) in enumerate(self._counts.items())
        }


def _copied(values: Tensor) -> Tensor:
    if values.device.type == "cpu":
        return values
    home = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    home.copy_(values, non_blocking=True)
    return home


def _text(tokenizer: Tokenizer, token_id: int) -> str:
    """Its text; "" for an id that only pads the model's vocabulary."""
    return tokenizer.decode([token_id]) if token_id < tokenizer.vocab_size else ""
