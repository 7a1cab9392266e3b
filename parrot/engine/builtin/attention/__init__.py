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


def load_attention(
    name: str, config: ModelConfig, cache: KVCache, max_rows: int = 256, max_seq_len: int = 8192, max_tokens: int = 2560
) -> Attention:
    """The attention function `name` (parrot.engine.config.ATTENTION) over `cache`, for at most `max_rows` decode rows of
    sequences of at most `max_seq_len` tokens. Iterations have about `max_tokens`: graphs are not captured for more."""
    if name == "torch_sdpa":
        from parrot.engine.builtin.attention.torch_sdpa import SdpaAttention

        return SdpaAttention(config, cache)
    if name == "xformers_with_buffer":
        from parrot.engine.builtin.attention.xformers_with_buffer import BufferedAttention

        return BufferedAttention(config, cache)
    if name not in ("xformers_paged", "xformers_shared_prefix"):
        raise ValueError(f"there is no attention function {name!r}")
    from parrot.engine.builtin.attention.xformers_paged import GRAPH_TOKENS, PagedAttention
    from parrot.engine.builtin.attention.xformers_shared_prefix import SharedPrefixAttention

    kind = PagedAttention if name == "xformers_paged" else SharedPrefixAttention
    return kind(config, cache, max_rows, max_seq_len, min(GRAPH_TOKENS, max_tokens))
