"""OpenAI's API on a ServeCore: each request becomes calls of a program, each output an answer in OpenAI's form.

It translates, in both directions, and decides nothing that the core decides: there is no second way in. What a request may be
is `parrot.protocol.openai_checks`, how its prompt is cut `prompts.py`, how its program lives `asking.py`. docs/openai-api.md is
the guide.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from aiohttp import web

from parrot.protocol.api import Criteria, ModelInfo, SamplingConfig, TaskReport, parse_criteria
from parrot.protocol.errors import ErrorInfo, ParrotError
from parrot.protocol.openai import (
    AnswerExtension,
    ChatRequest,
    CompletionRequest,
    CompletionUsage,
    Extension,
    ModelCard,
    ModelList,
    OpenAIErrorBody,
    OutputReference,
    Request,
)
from parrot.protocol.openai_answers import (
    DONE,
    Answers,
    ChatAnswers,
    CompletionAnswers,
    Outcome,
    event,
    usage_of,
)
from parrot.protocol.openai_checks import (
    CHAT_MAX_TOKENS,
    COMPLETION_MAX_TOKENS,
    chat_logprobs,
    check_chat,
    check_completion,
    decode,
    refusal,
    sampling_of,
    seeded,
)
from parrot.protocol.openai_errors import refusal_of
from parrot.protocol.outcomes import Visible, outcome_of
from parrot.serve.asking import Asking, Choice, Manner, Programs, Session, Stores, Wanted
from parrot.serve.credentials import hashed
from parrot.serve.identity import Identity, identity_of
from parrot.serve.keys import Keys
from parrot.serve.prompts import Prompt, chat_prompt, completion_prompt, known_tokens, pieces_of, segments_of
from parrot.serve.routing import Paths
from parrot.serve.served_models import ServedModel, ServedModels
from parrot.serve.texts import Piece
from parrot.serve.tokenization import Tokenization
from parrot.serve.wire import answer, body_of
from parrot.sse import EVENT_STREAM, StreamWriter
from parrot.together import all_of


class Work(NamedTuple):
    """A request that was understood: what is to be made, and how it is answered."""

    request: Request
    manner: Manner
    wanted: list[Wanted]
    prompts: list[Prompt]  # one a choice
    token_calls: bool  # a model that writes its tool calls into its text
    answers: Answers


class OpenAIRoutes:
    """The handlers. Each takes the request, its path's last part and its raw query."""

    def __init__(
        self,
        stores: Stores,
        models: ServedModels,
        infos: Callable[[], Sequence[ModelInfo]],
        tokenization: Tokenization,
        keys: Keys,
        reader_timeout_s: float | None = None,
    ) -> None:
        """`infos`: the models as the Parrot API tells them. `reader_timeout_s`: how long a client may take nothing of what is
        streamed to it; None: as long as it likes."""
        self._stores = stores
        self._models = models
        self._infos = infos
        self._tokenization = tokenization
        self._keys = keys
        self._reader_timeout_s = reader_timeout_s
        self._programs = Programs(stores)

    def paths(self) -> Paths:
        """Which of them has which path."""
        return {
            "/v1/chat/completions": {"POST": self.chat},
            "/v1/completions": {"POST": self.completion},
            "/v1/models": {"GET": self.list_models},
            "/v1/models/*": {"GET": self.one_model},
        }

    # ------------------------------------------------------------------------------------------------------- models

    async def list_models(self, request: web.BaseRequest, _: str, query: str) -> web.StreamResponse:
        """GET /v1/models: OpenAI's list and Parrot's in one answer."""
        identity_of(request, self._keys)
        cards = [ModelCard(model.name, model.created) for model in self._models.live()]
        return answer(ModelList(cards, list(self._infos())))

    async def one_model(self, request: web.BaseRequest, tail: str, query: str) -> web.StreamResponse:
        """GET /v1/models/{id}; an id may have slashes."""
        identity_of(request, self._keys)
        model = self._models.find(tail)
        return answer(ModelCard(model.name, model.created))

    # -------------------------------------------------------------------------------------------------- completions

    async def chat(self, request: web.BaseRequest, _: str, query: str) -> web.StreamResponse:
        """POST /v1/chat/completions"""
        identity = identity_of(request, self._keys)
        body = decode(await body_of(request), ChatRequest)
        check_chat(body)
        model = self._models.find(body.model)
        prompt = chat_prompt(body, model)
        answers = ChatAnswers(f"chatcmpl-{secrets.token_hex(12)}", int(time.time()), body.model, body.wants_usage)
        limit = body.max_completion_tokens or body.max_tokens
        name = "chat.completions"
        work = await self._work(body, model, [prompt], limit, chat_logprobs(body), name, answers)
        return await self._answer(request, identity, work)

    async def completion(self, request: web.BaseRequest, _: str, query: str) -> web.StreamResponse:
        """POST /v1/completions"""
        identity = identity_of(request, self._keys)
        body = decode(await body_of(request), CompletionRequest)
        given = check_completion(body)
        if body.return_token_ids:
            raise refusal(
                "Unsupported parameter: 'return_token_ids': an output has ids where it was generated; ask an engine.",
                "return_token_ids",
                "unsupported_parameter",
            )
        model = self._models.find(body.model)
        inputs = body.parrot.inputs if body.parrot is not None else {}
        prompts = [completion_prompt(each, model, inputs) for each in given]
        n = body.n or 1
        echoes = [prompt.text for prompt in prompts for _ in range(n)] if body.echo else []
        answers = CompletionAnswers(f"cmpl-{secrets.token_hex(12)}", int(time.time()), body.model, body.wants_usage, echoes)
        limit = body.max_tokens or COMPLETION_MAX_TOKENS
        work = await self._work(body, model, prompts, limit, body.logprobs, "completions", answers)
        return await self._answer(request, identity, work)

    async def _work(
        self,
        body: Request,
        model: ServedModel,
        prompts: Sequence[Prompt],
        limit: int | None,
        logprobs: int | None,
        name: str,
        answers: Answers,
    ) -> Work:
        """`limit`: tokens that the request asks for at most; None: it does not say."""
        extension = body.parrot or Extension()
        if not extension.wait and body.stream:
            raise refusal("'parrot.wait' false is answered at once; there is nothing to stream.", "parrot.wait")
        pieces = await pieces_of(prompts, self._tokenization, model.tokenizer.name)
        n = body.n or 1
        wanted: list[Wanted] = []
        for prompt in prompts:
            own = [pieces.pop(0) for part in prompt.parts if part.var_id is None]
            sampling = _sampling(body, model, prompt, own, limit, logprobs)
            segments = segments_of(prompt, own)
            share = prompt.shareable and extension.cache_prefix
            for _ in range(n):
                output = extension.output or "answer"
                wanted.append(Wanted(segments, own, seeded(sampling, len(wanted), secrets.randbits(31)), output, share))
        criteria = parse_criteria(extension.criteria)
        manner = Manner(
            body.model,
            model.kind,
            extension.func_name or name,
            criteria or Criteria.LATENCY if extension.wait else criteria,
            extension.deadline,
            extension.wait,
            extension.output is not None or not extension.wait,
        )
        token_calls = prompts[0].calls_tools and not prompts[0].options
        return Work(body, manner, wanted, [prompt for prompt in prompts for _ in range(n)], token_calls, answers)

    # ------------------------------------------------------------------------------------------------------ answers

    async def _answer(self, request: web.BaseRequest, identity: Identity, work: Work) -> web.StreamResponse:
        asking = await self._begin(identity, work)
        try:
            told = _told(asking, work)
            if not work.manner.wait:
                return answer(work.answers.whole([], usage_of(0, 0, 0), told))
            if work.request.stream:
                writer = StreamWriter(request, EVENT_STREAM, self._reader_timeout_s)
                return await self._stream(writer, asking, work, told)
            outcomes = await all_of(self._outcome(asking, choice, work) for choice in asking.choices)
            reports = await asking.reports()
            finished = [_finished(outcome, report, work) for outcome, report in zip(outcomes, reports, strict=True)]
            return answer(work.answers.whole(finished, _usage(reports, work), told))
        finally:
            asking.end()

    async def _begin(self, identity: Identity, work: Work) -> Asking:
        """The calls, accepted by the core. A program's session that is over is begun anew, once."""
        extension = work.request.parrot
        if extension is not None and extension.session is not None:
            return await self._in(Session(extension.session, hashed(extension.session_auth)), identity, work)
        if not identity.program:
            return await self._in(self._programs.own(), identity, work)
        session = await self._programs.shared(identity)
        try:
            return await self._in(session, identity, work)
        except ParrotError as error:
            if not self._programs.forget(identity, session, error):
                raise
        return await self._in(await self._programs.shared(identity), identity, work)

    async def _in(self, session: Session, identity: Identity, work: Work) -> Asking:
        asking = Asking(self._stores, session, identity.tenant, work.manner)
        try:
            await asking.begin(work.wanted)
        except BaseException:
            asking.end()
            raise
        return asking

    async def _outcome(self, asking: Asking, choice: Choice, work: Work) -> Outcome:
        """The choice's text; the reason of its end is the report's to say, but for one that a filter cut."""
        assert choice.stream is not None
        try:
            text = await asking.text(choice)
        except ParrotError as error:
            if error.code != "content_filtered" or not choice.stream.text:
                raise
            return Outcome(choice.stream.text, "content_filter", logprobs=_logprobs(choice, work))
        return Outcome(text, "", logprobs=_logprobs(choice, work))

    # ----------------------------------------------------------------------------------------------------- streaming

    async def _stream(
        self, writer: StreamWriter, asking: Asking, work: Work, told: AnswerExtension | None
    ) -> web.StreamResponse:
        """Errors before the first event are ordinary refusals, later ones the stream's last event."""
        try:
            streams = [_ChoiceStream(writer, asking, index, work, told) for index in range(len(asking.choices))]
            filtered = await all_of(each.text() for each in streams)
            reports = await asking.reports()
            for each, report, is_filtered in zip(streams, reports, filtered, strict=True):
                await each.finish("content_filter" if is_filtered else report.reason)
            if work.request.wants_usage:
                await writer.write(event(work.answers.usage(_usage(reports, work))))
            await writer.write(DONE)
        except ParrotError as error:
            await self._tell(writer, error.info)
        return await writer.end()

    async def _tell(self, writer: StreamWriter, info: ErrorInfo) -> None:
        if not writer.begun:
            raise ParrotError.of(info)
        await writer.write(event(OpenAIErrorBody(refusal_of(info).error)))


class _ChoiceStream:
    """One choice of a streamed answer."""

    def __init__(self, writer: StreamWriter, asking: Asking, index: int, work: Work, told: AnswerExtension | None) -> None:
        self._writer = writer
        self._asking = asking
        self._index = index
        self._work = work
        self._told = told
        self._choice = asking.choices[index]
        self._visible = Visible(work.token_calls, bool(work.wanted[index].sampling.chat_options))
        self._begun = False
        self._logprobs = 0  # how many were sent

    async def text(self) -> bool:
        """Sends the text as it comes. Whether a filter cut it. Raises ParrotError."""
        reader = self._asking.reader(self._choice)
        try:
            while (delta := await reader.piece()) is not None:
                await self._send(self._visible.add(delta))
        except ParrotError as error:
            stream = self._choice.stream
            if error.code != "content_filtered" or stream is None or not stream.text:
                raise
            await self._send(self._visible.add(stream.text[len(self._visible.whole) :]))
            return True
        return False

    async def _send(self, text: str) -> None:
        if not text:
            return
        answers, index = self._work.answers, self._index
        data = self._head()
        await self._writer.write(data + event(answers.delta(index, text, self._new_logprobs())))

    def _head(self) -> bytes:
        """What goes before the choice's first text."""
        if self._begun:
            return b""
        self._begun = True
        first = self._work.answers.first(self._index, self._told if self._index == 0 else None)
        return b"" if first is None else event(first)

    def _new_logprobs(self) -> list[Any] | None:
        stream = self._choice.stream
        if self._work.wanted[self._index].sampling.logprobs is None or stream is None:
            return None
        new = stream.logprobs[self._logprobs : stream.told_logprobs]
        self._logprobs += len(new)
        return new

    async def finish(self, reason: str) -> None:
        """Sends the end of the choice. `reason`: the engine's word for it."""
        outcome = outcome_of(self._visible.whole, reason, self._work.token_calls)
        data = [self._head()]
        rest = outcome.text[self._visible.shown :]
        if rest:
            data.append(event(self._work.answers.delta(self._index, rest, self._new_logprobs())))
        chunks = self._work.answers.end(self._index, outcome.finish_reason, outcome.tool_calls)
        await self._writer.write(b"".join([*data, *map(event, chunks)]))


def _sampling(
    body: Request, model: ServedModel, prompt: Prompt, pieces: Sequence[Piece], limit: int | None, logprobs: int | None
) -> SamplingConfig:
    room = max(1, model.max_seq_len - known_tokens(pieces, model.tokenizer.name))
    return sampling_of(body, min(limit or CHAT_MAX_TOKENS, room), logprobs, dict(prompt.options))


def _logprobs(choice: Choice, work: Work) -> list[Any] | None:
    if work.wanted[0].sampling.logprobs is None or choice.stream is None:
        return None
    return choice.stream.logprobs


def _finished(outcome: Outcome, report: TaskReport, work: Work) -> Outcome:
    if outcome.finish_reason:
        return outcome
    return outcome_of(outcome.text, report.reason, work.token_calls)._replace(logprobs=outcome.logprobs)


def _usage(reports: Sequence[TaskReport], work: Work) -> CompletionUsage:
    """Each prompt counts once, however many choices it has; of what was cached, what the first of them found."""
    n = work.request.n or 1
    first = [reports[place] for place in range(0, len(reports), n)]
    cached = [min(r.cached_tokens for r in reports[place : place + n]) for place in range(0, len(reports), n)]
    return usage_of(sum(r.prompt_tokens for r in first), sum(r.output_tokens for r in reports), sum(cached))


def _told(asking: Asking, work: Work) -> AnswerExtension | None:
    """What a request that joined a session is told of its variables."""
    extension = work.request.parrot
    if extension is None or extension.session is None:
        return None
    outputs = [OutputReference(choice.name, choice.var_id) for choice in asking.choices]
    return AnswerExtension(asking.session.id, asking.choices[0].number, outputs)
