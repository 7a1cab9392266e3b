"""The configuration of an engine as its JSON file has it: its keys, their defaults, and what is refused.

Reads and validates; starts nothing, loads no model, imports no torch. What follows from a configuration is said by
`parrot.engine.derived`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from parrot.configuration import ConfigurationError, masked, parse, read_json
from parrot.engine.profiles import find_any_profile, find_profile, find_remote_profile

Positive = Annotated[int, Meta(ge=1)]
NotNegative = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(gt=0)]
Port = Annotated[int, Meta(ge=0, le=65535)]
Device = Annotated[str, Meta(pattern=r"^(cpu|cuda(:[0-9]+)?)$")]

AttentionName = Literal[
    "torch_sdpa",
    "xformers_paged",
    "xformers_shared_prefix",
    "xformers_with_buffer",
    "xformers",
    "xformers_fill_vllm_paged_attention_generate",
    "xformers_fill_shared_prompts_generate",
]
#: Attention functions by the names that a file may give them, old ones included.
ATTENTION: dict[str, str] = {
    "torch_sdpa": "torch_sdpa",
    "xformers_paged": "xformers_paged",
    "xformers_shared_prefix": "xformers_shared_prefix",
    "xformers_with_buffer": "xformers_with_buffer",
    "xformers": "xformers_paged",
    "xformers_fill_vllm_paged_attention_generate": "xformers_paged",
    "xformers_fill_shared_prompts_generate": "xformers_shared_prefix",
}


def default_attention(device: str) -> str:
    """The attention function of a file that names none."""
    return "xformers_paged" if device.startswith("cuda") else "torch_sdpa"


class SchedulerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Section `scheduler`: the local scheduler. `max_total_tokens`: KV tokens held by running tasks, shared ones once.

    `pipeline_depth` null: 0 on a CPU, 1 on a GPU.
    """

    max_batch_size: Positive = 256
    max_num_batched_tokens: Positive = 2560
    max_total_tokens: Positive = 8192
    pipeline_depth: Annotated[int, Meta(ge=0, le=8)] | None = None
    policy: Literal["fifo"] = "fifo"


class ServeCoreAddress(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Section `serve_core`. `engine_secret`: the cluster's shared secret, or `env:NAME`; null: the core asks for none.
    `tls`: it shows a certificate; `ca_file`: of those whose certificates are believed (null: the system's authorities)."""

    host: str = "localhost"
    port: Annotated[int, Meta(ge=1, le=65535)] = 9000
    engine_secret: str | None = None
    tls: bool = False
    ca_file: str | None = None

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}"

    def __repr__(self) -> str:
        return masked(self, "engine_secret")


class BuiltinInstance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Section `instance` of a builtin engine. KV capacity in tokens: num_kv_cache_blocks × block_size.

    Null: `num_kv_cache_blocks` is sized from free memory, `attn_func` is the device's own, `dtype` is float16 on cuda
    and float32 on cpu, `max_seq_len` is the model's, `num_threads` is torch's choice, `cpu_affinity` is every core.
    """

    num_kv_cache_blocks: Positive | None = None
    block_size: Positive = 1
    attn_func: AttentionName | None = None
    attn_fallback: bool = False
    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    model_config: dict[str, Any] = {}
    device: Device = "cuda"
    max_seq_len: Positive | None = None
    use_dummy_weights: bool = False
    num_threads: Positive | None = None
    cpu_affinity: Annotated[tuple[NotNegative, ...], Meta(min_length=1)] | None = None


class EmulatedInstance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Section `instance` of an emulated engine, as a builtin one has it.

    `stream_interval_s`: how often text is streamed while nothing else happens; null: only when the batch changes.
    `requests_per_minute`, `tokens_per_minute`: with a remote profile, as an engine behind an endpoint has them.
    """

    num_kv_cache_blocks: Positive | None = None
    block_size: Positive = 1
    max_seq_len: Positive | None = None
    attn_func: str | None = None
    stream_interval_s: Seconds | None = None
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None


class OpenAIInstance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Section `instance` of an engine behind a remote endpoint. `api_key`: the key, or `env:NAME`; null: none is sent.

    `base_url`: of any server that speaks OpenAI's protocol, up to and with its `/v1`. `timeout`: seconds without a byte.
    `max_retries`: how often a request is sent again that was answered 408, 429 or 5xx, or not at all, before any text came.
    `requests_per_minute`, `tokens_per_minute`: what this engine keeps to by itself (null: no limit); tokens are the prompt's
    and `max_gen_length`, as Azure counts them. `stream_usage`: ask for the token counts with the stream (null: yes, but not of
    Azure, whose older versions refuse it). `send_seed`: send the seed of what is sampled (null: yes, but not to the versions of
    Azure that refuse it). `max_tokens_field`: newer models of OpenAI's take max_completion_tokens.
    `extended_sampling`: the server knows top_k, repetition_penalty, stop_token_ids and ignore_eos. `send_token_ids`: send the
    prompt as ids of `tokenizer` (api_endpoint "completion" alone); `return_token_ids`: the server, vLLM or an engine of this
    project, gives back those of the output, so that other calls read what was generated to the token. `max_seq_len`: the
    model's context window in tokens. `prompt_price`, `output_price`: of a million tokens, in any currency.
    """

    api_key: str | None = None
    api_endpoint: Literal["completion", "chat"] = "completion"
    base_url: str | None = None
    is_azure: bool = False
    azure_api_version: str | None = None
    azure_endpoint: str | None = None
    timeout: Seconds = 120.0
    max_retries: NotNegative = 5
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    stream_usage: bool | None = None
    send_seed: bool | None = None
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    extended_sampling: bool = False
    send_token_ids: bool = False
    return_token_ids: bool = False
    max_seq_len: Positive | None = None
    prompt_price: Annotated[float, Meta(ge=0)] = 0.0
    output_price: Annotated[float, Meta(ge=0)] = 0.0

    def __repr__(self) -> str:
        return masked(self, "api_key")


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What every engine's file has; the three kinds below narrow `engine_type` and `instance`.

    Null: `engine_name` and `tokenizer` are the model's name, `tokens_capacity` is min(KV capacity, max_total_tokens).
    `latency_profile`: a file, or a shipped profile's name; of an engine behind a remote endpoint, of a remote one, which only a
    simulation reads. `iteration_log`: see docs/iteration-log.md. `ssl_certfile`, `ssl_keyfile`: the certificate that the engine
    shows, see docs/security.md.
    """

    model: str
    host: str = "localhost"
    port: Port = 9001
    heartbeat_interval: Seconds = 3.0
    engine_name: str | None = None
    engine_type: str = "builtin"
    random_seed: int = 0
    tokenizer: str | None = None
    fill_chunk_size: Annotated[int, Meta(ge=-1)] = -1
    tasks_capacity: Positive = 256
    tokens_capacity: Positive | None = None
    latency_profile: str | None = None
    iteration_log: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    scheduler: SchedulerConfig = SchedulerConfig()
    serve_core: ServeCoreAddress = ServeCoreAddress()
    instance: BuiltinInstance | EmulatedInstance | OpenAIInstance

    @property
    def name(self) -> str:
        return self.engine_name or self.model

    @property
    def device(self) -> str:
        """The device that the file names; "" for an engine that has none of its own."""
        return self.instance.device if isinstance(self.instance, BuiltinInstance) else ""

    @property
    def kv_tokens(self) -> int | None:
        """KV capacity in tokens that the file gives; None when it leaves the size to the engine."""
        if isinstance(self.instance, OpenAIInstance) or self.instance.num_kv_cache_blocks is None:
            return None
        return self.instance.num_kv_cache_blocks * self.instance.block_size


class BuiltinEngineConfig(EngineConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`engine_type` "builtin": a model on this machine."""

    engine_type: Literal["builtin"] = "builtin"
    instance: BuiltinInstance = BuiltinInstance()


class EmulatedEngineConfig(EngineConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`engine_type` "emulated": the scheduler of an engine over a latency model, in real time. Its text is synthetic."""

    engine_type: Literal["emulated"] = "emulated"
    instance: EmulatedInstance = EmulatedInstance()


class OpenAIEngineConfig(EngineConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`engine_type` "openai": a remote endpoint."""

    engine_type: Literal["openai"] = "openai"
    instance: OpenAIInstance = OpenAIInstance()


KINDS: dict[str, type[EngineConfig]] = {
    "builtin": BuiltinEngineConfig,
    "openai": OpenAIEngineConfig,
    "emulated": EmulatedEngineConfig,
}


# ------------------------------------------------------------------------------------------------------------ reading


def load_engine_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> EngineConfig:
    """Reads the file at `path`; `overrides` (`{"instance.device": "cpu"}`) stand above it.

    A relative `latency_profile` file is looked for beside `path`, and made absolute. Raises ConfigurationError.
    """
    data = read_json(path)
    if not isinstance(data, dict):
        raise ConfigurationError(f"{path}: an engine's configuration is a JSON object, this is {type(data).__name__}")
    for key, value in (overrides or {}).items():
        _override(data, key, value, path)
    return parse_engine_config(data, path)


def parse_engine_config(data: Mapping[str, Any], path: str | Path) -> EngineConfig:
    """The configuration in `data`, which came from `path`. Raises ConfigurationError, which names file, key and values."""
    engine_type = data.get("engine_type", "builtin")
    if engine_type not in KINDS:
        raise ConfigurationError(f"{path}: key 'engine_type' is {engine_type!r}; expected one of: {', '.join(KINDS)}")
    config = parse(data, KINDS[engine_type], path)
    if config.fill_chunk_size == 0:
        raise ConfigurationError(f"{path}: key 'fill_chunk_size' is 0; expected -1 (no chunking) or at least 1")
    asked, capacity = config.instance.max_seq_len, config.kv_tokens
    if asked is not None and capacity is not None and asked > capacity:
        raise ConfigurationError(
            f"{path}: key 'instance.max_seq_len' is {asked}, but num_kv_cache_blocks × block_size holds {capacity} tokens, "
            "too few for one prompt of that length"
        )
    if config.latency_profile is not None:
        beside = Path(path).parent / config.latency_profile
        try:
            _check_kind(config, config.latency_profile, Path(path).parent)
        except ConfigurationError as error:
            raise ConfigurationError(f"{path}: {error}") from error
        if beside.is_file():
            config = msgspec.structs.replace(config, latency_profile=str(beside.resolve()))
    return config


def _check_kind(config: EngineConfig, name: str, folder: Path) -> None:
    """Raises ConfigurationError for a profile that is not there, or of a kind that the engine cannot have."""
    if isinstance(config, OpenAIEngineConfig):
        find_remote_profile(name, folder)
    elif isinstance(config, EmulatedEngineConfig):
        find_any_profile(name, folder)
    else:
        find_profile(name, folder)


def _override(data: dict[str, Any], dotted: str, value: Any, path: str | Path) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        inner = data.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigurationError(f"{path}: key {section!r} is {inner!r}; expected an object")
        data = inner
    data[key] = value


def secret_of(config: EngineConfig) -> str | None:
    """The shared secret that the core is told. Raises ConfigurationError when `env:NAME` names no variable."""
    secret = config.serve_core.engine_secret
    if secret is None or not secret.startswith("env:"):
        return secret
    name = secret.removeprefix("env:")
    if name not in os.environ:
        raise ConfigurationError(f"key 'serve_core.engine_secret' is {secret!r}, but the environment has no {name}")
    return os.environ[name]
