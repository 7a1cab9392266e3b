"""Loads xformers, says in one line what it lacks, and wraps the one operation that attention functions take from it."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: The library of CUDA's runtime that xformers' compiled part is linked to, and the package that brings it.
_RUNTIME, _RUNTIME_PACKAGE = "libcudart.so.12", "nvidia-cuda-runtime-cu12"


def missing() -> str | None:
    """Why xformers' kernels cannot be used in this process; None when they can."""
    for package in ("xformers", "triton"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed"
    if not torch.cuda.is_available():
        return "its kernels need a GPU, and torch finds none"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"its kernels need compute capability 8.0; {torch.cuda.get_device_name()} has less"
    loaded = _preload_runtime()
    quiet = logging.getLogger("xformers")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # its own warning is a page long
    try:
        from xformers import _cpp_lib
        from xformers.ops import fmha  # noqa: F401
    except Exception as error:  # an import of compiled code raises all kinds
        return f"the package xformers cannot be imported: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    finally:
        quiet.setLevel(level)
    failure = _cpp_lib._cpp_library_load_exception
    if failure is None:
        return None
    if not loaded:
        return f"its compiled part needs {_RUNTIME}, which the package {_RUNTIME_PACKAGE} brings and which is not installed"
    reason = str(failure.__cause__ or failure).strip().splitlines()[0]
    return (
        f"its compiled part does not load with torch {torch.__version__} (the package xformers must be built for it): {reason}"
    )


def _preload_runtime() -> bool:
    """Whether the runtime's library is in the process; xformers' file names it, but does not say where it is."""
    places = [_RUNTIME]
    spec = importlib.util.find_spec("nvidia.cuda_runtime") if importlib.util.find_spec("nvidia") else None
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        places.append(str(Path(folder) / "lib" / _RUNTIME))
    for place in places:
        try:
            ctypes.CDLL(place, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return True
    return False


def causal_bias(query_lengths: Sequence[int], key_lengths: Sequence[int], device: torch.device) -> Any:
    """The mask of packed sequences, each of whose queries are its last positions."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalFromBottomRightMask, BlockDiagonalCausalMask

    if list(query_lengths) == list(key_lengths):
        return BlockDiagonalCausalMask.from_seqlens(list(query_lengths), device=device)
    return BlockDiagonalCausalFromBottomRightMask.from_seqlens(list(query_lengths), list(key_lengths), device=device)


def varlen_attention(queries: Tensor, keys: Tensor, values: Tensor, bias: Any) -> Tensor:
    """queries [tokens, heads, dim]; keys, values [keys, kv_heads, dim]. Gives [tokens, heads, dim]. FlashAttention in 16 bits,
    CUTLASS in float32."""
    from xformers.ops import fmha

    tokens, heads, dim = queries.shape
    kv_heads = keys.shape[1]
    op = fmha.cutlass.FwOp if queries.dtype == torch.float32 else fmha.flash.FwOp
    if heads == kv_heads:
        found = fmha.memory_efficient_attention_forward(
            queries.unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0), attn_bias=bias, op=op
        )
        whole: Tensor = found.view(tokens, heads, dim)
        return whole
    if op is fmha.cutlass.FwOp:  # its grouped form makes a stream a group
        group = heads // kv_heads
        keys, values = (part.repeat_interleave(group, dim=1) for part in (keys, values))
        return varlen_attention(queries, keys, values, bias)
    shape = (1, -1, kv_heads, heads // kv_heads, dim)
    grouped = [part.unsqueeze(0).unsqueeze(3).expand(shape[0], part.shape[0], *shape[2:]) for part in (keys, values)]
    found = fmha.memory_efficient_attention_forward(queries.reshape(shape), *grouped, attn_bias=bias, op=op)
    folded: Tensor = found.reshape(tokens, heads, dim)
    return folded
