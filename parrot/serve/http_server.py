"""The command `python3 -m parrot.serve.http_server`: reads flags and configuration, serves until it is told to stop.

Whatever keeps it from starting is one line on stderr and exit status 1.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from parrot.configuration import ConfigurationError, load
from parrot.protocol.errors import ParrotError
from parrot.serve.config import ServeCoreConfig
from parrot.serve.policies import is_clairvoyant


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    flags = _parser().parse_args(arguments)
    try:
        config = _configuration(flags)
        _set_up_logging(flags)
        return _run(config, flags.config_path)
    except (ConfigurationError, ParrotError) as error:
        print(f"parrot.serve.http_server: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python3 -m parrot.serve.http_server",
        description="Starts a ServeCore: the server that applications and engines connect to. Flags override the file.",
    )
    parser.add_argument(
        "--config_path", required=True, help="configuration file (JSON, // comments allowed), e.g. sample_configs/core/…"
    )
    parser.add_argument("--host", help="address to listen on; 0.0.0.0 for every interface (default: the file's, localhost)")
    parser.add_argument("--port", type=int, help="port to listen on; 0 for any free one (default: the file's, 9000)")
    parser.add_argument("--log_dir", help="directory for the log file, made when missing (default: log to stderr)")
    parser.add_argument("--log_filename", default="core.log", help="name of the log file in --log_dir (default: %(default)s)")
    parser.add_argument(
        "--lengths_are_told",
        action="store_true",
        help="clients tell the lengths of outputs (emulated engines, dummy weights): a policy that reads them may run",
    )
    parser.add_argument("--release_mode", action="store_true", help="log warnings and errors only")
    return parser


def _configuration(flags: argparse.Namespace) -> ServeCoreConfig:
    config = load(flags.config_path, ServeCoreConfig)
    if flags.host is not None:
        config = msgspec.structs.replace(config, host=flags.host)
    if flags.port is not None:
        if not 0 <= flags.port <= 65535:
            raise ConfigurationError(f"--port {flags.port} is no port; expected 0 to 65535")
        config = msgspec.structs.replace(config, port=flags.port)
    policy = config.global_scheduler.policy
    try:
        clairvoyant = is_clairvoyant(config.global_scheduler)
    except ParrotError as error:
        raise ConfigurationError(f"{flags.config_path}: {error}") from error
    if clairvoyant and not flags.lengths_are_told:
        raise ConfigurationError(
            f"{flags.config_path}: global_scheduler.policy {policy!r} reads the true lengths of outputs, which only a "
            "simulation knows; choose another ('lookahead' expects them), or --lengths_are_told where clients send them"
        )
    if config.journal_path is msgspec.UNSET:
        config = msgspec.structs.replace(config, journal_path=_default_journal(config, flags.log_dir))
    secret = config.engine_secret
    if secret is not None and secret.startswith("env:"):
        name = secret.removeprefix("env:")
        if name not in os.environ:
            raise ConfigurationError(f"{flags.config_path}: engine_secret is {secret!r}, but the environment has no {name}")
        config = msgspec.structs.replace(config, engine_secret=os.environ[name])
    return config


def _default_journal(config: ServeCoreConfig, log_dir: str | None) -> str | None:
    """`journal/core-PORT.sqlite` next to the log directory: a core that is started again with the same command finds it."""
    if config.port == 0:
        return None  # nobody could start this one again
    folder = Path(log_dir or "log").absolute().parent / "journal"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"journal directory {str(folder)!r} cannot be made: {error.strerror}; set journal_path"
        ) from error
    return str(folder / f"core-{config.port}.sqlite")


def _set_up_logging(flags: argparse.Namespace) -> None:
    handler: logging.Handler = logging.StreamHandler()
    if flags.log_dir:
        path = Path(flags.log_dir) / flags.log_filename
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handler = logging.FileHandler(path, encoding="utf-8")
        except OSError as error:
            raise ConfigurationError(f"log file {str(path)!r} cannot be written: {error.strerror}") from error
    logging.basicConfig(
        level=logging.WARNING if flags.release_mode else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        handlers=[handler],
        force=True,
    )


def _run(config: ServeCoreConfig, path: str) -> int:
    try:
        import uvloop
    except ImportError:
        factory = None
    else:
        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(_serve(config, path))


async def _serve(config: ServeCoreConfig, path: str) -> int:
    from parrot.serve.server import Server

    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    try:
        server = Server(config)
    except (ConfigurationError, ParrotError) as error:  # a policy or a journal that cannot be had
        raise ConfigurationError(f"{path}: {error}") from error
    try:
        addresses = await server.start()
        # What stands now stays, and nearly all garbage goes by reference counts: the collector may look seldom.
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 20, 50)
        named = (f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in addresses)
        shown = ", ".join(f"{server.scheme}://{each}" for each in named)
        print(f"ServeCore listens on {shown}", file=sys.stderr, flush=True)
        logging.getLogger(__name__).info("journal: %s", config.journal_path or "none")
        await stopped.wait()
    finally:
        await server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
