"""What follows from an engine's configuration: its latency profile, its limits, what it registers as, and the emulated engine
that stands for it.

Reads shipped profiles and shapes; starts nothing, loads no model, imports no torch. The real engine and the simulator both come
here, so that the same file means the same engine in both.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from parrot.configuration import read_json
from parrot.engine.batches import EngineLimits
from parrot.engine.config import (
    ATTENTION,
    BuiltinInstance,
    EmulatedEngineConfig,
    EmulatedInstance,
    EngineConfig,
    OpenAIInstance,
    default_attention,
)
from parrot.engine.profiles import AnyProfile, find_any_profile, profile_for
from parrot.latency import LatencyProfile
from parrot.protocol.engine import EngineDescription
from parrot.remote_profile import RemoteProfile

#: Tokens of one page of the KV cache: the engine's own affair, whatever `block_size` the file counts its blocks in.
PAGE_TOKENS = 16

#: Published dimensions of the models that sample configurations name.
SHAPES = Path(__file__).parent / "builtin" / "models" / "shapes"

#: Tokenizers of engines whose file names none; of a builtin engine it is the model's own.
TOKENIZERS = {"emulated": "synthetic", "openai": "estimated"}


def profile_of(config: EngineConfig) -> AnyProfile | None:
    """The file's latency profile; else, for a builtin engine, the shipped one of its model and device; else None."""
    if config.latency_profile is not None:
        return find_any_profile(config.latency_profile)
    if not isinstance(config.instance, BuiltinInstance):
        return None
    function = ATTENTION[config.instance.attn_func or default_attention(config.device)]
    return profile_for(config.model, config.device, function)


def limits_of(config: EngineConfig, *, max_seq_len: int | None = None, kv_tokens: int | None = None) -> EngineLimits:
    """The limits of an engine with this file.

    `max_seq_len`: the model's own, in tokens (None: what its shipped shape says); the file's may be lower. `kv_tokens`:
    the capacity when the file leaves it out (`max_total_tokens` when this is None too, as in simulation, where there is
    no memory to measure).
    """
    scheduler = config.scheduler
    capacity = config.kv_tokens or kv_tokens or scheduler.max_total_tokens
    page = min(PAGE_TOKENS, capacity)
    asked = config.instance.max_seq_len
    if max_seq_len is None:
        max_seq_len = _published_max_seq_len(config)
    longest = min((n for n in (asked, max_seq_len) if n is not None), default=capacity)
    return EngineLimits(
        num_blocks=capacity // page,
        block_size=page,
        max_batch_size=scheduler.max_batch_size,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        max_total_tokens=scheduler.max_total_tokens,
        tasks_capacity=config.tasks_capacity,
        max_seq_len=longest,
        fill_chunk_size=config.fill_chunk_size,
        pipeline_depth=pipeline_depth_of(config),
    )


def _published_max_seq_len(config: EngineConfig) -> int | None:
    """The longest sequence of a model whose shape is shipped, as a builtin engine would find it; None for others."""
    if not isinstance(config.instance, BuiltinInstance):
        return None
    shape = SHAPES / f"{config.model.replace('/', '--')}.json"
    published = read_json(shape) if shape.is_file() else {}
    longest = (published | config.instance.model_config).get("max_position_embeddings")
    return longest if isinstance(longest, int) else None


def pipeline_depth_of(config: EngineConfig) -> int:
    """The file's, else 1 on a GPU (of an emulated engine: its profile's) and 0 elsewhere."""
    if config.scheduler.pipeline_depth is not None:
        return config.scheduler.pipeline_depth
    device = config.device
    if not device and config.latency_profile is not None:
        profile = find_any_profile(config.latency_profile)
        device = profile.device if isinstance(profile, LatencyProfile) else ""
    return 1 if device.startswith("cuda") else 0


def rate_limits_of(config: EngineConfig, profile: RemoteProfile) -> tuple[int | None, int | None]:
    """Requests and tokens a minute that a remote engine keeps to: the file's, else what its profile was measured under."""
    instance = config.instance
    if isinstance(instance, BuiltinInstance):
        return profile.requests_per_minute, profile.tokens_per_minute
    return (
        instance.requests_per_minute or profile.requests_per_minute,
        instance.tokens_per_minute or profile.tokens_per_minute,
    )


def description_of(
    config: EngineConfig,
    limits: EngineLimits | None = None,
    *,
    tokenizer: str | None = None,
    bos_tokens: int = 0,
    host: str | None = None,
    port: int | None = None,
    accepts_output_length: bool | None = None,
    attn_func: str | None = None,
    latency_profile: AnyProfile | None = None,
) -> EngineDescription:
    """What an engine with this file registers as; what is given stands above what the file says.

    `tokenizer` and `bos_tokens` are of the tokenizer in use; `latency_profile` defaults to `profile_of(config)`. The core is
    told of a profile of iterations alone, and the emulation of a remote engine registers as one.
    """
    limits = limits or limits_of(config)
    profile = latency_profile or profile_of(config)
    remote = isinstance(profile, RemoteProfile)
    if accepts_output_length is None:
        dummy = isinstance(config.instance, BuiltinInstance) and config.instance.use_dummy_weights
        accepts_output_length = dummy or config.engine_type == "emulated"
    if attn_func is None:
        attn_func = "" if isinstance(config.instance, OpenAIInstance) else config.instance.attn_func or ""
    return EngineDescription(
        engine_name=config.name,
        model=config.model,
        tokenizer=tokenizer or config.tokenizer or TOKENIZERS.get(config.engine_type, config.model),
        host=host or config.host,
        port=config.port if port is None else port,
        engine_type="openai" if remote else config.engine_type,
        tasks_capacity=config.tasks_capacity,
        tokens_capacity=config.tokens_capacity or min(limits.num_blocks * limits.block_size, limits.max_total_tokens),
        max_seq_len=limits.max_seq_len,
        bos_tokens=bos_tokens,
        accepts_output_length=accepts_output_length,
        random_seed=config.random_seed,
        attn_func=attn_func,
        latency_profile=profile if isinstance(profile, LatencyProfile) else None,
        tls=config.ssl_certfile is not None,
        takes_token_ids=isinstance(config.instance, OpenAIInstance) and config.instance.send_token_ids,
    )


def as_emulated(config: EngineConfig, latency_profile: str, tokenizer: str = "synthetic") -> EmulatedEngineConfig:
    """The emulated engine that stands for `config`: same limits and capacities, `latency_profile` for its device.

    `msgspec.json.encode` of any configuration is a file that loads to the same configuration.
    """
    old = config.instance
    if isinstance(old, OpenAIInstance):
        instance = EmulatedInstance(
            max_seq_len=old.max_seq_len,
            requests_per_minute=old.requests_per_minute,
            tokens_per_minute=old.tokens_per_minute,
        )
    else:
        longest = limits_of(config).max_seq_len
        instance = EmulatedInstance(old.num_kv_cache_blocks, old.block_size, longest, old.attn_func)
    fields = {name: getattr(config, name) for name in config.__struct_fields__}
    fields |= {
        "engine_type": "emulated",
        "instance": instance,
        "latency_profile": latency_profile,
        "tokenizer": tokenizer,
        "iteration_log": None,
        "ssl_certfile": None,
        "ssl_keyfile": None,
        "scheduler": msgspec.structs.replace(config.scheduler, pipeline_depth=pipeline_depth_of(config)),
    }
    return EmulatedEngineConfig(**fields)
