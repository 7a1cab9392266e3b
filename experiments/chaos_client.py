"""A client of the public HTTP API that shares as little as it can with `P`: what the chaos test says of the API rests on it.

It sends what it sends until it is answered, repeats requests that were answered already, leaves streams in their middle, and
raises Contradiction when two answers to one question differ.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import aiohttp

from parrot.frontend.wire import Answer, Attempts, LostConnection, RetryPolicy, Stat, checked, read_line
from parrot.protocol.errors import ParrotError

_ENDED = frozenset({"not_found", "session_closed", "session_expired"})


class Contradiction(Exception):
    """The core said two things that cannot both be true."""


class RawSession:
    """`async with RawSession(url, policy) as session`: a session at the core, opened and closed by requests of its own."""

    def __init__(self, url: str, policy: RetryPolicy) -> None:
        self.reconnects = 0
        self._url = url
        self._policy = policy
        self._stat = Stat()
        self._who: dict[str, Any] = {}
        self._posts: list[tuple[str, dict[str, Any], str, Any]] = []  # path, body, key and what was answered

    @property
    def lost_connections(self) -> int:
        return self._stat.lost_connections

    async def __aenter__(self) -> RawSession:
        self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60.0))
        try:
            self._who = await self.post("/v1/session", {})
        except BaseException:
            await self._http.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """A POST with a key of its own, sent until it is answered."""
        body, key = {**self._who, **body}, secrets.token_hex(16)
        answer = await self._post(path, body, key)
        self._posts.append((path, body, key, answer))
        return answer

    async def repeat_posts(self) -> int:
        """Sends every POST once more; how many. Raises Contradiction when one is answered otherwise than before."""
        for path, body, key, before in self._posts:
            again = await self._post(path, body, key)
            if again != before:
                raise Contradiction(f"POST {path} with key {key} was answered {before!r}, and then {again!r}")
        return len(self._posts)

    async def get(self, var_id: str) -> str:
        """The content of a variable."""
        query = {**self._who, "criteria": "latency"}
        text: str = (await self._until_answered("GET", f"/v1/semantic_var/{var_id}", query=query))["content"]
        return text

    async def close(self) -> None:
        """Ends the session; that it has ended already is no error: then the answer got lost."""
        try:
            await self._until_answered("DELETE", f"/v1/session/{self._who['session_id']}", query=self._who)
        except ParrotError as error:
            if error.code not in _ENDED:
                raise

    async def stream(self, var_id: str, cuts: Sequence[int] = (), start: int = 0) -> str:
        """The text from character `start` on, streamed; at each of `cuts` characters it leaves and comes back for the rest."""
        text, cuts = "", list(cuts)
        attempts = Attempts(self._policy, self._stat, self._url)
        while True:
            query = {**self._who, "criteria": "TTFT", "stream": "true", "stream_from": str(start + len(text))}
            try:
                async with self._http.get(f"{self._url}/v1/semantic_var/{var_id}", params=query) as response:
                    if response.status == 200:
                        async for line in response.content:
                            event = read_line(line)
                            attempts.heard()
                            text += event.delta
                            if event.done:
                                return text
                            if cuts and len(text) >= cuts[0]:
                                cuts.pop(0)
                                break
                        else:
                            raise LostConnection("the stream ended before its last line")
                        self.reconnects += 1
                        continue
                    wait_s = attempts.busy(answer := await _answer(response))
                    if wait_s is None:
                        checked(answer)
                        raise Contradiction(f"a streaming get was answered with status {answer.status}")
            except (aiohttp.ClientError, OSError, LostConnection) as error:
                self.reconnects += 1
                wait_s = attempts.lost(_lost(error))
            await asyncio.sleep(wait_s)

    async def _post(self, path: str, body: dict[str, Any], key: str) -> Any:
        return await self._until_answered("POST", path, body=body, headers={"Idempotency-Key": key})

    async def _until_answered(
        self,
        method: str,
        path: str,
        *,
        body: dict[str, Any] | None = None,
        query: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> Any:
        """The decoded answer. Raises ParrotError for a refusal."""
        attempts = Attempts(self._policy, self._stat, self._url)
        while True:
            try:
                async with self._http.request(method, self._url + path, json=body, params=query, headers=headers) as response:
                    answer = await _answer(response)
                wait_s = attempts.busy(answer)
                if wait_s is None:
                    return json.loads(checked(answer))
            except (aiohttp.ClientError, OSError) as error:
                wait_s = attempts.lost(_lost(error))
            await asyncio.sleep(wait_s)


async def _answer(response: aiohttp.ClientResponse) -> Answer:
    return Answer(response.status, await response.read(), response.headers.get("Retry-After"))


def _lost(error: Exception) -> LostConnection:
    if isinstance(error, LostConnection):
        return error
    unheard = isinstance(error, aiohttp.ClientConnectorError | TimeoutError)
    return LostConnection(str(error) or type(error).__name__, unheard=unheard)
