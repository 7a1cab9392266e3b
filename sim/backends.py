"""The backends in real time: the same players over HTTP, on a cluster of real processes or on one that already runs.

Decides how a cluster of this machine is started and stopped (the documented commands, on free ports, every process ended when
the run is), and how a program's actions become requests. What is sent and what is measured is decided by `sim.clients` and
`sim.metrics`, as in simulation.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from parrot.configuration import ConfigurationError
from parrot.engine.config import EngineConfig, ServeCoreAddress, as_emulated, description_of
from parrot.latency import LatencyProfile
from parrot.protocol.api import SamplingConfig, SessionReport
from parrot.protocol.errors import ErrorBody, ErrorInfo
from parrot.serve.config import ServeCoreConfig
from parrot.tokenizer import synthetic_text
from sim.clients import (
    Action,
    Assign,
    Close,
    Complete,
    Create,
    Fetch,
    Given,
    Into,
    Open,
    Piece,
    Player,
    Reference,
    Submit,
    Value,
    Wait,
    new_player,
)
from sim.metrics import Recorder
from sim.network import Network, open_network
from sim.spec import Run, check_programs, core_config_of, engine_configs_of, engine_models_of, profiles_of
from sim.workloads import open_workload
from sim.workloads.program import Program, Text

HOST = "127.0.0.1"
START_TIMEOUT_S = 120.0  #: for the core and all engines, model loading included
STOP_TIMEOUT_S = 5.0  #: between SIGTERM and SIGKILL


# ----------------------------------------------------------------------------------------------- a cluster's processes


class Processes:
    """The processes of a cluster. `stop` ends every one of them, those that they started included."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, module: str, arguments: Sequence[str]) -> None:
        """Starts `python -m module arguments…`; what it prints goes to FOLDER/NAME.log."""
        with open(self._log(name), "wb") as log:
            self._running[name] = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process alone, which then stops them in order
            )

    def check(self) -> None:
        """Raises ConfigurationError when one has died, with the last that it said."""
        for name, process in self._running.items():
            if process.poll() is not None:
                said = self._log(name).read_text(errors="replace").strip().splitlines()[-3:]
                raise ConfigurationError(f"{name} died with status {process.returncode}: {' / '.join(said) or 'it said nothing'}")

    def stop(self) -> None:
        for process in self._running.values():
            _signal(process, signal.SIGTERM)
        for process in self._running.values():
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                _signal(process, signal.SIGKILL)
                process.wait()
        self._running.clear()

    def _log(self, name: str) -> Path:
        return self._folder / f"{name.replace('/', '-')}.log"


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listened on a moment ago, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((HOST, 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.asynccontextmanager
async def local_cluster(
    config: ServeCoreConfig, engines: Sequence[tuple[EngineConfig, LatencyProfile | None]]
) -> AsyncIterator[tuple[str, Processes]]:
    """Starts a core and engines on free ports and yields the core's address; an engine with a profile is emulated."""
    with tempfile.TemporaryDirectory(prefix="parrot-") as folder:
        processes = Processes(Path(folder))
        core_port, *ports = free_ports(len(engines) + 1)
        url = f"http://{HOST}:{core_port}"
        try:
            core_file = Path(folder) / "core.json"
            core_file.write_bytes(msgspec.json.encode(msgspec.structs.replace(config, host=HOST, port=core_port)))
            processes.start("core", "parrot.serve.http_server", ["--config_path", str(core_file)])
            await _until_ready(url, 0, processes)
            for number, ((engine, profile), port) in enumerate(zip(engines, ports, strict=True)):
                address = msgspec.structs.replace(engine.serve_core, host=HOST, port=core_port)
                file = Path(folder) / f"engine{number}.json"
                file.write_bytes(msgspec.json.encode(_placed(engine, profile, port, address, Path(folder), number)))
                processes.start(engine.name, "parrot.engine.http_server", ["--config_path", str(file)])
            await _until_ready(url, len(engines), processes)
            yield url, processes
        finally:
            processes.stop()


def _placed(
    engine: EngineConfig, profile: LatencyProfile | None, port: int, core: ServeCoreAddress, folder: Path, number: int
) -> EngineConfig:
    """The engine at `port` under `core`; with a profile, the emulated one that stands for it."""
    if profile is not None:
        profile_file = folder / f"profile{number}.json"
        profile_file.write_bytes(msgspec.json.encode(profile))
        engine = as_emulated(engine, str(profile_file))
    return msgspec.structs.replace(engine, host=HOST, port=port, serve_core=core)


async def _until_ready(url: str, engines: int, processes: Processes) -> None:
    """Waits until the core answers and has that many engines. Raises ConfigurationError."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + START_TIMEOUT_S
    async with aiohttp.ClientSession() as http:
        while loop.time() < deadline_s:
            processes.check()
            with contextlib.suppress(aiohttp.ClientError, asyncio.TimeoutError):
                async with http.get(f"{url}/health", timeout=aiohttp.ClientTimeout(2)) as answer:
                    if answer.status == 200 and (await answer.json())["engines"] >= engines:
                        return
            await asyncio.sleep(0.05)
    raise ConfigurationError(f"the cluster was not ready after {START_TIMEOUT_S:g} s: {engines} engines were expected at {url}")


# ------------------------------------------------------------------------------------------------------ HTTP, one client


class Refusal(Exception):
    """An answer with an error: what it says and, for one that may be tried again, when."""

    def __init__(self, info: ErrorInfo, retry_after_s: float) -> None:
        super().__init__(info.message)
        self.info = info
        self.retry_after_s = retry_after_s


class Api:
    """The public API of a core as coroutines. Raises Refusal for every answer that is an error."""

    def __init__(self, url: str, http: aiohttp.ClientSession) -> None:
        self._url = url.rstrip("/")
        self._http = http

    async def call(self, method: str, path: str, body: Any = None, query: dict[str, Any] | None = None) -> bytes:
        data = msgspec.json.encode(body) if body is not None else None
        headers = {"Content-Type": "application/json"} if body is not None else None
        try:
            async with self._http.request(method, self._url + path, data=data, params=query, headers=headers) as answer:
                content = await answer.read()
                if answer.status == 200:
                    return content
                retry_after_s = float(answer.headers.get("Retry-After", "1"))
        except (aiohttp.ClientError, OSError) as error:
            raise Refusal(ErrorInfo("unavailable", f"{method} {path}: {error or type(error).__name__}"), 1.0) from None
        try:
            info = msgspec.json.decode(content, type=ErrorBody).error
        except msgspec.DecodeError:
            info = ErrorInfo("internal", f"{method} {path} answered {answer.status} with no error body")
        raise Refusal(info, retry_after_s)


class HttpSession:
    """A session at the core: the requests of a program in it, and the report before it closes."""

    def __init__(self, api: Api, client: HttpClient) -> None:
        self._api = api
        self._client = client
        self._who: dict[str, Any] = {}
        self._outputs: dict[str, tuple[int, int]] = {}

    async def open(self, tenant: str) -> None:
        body = {"api_key": tenant} if tenant else {}
        self._who = json.loads(await self._api.call("POST", "/v1/session", body))

    async def create(self, var: str) -> str:
        answer = json.loads(await self._api.call("POST", "/v1/semantic_var", {**self._who, "var_name": var}))
        return str(answer["var_id"])

    async def assign(self, var_id: str, value: Value) -> None:
        await self._api.call("POST", f"/v1/semantic_var/{var_id}", {**self._who, "content": text_of(value)})

    async def submit(self, call: int, output: int, action: Submit | Complete) -> tuple[str, ...]:
        template, parameters = render(action.pieces, self._client.sampling)
        body = {
            **self._who,
            "template": template,
            "parameters": parameters,
            "func_name": action.spec.name,
            "models": action.spec.models,
            "cache_prefix": action.spec.cache_prefix,
        }
        answer = json.loads(await self._api.call("POST", "/v1/semantic_call", body))
        var_ids = tuple(item["var_id"] for item in answer["param_info"] if item["is_output"])
        self._outputs |= {var_id: (call, output + place) for place, var_id in enumerate(var_ids)}
        return var_ids

    async def fetch(self, var_id: str, criteria: str) -> Value:
        answer = await self._api.call("GET", f"/v1/semantic_var/{var_id}", query={**self._who, "criteria": criteria})
        content = json.loads(answer)["content"]
        return Value("", 0, content)

    async def close(self) -> None:
        session_id = self._who["session_id"]
        answer = await self._api.call("GET", f"/v1/session/{session_id}", query={**self._who, "calls": "true"})
        self._client.record(msgspec.json.decode(answer, type=SessionReport), self._outputs)
        await self._api.call("DELETE", f"/v1/session/{session_id}", query=self._who)


class HttpClient:
    """One program's client over HTTP: its player, in the running event loop."""

    def __init__(
        self, api: Api, player: Player, network: Network, recorder: Recorder, sampling: Callable[[Into], SamplingConfig], zero_s: float
    ) -> None:
        self.sampling = sampling
        self._api = api
        self._player = player
        self._network = network
        self._recorder = recorder
        self._zero_s = zero_s
        self._session = HttpSession(api, self)
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[None] = self._loop.create_future()

    async def play(self) -> None:
        """Runs the program to its end. Cancelled, it leaves no task behind."""
        try:
            self._perform(self._player.start(self._now_s()))
            await self._over
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def record(self, report: SessionReport, outputs: dict[str, tuple[int, int]]) -> None:
        self._recorder.session_ended(self._player.serial, report, outputs)

    def _now_s(self) -> float:
        return self._loop.time() - self._zero_s

    def _perform(self, actions: Iterable[Action]) -> None:
        for action in actions:
            task = self._loop.create_task(self._carry(action))
            self._tasks.add(task)
            task.add_done_callback(self._carried)
        if self._player.ended and not self._over.done():
            self._over.set_result(None)

    def _carried(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self._over.done():
            self._over.set_exception(error)

    async def _carry(self, action: Action) -> None:
        """There, the answer, and back."""
        if type(action) is Wait:
            await asyncio.sleep(action.delay_s)
            self._perform(self._player.answer(action, None, self._now_s()))
            return
        half_s = self._network.round_trip_s() / 2
        if half_s:
            await asyncio.sleep(half_s)
        answer, refusal = None, None
        try:
            answer = await self._request(action)
        except Refusal as error:
            refusal = error
        if half_s:
            await asyncio.sleep(half_s)
        if refusal is None:
            actions = self._player.answer(action, answer, self._now_s())
        elif refusal.info.status == 429:
            actions = self._player.refuse(action, refusal.retry_after_s, self._now_s())
        else:
            actions = self._player.fail(action, refusal.info, self._now_s())
        self._perform(actions)

    def _request(self, action: Action) -> Coroutine[Any, Any, Any]:
        session = self._session
        if type(action) is Fetch:
            return session.fetch(action.var_id, action.criteria.value)
        if type(action) is Submit:
            return session.submit(action.call, 0, action)
        if type(action) is Open:
            return session.open(action.tenant)
        if type(action) is Close:
            return session.close()
        if type(action) is Create:
            return session.create(action.var)
        if type(action) is Assign:
            return session.assign(action.var_id, action.value)
        assert type(action) is Complete
        return self._complete(action)

    async def _complete(self, action: Complete) -> Value:
        """A request of the baseline: one session from its opening to its end."""
        session = HttpSession(self._api, self)
        await session.open(action.tenant)
        try:
            (var_id,) = await session.submit(action.call, action.output, action)
            return await session.fetch(var_id, action.criteria.value)
        finally:
            await session.close()


def render(pieces: Sequence[Piece], sampling: Callable[[Into], SamplingConfig]) -> tuple[str, list[dict[str, Any]]]:
    """Pieces as a template and its parameters. Constants in a row stay apart (all but the first become values), because
    a boundary of segments is where contexts can be shared."""
    parts: list[str] = []
    parameters: dict[str, dict[str, Any]] = {}
    places: dict[str, str] = {}
    constant = False
    for number, piece in enumerate(pieces):
        name = f"p{number}"
        if type(piece) is Text and not constant:
            parts.append(text_of(piece))
            constant = True
            continue
        constant = type(piece) is Text
        if type(piece) is Reference:
            name = places.setdefault(piece.var_id, name)  # a variable read twice is one parameter with two places
            parameters[name] = {"name": name, "var_id": piece.var_id}
        elif type(piece) is Into:
            parameters[name] = {"name": name, "is_output": True, "sampling_config": sampling(piece)}
            if piece.var_id is not None:
                parameters[name]["var_id"] = piece.var_id
        else:
            value = piece.value if type(piece) is Given else piece
            parameters[name] = {"name": name, "value": text_of(value)}  # type: ignore[arg-type]
        parts.append("{{" + name + "}}")
    return " ".join(parts), list(parameters.values())


def text_of(piece: Text | Value) -> str:
    """The text of a value: the real one where there is one, else synthetic words drawn from its key."""
    if type(piece) is Value and piece.text is not None:
        return piece.text
    return _words(piece.key, piece.tokens)


@functools.lru_cache(maxsize=4096)
def _words(key: str, tokens: int) -> str:
    return synthetic_text(key, tokens)


def exact_length(into: Into) -> SamplingConfig:
    """For engines that are told how long the output is (emulated, dummy weights)."""
    return SamplingConfig(temperature=0.0, max_gen_length=into.max_gen_length, output_length=into.output_length)


def bounded_length(into: Into) -> SamplingConfig:
    """For engines with real weights: the length is reached by ignoring the end of sequence, so a policy gets to know it."""
    return SamplingConfig(temperature=0.0, max_gen_length=into.output_length, ignore_tokenizer_eos=True)


# --------------------------------------------------------------------------------------------------------- a whole run


def run_on_cluster(run: Run, tables: bool, watch: Callable[[], None] | None) -> tuple[Recorder, int]:
    """Carries out a run in real time; returns what it measured and the number of engines (0: of a cluster not ours).

    Raises ConfigurationError for what cannot be run or a process that dies; KeyboardInterrupt after everything has stopped.
    """
    programs = list(
        open_workload(run.workload, rate=run.rate, seed=run.seed, count=run.count, max_gen_length=run.max_gen_length)
    )
    if not programs:
        raise ConfigurationError(f"workload {run.workload!r} has no programs")
    recorder = Recorder(run.client, tables)
    if run.core_url is not None:
        sampling = bounded_length if run.backend == "real" else exact_length
        _run_interruptibly(_play_all(run, run.core_url, programs, recorder, sampling, watch))
        return recorder, 0
    configs = engine_configs_of(run)
    profiles: list[LatencyProfile | None] = [None] * len(configs)
    sampling = bounded_length
    if run.backend == "emulated":
        profiles = [profile for _, profile in profiles_of(run, configs)]
        for _ in check_programs(iter(programs), engine_models_of(run), run.workload):
            pass
    if run.backend == "emulated" or all(description_of(c).accepts_output_length for c in configs):
        sampling = exact_length

    async def whole() -> None:
        async with local_cluster(core_config_of(run), list(zip(configs, profiles, strict=True))) as (url, processes):
            playing = asyncio.ensure_future(_play_all(run, url, programs, recorder, sampling, watch))
            try:
                while not playing.done():
                    await asyncio.wait([playing], timeout=0.5)
                    processes.check()
            finally:
                playing.cancel()
                await asyncio.gather(playing, return_exceptions=True)
            playing.result()

    _run_interruptibly(whole())
    return recorder, len(configs)


def _run_interruptibly(work: Coroutine[Any, Any, None]) -> None:
    """asyncio.run, in which SIGTERM does what Ctrl-C does."""

    before = signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    try:
        asyncio.run(work)
    finally:
        signal.signal(signal.SIGTERM, before)


async def _play_all(
    run: Run,
    url: str,
    programs: Sequence[Program],
    recorder: Recorder,
    sampling: Callable[[Into], SamplingConfig],
    watch: Callable[[], None] | None,
) -> None:
    """Starts each program when it arrives and waits for the last."""
    network = open_network(run.rtt_ms, run.seed)
    loop = asyncio.get_running_loop()
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http, asyncio.TaskGroup() as group:
        api = Api(url, http)
        zero_s = loop.time()

        async def play(serial: int, program: Program) -> None:
            player = new_player(
                program, run.client, serial=serial, max_gen_length=run.max_gen_length, preallocate=not network.is_local
            )
            await HttpClient(api, player, network, recorder, sampling, zero_s).play()
            recorder.program_ended(player)
            if watch is not None:
                watch()

        for serial, program in enumerate(programs):
            await asyncio.sleep(max(zero_s + program.arrival_s - loop.time(), 0.0))
            group.create_task(play(serial, program))
