"""Writes the iteration log (docs/iteration-log.md says what is in it). Decides nothing; never fails an engine."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from parrot.configuration import ConfigurationError
from parrot.engine.batches import EngineLimits
from parrot.engine.config import BuiltinEngineConfig, OpenAIEngineConfig
from parrot.latency import BatchShape
from parrot.protocol.engine import EngineDescription

log = logging.getLogger(__name__)

FLUSH_S = 1.0


class IterationLog:
    """An open log file. Lines are buffered and written out `FLUSH_S` seconds later at the latest."""

    def __init__(self, path: str | Path, header: dict[str, Any]) -> None:
        """Raises ConfigurationError when `path` cannot be written."""
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file: Any = open(path, "ab", buffering=1 << 16)  # noqa: SIM115 - it lives as long as the engine
        except OSError as error:
            raise ConfigurationError(f"iteration_log {str(path)!r}: cannot be written: {error.strerror}") from error
        self._encode = msgspec.json.Encoder().encode
        self._timer: asyncio.TimerHandle | None = None
        self._write({"kind": "header", "iteration_log": 1, **header})

    def iteration(
        self, t: float, duration_s: float, run_s: float, shape: BatchShape, tasks: Iterable[str], failed: bool = False
    ) -> None:
        """One completed iteration that began at `t`."""
        line: dict[str, Any] = {"kind": "iteration", "t": round(t, 6), "duration_s": round(duration_s, 6)}
        line["run_s"] = round(run_s, 6)
        line.update(shape.fields())
        line["tasks"] = list(tasks)
        if failed:
            line["failed"] = True
        self._write(line)

    def task(self, t: float, label: str, overhead_s: float, prompt_tokens: int, max_gen_length: int) -> None:
        """One task, handed to the scheduler at `t`."""
        self._write(
            {
                "kind": "task",
                "t": round(t, 6),
                "task": label,
                "overhead_s": round(overhead_s, 6),
                "prompt_tokens": prompt_tokens,
                "max_gen_length": max_gen_length,
            }
        )

    def line(self, kind: str, fields: dict[str, Any]) -> None:
        """Any other line, of a `kind` of its own."""
        self._write({"kind": kind, **fields})

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(self._encode(line) + b"\n")
        except OSError as error:
            self._give_up(error)
        else:
            self._flush_later()

    def _flush_later(self) -> None:
        if self._timer is None:
            with contextlib.suppress(RuntimeError):  # no loop yet (the header): the next line's timer writes it out
                self._timer = asyncio.get_running_loop().call_later(FLUSH_S, self.flush)

    def flush(self) -> None:
        self._timer = None
        if self._file is not None:
            try:
                self._file.flush()
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        log.warning("the iteration log is off from now on: %s", error.strerror)
        self._file = None

    def close(self) -> None:
        """Writes out what is left. A second call does nothing."""
        if self._timer is not None:
            self._timer.cancel()
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None


def versions(*packages: str) -> dict[str, str]:
    """Versions of python and of those `packages` that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def log_header(
    config: BuiltinEngineConfig, description: EngineDescription, limits: EngineLimits, fill_graphs: Sequence[int] = ()
) -> dict[str, object]:
    """What a builtin engine's log begins with. `fill_graphs`: the runner's."""
    instance = config.instance
    return {
        "engine": description.engine_name,
        "engine_type": description.engine_type,
        "model": description.model,
        "device": instance.device,
        "attn_func": description.attn_func,
        "tokenizer": description.tokenizer,
        "dtype": instance.dtype or ("float32" if instance.device == "cpu" else "float16"),
        "num_threads": instance.num_threads,
        "dummy_weights": instance.use_dummy_weights,
        "limits": msgspec.to_builtins(limits),
        "fill_graphs": list(fill_graphs),
        "versions": versions("parrot-testbed", "torch", "transformers", "triton", "xformers"),
    }


def remote_log_header(config: OpenAIEngineConfig, description: EngineDescription) -> dict[str, object]:
    """What the log of an engine behind a remote endpoint begins with."""
    instance = config.instance
    return {
        "engine": description.engine_name,
        "engine_type": description.engine_type,
        "model": description.model,
        "tokenizer": description.tokenizer,
        "endpoint": instance.azure_endpoint or instance.base_url or "OpenAI",
        "api_endpoint": instance.api_endpoint,
        "requests_per_minute": instance.requests_per_minute,
        "tokens_per_minute": instance.tokens_per_minute,
        "tasks_capacity": config.tasks_capacity,
        "versions": versions("parrot-testbed", "openai"),
    }
