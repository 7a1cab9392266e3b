"""A stand-in for Azure OpenAI and for any server of its protocol, on loopback: it speaks their paths, headers and errors.

What it answers is scripted, a step a request; without a step it answers `TEXT`, a word a chunk.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

TEXT = "one two three four"
KEY = "secret-key"
VERSION = "2023-07-01-preview"
NEWER = ("seed", "stream_options")  #: what that version of Azure's API does not know, and refuses


@dataclass
class Answer:
    """One scripted answer. `status` other than 200: an error body of `code`; `cut`: the connection breaks after that many
    chunks; `gate`: awaited before the last chunk; `error_after`: an error event of the stream, after that many chunks.
    `logprobs`: tells the probability of each chunk, as one token; `calls`: tools that it calls, each in two pieces."""

    text: str = TEXT
    status: int = 200
    code: str = ""
    message: str = "no"
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    error_after: int | None = None
    reason: str = "stop"
    ids: tuple[int, ...] = ()  # of the tokens, one a chunk
    gate: asyncio.Event | None = None
    usage: tuple[int, int, int] | None = None  # prompt, cached, output
    delay_s: float = 0.0
    logprobs: bool = False
    calls: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class StandIn:
    """The server. `seen`: the bodies of the requests; `headers`: theirs; `open`: streams that run."""

    answers: list[Answer] = field(default_factory=list)
    respond: Callable[[dict[str, Any]], Answer] | None = None
    seen: list[dict[str, Any]] = field(default_factory=list)
    headers: list[Any] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    open: int = 0
    most_open: int = 0
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        azure = "deployment" in request.match_info
        if azure and request.headers.get("api-key") != KEY:
            return error(401, "401", "Access denied due to invalid subscription key")
        if not azure and request.headers.get("Authorization") != f"Bearer {KEY}":
            return error(401, "invalid_api_key", "Incorrect API key provided")
        if azure and request.query.get("api-version") != VERSION:
            return error(404, "404", "Resource not found")
        if azure and request.match_info["deployment"] != "gpt35":
            return error(404, "DeploymentNotFound", "The API deployment for this resource does not exist.")
        newer = [name for name in NEWER if azure and name in body]
        if newer:
            return error(400, "", f"Unrecognized request argument supplied: {newer[0]}")
        self.seen.append(body)
        self.headers.append(request.headers)
        self.times.append(asyncio.get_running_loop().time())
        answer = self.answers.pop(0) if self.answers else self.respond(body) if self.respond else Answer()
        if answer.delay_s:
            await asyncio.sleep(answer.delay_s)
        if answer.status != 200:
            return error(answer.status, answer.code, answer.message, answer.headers)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            return await self._stream(request, answer, "messages" in body, azure)
        finally:
            self.open -= 1

    async def _stream(self, request: web.Request, answer: Answer, chat: bool, azure: bool) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def send(choices: list[dict[str, Any]], **more: Any) -> None:
            chunk = {"id": "x", "object": "chunk", "created": 1, "model": "m", "choices": choices, **more}
            await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")

        if azure:  # the filter's verdict on the prompt comes first, with no choice
            await send([], prompt_filter_results=[{"prompt_index": 0, "content_filter_results": {}}])
        words = answer.text.split(" ")
        pieces = [word if n == 0 else f" {word}" for n, word in enumerate(words)] if answer.text else []
        for n, piece in enumerate(pieces):
            if answer.cut == n:
                assert request.transport is not None
                request.transport.close()
                return response
            if answer.error_after == n:
                body = {"error": {"message": answer.message, "code": answer.code, "type": "server_error"}}
                await response.write(b"data: " + json.dumps(body).encode() + b"\n\n")
                return response
            if answer.gate is not None and n == len(pieces) - 1:
                await answer.gate.wait()
            shown = {"delta": {"content": piece}} if chat else {"text": piece}
            if answer.ids:
                shown["token_ids"] = [answer.ids[n]]
            if answer.logprobs:
                shown["logprobs"] = _logprobs(piece, chat)
            await send([{"index": 0, "finish_reason": None, **shown}])
        for n, call in enumerate(answer.calls):
            for name, arguments in ((call["function"]["name"], ""), (None, call["function"]["arguments"])):
                delta = {"index": n, "function": {"name": name, "arguments": arguments}}
                if name is not None:
                    delta |= {"id": call["id"], "type": "function"}
                await send([{"index": 0, "finish_reason": None, "delta": {"tool_calls": [delta]}}])
        reason = "tool_calls" if answer.calls else answer.reason
        await send([{"index": 0, "finish_reason": reason, **({"delta": {}} if chat else {"text": ""})}])
        if answer.usage is not None:
            prompt, cached, output = answer.usage
            usage = {
                "prompt_tokens": prompt,
                "completion_tokens": output,
                "total_tokens": prompt + output,
                "prompt_tokens_details": {"cached_tokens": cached},
            }
            await send([], usage=usage)
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response


def _logprobs(piece: str, chat: bool) -> dict[str, Any]:
    if not chat:
        return {"tokens": [piece], "token_logprobs": [-0.5], "top_logprobs": [{piece: -0.5}], "text_offset": [0]}
    token = {"token": piece, "logprob": -0.5, "bytes": None}
    return {"content": [{**token, "top_logprobs": [token]}], "refusal": None}


def error(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response({"error": {"code": code, "message": message}}, status=status, headers=headers or {})


@asynccontextmanager
async def stand_in(**fields: Any) -> AsyncIterator[StandIn]:
    """A running one."""
    server = StandIn(**fields)
    app = web.Application()
    for kind in ("completions", "chat/completions"):
        app.router.add_post("/openai/deployments/{deployment}/" + kind, server.handle)
        app.router.add_post("/v1/" + kind, server.handle)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.port = runner.addresses[0][1]
    try:
        yield server
    finally:
        await runner.cleanup()
