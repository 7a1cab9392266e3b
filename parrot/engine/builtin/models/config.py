"""A model's dimensions, read from the configuration that its authors published. What differs between families is data.

Refuses, in one line and before any weight is read, what the decoder cannot run. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from parrot.configuration import ConfigurationError
from parrot.engine.builtin.models.families import FAMILIES, Family
from parrot.model_files import ModelFiles, resolve_model

_SHAPES = Path(__file__).parent / "shapes"

_ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions. `factor` and what follows: scaling of type `linear` or `llama3`."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions of a decoder. Lengths are tokens. `family`: a key of FAMILIES, which says what differs beside them."""

    name: str
    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_seq_len: int
    norm_eps: float = 1e-6
    tied_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    initializer_range: float = 0.02
    rope: RopeConfig = field(default_factory=RopeConfig)
    eos_ids: tuple[int, ...] = ()

    @property
    def kind(self) -> Family:
        return FAMILIES[self.family]

    @property
    def num_parameters(self) -> int:
        """Of all tensors, tied ones once. Exact but for norms and biases, which are left out."""
        wide = self.intermediate_size * (2 if self.kind.names.gate is None else 3)
        heads = (self.qkv_heads + self.num_heads) * self.head_dim
        embeddings = self.vocab_size * (1 if self.tied_embeddings else 2)
        return self.hidden_size * (embeddings + self.num_layers * (wide + heads))

    @property
    def qkv_heads(self) -> int:
        """Heads of the fused query, key and value projection."""
        return self.num_heads + 2 * self.num_kv_heads

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Bytes that one token holds in the KV cache, all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * bytes_per_value


def published_config(name: str) -> dict[str, Any]:
    """The configuration of `name` alone, without its weights: a shape of this package, else what `resolve_model` finds."""
    shape = _SHAPES / f"{name.replace('/', '--')}.json"
    if shape.is_file():
        return _read(shape)
    files = resolve_model(name, "config")
    if files.gguf:
        raise ConfigurationError(f"model {name!r}: dummy weights need a config.json or a shipped shape; {files} is a GGUF file")
    return config_at(files)


def config_at(files: ModelFiles) -> dict[str, Any]:
    """config.json of a directory, with the end tokens of its generation_config.json."""
    config = _read(files.directory / "config.json")
    generation = files.directory / "generation_config.json"
    if generation.is_file() and (eos := _read(generation).get("eos_token_id")) is not None:
        config["eos_token_id"] = eos
    return config


def _read(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigurationError(f"{path}: not a model's configuration: {error}") from error


def model_config(name: str, published: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> ModelConfig:
    """`published` with `overrides` over it, as the decoder needs it. Raises ConfigurationError."""
    unknown = sorted(set(overrides or {}) - set(published) - set(_OPTIONAL))
    if unknown:
        known = ", ".join(sorted(set(published) | set(_OPTIONAL)))
        raise ConfigurationError(f"model {name!r}: model_config has no key {unknown[0]!r}; it has: {known}")
    raw = {**published, **(overrides or {})}
    family = raw.get("model_type", "")
    if family not in FAMILIES:
        architecture = (raw.get("architectures") or [family or "(none named)"])[0]
        raise ConfigurationError(
            f"model {name!r}: architecture {architecture!r} is not one that the builtin engine runs yet; "
            f"it runs: {', '.join(FAMILIES)}"
        )
    kind = FAMILIES[family]
    raw = {**kind.defaults, **raw}
    raw |= {ours: raw[theirs] for ours, theirs in kind.renamed.items() if theirs in raw}
    _refuse_unsupported(name, kind, raw)
    try:
        return _config(name, family, raw)
    except KeyError as error:
        raise ConfigurationError(f"model {name!r}: its configuration has no key {error.args[0]!r}") from None
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"model {name!r}: its configuration is wrong: {error}") from None


#: Keys that a configuration may leave out and `model_config` may set all the same.
_OPTIONAL = (
    "attention_bias",
    "eos_token_id",
    "head_dim",
    "mlp_bias",
    "num_key_value_heads",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "use_sliding_window",
)


def _refuse_unsupported(name: str, kind: Family, raw: Mapping[str, Any]) -> None:
    activation = raw.get("hidden_act", kind.activations[0])
    if activation not in kind.activations:
        there = " and ".join(map(repr, kind.activations))
        raise ConfigurationError(f"model {name!r}: hidden_act is {activation!r}; the decoder has only {there}")
    for key, allowed in kind.only.items():
        if raw[key] not in allowed:
            raise ConfigurationError(f"model {name!r}: {key} is {raw[key]!r}; the decoder runs only {allowed[0]!r}")
    if raw.get("word_embed_proj_dim", raw.get("hidden_size")) != raw.get("hidden_size"):
        raise ConfigurationError(
            f"model {name!r}: word_embed_proj_dim is {raw['word_embed_proj_dim']}; the decoder needs it to be hidden_size, "
            f"{raw.get('hidden_size')}"
        )
    window = raw.get("sliding_window")
    longest = raw.get("max_position_embeddings", 0)
    if window is not None and raw.get("use_sliding_window", True) and longest > window:
        raise ConfigurationError(
            f"model {name!r}: attention with a sliding window of {window} tokens is not supported; set model_config "
            f'{{"max_position_embeddings": {window}}} to use the model within its window'
        )


def _config(name: str, family: str, raw: Mapping[str, Any]) -> ModelConfig:
    heads = int(raw["num_attention_heads"])
    hidden = int(raw["hidden_size"])
    kv_heads = int(raw.get("num_key_value_heads") or heads)
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    if not raw.get("head_dim") and hidden % heads:
        raise ValueError(f"hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    kind = FAMILIES[family]
    bias = bool(raw.get("attention_bias", False))
    eos = raw.get("eos_token_id")
    config = ModelConfig(
        name=name,
        family=family,
        vocab_size=int(raw["vocab_size"]),
        hidden_size=hidden,
        intermediate_size=int(raw["intermediate_size"]),
        num_layers=int(raw["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=int(raw.get("head_dim") or hidden // heads),
        max_seq_len=int(raw["max_position_embeddings"]),
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)) if kind.norm == "rms" else 1e-5,
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=bias,
        output_bias=bias and kind.output_bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        activation=str(raw.get("hidden_act", kind.activations[0])),
        initializer_range=float(raw.get("initializer_range", 0.02)),
        rope=_rope(name, raw),
        eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
    )
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "max_seq_len"):
        if getattr(config, key) < 1:
            raise ValueError(f"{key} is {getattr(config, key)}; at least 1 is expected")
    if config.head_dim % 2 and kind.position_offset is None:
        raise ValueError(f"head_dim is {config.head_dim}; rotary positions need an even one")
    return config


def _rope(name: str, raw: Mapping[str, Any]) -> RopeConfig:
    # Newer configurations put theta and scaling into rope_parameters; older ones have rope_theta and rope_scaling.
    scaling = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    kind = scaling.get("rope_type", scaling.get("type", "default")) or "default"
    if kind not in _ROPE_TYPES:
        raise ConfigurationError(f"model {name!r}: rope scaling {kind!r} is not supported; supported: {', '.join(_ROPE_TYPES)}")
    return RopeConfig(
        theta=float(scaling.get("rope_theta", raw.get("rope_theta", 10000.0))),
        kind=kind,
        factor=float(scaling.get("factor", 1.0)),
        low_freq_factor=float(scaling.get("low_freq_factor", 1.0)),
        high_freq_factor=float(scaling.get("high_freq_factor", 4.0)),
        original_max_seq_len=int(scaling.get("original_max_position_embeddings", raw.get("max_position_embeddings", 8192))),
    )
