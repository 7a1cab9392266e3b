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
    for index, row in enumerate(rows):
        if row.penalised or row.sampling.logit_bias:
            _adjust(logits[index], row)
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


def _adjust(logits: Tensor, row: SamplingRow) -> None:
    """Penalties and bias, in place; logits: [vocab_size]."""
    sampling, device = row.sampling, logits.device
    if row.penalised:
        if sampling.repetition_penalty not in (None, 1.0):
            vocab = logits.shape[0]  # synthetic ids know none: they are folded as the runner folds them
            seen = to_device(sorted({i % vocab for i in (*row.prompt, *row.counts)}), device)
            values = logits[seen]
            penalty = sampling.repetition_penalty
            # A finite penalty may still leave float32's range: no row may ever hold an infinity, of which a NaN comes.
            logits[seen] = torch.where(values > 0, values / penalty, values * penalty).nan_to_num()
        if row.counts:
            counts = to_device(list(row.counts.values()), device, logits.dtype)
            logits[to_device(list(row.counts), device)] -= sampling.frequency_penalty * counts + sampling.presence_penalty
    if sampling.logit_bias:
        ids = to_device([int(key) for key in sampling.logit_bias], device)
        logits.index_add_(0, ids, to_device(list(sampling.logit_bias.values()), device, logits.dtype))


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
