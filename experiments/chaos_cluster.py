"""The cluster of the chaos test: a core and engines as processes, each of which can be killed and started again.

It decides the configuration, watches when the core answers again, and keeps every log and the journal in one folder. It never
decides who dies: that is the test's seed.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from parrot.configuration import ConfigurationError, read_json
from parrot.latency import FixedCost, Hinge, LatencyProfile
from sim.processes import HOST, Processes, lasting_ports

CORE = "core"
SAMPLES = Path(__file__).parent.parent / "sample_configs"
START_TIMEOUT_S = 120.0
POLL_S = 0.01

#: An iteration of 10 ms: an output of 24 tokens takes a quarter of a second, so that most kills meet one on its way.
PROFILE = LatencyProfile(
    name="chaos",
    model="chaos",
    device="none",
    attn_func="none",
    fixed=(FixedCost(64, 0.01),),
    hinges=(Hinge(0, 1e-5),),
    pair_s=0.0,
    kv_s=0.0,
    notes="made up for experiments/chaos.py",
)


class ChaosCluster:
    """`engine`: "emulated" or "builtin". Everything is written to `folder`."""

    def __init__(self, folder: Path, engines: int, engine: str, *, journal: bool = True) -> None:
        self.folder = folder
        self.engines = [f"engine{number}" for number in range(engines)]
        self.journal = folder / "core.journal"
        self._processes = Processes(folder)
        port, *engine_ports = lasting_ports(engines + 1)
        self.url = f"http://{HOST}:{port}"
        self._engine_ports = dict(zip(self.engines, engine_ports, strict=True))
        core = {
            "host": HOST,
            "port": port,
            "engine_heartbeat_timeout": 3.0,
            "journal_path": str(self.journal) if journal else None,
            "global_scheduler": {"app_fifo": True, "graph_group": True, "ctx_group": True, "ctx_aware": True},
        }
        self._commands: dict[str, tuple[str, list[str]]] = {
            CORE: ("parrot.serve.http_server", ["--config_path", self._write(CORE, core)])
        }
        configs = self._engine_config(engine)
        for name, engine_port in self._engine_ports.items():
            address = {"host": HOST, "port": port}
            config = {**configs, "engine_name": name, "host": HOST, "port": engine_port, "serve_core": address}
            self._commands[name] = ("parrot.engine.http_server", ["--config_path", self._write(name, config)])

    async def start(self) -> None:
        """Returns when every engine is registered. Raises ConfigurationError."""
        for name in (CORE, *self.engines):
            module, arguments = self._commands[name]
            self._processes.start(name, module, arguments)
        async with asyncio.timeout(START_TIMEOUT_S):
            while True:
                self._processes.check()
                health = await self._health()
                if health is not None and health["engines"] == len(self.engines):
                    return
                await asyncio.sleep(0.05)

    def kill(self, name: str) -> None:
        """kill -9."""
        self._processes.kill(name)

    def start_again(self, name: str) -> None:
        self._processes.start_again(name)

    def is_running(self, name: str) -> bool:
        return self._processes.is_running(name)

    def process_id(self, name: str) -> int:
        return self._processes.process_id(name)

    async def has_answered(self, name: str) -> bool:
        """Waits for the first answer of this life of `name`, whatever it is; False when the life is over before."""
        process_id = self.process_id(name)
        url = self.url if name == CORE else f"http://{HOST}:{self._engine_ports[name]}"
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(5.0)) as http:
            while self.is_running(name) and self.process_id(name) == process_id:
                try:
                    async with http.get(f"{url}/health"):
                        return self.process_id(name) == process_id  # else the next life answered, which is waited for as well
                except (aiohttp.ClientError, OSError):
                    await asyncio.sleep(POLL_S)
        return False

    def died_by_themselves(self, names: Sequence[str]) -> list[str]:
        """Those of `names` that should be running and are not, with the last line of each one's log."""
        return [f"{name}: {self._last_line(name)}" for name in names if not self.is_running(name)]

    def journal_bytes(self) -> int:
        """What the journal takes on disk, with what belongs to it."""
        return sum(path.stat().st_size for path in self.folder.glob(f"{self.journal.name}*"))

    def tracebacks(self) -> list[str]:
        """The last line of every traceback in the logs: exceptions that nobody expected."""
        found = []
        for name in (CORE, *self.engines):
            log = (self.folder / f"{name}.log").read_text(errors="replace")
            for trace in re.finditer(r"^Traceback .*\n(?:[ \t].*\n|\n)*(\S.*)", log, re.MULTILINE):
                found.append(f"{name}: {trace[1]}")
        return found

    def stop(self) -> None:
        self._processes.stop()

    async def _health(self) -> dict[str, Any] | None:
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(2.0)) as http,
                http.get(f"{self.url}/health") as answer,
            ):
                health: dict[str, Any] = await answer.json()
                return health
        except (aiohttp.ClientError, OSError):
            return None

    def _engine_config(self, engine: str) -> dict[str, Any]:
        if engine == "builtin":
            config: dict[str, Any] = read_json(SAMPLES / "engine/smollm2-135m-cpu.json")
            return {**config, "heartbeat_interval": 0.5}
        if engine != "emulated":
            raise ConfigurationError(f"engine {engine!r} is neither 'emulated' nor 'builtin'")
        profile = self.folder / "profile.json"
        profile.write_bytes(msgspec.json.encode(PROFILE))
        return {
            "model": "chaos",
            "engine_type": "emulated",
            "tokenizer": "synthetic",
            "heartbeat_interval": 0.5,
            "fill_chunk_size": 256,
            "latency_profile": str(profile),
            "instance": {"num_kv_cache_blocks": 4096, "block_size": 16, "max_seq_len": 8192, "stream_interval_s": 0.03},
            "scheduler": {"max_batch_size": 32, "max_num_batched_tokens": 512, "max_total_tokens": 65536},
        }

    def _write(self, name: str, config: dict[str, Any]) -> str:
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(config, indent=1))
        return str(path)

    def _last_line(self, name: str) -> str:
        said = (self.folder / f"{name}.log").read_text(errors="replace").strip().splitlines()
        return said[-1] if said else "it said nothing"
