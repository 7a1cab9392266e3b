"""Attention functions by name, one file each behind the interface of base.py. Chooses; computes nothing."""

from __future__ import annotations

from parrot.configuration import ConfigurationError
from parrot.engine.builtin.attention.base import Attention
from parrot.engine.builtin.kv_cache import KVCache
from parrot.engine.builtin.models.config import ModelConfig


def load_attention(name: str, config: ModelConfig, cache: KVCache) -> Attention:
    """The attention function `name` over `cache`. Raises ConfigurationError for one that is not there."""
    if name == "torch_sdpa":
        from parrot.engine.builtin.attention.torch_sdpa import SdpaAttention

        return SdpaAttention(config, cache)
    raise ConfigurationError(f"attn_func {name!r} is not available in this engine; it has: 'torch_sdpa'")
