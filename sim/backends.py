"""The backends in real time: the same programs, players and metrics on a cluster of real processes, or on one that runs.

`emulated` starts a core and emulated engines as processes of this machine, `real` engines of the types that the files name;
with `core_url` nothing is started. What is sent and what is measured is decided as in simulation.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import aiohttp
import msgspec

from parrot.configuration import ConfigurationError
from parrot.engine.derived import description_of
from parrot.engine.profiles import AnyProfile
from parrot.serve.explanations import PlacementsAnswer
from parrot.serve.policies import is_clairvoyant
from sim.clients import new_player
from sim.configs import KEPT_PLACEMENTS, core_config_of, engine_configs_of, engine_models_of, open_programs, profiles_of
from sim.fit import check_programs
from sim.http_client import MODEL, TOLD, Api, HttpClient, Refusal, Style
from sim.model_types import ModelTypes
from sim.network import open_network
from sim.processes import local_cluster
from sim.programs import play_programs
from sim.recorder import Recorder
from sim.spec import Run
from sim.workloads.program import Program


def run_on_cluster(run: Run, rows: bool, expect: Callable[[int], None], ended: Callable[[], None]) -> tuple[Recorder, int]:
    """Carries out a run in real time; returns what it measured and the number of engines (0: of a cluster not ours).

    rows: whether the recorder keeps them. expect: told the number of programs. ended: called as each ends. Raises
    ConfigurationError for what cannot be run or a process that dies; KeyboardInterrupt after everything has stopped.
    """
    programs: list[Program] = []
    if run.program is None:
        programs = list(open_programs(run))
        if not programs:
            raise ConfigurationError(f"workload {run.workload!r} has no programs")
        expect(len(programs))
    recorder = Recorder(run.client, rows, names=run.explain)
    if run.core_url is not None:
        _run_interruptibly(_play_on_running(run, run.core_url, programs, recorder, expect, ended))
        return recorder, 0
    configs = engine_configs_of(run)
    profiles: list[AnyProfile | None] = [None] * len(configs)
    style = MODEL
    if run.backend == "emulated":
        profiles = [profile for _, profile in profiles_of(run, configs)]
        for _ in check_programs(iter(programs), engine_models_of(run), run.workload):
            pass
    if run.backend == "emulated" or all(description_of(c).accepts_output_length for c in configs):
        style = TOLD
    core_config = core_config_of(run)
    if style is not TOLD and is_clairvoyant(core_config.global_scheduler):
        raise ConfigurationError(
            f"policy {run.policy!r} reads the true lengths of outputs, which engines with real weights are not told; "
            "--backend sim and emulated know them"
        )

    engines = list(zip(configs, profiles, strict=True))
    types = ModelTypes(description_of(config, latency_profile=profile) for config, profile in engines)

    async def whole() -> None:
        async with local_cluster(core_config, engines, lengths_are_told=style is TOLD) as (url, processes):
            if run.program is not None:
                work = play_programs(run, url, recorder, expect, ended)
            else:
                work = _play_all(run, url, programs, recorder, style, ended, types)
            playing = asyncio.ensure_future(work)
            try:
                while not playing.done():
                    await asyncio.wait([playing], timeout=0.5)
                    processes.check()
            finally:
                playing.cancel()
                await asyncio.gather(playing, return_exceptions=True)
            playing.result()
            answer = await ask_placements(url, core_config.engine_secret, KEPT_PLACEMENTS)
            take_placements(answer, recorder)
            recorder.policy_errors = answer.policy_errors

    _run_interruptibly(whole())
    return recorder, len(configs)


def _run_interruptibly(work: Coroutine[Any, Any, None]) -> None:
    """asyncio.run, in which SIGTERM does what Ctrl-C does."""

    before = signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    try:
        asyncio.run(work)
    finally:
        signal.signal(signal.SIGTERM, before)


async def _play_on_running(
    run: Run,
    url: str,
    programs: Sequence[Program],
    recorder: Recorder,
    expect: Callable[[int], None],
    ended: Callable[[], None],
) -> None:
    """On a cluster that is not ours: its engines are known by their models alone, and it explains as much as it keeps."""
    if run.program is not None:
        await play_programs(run, url, recorder, expect, ended)
    else:
        await _check_models(url, programs)
        await _play_all(run, url, programs, recorder, MODEL if run.backend == "real" else TOLD, ended)
    if not run.explain:
        return
    try:
        answer = await ask_placements(url, None, KEPT_PLACEMENTS)
    except ConfigurationError as error:
        print(f"sim.run: no explanations: {error}", file=sys.stderr)
        return
    take_placements(answer, recorder)
    missing = len(recorder.names or ()) - len({placed.task for placed in recorder.placements})
    if missing > 0:
        kept = f"{url} keeps its last {answer.kept} placements (global_scheduler.explain_placements)"
        print(f"sim.run: {missing} tasks have no explanation: the core at {kept}", file=sys.stderr)


async def ask_placements(url: str, secret: str | None, most: int) -> PlacementsAnswer:
    """What the core at `url` says of its last placements. `secret`: its engine_secret, as its configuration has it. Raises
    ConfigurationError."""
    if secret is not None and secret.startswith("env:"):
        secret = os.environ.get(secret.removeprefix("env:"))
    async with aiohttp.ClientSession() as http:
        try:
            found = await Api(url, http).call("GET", "/v1/debug/placements", {"limit": most, "secret": secret})
        except Refusal as error:
            raise ConfigurationError(f"{url}/v1/debug/placements: {error}") from None
    return msgspec.json.decode(found, type=PlacementsAnswer)


def take_placements(answer: PlacementsAnswer, recorder: Recorder) -> None:
    """Those of the run's own tasks, the oldest first."""
    names = recorder.names or {}
    recorder.placements = [placed for placed in reversed(answer.placements) if placed.task in names]


async def _check_models(url: str, programs: Sequence[Program]) -> None:
    """Raises ConfigurationError when no core answers at `url`, or it has no model that one of `programs` asks for."""
    async with aiohttp.ClientSession() as http:
        try:
            answer = msgspec.json.decode(await Api(url, http).call("GET", "/v1/models"))
        except Refusal as error:
            raise ConfigurationError(f"--core-url {url}: no core answers there: {error}") from None
    models = {item["model_name"] for item in answer["models"]}
    for program in programs:
        for call in program.calls:
            if not models or (call.models and models.isdisjoint(call.models)):
                wanted = " or ".join(call.models) or "any model"
                have = ", ".join(sorted(models)) or "no engine"
                raise ConfigurationError(f"program {program.id!r} needs {wanted}; the cluster at {url} has {have}")


async def _play_all(
    run: Run,
    url: str,
    programs: Sequence[Program],
    recorder: Recorder,
    style: Style,
    ended: Callable[[], None],
    types: ModelTypes = ModelTypes(),
) -> None:
    """Starts each program when it arrives, or in a closed loop when one before it has ended, and waits for the last."""
    network = open_network(run.rtt_ms, run.seed)
    loop = asyncio.get_running_loop()
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http, asyncio.TaskGroup() as group:
        api = Api(url, http)
        zero_s = loop.time()
        places = asyncio.Semaphore(run.clients) if run.clients is not None else None

        async def play(serial: int, program: Program) -> None:
            player = new_player(
                program, run.client, serial=serial, max_gen_length=run.max_gen_length, preallocate=not network.is_local
            )
            await HttpClient(api, player, network, recorder, style, zero_s, types).play()
            recorder.program_ended(player)
            ended()
            if places is not None:
                places.release()

        for serial, program in enumerate(programs):
            if places is not None:
                await places.acquire()
            else:
                await asyncio.sleep(max(zero_s + program.arrival_s - loop.time(), 0.0))
            group.create_task(play(serial, program))
