"""The command `python3 -m parrot.engine.http_server`: flags, logging, signals, exit status. Engines are made in launch.py.

Exit status: 0 after SIGTERM or Ctrl-C, 1 with one line on stderr when the engine cannot start, 2 for wrong usage.
Once it serves, it prints one line a engine on stdout: `engine NAME serves MODEL at URL`.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from parrot.configuration import ConfigurationError
from parrot.engine.config import (
    BuiltinEngineConfig,
    EmulatedEngineConfig,
    EngineConfig,
    OpenAIEngineConfig,
    load_engine_config,
    secret_of,
)
from parrot.engine.derived import profile_of
from parrot.engine.listening import bind
from parrot.protocol.errors import ParrotError
from parrot.tls import client_context, server_context

if TYPE_CHECKING:
    from parrot.engine.serving import RunningEngine

log = logging.getLogger("parrot.engine")


def parser() -> argparse.ArgumentParser:
    """The command's flags. Each stands above the key of the configuration file that it names."""
    p = argparse.ArgumentParser(
        prog="python3 -m parrot.engine.http_server",
        description="Serves one engine over HTTP and registers it with its ServeCore. Flags override the configuration file.",
        epilog="Prints `engine NAME serves MODEL at URL` once it serves. SIGTERM and Ctrl-C stop it.",
    )
    add = p.add_argument
    add("--config_path", required=True, metavar="FILE", help="the engine's configuration: JSON, // comments allowed")
    add("--host", help="address to listen on (file: host)")
    add("--port", type=_port, help="port to listen on; 0 chooses a free one (file: port)")
    add("--engine_name", help="name under which the engine registers (file: engine_name)")
    add("--device", help="cpu, cuda or cuda:N, for a builtin engine (file: instance.device)")
    add("--serve_core", type=_address, metavar="HOST:PORT", help="the ServeCore to register with (file: serve_core)")
    add("--without_core", action="store_true", help="register nowhere: serve the primitives /fill, /generate, ... alone")
    add("--iteration_log", metavar="FILE", help="write a line an iteration, see docs/iteration-log.md (file: iteration_log)")
    add("--num_threads", type=_positive, help="CPU threads of a builtin engine (file: instance.num_threads)")
    add("--cpu_affinity", type=_cores, metavar="N[,N...]", help="cores to run on, builtin engine (file: instance.cpu_affinity)")
    add("--count", type=_positive, default=1, help="emulated: serve this many engines in one process, on ports from --port up")
    add("--log_dir", metavar="DIR", help="write the log into this folder; without it, it goes to stderr")
    add("--log_filename", metavar="FILE", default="engine.log", help="the log's name in --log_dir (default: %(default)s)")
    add("--release_mode", action="store_true", help="log warnings and errors only")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command until it is told to stop; its exit status."""
    args = parser().parse_args(argv)
    try:
        config = load_engine_config(args.config_path, _overrides(args))
        _check(config, args)
        start_logging(args.log_dir, args.log_filename, args.release_mode)
        return _run(_serve(config, args.count, not args.without_core))
    except (ConfigurationError, ParrotError) as error:
        print(f"parrot.engine: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the signal handlers stand
        return 130


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    keys = {
        "host": args.host,
        "port": args.port,
        "engine_name": args.engine_name,
        "instance.device": args.device,
        "iteration_log": args.iteration_log,
        "instance.num_threads": args.num_threads,
        "instance.cpu_affinity": args.cpu_affinity,
    }
    if args.serve_core is not None:
        keys["serve_core.host"], keys["serve_core.port"] = args.serve_core
    return {key: value for key, value in keys.items() if value is not None}


def _check(config: EngineConfig, args: argparse.Namespace) -> None:
    if args.count > 1 and not isinstance(config, EmulatedEngineConfig):
        raise ConfigurationError(f"--count {args.count} is for emulated engines; {args.config_path} is {config.engine_type!r}")
    try:
        if isinstance(config, EmulatedEngineConfig) and profile_of(config) is None:
            raise ConfigurationError("missing key 'latency_profile': an emulated engine needs a file or a shipped one's name")
        if isinstance(config, OpenAIEngineConfig):
            from parrot.engine.openai.client import api_key_of, check

            check(config)
            api_key_of(config)
        server_context(config.ssl_certfile, config.ssl_keyfile)
        if config.serve_core.ca_file is not None:
            if not config.serve_core.tls:
                raise ConfigurationError("key 'serve_core.ca_file' is given, but serve_core.tls is false")
            client_context(config.serve_core.ca_file, "serve_core.ca_file")
        if not args.without_core:
            secret_of(config)
    except ConfigurationError as error:
        raise ConfigurationError(f"{args.config_path}: {error}") from error


async def _serve(config: EngineConfig, count: int, with_core: bool) -> int:
    # Loading a model keeps the event loop busy: until it is loaded, Ctrl-C is an exception as anywhere else.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    engines: list[RunningEngine] = []
    sockets = _bind_all(config, count)
    try:
        if isinstance(config, BuiltinEngineConfig):
            from parrot.engine.builtin.process import spare_what_is_loaded
            from parrot.engine.launch import start_builtin

            engines.append(await start_builtin(config, with_core=with_core, sockets=sockets[0]))
            spare_what_is_loaded()
        elif isinstance(config, EmulatedEngineConfig):
            await _start_emulated(config, sockets, with_core, engines)
        elif isinstance(config, OpenAIEngineConfig):
            from parrot.engine.launch import start_openai

            engines.append(await start_openai(config, with_core=with_core, sockets=sockets[0]))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        gc.freeze()  # what was made up to here stays: a collection need not look at it again
        for engine in engines:
            d = engine.description
            print(f"engine {d.engine_name} serves {d.model} at {engine.url}", flush=True)
        await stop.wait()
        log.info("stopping")
    finally:
        await asyncio.gather(*(engine.close() for engine in engines))
        for listening in (s for one in sockets for s in one):
            listening.close()
    return 0


def _bind_all(config: EngineConfig, count: int) -> list[list[socket.socket]]:
    """Every engine's sockets, before anything slow: a port in use is told at once."""
    return [bind(config.host, config.port and config.port + i) for i in range(count)]


async def _start_emulated(
    config: EmulatedEngineConfig, sockets: list[list[socket.socket]], with_core: bool, engines: list[RunningEngine]
) -> None:
    from parrot.engine.launch import start_emulated

    for number, own in enumerate(sockets):
        name = config.name if len(sockets) == 1 else f"{config.name}-{number}"
        named = msgspec.structs.replace(config, engine_name=name)
        engines.append(await start_emulated(named, with_core=with_core, sockets=own))


def _run(main: Any) -> int:
    try:
        import uvloop
    except ImportError:
        return int(asyncio.run(main))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return int(runner.run(main))


def start_logging(log_dir: str | None, log_filename: str, release_mode: bool) -> None:
    """The process's log: a file in `log_dir`, else stderr. Raises ConfigurationError when it cannot be written."""
    if log_dir is None:
        handler: logging.Handler = logging.StreamHandler()
    else:
        path = Path(log_dir) / log_filename
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handler = logging.FileHandler(path, encoding="utf-8")
        except OSError as error:
            raise ConfigurationError(f"--log_dir {log_dir}: {path} cannot be written: {error.strerror}") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING if release_mode else logging.INFO, handlers=[handler], force=True)


# ---------------------------------------------------------------------------------------------------- values of flags


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{port} is no port: 0 to 65535")
    return port


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def _cores(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of cores like 0,1") from None


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host.strip("[]"), _port(port)


if __name__ == "__main__":
    sys.exit(main())
