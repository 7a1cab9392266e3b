"""Chooses tokens from logits, for a whole batch. A draw depends on nothing but the row's seed and position.

Order of what is applied: repetition penalty (prompt and output), frequency and presence penalties (output), logit bias,
temperature, top-k, top-p (of what top-k left). Temperature 0 takes the most probable token.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from parrot.engine.builtin.kv_cache import to_device
from parrot.protocol.api import SamplingConfig, refuse_chat_options
from parrot.protocol.errors import ParrotError

#: Candidates that top-p looks at first, before it looks at eight times as many, and so on.
_CANDIDATES = 256
#: Below this a draw is the most probable token anyhow, and float32 has no smaller number than 1e-45.
_LEAST_TEMPERATURE = 1e-6


@dataclass
class SamplingRow:
    """How one task is sampled. `position`: how many tokens of its output there are already."""

    sampling: SamplingConfig
    seed: int
    prompt: Sequence[int] = ()  #: ids, for the repetition penalty only
    counts: Counter[int] = field(default_factory=Counter)  #: of its output's ids, for the penalties only
    position: int = 0
    _prompt_ids: frozenset[int] | None = None

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature == 0.0 or self.sampling.top_k == 1

    @property
    def penalised(self) -> bool:
        s = self.sampling
        return bool(s.presence_penalty or s.frequency_penalty or s.repetition_penalty not in (None, 1.0))

    @property
    def plain(self) -> bool:
        """The most probable token, nothing else."""
        return self.greedy and not self.penalised and not self.sampling.logit_bias

    def seen(self, vocab_size: int) -> NDArray[np.int64]:
        """The ids of the prompt, which stays what it is at the first call, and of the output, each once."""
        if self._prompt_ids is None:  # synthetic ids know no vocabulary: they are folded as the runner folds them
            self._prompt_ids = frozenset(token_id % vocab_size for token_id in self.prompt)
        ids = self._prompt_ids.union(self.counts)
        return np.fromiter(ids, np.int64, len(ids))

    def took(self, token_id: int) -> None:
        """The token was chosen."""
        self.position += 1
        if self.penalised:
            self.counts[token_id] += 1


def check_sampling(sampling: SamplingConfig, vocab_size: int, dummy: bool) -> None:
    """Raises ParrotError `bad_sampling` for what this engine cannot honour."""
    sampling.check()
    refuse_chat_options(sampling)
    if sampling.output_length is not None and not dummy:
        raise ParrotError(
            "bad_sampling",
            "sampling_config.output_length is only for emulated engines and dummy weights; this engine has a real model",
            field="output_length",
        )
    for token_id in sampling.stop_token_ids:
        if not 0 <= token_id < vocab_size:
            raise ParrotError(
                "bad_sampling",
                f"sampling_config.stop_token_ids has {token_id}; this model's ids are 0 to {vocab_size - 1}",
                field="stop_token_ids",
            )
    for key in sampling.logit_bias or ():
        if not (key.isascii() and key.isdigit() and int(key) < vocab_size):
            raise ParrotError(
                "bad_sampling",
                f"sampling_config.logit_bias has the key {key!r}; expected token ids, 0 to {vocab_size - 1}",
                field="logit_bias",
            )


def sample(logits: Tensor, rows: Sequence[SamplingRow], positions: Sequence[int] | None = None) -> Tensor:
    """The chosen ids, [rows], on the device of `logits`, which a GPU is not waited for. Changes `logits`.

    `positions`: how many tokens of its output are before each row's; None: as many as the row knows. A row with penalties
    must know all of them.
    """
    if positions is None:
        positions = [row.position for row in rows]
    device = logits.device
    _adjust(logits, rows)
    chosen = logits.argmax(dim=-1)
    drawing = [i for i, row in enumerate(rows) if not row.greedy]
    for wanted, draw in ((False, _draw_whole), (True, _draw_truncated)):
        indices = [i for i in drawing if _truncated(rows[i].sampling) is wanted]
        if indices:
            places = to_device(indices, device)
            found = _tempered(logits, places, [rows[i] for i in indices])
            draws = to_device([uniform(rows[i].seed, positions[i]) for i in indices], device, torch.float64)
            chosen.index_copy_(0, places, draw(found, [rows[i].sampling for i in indices], draws))
    return chosen


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), the same for the same seed and position everywhere."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def _adjust(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Penalties and biases, in place, in as many steps for all rows as for one; logits: [rows, vocab_size]."""
    vocab, flat = logits.shape[1], logits.view(-1)
    repeated: list[_Changes] = []
    added: list[_Changes] = []
    for index, row in enumerate(rows):
        sampling, first = row.sampling, index * vocab
        if row.penalised:
            if sampling.repetition_penalty not in (None, 1.0):
                repeated.append(_Changes(first + row.seen(vocab), sampling.repetition_penalty))
            if sampling.frequency_penalty or sampling.presence_penalty:
                taken = np.fromiter(row.counts.values(), np.float64)
                penalties = -(sampling.frequency_penalty * taken + sampling.presence_penalty)
                added.append(_Changes(first + np.fromiter(row.counts, np.int64), penalties))
        if sampling.logit_bias:
            ids = np.array([int(key) for key in sampling.logit_bias])
            added.append(_Changes(first + ids, list(sampling.logit_bias.values())))
    if repeated:
        places, penalties_of = _joined(repeated, logits.device)
        values = flat[places].double()
        # A finite penalty may still leave float32's range: no row may ever hold an infinity, of which a NaN comes.
        flat[places] = torch.where(values > 0, values / penalties_of, values * penalties_of).to(logits.dtype).nan_to_num()
    if added:
        places, amounts = _joined(added, logits.device)
        flat.index_put_((places,), amounts.to(logits.dtype), accumulate=True)


class _Changes(NamedTuple):
    """`places`: in the logits of all rows, one behind the other. `values`: one for each of them, or for all."""

    places: NDArray[np.int64]
    values: ArrayLike


def _joined(parts: Sequence[_Changes], device: torch.device) -> tuple[Tensor, Tensor]:
    """All places, and a value for each, float64."""
    values = [np.broadcast_to(np.asarray(part.values, np.float64), part.places.shape) for part in parts]
    places = np.concatenate([part.places for part in parts])
    return to_device(places, device), to_device(np.concatenate(values), device, torch.float64)


def _truncated(sampling: SamplingConfig) -> bool:
    return sampling.top_p < 1.0 or sampling.top_k > 0


def _tempered(logits: Tensor, places: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Logits over temperature, the greatest of each row 0: [places, vocab_size]."""
    found = logits.index_select(0, places)
    temperatures = to_device([max(_LEAST_TEMPERATURE, row.sampling.temperature) for row in rows], logits.device, torch.float32)
    return (found - found.amax(dim=-1, keepdim=True)) / temperatures.unsqueeze(1)


def _draw_whole(logits: Tensor, samplings: Sequence[SamplingConfig], draws: Tensor) -> Tensor:
    return _invert(logits.double().exp().cumsum(dim=-1), draws)


def _draw_truncated(logits: Tensor, samplings: Sequence[SamplingConfig], draws: Tensor) -> Tensor:
    """Candidates in order of probability: on a CPU as many as the rows' top-k and top-p need, on a GPU all of them, because
    to ask whether they are enough would be to wait for it."""
    vocab, device = logits.shape[1], logits.device
    limits = [sampling.top_k if sampling.top_k > 0 else vocab for sampling in samplings]
    count = min(vocab, max(_CANDIDATES, *(limit for limit in limits if limit < vocab), 0)) if device.type == "cpu" else vocab
    totals = logits.double().exp().sum(dim=-1, keepdim=True)
    top_p = to_device([sampling.top_p for sampling in samplings], device, torch.float64).unsqueeze(1)
    ranks_left = to_device(limits, device).unsqueeze(1)
    while True:
        values, ids = logits.topk(count, dim=-1) if count < vocab else logits.sort(dim=-1, descending=True, stable=True)
        weights = values.double().exp()
        weights.masked_fill_(torch.arange(count, device=device) >= ranks_left, 0.0)
        cumulative = weights.cumsum(dim=-1)
        # Where top-k cuts, it is what remains that top-p is a part of.
        mass = top_p * torch.where(ranks_left < vocab, cumulative[:, -1:], totals)
        if count == vocab or bool((cumulative[:, -1:] >= mass).all()):
            break
        count = min(vocab, 8 * count)
    weights.masked_fill_(cumulative - weights >= mass, 0.0)
    ranks = _invert(weights.cumsum(dim=-1), draws)
    return ids.gather(1, ranks.unsqueeze(1)).squeeze(1)


def _invert(cumulative: Tensor, draws: Tensor) -> Tensor:
    """The first entry of each row whose cumulative weight exceeds the row's draw; cumulative: [rows, n], float64."""
    totals = cumulative[:, -1]
    targets = torch.minimum(draws * totals, torch.nextafter(totals, torch.zeros_like(totals)))
    return torch.searchsorted(cumulative, targets.unsqueeze(1), right=True).squeeze(1)
