"""Log-probabilities of chosen tokens and of the most probable ones: of the model's own distribution, before penalties, bias,
temperature and truncation. Natural logarithms, float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parrot.engine.builtin.kv_cache import to_device
from parrot.protocol.engine import TokenLogprob
from parrot.tokenizer import Tokenizer


class Logprobs:
    """Of the rows `rows` of an iteration, on its device until `send_home`. `counts`: how many of the most probable tokens each
    wants. Made before the logits are changed."""

    def __init__(self, logits: Tensor, rows: Sequence[int], counts: Sequence[int]) -> None:
        self.rows = list(rows)
        self._counts = list(counts)
        self._all = logits.index_select(0, to_device(self.rows, logits.device)).float().log_softmax(dim=-1)
        self._top_values, self._top_ids = self._all.topk(min(max(counts), logits.shape[1]), dim=-1)
        self._chosen_values = self._all[:, 0]

    def choose(self, chosen: Tensor) -> None:
        """The tokens were chosen, one a row of the iteration."""
        ids = chosen.index_select(0, to_device(self.rows, chosen.device)).unsqueeze(1)
        self._chosen_values = self._all.gather(1, ids).squeeze(1)
        del self._all

    def send_home(self) -> None:
        """Begins to copy them to the host; they are there when the device has come so far."""
        if self._chosen_values.device.type != "cpu":
            self._top_values, self._top_ids, self._chosen_values = map(
                _copied, (self._top_values, self._top_ids, self._chosen_values)
            )

    def tokens(self, chosen: Sequence[int], tokenizer: Tokenizer) -> dict[int, TokenLogprob]:
        """By row; `chosen`: the chosen token of each row of the iteration."""
        values, top_values, top_ids = self._chosen_values.tolist(), self._top_values.tolist(), self._top_ids.tolist()
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
            for place, (row, count) in enumerate(zip(self.rows, self._counts, strict=True))
        }


def _copied(values: Tensor) -> Tensor:
    home = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    home.copy_(values, non_blocking=True)
    return home


def _text(tokenizer: Tokenizer, token_id: int) -> str:
    """Its text; "" for an id that only pads the model's vocabulary."""
    return tokenizer.decode([token_id]) if token_id < tokenizer.vocab_size else ""
