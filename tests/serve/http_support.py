"""For the tests of the core's server: a tokenizer of one id a word, an engine that does what a script says, a client."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from parrot.protocol.engine import EngineDescription, Failed, Finished, Rejected, Started, TaskRequest, Tokens
from parrot.serve.config import ServeCoreConfig
from parrot.serve.server import Server

WORDS = "words"  # the tokenizer's name


class WordTokenizer:
    """`a b` ↔ [id of a, id of b]; an id is the word's number by first appearance, from 1 (0 is the BOS)."""

    name = WORDS
    bos_id: int | None = 0
    chat_template: str | None = None

    def __init__(self) -> None:
        self.words = ["<s>"]

    def encode(self, text: str) -> list[int]:
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
        return [self.words.index(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self.words[i] for i in ids)

    def apply_chat_template(self, messages: Sequence[Any], add_generation_prompt: bool = True, tools: Any = None) -> str:
        given = "".join(f"TOOL {tool['function']['name']} " for tool in tools or ())
        turns = "".join(f"{message['role']}> {message['content']} " for message in messages)
        return given + turns + ("assistant> " if add_generation_prompt else "")


class Tokenizers:
    """A loader of tokenizers: every name is one, but `missing…`."""

    def __init__(self) -> None:
        self.loaded: dict[str, WordTokenizer] = {}

    def load(self, name: str) -> WordTokenizer:
        if name.startswith("missing"):
            raise OSError(f"{name} is not there")
        return self.loaded.setdefault(name, WordTokenizer())


Event = Started | Tokens | Finished | Failed | Rejected
Step = Event | Callable[[], Any] | asyncio.Event | bytes | None


class ScriptedEngine:
    """An engine's HTTP side. Each task runs the next script: events to send, raw bytes, asyncio events to wait for,
    or None to break the connection. With no script left a task is answered with `text`."""

    def __init__(self, tokenizers: Tokenizers, name: str = "scripted", model: str = "m", tokenizer: str = WORDS) -> None:
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.tokenizers = tokenizers
        self.scripts: list[list[Step]] = []
        self.text = "fine thanks"
        self.tasks: list[TaskRequest] = []
        self.aborted: list[Any] = []
        self.freed: list[Any] = []
        self.lost_connections = 0
        self.pings = 0
        self.bos_tokens = 0
        self.status: int | None = None
        self.ping_status = 200
        self.engine_id = -1

    def script(self, *steps: Step) -> None:
        self.scripts.append(list(steps))

    def finished(self, text: str) -> Finished:
        return Finished(tuple(self.tokenizers.load(self.tokenizer).encode(text)), text, "eos", 1)

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post("/task", self._task)
        app.router.add_post("/abort", self._abort)
        app.router.add_post("/free_context", self._free)
        app.router.add_post("/ping", self._ping)
        self.runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        self.port: int = self.runner.addresses[0][1]

    async def stop(self) -> None:
        await self.runner.cleanup()

    def description(self, **changes: Any) -> EngineDescription:
        fields: dict[str, Any] = {
            "engine_name": self.name,
            "model": self.model,
            "tokenizer": self.tokenizer,
            "host": "127.0.0.1",
            "port": self.port,
            "engine_type": "emulated",
            "tasks_capacity": 16,
            "tokens_capacity": 10_000,
            "max_seq_len": 2_000,
            "bos_tokens": self.bos_tokens,
            "accepts_output_length": True,
        }
        return EngineDescription(**{**fields, **changes})

    async def _task(self, request: web.Request) -> web.StreamResponse:
        task = msgspec.json.decode(await request.read(), type=TaskRequest)
        self.tasks.append(task)
        if self.status is not None:
            return web.Response(status=self.status, text="no")
        steps = self.scripts.pop(0) if self.scripts else [Started(), self.finished(self.text)]
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            for step in steps:
                if step is None:
                    assert request.transport is not None
                    request.transport.abort()
                    return response
                if isinstance(step, asyncio.Event):
                    await step.wait()
                else:
                    await response.write(step if isinstance(step, bytes) else msgspec.json.encode(step) + b"\n")
            await response.write_eof()
        except asyncio.CancelledError:
            self.lost_connections += 1
            raise
        return response

    async def _abort(self, request: web.Request) -> web.Response:
        self.aborted.append(await request.json())
        return web.json_response({})

    async def _free(self, request: web.Request) -> web.Response:
        self.freed.append(await request.json())
        return web.json_response({"context_len": 0})

    async def _ping(self, request: web.Request) -> web.Response:
        self.pings += 1
        return web.json_response({"runtime_info": {}}, status=self.ping_status)


class Client:
    """Speaks to the core over HTTP."""

    def __init__(self, url: str, http: aiohttp.ClientSession) -> None:
        self.url = url
        self.http = http

    async def send(self, method: str, path: str, body: Any = None, **options: Any) -> tuple[int, Any]:
        """Status and decoded body."""
        if isinstance(body, bytes):
            options["data"] = body
        elif body is not None:
            options["json"] = body
        async with self.http.request(method, self.url + path, **options) as response:
            self.headers = response.headers
            raw = await response.read()
            return response.status, msgspec.json.decode(raw)

    async def session(self, **body: Any) -> dict[str, Any]:
        status, answer = await self.send("POST", "/v1/session", body)
        assert status == 200, answer
        return answer

    async def call(self, session: dict[str, Any], template: str, parameters: list[dict[str, Any]], **more: Any) -> Any:
        body = {**session, "template": template, "parameters": parameters, **more}
        status, answer = await self.send("POST", "/v1/semantic_call", body)
        assert status == 200, answer
        return answer

    async def ask(self, session: dict[str, Any], question: str) -> str:
        """Submits `{question} {{answer}}`; returns the output's variable id."""
        answer = await self.call(session, question + " {{answer}}", [{"name": "answer", "is_output": True}])
        return str(answer["param_info"][-1]["var_id"])

    async def get(self, session: dict[str, Any], var_id: str, **more: Any) -> tuple[int, Any]:
        return await self.send("GET", f"/v1/semantic_var/{var_id}", {**session, **more})

    async def stream(self, session: dict[str, Any], var_id: str, **more: Any) -> AsyncIterator[Any]:
        body = {**session, "stream": True, **more}
        async with self.http.get(f"{self.url}/v1/semantic_var/{var_id}", json=body) as response:
            assert response.status == 200, await response.text()
            async for line in response.content:
                yield msgspec.json.decode(line)

    async def register(self, engine: ScriptedEngine, instance: str = "", **changes: Any) -> tuple[int, Any]:
        body = {"engine_config": msgspec.to_builtins(engine.description(**changes)), "instance": instance}
        status, answer = await self.send("POST", "/register_engine", body)
        if status == 200:
            engine.engine_id = answer["engine_id"]
        return status, answer


class Cluster:
    """A core and its client; `engine()` adds engines."""

    def __init__(self, server: Server, client: Client, tokenizers: Tokenizers) -> None:
        self.server = server
        self.client = client
        self.tokenizers = tokenizers
        self._engines: list[ScriptedEngine] = []

    async def engine(self, name: str = "scripted", instance: str = "", **facts: Any) -> ScriptedEngine:
        """A started and registered engine."""
        engine = ScriptedEngine(self.tokenizers, name, **{k: v for k, v in facts.items() if k in ("model", "tokenizer")})
        engine.bos_tokens = facts.get("bos_tokens", 0)
        await engine.start()
        self._engines.append(engine)
        status, answer = await self.client.register(engine, instance or name)
        assert status == 200, answer
        return engine

    async def stop(self) -> None:
        for engine in self._engines:
            await engine.stop()


@contextlib.asynccontextmanager
async def cluster(load: Callable[[str], Any] | None = None, **config: Any) -> AsyncIterator[Cluster]:
    """A running core without engines. `config`: keys of ServeCoreConfig; `load`: loads tokenizers (else each name is one)."""
    tokenizers = Tokenizers()
    server = Server(msgspec.convert({"host": "127.0.0.1", "port": 0, **config}, ServeCoreConfig), load=load or tokenizers.load)
    [(host, port)] = await server.start()
    async with aiohttp.ClientSession() as http:
        running = Cluster(server, Client(f"http://{host}:{port}", http), tokenizers)
        try:
            yield running
        finally:
            await server.stop()
            await running.stop()


async def eventually(condition: Callable[[], Any], patience_s: float = 5.0) -> None:
    """Waits until `condition` holds; fails after a time that no healthy run needs."""
    async with asyncio.timeout(patience_s):
        while not condition():
            await asyncio.sleep(0.005)
