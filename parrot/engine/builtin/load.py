"""Makes a runner from a configuration: weights, tokenizer, KV cache, attention function. Refuses before it loads."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from parrot.configuration import ConfigurationError
from parrot.engine.batches import EngineLimits
from parrot.engine.builtin.attention import load_attention, unavailable
from parrot.engine.builtin.attention.paged_rows import most_partials
from parrot.engine.builtin.attention.xformers_paged import GRAPH_TOKENS
from parrot.engine.builtin.kv_cache import KVCache
from parrot.engine.builtin.models.config import ModelConfig, config_at, model_config, published_config
from parrot.engine.builtin.runner import BuiltinRunner
from parrot.engine.builtin.weights import Checkpoint, DummyWeights, Source, as_directory, load_decoder
from parrot.engine.config import ATTENTION, BuiltinEngineConfig, default_attention
from parrot.engine.derived import PAGE_TOKENS, limits_of
from parrot.model_files import resolve_model
from parrot.tokenizer import SYNTHETIC, Tokenizer, load_tokenizer

#: Part of the free memory that a KV cache of no stated size may take on a CPU, with the windows of its attention function.
_FREE_MEMORY_SHARE = 0.5
#: No more than this many times max_total_tokens there: what running tasks may hold, and retained contexts beside it.
_MOST_TOTALS = 4
#: Part of a GPU's memory that stays free when the KV cache has no stated size: libraries, fragments, other processes.
GPU_MARGIN = 0.05


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
    attn_func = ATTENTION[instance.attn_func or default_attention(instance.device)]
    if reason := unavailable(attn_func, instance.device):
        raise ConfigurationError(f"instance.attn_func {instance.attn_func or attn_func!r} cannot be used: {reason}")
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
    limits = limits_of(config, max_seq_len=shape.max_seq_len, kv_tokens=affordable_kv_tokens(config, shape, dtype, device))
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device.index or 0)
    decoder = load_decoder(shape, source, dtype, device)
    cache = KVCache(shape, limits.num_blocks, limits.block_size, dtype, device, spare_page=on_gpu)
    rows = min(limits.max_batch_size, limits.max_num_batched_tokens)
    attention = load_attention(attn_func, shape, cache, rows, limits.largest_task, limits.max_num_batched_tokens)
    runner = BuiltinRunner(
        decoder,
        cache,
        attention,
        tokenizer,
        slots=limits.tasks_capacity + (limits.pipeline_depth + 2) * rows,
        graphs=on_gpu and bool(attention.buckets),
        dummy=instance.use_dummy_weights,
        random_seed=config.random_seed,
    )
    return LoadedRunner(
        runner, tokenizer, limits, shape.max_seq_len, instance.use_dummy_weights, decoder.nbytes, cache.nbytes, tuple(notes)
    )


def limits_for(config: BuiltinEngineConfig) -> EngineLimits:
    """The limits that `load_runner` would give the engine now. Raises ConfigurationError."""
    files = None if config.instance.use_dummy_weights else as_directory(config.model, resolve_model(config.model))
    published = published_config(config.model) if files is None else config_at(files)
    shape = model_config(config.model, published, config.instance.model_config)
    device = torch.device(config.instance.device)
    dtype = getattr(torch, config.instance.dtype or ("float32" if device.type == "cpu" else "float16"))
    return limits_of(config, max_seq_len=shape.max_seq_len, kv_tokens=affordable_kv_tokens(config, shape, dtype, device))


def _tokenizer_or_synthetic(config: BuiltinEngineConfig, notes: list[str]) -> Tokenizer:
    """Dummy weights need no tokenizer of their own: where it cannot be had, `synthetic` stands in."""
    try:
        return load_tokenizer(config.tokenizer or config.model)
    except ConfigurationError as error:
        notes.append(f"using the tokenizer 'synthetic', one word a token: {error}")
        return load_tokenizer(SYNTHETIC)


# -------------------------------------------------------------------------------------------------------------- memory


def affordable_kv_tokens(config: BuiltinEngineConfig, shape: ModelConfig, dtype: torch.dtype, device: torch.device) -> int:
    """KV capacity in tokens when the file leaves it out. Raises ConfigurationError when not even the weights fit, or what the
    file asks for does not."""
    if device.type == "cuda":
        return _affordable_on_gpu(config, shape, dtype, device)
    free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    weights = 4 * shape.num_layers * shape.hidden_size * (4 * shape.hidden_size + 3 * shape.intermediate_size)
    spare = max(0, free_bytes - weights) * _FREE_MEMORY_SHARE
    affordable = int(spare // (2 * shape.kv_bytes_per_token(dtype.itemsize)))
    if affordable < 1:
        raise ConfigurationError(
            f"model {shape.name!r} leaves no memory for a KV cache: {free_bytes >> 20} MiB are free; a smaller model, "
            "or instance.num_kv_cache_blocks, would help"
        )
    return min(_MOST_TOTALS * config.scheduler.max_total_tokens, affordable)


def _affordable_on_gpu(config: BuiltinEngineConfig, shape: ModelConfig, dtype: torch.dtype, device: torch.device) -> int:
    """What is free less the weights, the largest iteration's tensors and GPU_MARGIN of the whole memory."""
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    weights = shape.num_parameters * dtype.itemsize
    spare = free_bytes - int(GPU_MARGIN * total_bytes) - weights - iteration_bytes(config, shape, dtype)
    per_token = shape.kv_bytes_per_token(dtype.itemsize)
    wanted = config.kv_tokens or PAGE_TOKENS
    if spare < wanted * per_token:
        raise ConfigurationError(
            f"model {shape.name!r} does not fit on {config.device}: its weights take {_gib(weights)}, a KV cache of {wanted} "
            f"tokens {_gib(wanted * per_token)}, and {_gib(max(0, spare + weights))} are left for both of the "
            f"{_gib(free_bytes)} that are free"
        )
    return int(spare // per_token)


def iteration_bytes(config: BuiltinEngineConfig, shape: ModelConfig, dtype: torch.dtype) -> int:
    """The most that the tensors of one iteration take, about: activations, logits, gathered keys, partial results."""
    scheduler = config.scheduler
    tokens = scheduler.max_num_batched_tokens
    captured = min(GRAPH_TOKENS, tokens)  # graphs keep what they were captured with
    if config.fill_chunk_size == -1:  # a longer prompt runs alone
        tokens = max(tokens, min(shape.max_seq_len, scheduler.max_total_tokens))
    heads = (shape.qkv_heads + shape.num_heads) * shape.head_dim
    activations = (tokens + captured) * (4 * shape.hidden_size + 3 * heads + 4 * shape.intermediate_size) * dtype.itemsize
    logits = 4 * scheduler.max_batch_size * shape.vocab_size * 4
    gathered = 2 * scheduler.max_total_tokens * 2 * shape.num_kv_heads * shape.head_dim * dtype.itemsize
    partials = most_partials(scheduler.max_batch_size, captured) * shape.num_heads * (shape.head_dim + 1) * 4
    return activations + logits + gathered + partials


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
