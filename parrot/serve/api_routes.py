"""The public HTTP API v1: each request becomes one event for the core, and the core's reply its answer.

It checks the form of what clients send, with the shared template rules, and tokenizes. Whether a request is allowed and
what it does is the core's to say.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from aiohttp import web

from parrot.protocol.api import (
    CreateVariableRequest,
    GetVariableRequest,
    ModelInfo,
    OpenSessionRequest,
    ParameterSpec,
    SamplingConfig,
    SemanticCallRequest,
    SessionAnswer,
    SessionReference,
    SetVariableRequest,
    VariableInfo,
    parse_criteria,
)
from parrot.protocol.errors import ErrorBody, ParrotError
from parrot.protocol.template import Piece as TemplatePiece
from parrot.protocol.template import Text, pieces_for
from parrot.serve.credentials import Credentials, hashed
from parrot.serve.effects import Reply
from parrot.serve.events import (
    CloseSession,
    Constant,
    CreateVariable,
    DescribeSession,
    GetVariable,
    Input,
    ListVariables,
    OpenSession,
    Output,
    Segment,
    SetVariable,
    SubmitCall,
)
from parrot.serve.following import Follower, text_of
from parrot.serve.keys import Keys
from parrot.serve.routing import Handler, Paths
from parrot.serve.shell import Shell
from parrot.serve.streams import OutputStreams
from parrot.serve.texts import Piece, Texts
from parrot.serve.tokenization import Tokenization
from parrot.serve.wire import NDJSON, answer, arguments, body_of, decoded, idempotency_key, line
from parrot.sse import StreamWriter

_MODEL_TYPES = ("token_id", "text")
_EMPTY: dict[str, Any] = {}
_NDJSON = {"Content-Type": NDJSON}


class _SessionQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Arguments of GET and DELETE /v1/session/{id}; the id is the path's."""

    session_id: int
    session_auth: str | None = None
    calls: bool = False


class ApiRoutes:
    """The handlers of /v1. Each takes the request, its path's last part and its raw query."""

    def __init__(
        self,
        shell: Shell,
        models: Callable[[], Sequence[ModelInfo]],
        texts: Texts,
        tokenization: Tokenization,
        streams: OutputStreams,
        credentials: Credentials,
        stream_response: Callable[..., web.StreamResponse] | None = None,
        keys: Keys | None = None,
        reader_timeout_s: float | None = None,
    ) -> None:
        """`reader_timeout_s`: how long a client may take nothing of what is streamed to it; None: as long as it likes."""
        self._shell = shell
        self._models = models
        self._texts = texts
        self._tokenization = tokenization
        self._streams = streams
        self._credentials = credentials
        self._keys = keys or Keys({})
        self._reader_timeout_s = reader_timeout_s
        self._stream_response = stream_response or web.StreamResponse

    def paths(self) -> Paths:
        """Which of them has which path."""
        paths: Paths = {
            "/v1/session": {"POST": self.open_session},
            "/v1/session/": {"GET": self.describe_session, "DELETE": self.close_session},
            "/v1/semantic_call": {"POST": self.semantic_call},
            "/v1/py_native_call": {"POST": self.native_call},
            "/v1/semantic_var": {"GET": self.list_variables, "POST": self.create_variable},
            "/v1/semantic_var/": {"GET": self.get_variable, "POST": self.set_variable},
            "/v1/models": {"GET": self.models},
        }
        if not self._keys.required:
            return paths
        return {path: {method: self._checked(each) for method, each in methods.items()} for path, methods in paths.items()}

    def _checked(self, handler: Handler) -> Handler:
        """A session's own token lets in; a key that is shown beside it must be a right one."""

        async def checked(request: web.BaseRequest, tail: str, query: str) -> web.StreamResponse:
            self._keys.check(request.headers.get("Authorization"))
            return await handler(request, tail, query)

        return checked

    # ----------------------------------------------------------------------------------------------------- sessions

    async def open_session(self, request: web.BaseRequest, _: str, query: str) -> web.StreamResponse:
        """POST /v1/session"""
        body = decoded(await body_of(request), OpenSessionRequest)
        tenant = self._keys.tenant(request.headers.get("Authorization"), body.api_key)
        session_id = self._credentials.new_session_id()
        auth = hashed(self._credentials.auth(session_id))
        assert auth is not None
        key = idempotency_key(request)
        if key is not None:
            key = f"{tenant}:{key}"  # a key is its owner's alone
        event = OpenSession(self._shell.number(), session_id, auth, tenant, key)

        def on_reply(reply: Reply) -> None:
            if reply.payload == event.session_id:  # not the answer of an earlier request, whose session may be over
                self._texts.open(event.session_id)

        session_id = await self._shell.ask(event, on_reply)
        return answer(SessionAnswer(session_id, self._credentials.auth(session_id)))

    async def describe_session(self, request: web.BaseRequest, tail: str, query: str) -> web.StreamResponse:
        """GET /v1/session/{id}"""
        args = arguments(query, await body_of(request), _SessionQuery, session_id=tail)
        event = DescribeSession(self._shell.number(), args.session_id, hashed(args.session_auth), args.calls)
        return answer(await self._shell.ask(event))

    async def close_session(self, request: web.BaseRequest, tail: str, query: str) -> web.StreamResponse:
        """DELETE /v1/session/{id}"""
        args = arguments(query, await body_of(request), _SessionQuery, session_id=tail)
        await self._shell.ask(CloseSession(self._shell.number(), args.session_id, hashed(args.session_auth)))
        return answer(_EMPTY)

    # -------------------------------------------------------------------------------------------------------- calls

    async def semantic_call(self, request: web.BaseRequest, _: str, query: str) -> web.StreamResponse:
        """POST /v1/semantic_call"""
        body = decoded(await body_of(request), SemanticCallRequest)
        if body.model_type not in _MODEL_TYPES:
            raise ParrotError("bad_request", f"model_type {body.model_type!r} is none of {', '.join(_MODEL_TYPES)}")
        criteria = parse_criteria(body.output_criteria)
        key = idempotency_key(request)
        template = pieces_for(
            body.template, body.parameters, remove_pure_fill=body.remove_pure_fill, func_name=body.func_name or None
        )
        specs = {spec.name: spec for spec in body.parameters}
        texts = [text for part in template if (text := _text_of(part, specs)) is not None]
        pieces = await self._tokenization.pieces(texts)
        # From here to `ask` nothing waits: no tokenizer can become live in between.
        event = SubmitCall(
            self._shell.number(),
            body.session_id,
            hashed(body.session_auth),
            _segments(template, specs, pieces),
            body.func_name or "",
            tuple(dict.fromkeys(body.models)),
            body.model_type,
            body.cache_prefix,
            criteria,
            body.fuse_fill,
            key,
            body.deadline,
        )
        return answer(await self._ask_with_texts(event, pieces))

    async def native_call(self, request: web.BaseRequest, _: str, query: str) -> web.StreamResponse:
        """POST /v1/py_native_call"""
        await body_of(request)
        raise ParrotError(
            "not_implemented",
            "py_native_call is not available in this version of ServeCore; run native functions in the client "
            "and set their outputs with POST /v1/semantic_var/{var_id}",
        )

    # ---------------------------------------------------------------------------------------------------- variables

    async def list_variables(self, request: web.BaseRequest, _: str, query: str) -> web.StreamResponse:
        """GET /v1/semantic_var"""
        args = arguments(query, await body_of(request), SessionReference)
        event = ListVariables(self._shell.number(), args.session_id, hashed(args.session_auth))
        listed: Sequence[VariableInfo] = await self._shell.ask(event)
        return answer({"vars": [self._with_text(info) for info in listed]})

    def _with_text(self, info: VariableInfo) -> VariableInfo:
        if info.content is None:
            return info
        return msgspec.structs.replace(info, content=self._text(info.content))

    async def create_variable(self, request: web.BaseRequest, _: str, query: str) -> web.StreamResponse:
        """POST /v1/semantic_var"""
        body = decoded(await body_of(request), CreateVariableRequest)
        event = CreateVariable(
            self._shell.number(), body.session_id, hashed(body.session_auth), body.var_name, idempotency_key(request)
        )
        return answer(await self._shell.ask(event))

    async def set_variable(self, request: web.BaseRequest, tail: str, query: str) -> web.StreamResponse:
        """POST /v1/semantic_var/{var_id}"""
        body = decoded(await body_of(request), SetVariableRequest)
        key = idempotency_key(request)
        pieces = await self._tokenization.pieces([body.content])
        event = SetVariable(self._shell.number(), body.session_id, hashed(body.session_auth), tail, pieces[0].content(), key)
        await self._ask_with_texts(event, pieces)
        return answer(_EMPTY)

    async def get_variable(self, request: web.BaseRequest, tail: str, query: str) -> web.StreamResponse:
        """GET /v1/semantic_var/{var_id}"""
        args = arguments(query, await body_of(request), GetVariableRequest)
        criteria = parse_criteria(args.criteria)
        number = self._shell.number()
        event = GetVariable(
            number, args.session_id, hashed(args.session_auth), tail, criteria, args.timeout, args.stream, args.deadline
        )
        answered: list[Reply] = []
        future = self._shell.ask(event, answered.append)
        try:
            if args.stream:
                await self._shell.flushed()
                if answered and answered[0].error is not None:
                    await future  # a get that the core refuses shows nothing
                return await self._stream(request, future, args.session_id, tail, args.stream_from)
            return answer({"content": self._text(await future)})
        finally:
            if not future.done() or future.cancelled():  # the client went away
                self._shell.cancel_get(number)

    async def models(self, request: web.BaseRequest, _: str, query: str) -> web.StreamResponse:
        """GET /v1/models"""
        self._keys.tenant(request.headers.get("Authorization"))
        return answer({"models": self._models()})

    # ---------------------------------------------------------------------------------------------------- streaming

    async def _stream(
        self, request: web.BaseRequest, future: asyncio.Future[str], session_id: int, var_id: str, sent: int
    ) -> web.StreamResponse:
        """Sends the text as it comes, from character `sent` on. Errors before the first line are ordinary refusals."""
        writer = StreamWriter(request, _NDJSON, self._reader_timeout_s, self._stream_response)
        stream = self._streams.watch(session_id, var_id)
        reader = Follower(self._shell, self._texts, session_id, var_id, stream, future, sent)
        try:
            while (delta := await reader.piece()) is not None:
                await writer.write(line({"delta": delta}))
            await writer.write(line({"done": True}))
        except ParrotError as error:
            if not writer.begun:
                raise
            await writer.write(line(ErrorBody(error.info)))  # a status cannot be sent any more
        finally:
            self._streams.leave(session_id, var_id, stream)
        return await writer.end()

    # ------------------------------------------------------------------------------------------------------- shared

    def _text(self, key: str) -> str:
        return text_of(self._texts, key)

    async def _ask_with_texts(self, event: SubmitCall | SetVariable, pieces: Sequence[Piece]) -> Any:
        """Stores the texts that `event` names for as long as the core accepts it."""
        session_id = event.session_id
        keys = self._texts.hold(session_id, pieces)

        def on_reply(reply: Reply) -> None:
            if reply.error is not None:
                self._texts.release(session_id, keys)

        return await self._shell.ask(event, on_reply)


def _text_of(part: TemplatePiece, specs: dict[str, ParameterSpec]) -> str | None:
    """The text that a part of a template brings with it."""
    return part.text if isinstance(part, Text) else specs[part.name].value


def _segments(
    template: Sequence[TemplatePiece], specs: dict[str, ParameterSpec], pieces: Sequence[Piece]
) -> tuple[Segment, ...]:
    """The template's parts as the core takes them; `pieces` are those that bring text, in order."""
    brought = iter(pieces)
    segments: list[Segment] = []
    for part in template:
        if isinstance(part, Text):
            segments.append(Constant(next(brought).content()))
            continue
        spec = specs[part.name]
        if part.is_output:
            segments.append(Output(part.name, _with_seed(spec.sampling_config), spec.var_id))
        elif spec.value is not None:
            segments.append(Input(part.name, value=next(brought).content()))
        else:
            segments.append(Input(part.name, spec.var_id))
    return tuple(segments)


def _with_seed(sampling: SamplingConfig | None) -> SamplingConfig:
    """Draws the seed where the client leaves it open, so that every later attempt samples alike."""
    if sampling is None:
        return SamplingConfig(seed=secrets.randbits(31))
    return sampling if sampling.seed is not None else msgspec.structs.replace(sampling, seed=secrets.randbits(31))
