"""The engine's HTTP API on aiohttp: bodies in, events out. Every refusal is an ErrorBody; nothing here schedules.

POST /task streams a task's events as NDJSON, a flush for all that have come; when the client goes away the task is
aborted. /fill, /generate, /generate_stream and /free_context are the primitives of an engine used alone, and so are OpenAI's
routes (`openai_routes.py`); the core itself uses /task, /abort, /free_context (with its epoch) and /ping.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing

import msgspec
from aiohttp import web

from parrot.engine.jobs import Job
from parrot.engine.loop import EngineLoop
from parrot.engine.openai_routes import PREFIX, OpenAIRoutes, refused
from parrot.engine.primitives import Primitives
from parrot.engine.tasks import Tasks, decode
from parrot.protocol.engine import (
    AbortRequest,
    FillRequest,
    FreeContextAnswer,
    FreeContextRequest,
    GenerateRequest,
    PingAnswer,
)
from parrot.protocol.errors import ErrorBody, ErrorInfo, ParrotError

log = logging.getLogger(__name__)

#: What aiohttp itself has to say of connections. Not of a body that cannot be read: it was answered 400, but aiohttp, which
#: then throws away the rest of it, fails again.
connections_log = logging.getLogger(f"{__name__}.connections")
connections_log.addFilter(lambda record: not (record.exc_info and isinstance(record.exc_info[1], web.RequestPayloadError)))

#: A chain of a million token ids is some 8 MB.
MAX_BODY_BYTES = 64 * 1024 * 1024

_encode = msgspec.json.Encoder().encode
_encode_lines = msgspec.json.Encoder().encode_lines
_ABORT = msgspec.json.Decoder(AbortRequest)
_FREE = msgspec.json.Decoder(FreeContextRequest)
_FILL = msgspec.json.Decoder(FillRequest)
_GENERATE = msgspec.json.Decoder(GenerateRequest)

_NDJSON = {"Content-Type": "application/x-ndjson"}
_JSON = {"Content-Type": "application/json"}


class EngineServer:
    """The routes of one engine."""

    def __init__(self, loop: EngineLoop, tasks: Tasks, primitives: Primitives, openai: OpenAIRoutes | None = None) -> None:
        self._loop = loop
        self._tasks = tasks
        self._primitives = primitives
        self._openai = openai

    def application(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_refuse])
        app.router.add_post("/task", self._task)
        app.router.add_post("/abort", self._abort)
        app.router.add_post("/free_context", self._free_context)
        app.router.add_post("/fill", self._fill)
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/generate_stream", self._generate_stream)
        app.router.add_post("/ping", self._ping)
        if self._openai is not None:
            self._openai.add_to(app)
        return app

    # ---------------------------------------------------------------------------------------------------- for the core

    async def _task(self, request: web.Request) -> web.StreamResponse:
        arrived = self._loop.now()
        job = self._tasks.start(await request.read(), arrived)
        try:
            return await self._stream_job(request, job)
        finally:
            self._tasks.done(job)

    async def _stream_job(self, request: web.Request, job: Job) -> web.StreamResponse:
        events = await job.stream.take()
        if job.ended:  # all there is: one write
            return web.Response(body=_encode_lines(events), headers=_NDJSON)
        response = web.StreamResponse(headers=_NDJSON)
        await response.prepare(request)
        try:
            while events:
                await response.write(_encode_lines(events))
                events = await job.stream.take()
            await response.write_eof()
        except ConnectionError:
            pass  # the client has gone: the caller aborts what still runs
        return response

    async def _abort(self, request: web.Request) -> web.Response:
        self._tasks.abort(decode(_ABORT, await request.read()))
        return _answer({})

    async def _free_context(self, request: web.Request) -> web.Response:
        free = decode(_FREE, await request.read())
        ids = (*free.context_ids, *(() if free.context_id is None else (free.context_id,)))
        if not ids:
            raise ParrotError("bad_request", "free_context needs context_id or context_ids")
        if free.epoch is not None:
            return _answer(FreeContextAnswer(self._tasks.free(free.epoch, ids)))
        return _answer(FreeContextAnswer(sum(self._primitives.free(i) for i in ids)))

    async def _ping(self, request: web.Request) -> web.Response:
        return _answer(PingAnswer(self._loop.runtime_info()))

    # ------------------------------------------------------------------------------------------- for an engine used alone

    async def _fill(self, request: web.Request) -> web.Response:
        return _answer(await self._primitives.fill(decode(_FILL, await request.read())))

    async def _generate(self, request: web.Request) -> web.Response:
        return _answer(await self._primitives.generate(decode(_GENERATE, await request.read())))

    async def _generate_stream(self, request: web.Request) -> web.StreamResponse:
        generate = decode(_GENERATE, await request.read())
        response: web.StreamResponse | None = None
        try:
            async with aclosing(self._primitives.stream(generate)) as events:
                async for event in events:
                    if response is None:
                        response = web.StreamResponse(headers=_NDJSON)
                        await response.prepare(request)
                    await response.write(_encode_lines([event]))
        except ParrotError as error:
            if response is None:  # nothing was sent yet: an HTTP error
                raise
            await response.write(_encode_lines([ErrorBody(error.info)]))
        if response is None:
            raise ParrotError("internal", f"the generate in context {generate.context_id} ended without an event")
        await response.write_eof()
        return response


def _answer(data: object) -> web.Response:
    return web.Response(body=_encode(data), headers=_JSON)


_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}


@web.middleware
async def _refuse(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
    """Turns what a handler raises into an ErrorBody: its own refusals, aiohttp's, and bugs (which are logged)."""
    try:
        return await handler(request)
    except ParrotError as error:
        info = error.info
    except web.RequestPayloadError:
        encoding = request.headers.get("Content-Encoding", "none")
        info = ErrorInfo("bad_request", f"the body cannot be read; its Content-Encoding is {encoding}")
    except web.HTTPException as error:
        code = _HTTP_CODES.get(error.status, "bad_request")
        message = f"{request.method} {request.path}: {error.reason}"
        if error.status == 413:
            message = f"the body is over the limit of {MAX_BODY_BYTES} bytes"
        info = ErrorInfo(code, message)
    except ConnectionError:
        raise
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        info = ErrorInfo("internal", f"{request.method} {request.path} failed; the engine's log says how")
    if request.path.startswith(PREFIX):
        return refused(info)
    return web.Response(status=info.status, body=_encode(ErrorBody(info)), headers=_JSON)
