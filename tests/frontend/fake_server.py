"""A core in a thread of the test: the public API v1 without engines. Its model answers `[prompt]`.

`faults` is a list of what to do to the next requests, one each: "drop" (close without an answer, after doing the work),
"busy" (429, Retry-After 0), "unavailable" (503, Retry-After 0), "garbage" (a 500 that is no JSON), None (nothing).
`die` cuts all its connections and frees its port, `come_back` listens there again; what it knows it keeps, as a core with
a journal does.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from parrot.protocol import api
from parrot.protocol.errors import ErrorBody, ErrorInfo, ParrotError
from parrot.protocol.template import Text, pieces_for

T = TypeVar("T")


class FakeVariable:
    def __init__(self, name: str) -> None:
        self.name = name
        self.state = "empty"
        self.done: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def finish(self, content: str | ErrorInfo) -> None:
        if isinstance(content, str):
            self.done.set_result(content)
        else:
            self.done.set_exception(ParrotError.of(content))
            self.done.exception()


class FakeServer:
    """`with FakeServer() as server:`; `server.address` is where it listens."""

    def __init__(self) -> None:
        self.faults: list[str | None] = []
        self.cut_stream_after: int | None = None
        self.on_cut: Callable[[], None] | None = None
        self.last_line: bytes | None = None  #: the end of the stream that is cut
        self.hold = threading.Event()
        self.hold.set()
        self.requests: list[tuple[str, str, Any]] = []
        self.keys: list[str | None] = []
        self.calls: list[api.SemanticCallRequest] = []
        self.criteria: list[str | None] = []
        self.open_sessions: set[int] = set()
        self.work: Counter[str] = Counter()
        self._auth: dict[int, str] = {}
        self._variables: dict[str, FakeVariable] = {}
        self._answers: dict[str, bytes] = {}
        self._numbers = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self) -> FakeServer:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    # ------------------------------------------------------------------------------------------- serving

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        app = web.Application(middlewares=[self._edge])
        app.add_routes(
            [
                web.post("/v1/session", self._open),
                web.get("/v1/session/{id}", self._describe),
                web.delete("/v1/session/{id}", self._close),
                web.post("/v1/semantic_call", self._call),
                web.post("/v1/py_native_call", self._native),
                web.post("/v1/semantic_var", self._create),
                web.get("/v1/semantic_var", self._list),
                web.post("/v1/semantic_var/{id}", self._set),
                web.get("/v1/semantic_var/{id}", self._get),
            ]
        )
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        self._site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await self._site.start()
        assert self._runner.addresses
        self._port = self._runner.addresses[0][1]
        self.address = f"http://127.0.0.1:{self._port}"
        self._ready.set()
        await self._stop.wait()
        for task in self._tasks:
            task.cancel()
        await self._runner.cleanup()

    def die(self) -> None:
        """From any thread but its own; returns when it is done."""
        asyncio.run_coroutine_threadsafe(self._die(), self._loop).result(10)

    async def _die(self) -> None:
        server = self._runner.server
        assert server is not None
        for connection in list(server.connections):
            if connection.transport is not None:
                connection.transport.abort()
        await self._site.stop()

    def come_back(self) -> None:
        """From any thread but its own; returns when it listens."""
        asyncio.run_coroutine_threadsafe(self._come_back(), self._loop).result(10)

    async def _come_back(self) -> None:
        self._site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True)
        await self._site.start()

    async def die_for_a_while(self, seconds: float) -> None:
        """In its own loop."""
        await self._die()
        await asyncio.sleep(seconds)
        await self._come_back()

    def start_dying(self, seconds: float) -> None:
        """`die_for_a_while`, from its own thread or any other; returns at once."""
        asyncio.run_coroutine_threadsafe(self.die_for_a_while(seconds), self._loop)

    @web.middleware
    async def _edge(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        fault = self.faults.pop(0) if self.faults else None
        key = request.headers.get("Idempotency-Key")
        body = await request.read()
        self.requests.append((request.method, request.path, msgspec.json.decode(body) if body else dict(request.query)))
        if request.method == "POST":
            self.keys.append(key)
        if fault == "busy":
            return _error(ErrorInfo("queue_full", "the queue is full"), retry_after="0")
        if fault == "unavailable":
            return _error(ErrorInfo("unavailable", "shutting down"), retry_after="0")
        if fault == "garbage":
            return web.Response(status=500, text="<html>proxy</html>")
        try:
            if key in self._answers:
                answer: web.StreamResponse = _json(self._answers[key])
            else:
                answer = await handler(request)
                if key and isinstance(answer, web.Response):
                    assert isinstance(answer.body, bytes)
                    self._answers[key] = answer.body
        except ParrotError as error:
            answer = _error(error.info)
        if fault == "drop" and request.transport is not None:
            request.transport.close()
        return answer

    # ------------------------------------------------------------------------------------------ sessions

    async def _open(self, request: web.Request) -> web.Response:
        await _decoded(request, api.OpenSessionRequest)
        number = 1000 + next(self._numbers)
        self._auth[number] = f"auth-{number}"
        self.open_sessions.add(number)
        return _json(api.SessionAnswer(number, self._auth[number]))

    async def _describe(self, request: web.Request) -> web.Response:
        self._check(int(request.match_info["id"]), request.query.get("session_auth"))
        assert request.query.get("calls") == "true"
        task = api.TaskReport(
            "v", "finished", ready_s=1.0, first_token_s=1.5, finished_s=3.5, prompt_tokens=9, output_tokens=5, decode_s=2.0
        )
        waiting = api.TaskReport("w", "waiting")
        calls = (api.CallReport(0, "f", "finished", 0.5, (task, waiting)),)
        return _json(api.SessionReport(int(request.match_info["id"]), "open", {"finished": 1}, {}, 1.0, 0.0, calls))

    async def _close(self, request: web.Request) -> web.Response:
        body = await _decoded(request, api.SessionReference)
        self._check(body.session_id, body.session_auth)
        self.open_sessions.discard(body.session_id)
        return _json({})

    def _check(self, session_id: int, auth: str | None) -> None:
        if session_id not in self._auth:
            raise ParrotError("not_found", f"session {session_id} is unknown")
        if auth != self._auth[session_id]:
            raise ParrotError("forbidden", "a wrong session_auth")
        if session_id not in self.open_sessions:
            raise ParrotError("session_closed", f"session {session_id} is closed")

    # --------------------------------------------------------------------------------------------- calls

    async def _call(self, request: web.Request) -> web.Response:
        call = await _decoded(request, api.SemanticCallRequest)
        self._check(call.session_id, call.session_auth)
        pieces = pieces_for(call.template, call.parameters, remove_pure_fill=call.remove_pure_fill)
        self.calls.append(call)
        self.work["call"] += 1
        specs = {spec.name: spec for spec in call.parameters}
        ids = {name: spec.var_id or self._new(name) for name, spec in specs.items()}
        for name, spec in specs.items():
            if spec.value is not None:
                self._variables[ids[name]].finish(spec.value)
        task = asyncio.create_task(self._generate(pieces, ids))
        self._tasks.add(task)
        info = tuple(
            api.ParamInfo(p.name, p.name, p.is_output, self._variables[ids[p.name]].name, ids[p.name], "", "")
            for p in pieces
            if not isinstance(p, Text)
        )
        return _json(api.CallAnswer(next(self._numbers), call.session_id, info))

    async def _generate(self, pieces: list[Any], ids: dict[str, str]) -> None:
        prompt = ""
        try:
            for piece in pieces:
                if isinstance(piece, Text):
                    prompt += piece.text
                elif not piece.is_output:
                    prompt += await asyncio.shield(self._variables[ids[piece.name]].done)
                else:
                    while not self.hold.is_set():
                        await asyncio.sleep(0.005)
                    if "FAIL" in prompt:
                        raise ParrotError("generation_failed", "the model said no", prompt=prompt)
                    self._variables[ids[piece.name]].finish(f"[{prompt}]")
                    prompt += f"[{prompt}]"
        except ParrotError as error:
            for piece in pieces:
                if not isinstance(piece, Text) and piece.is_output and not self._variables[ids[piece.name]].done.done():
                    self._variables[ids[piece.name]].finish(error.info)

    async def _native(self, request: web.Request) -> web.Response:
        raise ParrotError("not_implemented", "native functions are not run by this core")

    # ----------------------------------------------------------------------------------------- variables

    def _new(self, name: str) -> str:
        var_id = f"v/{next(self._numbers)}"
        self._variables[var_id] = FakeVariable(name)
        return var_id

    def _variable(self, request: web.Request) -> FakeVariable:
        var_id = request.match_info["id"]
        if var_id not in self._variables:
            raise ParrotError("not_found", f"variable {var_id!r} is unknown")
        return self._variables[var_id]

    async def _create(self, request: web.Request) -> web.Response:
        body = await _decoded(request, api.CreateVariableRequest)
        self._check(body.session_id, body.session_auth)
        self.work["create"] += 1
        return _json({"var_id": self._new(body.var_name)})

    async def _list(self, request: web.Request) -> web.Response:
        body = await _decoded(request, api.SessionReference)
        self._check(body.session_id, body.session_auth)
        return _json({"vars": [api.VariableInfo(var_id, v.name, v.state) for var_id, v in self._variables.items()]})

    async def _set(self, request: web.Request) -> web.Response:
        body = await _decoded(request, api.SetVariableRequest)
        self._check(body.session_id, body.session_auth)
        variable = self._variable(request)
        if variable.done.done():
            raise ParrotError("conflict", "the variable is set")
        self.work["set"] += 1
        variable.finish(body.content)
        return _json({})

    async def _get(self, request: web.Request) -> web.StreamResponse:
        body = await _decoded(request, api.GetVariableRequest)
        self._check(body.session_id, body.session_auth)
        self.criteria.append(body.criteria)
        variable = self._variable(request)
        try:
            content = await asyncio.wait_for(asyncio.shield(variable.done), body.timeout)
        except TimeoutError:
            raise ParrotError("timeout", f"no content after {body.timeout} s") from None
        if not body.stream:
            return _json({"content": content})
        return await self._stream(request, content, body.stream_from)

    async def _stream(self, request: web.Request, content: str, start: int) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await answer.prepare(request)
        async for position, delta in _slices(content, start):
            if position == self.cut_stream_after:
                self.cut_stream_after = None
                if self.last_line is not None:
                    line, self.last_line = self.last_line, None
                    await answer.write(line)
                    await answer.write_eof()
                    return answer
                assert request.transport is not None
                request.transport.close()
                if self.on_cut is not None:
                    self.on_cut()
                return answer
            await answer.write(msgspec.json.encode({"delta": delta}) + b"\n")
        await answer.write(b'{"done":true}\n')
        await asyncio.sleep(0.02)  # the end of the body may come in a packet of its own
        with contextlib.suppress(ConnectionError):  # the client may leave after the last line
            await answer.write_eof()
        return answer


async def _slices(content: str, start: int) -> AsyncIterator[tuple[int, str]]:
    for position in range(start, len(content), 3):
        yield position, content[position : position + 3]
        await asyncio.sleep(0)


async def _decoded(request: web.Request, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(await request.read(), type=kind)
    except msgspec.DecodeError as error:
        raise ParrotError("bad_request", str(error)) from None


def _json(value: Any) -> web.Response:
    body = value if isinstance(value, bytes) else msgspec.json.encode(value)
    return web.Response(body=body, content_type="application/json")


def _error(info: ErrorInfo, retry_after: str | None = None) -> web.Response:
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    return web.Response(
        status=info.status, body=msgspec.json.encode(ErrorBody(info)), content_type="application/json", headers=headers
    )
