"""Chooses tokens from logits, for a whole batch. A draw depends on nothing but the row's seed and position.

Order of what is applied: repetition penalty (prompt and output), frequency and presence penalties (output), logit bias,
temperature, top-k, top-p (of what top-k left). Temperature 0 takes the most probable token.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from parrot.protocol.api import SamplingConfig
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

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature == 0.0 or self.sampling.top_k == 1

    @property
    def penalised(self) -> bool:
        s = self.sampling
        return bool(s.presence_penalty or s.frequency_penalty or s.repetition_penalty not in (None, 1.0))

    def took(self, token_id: int) -> None:
        """The token was chosen."""
        self.position += 1
        if self.penalised:
            self.counts[token_id] += 1


def check_sampling(sampling: SamplingConfig, vocab_size: int, dummy: bool) -> None:
    """Raises ParrotError `bad_sampling` for what this engine cannot honour."""
    sampling.check()
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


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """The next token of each row. logits: [rows, vocab_size], float32; they may be changed."""
    for index, row in enumerate(rows):
        _adjust(logits[index], row)
    chosen: list[int] = logits.argmax(dim=-1).tolist() if any(row.greedy for row in rows) else [0] * len(rows)
    whole = [i for i, row in enumerate(rows) if not row.greedy and not _truncated(row.sampling)]
    cut = [i for i, row in enumerate(rows) if not row.greedy and _truncated(row.sampling)]
    for indices, draw in ((whole, _draw_whole), (cut, _draw_truncated)):
        if indices:
            drawn = draw(_tempered(logits, indices, rows), [rows[i] for i in indices])
            for index, token_id in zip(indices, drawn, strict=True):
                chosen[index] = token_id
    return chosen


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), the same for the same seed and position everywhere."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def _adjust(logits: Tensor, row: SamplingRow) -> None:
    """Penalties and bias, in place; logits: [vocab_size]."""
    sampling = row.sampling
    if row.penalised:
        if sampling.repetition_penalty not in (None, 1.0):
            vocab = logits.shape[0]  # synthetic ids know none: they are folded as the runner folds them
            seen = torch.tensor(sorted({i % vocab for i in (*row.prompt, *row.counts)}), device=logits.device)
            values = logits[seen]
            penalty = sampling.repetition_penalty
            # A finite penalty may still leave float32's range: no row may ever hold an infinity, of which a NaN comes.
            logits[seen] = torch.where(values > 0, values / penalty, values * penalty).nan_to_num()
        if row.counts:
            ids = torch.tensor(list(row.counts), device=logits.device)
            counts = torch.tensor(list(row.counts.values()), dtype=logits.dtype, device=logits.device)
            logits[ids] -= sampling.frequency_penalty * counts + sampling.presence_penalty
    for key, bias in (sampling.logit_bias or {}).items():
        logits[int(key)] += bias


def _truncated(sampling: SamplingConfig) -> bool:
    return sampling.top_p < 1.0 or sampling.top_k > 0


def _tempered(logits: Tensor, indices: list[int], rows: Sequence[SamplingRow]) -> Tensor:
    """Logits over temperature, the greatest of each row 0: [indices, vocab_size]."""
    found = logits[indices]
    temperatures = torch.tensor([max(_LEAST_TEMPERATURE, rows[i].sampling.temperature) for i in indices], device=logits.device)
    return (found - found.amax(dim=-1, keepdim=True)) / temperatures.unsqueeze(1)


def _draw_whole(logits: Tensor, rows: list[SamplingRow]) -> list[int]:
    return _invert(logits.double().exp().cumsum(dim=-1), rows)


def _draw_truncated(logits: Tensor, rows: list[SamplingRow]) -> list[int]:
    """Candidates in order of probability; looks at as many as the rows' top-k and top-p need."""
    vocab = logits.shape[1]
    limits = [row.sampling.top_k if row.sampling.top_k > 0 else vocab for row in rows]
    count = min(vocab, max(_CANDIDATES, *(limit for limit in limits if limit < vocab), 0))
    totals = logits.double().exp().sum(dim=-1, keepdim=True)
    top_p = torch.tensor([row.sampling.top_p for row in rows], dtype=torch.float64, device=logits.device).unsqueeze(1)
    ranks_left = torch.tensor(limits, device=logits.device).unsqueeze(1)
    while True:
        values, ids = logits.topk(count, dim=-1)
        weights = values.double().exp()
        weights.masked_fill_(torch.arange(count, device=logits.device) >= ranks_left, 0.0)
        cumulative = weights.cumsum(dim=-1)
        # Where top-k cuts, it is what remains that top-p is a part of.
        mass = top_p * torch.where(ranks_left < vocab, cumulative[:, -1:], totals)
        if count == vocab or bool((cumulative[:, -1:] >= mass).all()):
            break
        count = min(vocab, 8 * count)
    weights.masked_fill_(cumulative - weights >= mass, 0.0)
    ranks = _invert(weights.cumsum(dim=-1), rows)
    return [int(ids[i, rank]) for i, rank in enumerate(ranks)]


def _invert(cumulative: Tensor, rows: list[SamplingRow]) -> list[int]:
    """The first entry of each row whose cumulative weight exceeds the row's draw; cumulative: [rows, n], float64."""
    draws = torch.tensor([uniform(row.seed, row.position) for row in rows], dtype=torch.float64, device=cumulative.device)
    totals = cumulative[:, -1]
    targets = torch.minimum(draws * totals, torch.nextafter(totals, torch.zeros_like(totals)))
    found: list[int] = torch.searchsorted(cumulative, targets.unsqueeze(1), right=True).squeeze(1).tolist()
    return found
