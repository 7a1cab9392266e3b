"""Puts an engine together from its configuration: sockets, model or latency model, loop, server, link to the core.

Used by the command (http_server.py) and, in-process, by tests and benchmarks. Imports torch only for a builtin engine.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from aiohttp import web

from parrot.configuration import ConfigurationError
from parrot.engine.batches import EngineLimits
from parrot.engine.config import (
    ATTENTION,
    BuiltinEngineConfig,
    BuiltinInstance,
    EmulatedEngineConfig,
    EngineConfig,
    OpenAIEngineConfig,
    default_attention,
    description_of,
    limits_of,
    profile_of,
    rate_limits_of,
    secret_of,
)
from parrot.engine.context_ids import ContextIds
from parrot.engine.core import EngineCore
from parrot.engine.core_link import CoreLink
from parrot.engine.iteration_log import IterationLog, versions
from parrot.engine.loop import BuiltinLoop, EngineLoop, MemoryUse
from parrot.engine.openai_routes import OpenAIRoutes
from parrot.engine.primitives import Primitives
from parrot.engine.rate_limits import RateLimits
from parrot.engine.server import EngineServer, connections_log
from parrot.engine.tasks import Tasks
from parrot.latency import LatencyModel
from parrot.protocol.engine import EngineDescription
from parrot.remote_latency import RemoteModel
from parrot.remote_profile import RemoteProfile
from parrot.tls import client_context, server_context
from parrot.tokenizer import ESTIMATED, Tokenizer, load_tokenizer

log = logging.getLogger(__name__)

#: How long running responses get to write their last event when an engine stops.
STOP_S = 2.0
BACKLOG = 1024
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass
class RunningEngine:
    """An engine that serves. `close` ends its tasks with `unavailable`, then its server."""

    description: EngineDescription
    loop: EngineLoop
    link: CoreLink | None
    _link_task: asyncio.Task[None] | None
    _runner: web.AppRunner

    @property
    def port(self) -> int:
        return self.description.port

    @property
    def url(self) -> str:
        host, scheme = self.description.host, "https" if self.description.tls else "http"
        return f"{scheme}://[{host}]:{self.port}" if ":" in host else f"{scheme}://{host}:{self.port}"

    async def close(self) -> None:
        if self._link_task is not None:
            self._link_task.cancel()
            await asyncio.gather(self._link_task, return_exceptions=True)
        for site in list(self._runner.sites):
            await site.stop()
        await self.loop.close("the engine is shutting down")
        await self._runner.cleanup()


def bind(host: str, port: int) -> list[socket.socket]:
    """Listening sockets for every address of `host`, all with the same port (0: a free one is chosen).

    Raises ConfigurationError when the port is in use or the host is none of this machine's.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(f"host {host!r} cannot be resolved: {error}") from error
    # IPv4 first: it is there everywhere, and a missing IPv6 must not hinder a start.
    addresses = sorted({(family, address[0]) for family, _, _, _, address in found}, key=lambda a: a[0] != socket.AF_INET)
    sockets: list[socket.socket] = []
    for family, address in addresses:
        try:
            sockets.append(_listen(family, str(address), port or (sockets[0].getsockname()[1] if sockets else 0)))
        except OSError as error:
            if sockets and (error.errno != errno.EADDRINUSE or not port):  # an address family that is not there
                continue
            for opened in sockets:
                opened.close()
            reason = f"{host}:{port} cannot be listened on: {error.strerror}"
            raise ConfigurationError(f"{reason}; choose another with --port (0: any free one)") from error
    return sockets


def _listen(family: int, address: str, port: int) -> socket.socket:
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind((address, port))
        listening.listen(BACKLOG)
        listening.setblocking(False)
    except OSError:
        listening.close()
        raise
    return listening


# ---------------------------------------------------------------------------------------------------------- emulated


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


def tokenizer_or_synthetic(name: str) -> Tokenizer:
    """The tokenizer `name`, or the synthetic one where that cannot be had, which is said in one line."""
    try:
        return load_tokenizer(name)
    except Exception as error:
        log.warning("tokenizer %r cannot be had (%s); using 'synthetic', one word a token", name, _first_line(error))
        return load_tokenizer("synthetic")


def bos_tokens(tokenizer: Tokenizer) -> int:
    return 0 if tokenizer.bos_id is None else 1


# ------------------------------------------------------------------------------------------------------------ openai


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
        request_log = IterationLog(config.iteration_log, _remote_header(config, description))
    loop = RemoteLoop(client, config, tokenizer, request_log)
    return await serve(config, description, loop, tokenizer, sockets, with_core)


def _remote_header(config: OpenAIEngineConfig, description: EngineDescription) -> dict[str, object]:
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


# ----------------------------------------------------------------------------------------------------------- builtin


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


def log_header(
    config: BuiltinEngineConfig, description: EngineDescription, limits: EngineLimits, fill_graphs: Sequence[int] = ()
) -> dict[str, object]:
    """`fill_graphs`: the runner's."""
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


# ------------------------------------------------------------------------------------------------------------ serving


async def serve(
    config: EngineConfig,
    description: EngineDescription,
    loop: EngineLoop,
    tokenizer: Tokenizer,
    sockets: Sequence[socket.socket] | None,
    with_core: bool,
) -> RunningEngine:
    """The server of an engine whose `loop` runs, on `sockets` (None: those that the configuration says), and its link."""
    tls = server_context(config.ssl_certfile, config.ssl_keyfile)
    core = config.serve_core
    trust = client_context(core.ca_file, "serve_core.ca_file") if with_core and core.tls else None
    if sockets is None:
        sockets = bind(config.host, config.port)
    port = int(sockets[0].getsockname()[1])
    description = msgspec.structs.replace(description, host=_reachable(config.host, core.host), port=port)
    context_ids = ContextIds()
    instance = secrets.token_hex(16)
    tasks = Tasks(loop, tokenizer, context_ids, instance)
    loop.on_evicted = tasks.note_evicted
    takes_text = description.engine_type == "openai"
    openai = OpenAIRoutes(loop, tokenizer, context_ids, description)
    app = EngineServer(loop, tasks, Primitives(loop, tokenizer, context_ids, takes_text), openai).application()
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, logger=connections_log, shutdown_timeout=STOP_S)
    await runner.setup()
    for listening in sockets:
        await web.SockSite(runner, listening, ssl_context=tls).start()
    link = link_task = None
    if with_core:
        link = CoreLink(
            core.url,
            description,
            instance,
            tasks,
            context_ids,
            loop.runtime_info,
            heartbeat_interval_s=config.heartbeat_interval,
            secret=secret_of(config),
            trust=trust,
        )
        link_task = asyncio.create_task(link.run(), name=f"link of {description.engine_name}")
    return RunningEngine(description, loop, link, link_task, runner)


def _reachable(host: str, core_host: str) -> str:
    """The address under which the core reaches an engine that listens on `host`."""
    if host not in ("0.0.0.0", "::", ""):
        if host in LOOPBACK and core_host not in LOOPBACK:
            log.warning("this engine listens on %s, where the core at %s cannot reach it; use --host 0.0.0.0", host, core_host)
        return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((core_host, 9))  # sends nothing: only asks which of our addresses leads there
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
