"""One program's client over HTTP: carries its player's actions to a core's public API, in an asyncio event loop.

The counterpart of `sim.conversation`: it decides nothing about what is sent (`sim.clients`), when it is sent again
(`parrot.frontend.wire`) nor about what is measured (`sim.metrics`). Segments become text drawn from their keys: equal keys,
equal texts.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, NamedTuple

import aiohttp
import msgspec
import numpy as np

from parrot.frontend.wire import Answer, Attempts, LostConnection, Request, RetryPolicy, Stat, error_of, request
from parrot.protocol.api import SamplingConfig, SessionReport
from parrot.protocol.errors import ErrorInfo, ParrotError
from parrot.tokenizer import synthetic_text
from sim.actions import (
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
    Reference,
    Submit,
    Value,
    Wait,
)
from sim.model_types import ModelTypes
from sim.network import Network
from sim.player import Player
from sim.recorder import Recorder
from sim.workloads.program import Text


class Refusal(Exception):
    """An answer with an error: what it says and, for one that may be tried again, when."""

    def __init__(self, info: ErrorInfo, retry_after_s: float) -> None:
        super().__init__(info.message)
        self.info = info
        self.retry_after_s = retry_after_s


#: Codes of a session that is over: what a close is told that was done before its answer got lost.
_ENDED = frozenset({"not_found", "session_closed", "session_expired"})


class Api:
    """The public API of a core as coroutines. Raises Refusal for every answer that is an error.

    A core that dies and comes back is waited for, and a POST is the same one however often it is sent. What is refused for
    lack of room (429) is the player's to see at once, which counts it.
    """

    def __init__(self, url: str, http: aiohttp.ClientSession, retry: RetryPolicy | None = None) -> None:
        self.stat = Stat()
        self._url = url.rstrip("/")
        self._http = http
        self._retry = retry or RetryPolicy()

    async def call(self, method: str, path: str, body: Any = None, query: dict[str, Any] | None = None) -> bytes:
        sent = request(method, path, body)
        attempts = Attempts(self._retry, self.stat, self._url)
        while True:
            try:
                answer = await self._exchange(sent, query)
                wait_s = None if answer.status == 429 else attempts.busy(answer)
                if wait_s is None:
                    return _content(answer)
            except LostConnection as error:
                try:
                    wait_s = attempts.lost(error)
                except ParrotError as given_up:
                    raise Refusal(given_up.info, 1.0) from None
            await asyncio.sleep(wait_s)

    async def _exchange(self, sent: Request, query: dict[str, Any] | None) -> Answer:
        """One attempt. Raises LostConnection."""
        data = sent.body or None
        try:
            async with self._http.request(
                sent.method, self._url + sent.path, data=data, params=query, headers=sent.headers
            ) as answer:
                return Answer(answer.status, await answer.read(), answer.headers.get("Retry-After"))
        except (aiohttp.ClientError, OSError) as error:
            unheard = isinstance(error, aiohttp.ClientConnectorError | TimeoutError)
            raise LostConnection(str(error) or type(error).__name__, unheard=unheard) from error


def _content(answer: Answer) -> bytes:
    """The body of a good answer. Raises the Refusal of any other."""
    if answer.status == 200:
        return answer.body
    try:
        retry_after_s = float(answer.retry_after or 1.0)
    except ValueError:
        retry_after_s = 1.0
    raise Refusal(error_of(answer), retry_after_s)


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
        await self._api.call("POST", f"/v1/semantic_var/{var_id}", {**self._who, "content": text_of(value, self._client.style)})

    async def submit(self, call: int, output: int, action: Submit | Complete) -> tuple[str, ...]:
        template, parameters = render(action.pieces, self._client.style)
        body = {
            **self._who,
            "template": template,
            "parameters": parameters,
            "func_name": action.spec.name,
            "models": action.spec.models,
            "model_type": self._client.model_types.of(action.spec),
            "cache_prefix": action.spec.cache_prefix,
        }
        answer = json.loads(await self._api.call("POST", "/v1/semantic_call", body))
        var_ids = tuple(item["var_id"] for item in answer["param_info"] if item["is_output"])
        self._outputs |= {var_id: (call, output + place) for place, var_id in enumerate(var_ids)}
        return var_ids

    async def fetch(self, var_id: str, criteria: str, deadline_s: float | None) -> Value:
        query = {**self._who, "criteria": criteria}
        if deadline_s is not None:
            query["deadline"] = deadline_s
        answer = await self._api.call("GET", f"/v1/semantic_var/{var_id}", query=query)
        content = json.loads(answer)["content"]
        return Value("", 0, content)

    async def close(self) -> None:
        session_id = self._who["session_id"]
        answer = await self._api.call("GET", f"/v1/session/{session_id}", query={**self._who, "calls": "true"})
        self._client.record(msgspec.json.decode(answer, type=SessionReport), self._outputs)
        try:
            await self._api.call("DELETE", f"/v1/session/{session_id}", query=self._who)
        except Refusal as refusal:
            if refusal.info.code not in _ENDED:
                raise


class HttpClient:
    """One program's client over HTTP: its player, in the running event loop."""

    def __init__(
        self,
        api: Api,
        player: Player,
        network: Network,
        recorder: Recorder,
        style: Style,
        zero_s: float,
        model_types: ModelTypes = ModelTypes(),
    ) -> None:
        self.style = style
        self.model_types = model_types
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
            return session.fetch(action.var_id, action.criteria.value, action.deadline_s)
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
            return await session.fetch(var_id, action.criteria.value, action.deadline_s)
        finally:
            await session.close()


class Style(NamedTuple):
    """How a program's lengths become text and sampling: the one for engines that are told them, or the one for models."""

    sampling: Callable[[Into], SamplingConfig]
    words: Callable[[str, int], str]


def render(pieces: Sequence[Piece], style: Style) -> tuple[str, list[dict[str, Any]]]:
    """Pieces as a template and its parameters. Constants in a row stay apart (all but the first become values), because
    a boundary of segments is where contexts can be shared; for the same reason nothing is put between them."""
    parts: list[str] = []
    parameters: dict[str, dict[str, Any]] = {}
    places: dict[str, str] = {}
    constant = False
    for number, piece in enumerate(pieces):
        name = f"p{number}"
        if type(piece) is Text and not constant:
            parts.append(text_of(piece, style))
            constant = True
            continue
        constant = type(piece) is Text
        if type(piece) is Reference:
            name = places.setdefault(piece.var_id, name)  # a variable read twice is one parameter with two places
            parameters[name] = {"name": name, "var_id": piece.var_id}
        elif type(piece) is Into:
            parameters[name] = {"name": name, "is_output": True, "sampling_config": style.sampling(piece)}
            if piece.var_id is not None:
                parameters[name]["var_id"] = piece.var_id
        else:
            value = piece.value if type(piece) is Given else piece
            parameters[name] = {"name": name, "value": text_of(value, style)}  # type: ignore[arg-type]
        parts.append("{{" + name + "}}")
    return "".join(parts), list(parameters.values())


def text_of(piece: Text | Value, style: Style) -> str:
    """The text of a value: the real one where there is one, else words drawn from its key."""
    if type(piece) is Value and piece.text is not None:
        return piece.text
    return style.words(piece.key, piece.tokens)


def _exact_length(into: Into) -> SamplingConfig:
    return SamplingConfig(temperature=0.0, max_gen_length=into.max_gen_length, output_length=into.output_length)


def _bounded_length(into: Into) -> SamplingConfig:
    # The only way to an exact length with real weights; the price is that a policy gets to know it.
    return SamplingConfig(temperature=0.0, max_gen_length=into.output_length, ignore_tokenizer_eos=True)


#: Frequent English words: each is one token for the usual tokenizers, in front of which a space belongs to it.
_PLAIN_TEXT = (
    "the of and to in is was for that it with as his on be at by had not are but from or have an they which one you were all "
    "her she there would their we him been has when who will no more if out so up said what its about than into them can "
    "only other time new some could these two may first then do any like my now over such our man me even most made after"
)
_PLAIN = tuple(_PLAIN_TEXT.split())


@functools.lru_cache(maxsize=4096)
def _synthetic(key: str, tokens: int) -> str:
    return synthetic_text(key, tokens)


@functools.lru_cache(maxsize=4096)
def _plain(key: str, tokens: int) -> str:
    drawn = np.random.default_rng(list(key.encode())).integers(len(_PLAIN), size=tokens)
    return "".join(f" {_PLAIN[i]}" for i in drawn.tolist())


TOLD = Style(_exact_length, _synthetic)  #: emulated engines and dummy weights: every length is exact
MODEL = Style(_bounded_length, _plain)  #: real weights: prompts have about the length that the program says
