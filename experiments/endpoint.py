"""`python -m experiments.endpoint`: a stand-in for a remote endpoint, whose latency follows a law that its flags say.

It speaks as much of OpenAI's protocol as an engine of type `openai` asks for (streamed completions and chats, usage, 429), and
stands where no endpoint can be had: to try a configuration, or to see what `sim.calibrate` makes of a law that is known. A word
is a token. Its text is made up.

The first token of a request with p prompt tokens that is the l-th in flight comes after a + b·p + c·l seconds, every further
one d + e·l seconds after the one before, l counted anew each time. Both are multiplied by a deviation of the request's own,
lognormal with mean 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from aiohttp import web

from parrot.engine.rate_limits import Minute

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Law:
    """Seconds, and standard deviations of the logarithm."""

    ttft_s: float = 0.3
    prompt_s: float = 0.0002
    ttft_load_s: float = 0.04
    tpot_s: float = 0.03
    tpot_load_s: float = 0.003
    ttft_spread: float = 0.2
    tpot_spread: float = 0.1


class Endpoint:
    """The server's handlers. Requests are drawn in the order in which they come, from `seed`."""

    def __init__(self, model: str, law: Law, requests_per_minute: int | None = None, seed: int = 0) -> None:
        self.in_flight = 0
        self._model = model
        self._law = law
        self._minute = Minute(requests_per_minute) if requests_per_minute else None
        self._generator = np.random.default_rng(seed)
        self._loop = asyncio.get_running_loop()

    def application(self) -> web.Application:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post("/v1/completions", self.complete)
        app.router.add_post("/v1/chat/completions", self.complete)
        app.router.add_get("/v1/models", self.models)
        return app

    async def models(self, request: web.Request) -> web.Response:
        """GET /v1/models"""
        return web.json_response({"object": "list", "data": [{"id": self._model, "object": "model"}]})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions, /v1/chat/completions: streams alone."""
        body = await request.json()
        if body.get("model") != self._model:
            return _error(404, "model_not_found", f"no model {body.get('model')!r}; there is {self._model!r}")
        if not body.get("stream"):
            return _error(400, "invalid_request_error", "this endpoint only streams: set stream to true")
        now = self._loop.time()
        if self._minute is not None:
            wait_s = self._minute.ready_at(1, now) - now
            if wait_s > 0:
                return _error(429, "rate_limit_exceeded", "too many requests", {"Retry-After": str(math.ceil(wait_s))})
            self._minute.take(1, now)
        self.in_flight += 1
        try:
            return await self._stream(request, body, now)
        finally:
            self.in_flight -= 1

    async def _stream(self, request: web.Request, body: dict[str, Any], now: float) -> web.StreamResponse:
        chat = "messages" in body
        prompt = " ".join(message["content"] for message in body["messages"]) if chat else body["prompt"]
        words = len(prompt.split())
        count = int(body.get("max_tokens") or body.get("max_completion_tokens") or 16)
        law = self._law
        first, rest = (self._deviation(spread) for spread in (law.ttft_spread, law.tpot_spread))
        drawn = self._generator.integers(1000, size=count)
        due = now + (law.ttft_s + law.prompt_s * words + law.ttft_load_s * self.in_flight) * first
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number in drawn.tolist():
            # From when it was due, not from when it came: a busy machine does not make the law slower.
            await asyncio.sleep(due - self._loop.time())
            word = f" w{number}"
            await self._send(response, [{"index": 0, "finish_reason": None, **_shown(chat, word)}])
            due += (law.tpot_s + law.tpot_load_s * self.in_flight) * rest
        await self._send(response, [{"index": 0, "finish_reason": "length", **_shown(chat, "")}])
        if (body.get("stream_options") or {}).get("include_usage"):
            usage = {"prompt_tokens": words, "completion_tokens": count, "total_tokens": words + count}
            await self._send(response, [], usage=usage)
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def _send(self, response: web.StreamResponse, choices: list[dict[str, Any]], **more: Any) -> None:
        chunk = {"id": "c", "object": "chunk", "created": 1, "model": self._model, "choices": choices, **more}
        await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")

    def _deviation(self, spread: float) -> float:
        return math.exp(self._generator.normal(-spread * spread / 2, spread)) if spread else 1.0


def _shown(chat: bool, text: str) -> dict[str, Any]:
    return {"delta": {"content": text}} if chat else {"text": text}


def _error(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response({"error": {"code": code, "message": message}}, status=status, headers=headers or {})


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m experiments.endpoint", description=(__doc__ or "").split("\n", 1)[0])
    p.add_argument("--port", type=int, default=9400, help="0: a free one (%(default)s)")
    p.add_argument("--model", default="stand-in", help="its one model (%(default)s)")
    for name, value in Law().__dict__.items():
        p.add_argument(f"--{name.replace('_', '-')}", type=float, default=value, metavar="X", help="(%(default)s)")
    p.add_argument("--requests-per-minute", type=int, metavar="N", help="what is more is answered 429 (no limit)")
    p.add_argument("--seed", type=int, default=0)
    return p


async def serve(arguments: argparse.Namespace) -> None:
    """Serves until SIGTERM or SIGINT comes."""
    law = Law(**{name: getattr(arguments, name) for name in Law().__dict__})
    endpoint = Endpoint(arguments.model, law, arguments.requests_per_minute, arguments.seed)
    runner = web.AppRunner(endpoint.application(), handler_cancellation=True, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    try:
        await web.TCPSite(runner, HOST, arguments.port).start()
        print(f"{arguments.model} at http://{HOST}:{runner.addresses[0][1]}/v1", flush=True)
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await stop.wait()
    finally:
        await runner.cleanup()


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if any(value < 0 for name, value in vars(arguments).items() if name in Law().__dict__):
        print("experiments.endpoint: times and spreads are 0 or more", file=sys.stderr)
        return 1
    try:
        asyncio.run(serve(arguments))
    except OSError as error:
        print(f"experiments.endpoint: port {arguments.port}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
