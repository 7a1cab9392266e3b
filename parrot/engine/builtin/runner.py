"""The Runner over a decoder, a paged cache and an attention function: token values in, tokens out.

EngineCore says which positions of which tasks are computed; this puts their ids together, runs the model once, samples,
and turns tokens into text. It decides nothing about who runs. `prepare` may be called while `run` is in its thread.
"""

from __future__ import annotations

import os
import random
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from parrot.configuration import ConfigurationError
from parrot.engine.batches import Batch, EngineLimits, EngineTask
from parrot.engine.builtin.attention import load_attention
from parrot.engine.builtin.attention.base import Attention, AttentionRow
from parrot.engine.builtin.kv_cache import KVCache
from parrot.engine.builtin.models.config import ModelConfig, config_at, model_config, published_config
from parrot.engine.builtin.models.decoder import Decoder
from parrot.engine.builtin.outputs import ContextTokens, Output, TaskTokens
from parrot.engine.builtin.sampler import check_sampling, sample
from parrot.engine.builtin.weights import Checkpoint, DummyWeights, Source, as_directory, load_decoder
from parrot.engine.config import BuiltinEngineConfig, limits_of
from parrot.engine.core import EngineCore
from parrot.engine.runner import TokenResult
from parrot.model_files import resolve_model
from parrot.protocol.api import SamplingConfig
from parrot.protocol.errors import ParrotError
from parrot.tokenizer import SYNTHETIC, Tokenizer, load_tokenizer

#: Part of the free memory that a KV cache of no stated size may take, with the windows of its attention function.
_FREE_MEMORY_SHARE = 0.5
#: No more than this many times max_total_tokens: what running tasks may hold, and retained contexts beside it.
_MOST_TOTALS = 4


class PreparedRow(NamedTuple):
    """A row of a batch with what it needs of the core. `ids` None: a decode row, whose token is known when it runs."""

    task: TaskTokens
    attention: AttentionRow
    ids: list[int] | None
    samples: bool


class Prepared(NamedTuple):
    rows: list[PreparedRow]
    copies: tuple[tuple[int, int], ...]


class BuiltinRunner:
    """See the module. `dummy`: the weights are made up, so that outputs of a given length can be honoured."""

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        attention: Attention,
        tokenizer: Tokenizer,
        *,
        dummy: bool = False,
        random_seed: int = 0,
    ) -> None:
        self.decoder = decoder
        self._cache = cache
        self._attention = attention
        self._tokenizer = tokenizer
        self._dummy = dummy
        self._vocab = decoder.config.vocab_size
        self._eos = tuple(sorted({*tokenizer.eos_ids, *decoder.config.eos_ids}))
        self._device = decoder.embedding.device
        self._seeds = random.Random(random_seed)
        self._tasks: dict[Hashable, TaskTokens] = {}
        self._contexts: dict[int, ContextTokens] = {}

    # ------------------------------------------------------------------------------------------- what the shell tells

    def add_task(
        self, task: EngineTask, link_ids: Sequence[Sequence[int]], sampling: SamplingConfig, forced_ids: Sequence[int]
    ) -> None:
        """See Runner. Raises ParrotError: bad_sampling; bad_request for ids that the model does not have."""
        for ids in (*link_ids, forced_ids):
            self._check_ids(ids)
        if task.generate_context_id is not None:
            check_sampling(sampling, self._vocab, self._dummy)
        end = self._contexts.get(task.parent_context_id) if task.parent_context_id is not None else None
        for link, ids in zip(task.links, link_ids, strict=True):
            known = self._contexts.get(link.context_id)
            if known is None or known.parent is not end or known.ids != list(ids):
                # Unknown, or what an attempt left here that was given up while it generated.
                known = self._contexts[link.context_id] = ContextTokens(end, list(ids))
            end = known
        if task.generate_context_id is None:
            if end is None:
                raise ParrotError("bad_request", "a task that only fills must have a chain to fill")
            self._tasks[task.key] = TaskTokens(task.key, end, generates=False)
            return
        output = ContextTokens(end, list(forced_ids))
        self._contexts[task.generate_context_id] = output
        seed = self._seeds.getrandbits(63) if sampling.seed is None else sampling.seed
        limit = task.max_gen_length or sampling.max_gen_length
        self._tasks[task.key] = Output(task.key, output, sampling, seed, limit, self._tokenizer, self._eos)

    def drop_task(self, key: Hashable) -> None:
        self._tasks.pop(key, None)

    def drop_contexts(self, context_ids: Iterable[int]) -> None:
        for context_id in context_ids:
            self._contexts.pop(context_id, None)

    def _check_ids(self, ids: Sequence[int]) -> None:
        # Synthetic ids are folded into the model's when they are computed.
        vocab = self._tokenizer.vocab_size if self._tokenizer.name == SYNTHETIC else self._vocab
        if ids and not 0 <= min(ids) <= max(ids) < vocab:
            wrong = next(i for i in ids if not 0 <= i < vocab)
            raise ParrotError("bad_request", f"token id {wrong} is none of the model's, which are 0 to {vocab - 1}")

    # ------------------------------------------------------------------------------------------------------ iterations

    def prepare(self, batch: Batch, core: EngineCore) -> Prepared:
        rows = []
        for row in batch.rows:
            task = self._tasks[row.key]
            attention = AttentionRow(row.key, row.start, row.stop, core.block_table(row.context_id))
            rows.append(PreparedRow(task, attention, None if row.decode else task.ids(row.start, row.stop), row.samples))
        return Prepared(rows, batch.copies)

    @torch.inference_mode()
    def run(self, prepared: Prepared) -> list[TokenResult]:
        ids: list[int] = []
        positions: list[int] = []
        last_tokens: list[int] = []
        outputs: list[Output] = []
        for row in prepared.rows:
            ids += _row_ids(row)
            positions += range(row.attention.start, row.attention.stop)
            if row.samples and isinstance(row.task, Output) and not row.task.ended:
                last_tokens.append(len(ids) - 1)
                outputs.append(row.task)
        self._cache.copy_pages(prepared.copies)
        plan = self._attention.plan([row.attention for row in prepared.rows])
        logits = self.decoder.forward(
            torch.tensor(ids, device=self._device).remainder_(self._vocab),  # synthetic ids know no vocabulary
            torch.tensor(positions, device=self._device),
            lambda layer, heads: self._attention.attend(plan, layer, heads),
            torch.tensor(last_tokens, dtype=torch.long, device=self._device),
        )
        if not outputs:
            return []
        for output in outputs:
            output.ready()
        tokens = sample(logits, [output.sampling for output in outputs])
        return [output.push(token_id) for output, token_id in zip(outputs, tokens, strict=True)]


def _row_ids(row: PreparedRow) -> list[int]:
    if row.ids is not None:
        return row.ids
    # A surplus row of an output that has ended in the meantime: whatever it computes is discarded.
    found = row.task.ids(row.attention.start, row.attention.stop)
    return found or [0]


# --------------------------------------------------------------------------------------------------------------- start


@dataclass(frozen=True)
class LoadedRunner:
    """A runner and what its engine must know of it. `model_bytes`, `cache_bytes`: memory taken, in bytes."""

    runner: BuiltinRunner
    tokenizer: Tokenizer
    limits: EngineLimits
    max_seq_len: int
    dummy: bool
    model_bytes: int
    cache_bytes: int
    notes: tuple[str, ...] = ()  #: what the operator should be told in one line each


def load_runner(config: BuiltinEngineConfig) -> LoadedRunner:
    """Loads model and tokenizer, makes the KV cache. Raises ConfigurationError, before weights are loaded where possible."""
    instance = config.instance
    device = torch.device(instance.device)
    dtype = getattr(torch, instance.dtype or ("float32" if device.type == "cpu" else "float16"))
    notes: list[str] = []
    source: Source
    if instance.use_dummy_weights:
        shape = model_config(config.model, published_config(config.model), instance.model_config)
        source = DummyWeights(shape, config.random_seed)
        tokenizer = _tokenizer_or_synthetic(config, notes)
    else:
        files = as_directory(config.model, resolve_model(config.model))
        shape = model_config(config.model, config_at(files), instance.model_config)
        tokenizer = load_tokenizer(config.tokenizer or config.model)
        source = Checkpoint(config.model, files.directory)
    if tokenizer.name != SYNTHETIC and tokenizer.vocab_size > shape.vocab_size:
        notes.append(
            f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} ids, model {config.model!r} only {shape.vocab_size}"
        )
    limits = limits_of(config, max_seq_len=shape.max_seq_len, kv_tokens=_affordable_kv_tokens(config, shape, dtype, device))
    decoder = load_decoder(shape, source, dtype, device)
    cache = KVCache(shape, limits.num_blocks, limits.block_size, dtype, device)
    attention = load_attention(instance.attn_func or "torch_sdpa", shape, cache)
    runner = BuiltinRunner(
        decoder, cache, attention, tokenizer, dummy=instance.use_dummy_weights, random_seed=config.random_seed
    )
    return LoadedRunner(
        runner, tokenizer, limits, shape.max_seq_len, instance.use_dummy_weights, decoder.nbytes, cache.nbytes, tuple(notes)
    )


def _tokenizer_or_synthetic(config: BuiltinEngineConfig, notes: list[str]) -> Tokenizer:
    """Dummy weights need no tokenizer of their own: where it cannot be had, `synthetic` stands in."""
    try:
        return load_tokenizer(config.tokenizer or config.model)
    except ConfigurationError as error:
        notes.append(f"using the tokenizer 'synthetic', one word a token: {error}")
        return load_tokenizer(SYNTHETIC)


def _affordable_kv_tokens(config: BuiltinEngineConfig, shape: ModelConfig, dtype: torch.dtype, device: torch.device) -> int:
    """KV capacity when the file leaves it out. Half goes to the attention function's windows.

    A GPU's capacity comes with the GPU engine; here it is what running tasks may hold.
    """
    wanted = _MOST_TOTALS * config.scheduler.max_total_tokens
    if device.type != "cpu":
        return config.scheduler.max_total_tokens
    free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    weights = 4 * shape.num_layers * shape.hidden_size * (4 * shape.hidden_size + 3 * shape.intermediate_size)
    spare = max(0, free_bytes - weights) * _FREE_MEMORY_SHARE
    affordable = int(spare // (2 * shape.kv_bytes_per_token(dtype.itemsize)))
    if affordable < 1:
        raise ConfigurationError(
            f"model {shape.name!r} leaves no memory for a KV cache: {free_bytes >> 20} MiB are free; a smaller model, "
            "or instance.num_kv_cache_blocks, would help"
        )
    return min(wanted, affordable)
