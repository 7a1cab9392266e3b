"""Attention functions by name, one file each behind the interface of base.py. Chooses; computes nothing."""

from __future__ import annotations

from parrot.engine.builtin.attention.base import Attention
from parrot.engine.builtin.kv_cache import KVCache
from parrot.engine.builtin.models.config import ModelConfig


def unavailable(name: str, device: str) -> str | None:
    """Why the attention function `name` cannot be had on `device`; None when it can."""
    if name == "torch_sdpa":
        return None
    if not device.startswith("cuda"):
        return f"its kernels need a GPU, and instance.device is {device!r}"
    from parrot.engine.builtin.attention import xformers_library

    return xformers_library.missing()


def load_attention(name: str, config: ModelConfig, cache: KVCache, max_rows: int = 256, max_seq_len: int = 8192) -> Attention:
    """The attention function `name` (parrot.engine.config.ATTENTION) over `cache`, for at most `max_rows` decode rows of
    sequences of at most `max_seq_len` tokens."""
    if name == "torch_sdpa":
        from parrot.engine.builtin.attention.torch_sdpa import SdpaAttention

        return SdpaAttention(config, cache)
    if name == "xformers_with_buffer":
        from parrot.engine.builtin.attention.xformers_with_buffer import BufferedAttention

        return BufferedAttention(config, cache)
    if name == "xformers_paged":
        from parrot.engine.builtin.attention.xformers_paged import PagedAttention

        return PagedAttention(config, cache, max_rows, max_seq_len)
    if name == "xformers_shared_prefix":
        from parrot.engine.builtin.attention.xformers_shared_prefix import SharedPrefixAttention

        return SharedPrefixAttention(config, cache, max_rows, max_seq_len)
    raise ValueError(f"there is no attention function {name!r}")
