"""Puts an engine together from its configuration: model or latency model, loop, server, link to the core.

Used by the command (http_server.py) and, in-process, by tests and benchmarks. Imports torch only for a builtin engine.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence

import msgspec

from parrot.configuration import ConfigurationError
from parrot.engine.builtin.process import prepare_builtin
from parrot.engine.config import BuiltinEngineConfig, EmulatedEngineConfig, OpenAIEngineConfig
from parrot.engine.core import EngineCore
from parrot.engine.derived import description_of, limits_of, profile_of, rate_limits_of
from parrot.engine.iteration_log import IterationLog, log_header, remote_log_header
from parrot.engine.loop import BuiltinLoop, MemoryUse
from parrot.engine.rate_limits import RateLimits
from parrot.engine.serving import RunningEngine, serve
from parrot.latency import LatencyModel
from parrot.remote_latency import RemoteModel
from parrot.remote_profile import RemoteProfile
from parrot.tokenizer import ESTIMATED, Tokenizer, load_tokenizer

log = logging.getLogger(__name__)


async def start_emulated(
    config: EmulatedEngineConfig,
    host: str | None = None,
    port: int | None = None,
    *,
    engine_name: str | None = None,
    with_core: bool = True,
    sockets: Sequence[socket.socket] | None = None,
) -> RunningEngine:
    """Starts one emulated engine in this event loop; `host`, `port` (0: a free one) and `engine_name` override the file.

    Hundreds of them fit in one process. Raises ConfigurationError. The caller must `close` what it gets.
    """
    from parrot.engine.emulated.engine import EmulatedEngine
    from parrot.engine.emulated.loop import EmulatedLoop
    from parrot.engine.emulated.remote import RemoteEngine

    profile = profile_of(config)
    if profile is None:
        raise ConfigurationError(f"engine {config.name!r} is emulated but has no latency_profile: name a file or a shipped one")
    if config.iteration_log is not None:
        log.warning("engine %r is emulated: it has no iterations of its own to log, so iteration_log is ignored", config.name)
    limits = limits_of(config)
    tokenizer = tokenizer_or_synthetic(config.tokenizer or "synthetic")
    engine: EmulatedEngine | RemoteEngine
    if isinstance(profile, RemoteProfile):
        rates = RateLimits(*rate_limits_of(config, profile))
        capacity, largest = limits.tasks_capacity, limits.largest_task
        engine = RemoteEngine(RemoteModel(profile), rates, tasks_capacity=capacity, largest_task=largest)
    else:
        engine = EmulatedEngine(limits, LatencyModel(profile))
    loop = EmulatedLoop(engine, tokenizer, stream_interval_s=config.instance.stream_interval_s)
    changes = {"engine_name": engine_name or config.engine_name, "host": host or config.host}
    config = msgspec.structs.replace(config, **changes, port=config.port if port is None else port)
    description = description_of(
        config, limits, tokenizer=tokenizer.name, bos_tokens=bos_tokens(tokenizer), latency_profile=profile
    )
    return await serve(config, description, loop, tokenizer, sockets, with_core)


async def start_openai(
    config: OpenAIEngineConfig, *, with_core: bool = True, sockets: Sequence[socket.socket] | None = None
) -> RunningEngine:
    """Starts the engine of a remote endpoint in this event loop; nothing is sent there yet. Raises ConfigurationError."""
    from parrot.engine.openai.client import make_client
    from parrot.engine.openai.loop import RemoteLoop

    client = make_client(config)
    tokenizer = load_tokenizer(config.tokenizer or ESTIMATED)
    if tokenizer.name == ESTIMATED:
        log.warning("tokens are estimated, since the file names no 'tokenizer': four bytes of text count as one")
    limits = limits_of(config)
    bos = bos_tokens(tokenizer) if config.instance.send_token_ids else 0
    description = description_of(config, limits, tokenizer=tokenizer.name, bos_tokens=bos)
    request_log = None
    if config.iteration_log is not None:
        request_log = IterationLog(config.iteration_log, remote_log_header(config, description))
    loop = RemoteLoop(client, config, tokenizer, request_log)
    return await serve(config, description, loop, tokenizer, sockets, with_core)


async def start_builtin(
    config: BuiltinEngineConfig, *, with_core: bool = True, sockets: Sequence[socket.socket] | None = None
) -> RunningEngine:
    """Loads the model and starts its engine in this event loop. Raises ConfigurationError, before weights are loaded
    where that is possible."""
    config = prepare_builtin(config)
    from parrot.engine.builtin.load import load_runner

    loaded = load_runner(config)
    for note in loaded.notes:
        log.warning("%s", note)
    limits = loaded.limits
    description = description_of(
        config,
        limits,
        tokenizer=loaded.tokenizer.name,
        bos_tokens=bos_tokens(loaded.tokenizer),
        accepts_output_length=loaded.dummy,
        attn_func=config.instance.attn_func,
    )
    iteration_log = None
    if config.iteration_log is not None:
        iteration_log = IterationLog(config.iteration_log, log_header(config, description, limits, loaded.runner.fill_graphs))
    loop = BuiltinLoop(
        EngineCore(limits),
        loaded.runner,
        pipeline_depth=limits.pipeline_depth,
        memory=MemoryUse(loaded.model_bytes, loaded.cache_bytes),
        iteration_log=iteration_log,
    )
    return await serve(config, description, loop, loaded.tokenizer, sockets, with_core)


def tokenizer_or_synthetic(name: str) -> Tokenizer:
    """The tokenizer `name`, or the synthetic one where that cannot be had, which is said in one line."""
    try:
        return load_tokenizer(name)
    except Exception as error:
        log.warning("tokenizer %r cannot be had (%s); using 'synthetic', one word a token", name, _first_line(error))
        return load_tokenizer("synthetic")


def bos_tokens(tokenizer: Tokenizer) -> int:
    return 0 if tokenizer.bos_id is None else 1


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
