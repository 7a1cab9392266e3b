"""The process of a builtin engine: its cores and threads, its device and attention function before the model is loaded, its
garbage collector after that. Loads nothing; imports torch only when the number of threads, which torch reads once, is set.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Sequence
from typing import Any

import msgspec

from parrot.configuration import ConfigurationError
from parrot.engine.config import ATTENTION, BuiltinEngineConfig, BuiltinInstance, default_attention

log = logging.getLogger(__name__)


def prepare_builtin(config: BuiltinEngineConfig) -> BuiltinEngineConfig:
    """Pins the process, then checks device and attention function; `attn_func` in the result is the one to use."""
    instance = config.instance
    if instance.cpu_affinity is not None:
        _pin(instance.cpu_affinity)
    if instance.num_threads is not None:
        # Before torch is first imported: its pools read it once.
        os.environ["OMP_NUM_THREADS"] = str(instance.num_threads)
    _check_device(instance.device)
    if instance.num_threads is not None:
        import torch

        torch.set_num_threads(instance.num_threads)
    return msgspec.structs.replace(config, instance=msgspec.structs.replace(instance, attn_func=_attention(instance)))


def spare_what_is_loaded() -> None:
    """Python's garbage collection looks at everything there is now for the last time: a full one over torch, transformers and a
    model's objects stops an engine for a quarter of a second. For a process that is an engine, once it has loaded."""
    gc.collect()
    gc.freeze()


def _pin(cores: Sequence[int]) -> None:
    try:
        os.sched_setaffinity(0, cores)
    except (OSError, ValueError, OverflowError) as error:
        here = ", ".join(map(str, sorted(os.sched_getaffinity(0))))
        raise ConfigurationError(f"instance.cpu_affinity {list(cores)}: {error}; there are the cores {here}") from error


def _check_device(device: str) -> None:
    try:
        import torch
    except ImportError as error:
        raise ConfigurationError(
            "engine_type 'builtin' needs torch, which is not installed: pip install 'parrot-testbed[engine]'"
        ) from error
    if not device.startswith("cuda"):
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(device.partition(":")[2] or 0)
    if index >= count:
        there = f"torch finds {count} GPUs" if count else "torch finds no GPU"
        raise ConfigurationError(f"instance.device {device!r} is not there: {there}; use --device cpu to run on the CPU")


def _attention(instance: BuiltinInstance) -> Any:
    """The attention function to use, by its present name. Raises ConfigurationError when it cannot be had."""
    from parrot.engine.builtin.attention import unavailable

    wanted = ATTENTION[instance.attn_func or default_attention(instance.device)]
    reason = unavailable(wanted, instance.device)
    if reason is None:
        return wanted
    named = instance.attn_func or wanted
    if not instance.attn_fallback:
        raise ConfigurationError(
            f"instance.attn_func {named!r} cannot be used: {reason}; use 'torch_sdpa', or set instance.attn_fallback to true"
        )
    log.warning("attn_func %r cannot be used (%s): falling back to 'torch_sdpa', as attn_fallback says", named, reason)
    return "torch_sdpa"
