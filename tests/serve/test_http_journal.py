"""A core with a journal: what it recorded replays to the same effects, and what it promised outlives it."""

from __future__ import annotations

import asyncio
import contextlib
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from parrot.configuration import ConfigurationError
from parrot.protocol.engine import Failed, Finished, Rejected, Started, Tokens
from parrot.protocol.errors import ErrorInfo
from parrot.serve.config import ServeCoreConfig
from parrot.serve.journal import read
from parrot.serve.server import Server
from sim.replay import replay
from tests.serve.http_support import Client, ScriptedEngine, Tokenizers, cluster, eventually


class Lives:
    """One journal, and the servers that live on it one after the other; engines outlive them."""

    def __init__(self, path: Path, http: aiohttp.ClientSession, **config: Any) -> None:
        self.path = path
        self.tokenizers = Tokenizers()
        self._http = http
        self._config = {"host": "127.0.0.1", "port": 0, "journal_path": str(path), **config}
        self._engines: list[ScriptedEngine] = []
        self.server: Server
        self.client: Client

    async def begin(self) -> None:
        """A new life."""
        self.server = Server(msgspec.convert(self._config, ServeCoreConfig), load=self.tokenizers.load)
        [(host, port)] = await self.server.start()
        self.client = Client(f"http://{host}:{port}", self._http)

    async def die(self) -> None:
        """As kill -9 would have it: nobody is answered, nothing more is written. Only the sockets are given back."""
        server = self.server
        journal = server._journal
        assert journal is not None
        journal.close()  # what was appended may have been committed; nothing that comes now is
        server.shell._closing = True
        if server.shell._timer is not None:
            server.shell._timer.cancel()
        await server.links.close()
        assert server._runner is not None
        await server._runner.cleanup()
        server._tokenization.close()

    async def engine(self, name: str, **facts: Any) -> ScriptedEngine:
        """A started engine, not registered yet."""
        engine = ScriptedEngine(self.tokenizers, name, **facts)
        await engine.start()
        self._engines.append(engine)
        return engine

    async def stop(self) -> None:
        await self.server.stop()
        for engine in self._engines:
            await engine.stop()


@contextlib.asynccontextmanager
async def lives(path: Path, **config: Any) -> AsyncIterator[Lives]:
    async with aiohttp.ClientSession() as http:
        found = Lives(path, http, **config)
        await found.begin()
        try:
            yield found
        finally:
            await found.stop()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


# ------------------------------------------------------------------------------------------------------------- parity


async def _busy_life(client: Client, one: ScriptedEngine, two: ScriptedEngine) -> None:
    """Two engines, several sessions, a broken stream, a rejection, a timeout, a refused call, a closed session."""
    one.script(Started(), Tokens((1,), "x"), None)
    two.script(Rejected("engine_rejected", "no room"))
    sessions = [await client.session() for _ in range(4)]
    for session in sessions:
        call = await client.call(
            session,
            "You are {{who}} . {{first}} then {{second}}",
            [
                {"name": "who", "value": "brief"},
                {"name": "first", "is_output": True},
                {"name": "second", "is_output": True},
            ],
        )
        status, _ = await client.get(session, call["param_info"][2]["var_id"], criteria="latency")
        assert status == 200
    made = (await client.send("POST", "/v1/semantic_var", sessions[0]))[1]["var_id"]
    assert (await client.get(sessions[0], made, timeout=0.01))[0] == 408
    assert (await client.send("POST", f"/v1/semantic_var/{made}", {**sessions[0], "content": "set"}))[0] == 200
    assert (await client.send("POST", f"/v1/semantic_var/{made}", {**sessions[0], "content": "set"}))[0] == 409
    auth = {"session_auth": sessions[1]["session_auth"]}
    assert (await client.send("DELETE", f"/v1/session/{sessions[1]['session_id']}", auth))[0] == 200
    await asyncio.sleep(0.02)


async def test_two_lives_of_a_busy_core_replay_to_the_same_effects(path: Path) -> None:
    policy = {"ctx_aware": True, "graph_group": True}
    async with lives(path, journal_mode="record", global_scheduler=policy) as c:
        one, two = await c.engine("one"), await c.engine("two", tokenizer="other")
        for life in range(2):
            for engine in (one, two):
                assert (await c.client.register(engine, engine.name))[0] == 200
            await _busy_life(c.client, one, two)
            if life == 0:
                hanging = asyncio.Event()
                one.script(Started(), hanging)
                two.script(Started(), hanging)
                session = await c.client.session()
                var = await c.client.ask(session, "unfinished")
                waiting = asyncio.ensure_future(c.client.get(session, var))
                await eventually(lambda: not (one.scripts and two.scripts))
                await c.die()
                with contextlib.suppress(aiohttp.ClientError):
                    await waiting
                hanging.set()
                one.scripts.clear()
                two.scripts.clear()
                await c.begin()
        assert (await c.client.get(session, var))[0] == 200
    found = replay(path)
    assert found.difference is None
    assert (found.lives, found.faults) == (2, 0)
    assert found.instants > 60
    assert found.effects > 60
    assert replay(path, life=2).lives == 1


# ----------------------------------------------------------------------------------------------------------- recovery


async def test_a_request_that_is_repeated_after_a_restart_is_answered_as_before(path: Path) -> None:
    def keyed(key: str) -> dict[str, Any]:
        return {"headers": {"Idempotency-Key": key}}

    async def ask_all(client: Client, session: dict[str, Any], var: str | None) -> list[Any]:
        call = {"template": "q {{a}}", "parameters": [{"name": "a", "is_output": True}]}
        created = await client.send("POST", "/v1/semantic_var", session, **keyed("create"))
        var = var or created[1]["var_id"]
        return [
            created,
            await client.send("POST", "/v1/semantic_call", {**session, **call}, **keyed("call")),
            await client.send("POST", f"/v1/semantic_var/{var}", {**session, "content": "once"}, **keyed("set")),
        ]

    async with lives(path) as c:
        opened = await c.client.send("POST", "/v1/session", {}, **keyed("open"))
        assert opened[0] == 200
        before = await ask_all(c.client, opened[1], None)
        assert [status for status, _ in before] == [200, 200, 200]
        await c.die()
        await c.begin()
        assert await c.client.send("POST", "/v1/session", {}, **keyed("open")) == opened  # the session_auth included
        assert await ask_all(c.client, opened[1], before[0][1]["var_id"]) == before


async def test_values_outputs_and_failures_are_there_after_a_restart(path: Path) -> None:
    async with lives(path, global_scheduler={"max_attempts": 1}) as c:
        engine = await c.engine("e")
        await c.client.register(engine, "e")
        session = await c.client.session()
        made = (await c.client.send("POST", "/v1/semantic_var", session))[1]["var_id"]
        assert (await c.client.send("POST", f"/v1/semantic_var/{made}", {**session, "content": "a value"}))[0] == 200
        engine.script(Started(), engine.finished("an output"))
        done = await c.client.ask(session, "q")
        assert await c.client.get(session, done) == (200, {"content": "an output"})
        engine.script(Started(), Failed("generation_failed", "it broke"))
        failed = await c.client.ask(session, "r")
        told = await c.client.get(session, failed)
        assert told[0] >= 400
        await c.die()
        await c.begin()
        assert await c.client.get(session, made) == (200, {"content": "a value"})
        assert await c.client.get(session, done) == (200, {"content": "an output"})
        assert await c.client.get(session, failed) == told
        assert (await c.client.get({**session, "session_auth": "another"}, done))[0] == 403


async def test_unfinished_work_goes_to_the_engines_of_the_next_life_whose_contexts_are_new(path: Path) -> None:
    async with lives(path) as c:
        old = await c.engine("old")
        await c.client.register(old, "old")
        session = await c.client.session()
        first = await c.client.ask(session, "shared start of both")
        assert (await c.client.get(session, first))[0] == 200
        old.script(Started(), asyncio.Event())
        var = await c.client.ask(session, "shared start of both")
        waiting = asyncio.ensure_future(c.client.get(session, var))
        await eventually(lambda: len(old.tasks) == 2)
        await c.die()
        with contextlib.suppress(aiohttp.ClientError):
            await waiting
        await c.begin()
        waiting = asyncio.ensure_future(c.client.get(session, var))
        await asyncio.sleep(0.02)
        assert not waiting.done()  # nobody is there to do it
        new = await c.engine("new")
        await c.client.register(new, "new")
        assert await waiting == (200, {"content": new.text})
        [task] = new.tasks
        assert task.epoch == old.tasks[0].epoch + 1
        assert task.parent == -1  # no context of the life before is reckoned with
        assert len(old.tasks) == 2


async def test_a_getter_that_comes_back_with_stream_from_gets_every_character_once(path: Path) -> None:
    words = "one two three four five"
    async with lives(path) as c:
        engine = await c.engine("e")
        await c.client.register(engine, "e")
        ids = c.tokenizers.load(engine.tokenizer).encode(words)
        session = await c.client.session()
        engine.script(Started(), Tokens(tuple(ids[:2]), "one two"), asyncio.Event())
        var = await c.client.ask(session, "count")
        got = ""
        async for line in c.client.stream(session, var):
            got += line["delta"]
            break
        assert got == "one two"
        await c.die()
        await c.begin()
        engine.script(Started(), Tokens(tuple(ids[2:4]), " three four"), Finished(tuple(ids), words, "eos", 1))
        await c.client.register(engine, "e")
        async for line in c.client.stream(session, var, stream_from=len(got)):
            got += line.get("delta", "")
        assert got == words
        assert engine.tasks[-1].generate.forced_ids == tuple(ids[:2])
        assert await c.client.get(session, var) == (200, {"content": words})


async def test_sessions_that_ended_say_so_in_the_next_life_and_leave_nothing(path: Path) -> None:
    async with lives(path) as c:
        session = await c.client.session()
        made = (await c.client.send("POST", "/v1/semantic_var", session))[1]["var_id"]
        await c.client.send("POST", f"/v1/semantic_var/{made}", {**session, "content": "a secret of its own"})
        auth = {"session_auth": session["session_auth"]}
        assert (await c.client.send("DELETE", f"/v1/session/{session['session_id']}", auth))[0] == 200
        await c.die()
        await c.begin()
        assert (await c.client.get(session, made))[0] == 410
        with read(path) as reading:
            past = reading.past()
        assert (past.kept, past.texts) == ([], {})
        assert [state for _, state in past.ended] == ["closed"]


# ------------------------------------------------------------------------------------------------------------ the disk


class Disk:
    """The journal's disk, which may be full."""

    def __init__(self, server: Server) -> None:
        journal = server._journal
        assert journal is not None
        self._journal = journal
        self._commit = journal._commit

    def fill(self) -> None:
        error = ErrorInfo("unavailable", f"journal {self._journal.path} cannot be written: database or disk is full")
        self._journal._commit = lambda entries: error  # type: ignore[method-assign]

    def make_room(self) -> None:
        self._journal._commit = self._commit  # type: ignore[method-assign]


async def test_a_full_disk_refuses_promises_until_there_is_room_and_nothing_dies(path: Path) -> None:
    key = {"headers": {"Idempotency-Key": "one"}}
    async with lives(path) as c:
        session = await c.client.session()
        made = (await c.client.send("POST", "/v1/semantic_var", session))[1]["var_id"]
        assert (await c.client.send("POST", f"/v1/semantic_var/{made}", {**session, "content": "early"}))[0] == 200
        disk = Disk(c.server)
        disk.fill()
        status, body = await c.client.send("POST", "/v1/semantic_var", session, **key)
        assert (status, body["error"]["code"]) == (503, "unavailable")
        assert "disk is full" in body["error"]["message"]
        assert int(c.client.headers["Retry-After"]) >= 0
        for method, where in (("POST", "/v1/session"), ("POST", "/v1/semantic_var")):
            assert (await c.client.send(method, where, session if where != "/v1/session" else {}))[0] == 503
        identity = f"/v1/session/{session['session_id']}"
        auth = {"session_auth": session["session_auth"]}
        assert (await c.client.send("GET", identity, auth))[0] == 200
        assert (await c.client.send("GET", "/v1/semantic_var", session))[1]["vars"][0]["content"] == "early"
        disk.make_room()
        await eventually(lambda: c.server._journal is not None and c.server._journal.failing is None)
        # What the core had taken in is there: the client asks again under its key.
        status, created = await c.client.send("POST", "/v1/semantic_var", session, **key)
        assert status == 200
        await c.die()
        await c.begin()
        assert await c.client.send("POST", "/v1/semantic_var", session, **key) == (200, created)
        assert await c.client.get(session, made) == (200, {"content": "early"})


# ------------------------------------------------------------------------------------------------------------ the key


@pytest.fixture
def key_file(path: Path) -> Path:
    return Path(f"{path}.key")


async def test_the_key_lies_beside_the_journal_for_its_owner_alone_and_no_token_is_in_any_file(
    path: Path, key_file: Path
) -> None:
    async with lives(path, journal_mode="record", engine_secret="open sesame") as c:
        session = await c.client.session(api_key="sk-of-a-tenant")
        await c.client.ask(session, "a question")
        assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
        assert len(key_file.read_bytes()) == 32
        await c.die()
        await c.begin()
        for file in path.parent.iterdir():
            content = file.read_bytes()
            for secret in (session["session_auth"], "sk-of-a-tenant", "open sesame"):
                assert secret.encode() not in content, file.name


async def test_a_key_of_a_wrong_length_is_refused_by_name(path: Path, key_file: Path) -> None:
    key_file.write_bytes(b"short")
    with pytest.raises(ConfigurationError, match=r"key'? has 5 bytes, expected 32"):
        Server(ServeCoreConfig(journal_path=str(path)))
    key_file.unlink()
    async with lives(path):  # nothing holds the journal
        assert key_file.exists()


async def test_two_cores_never_share_a_journal(path: Path) -> None:
    async with lives(path) as c:
        with pytest.raises(ConfigurationError, match="in use by another core"):
            Server(ServeCoreConfig(journal_path=str(path)))
        assert (await c.client.send("GET", "/health"))[0] == 200


async def test_without_a_journal_nothing_waits_and_nothing_is_written(tmp_path: Path) -> None:
    async with cluster(journal_path=None) as c:
        session = await c.client.session()
        assert (await c.client.send("POST", "/v1/semantic_var", session))[0] == 200
    assert list(tmp_path.iterdir()) == []
