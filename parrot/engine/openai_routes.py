"""OpenAI's API on an engine used alone: POST /v1/chat/completions, /v1/completions, GET /v1/models.

Bodies, checks, answers and streams are those of the core's server, from `parrot.protocol` and `parrot.sse`. Here a request
becomes a job for each of its choices; those of one prompt name the same contexts, so that it is computed once. Nothing is
kept for a later request: an engine alone does not know who asks.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from aiohttp import web

from parrot.engine.batches import EngineTask, Link
from parrot.engine.context_ids import ContextIds
from parrot.engine.jobs import Job, Turn
from parrot.engine.loop import EngineLoop
from parrot.engine.tasks import encode
from parrot.protocol.api import SamplingConfig
from parrot.protocol.engine import EngineDescription, Failed, Finished, Rejected, TokenLogprob, Tokens
from parrot.protocol.errors import ErrorInfo, ParrotError
from parrot.protocol.openai import (
    ChatRequest,
    CompletionChoice,
    CompletionRequest,
    ModelCard,
    ModelList,
    OpenAIErrorBody,
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
    chat_options_of,
    check_chat,
    check_completion,
    decode,
    refusal,
    sampling_of,
    seeded,
)
from parrot.protocol.openai_errors import refusal_of
from parrot.protocol.outcomes import Visible, outcome_of
from parrot.sse import EVENT_STREAM, StreamWriter
from parrot.together import all_of
from parrot.tokenizer import Tokenizer
from parrot.tokenizer.chat import asked_conversation, fill_of

PREFIX = "/v1/"
_encode = msgspec.json.Encoder().encode
_JSON = {"Content-Type": "application/json"}


class Prompt(msgspec.Struct, frozen=True):
    """What a choice continues: the ids of its segments, and what they stand for, of an engine that takes text."""

    ids: list[list[int]]
    turns: list[Turn] = []

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))


class OpenAIRoutes:
    """The handlers of one engine."""

    def __init__(self, loop: EngineLoop, tokenizer: Tokenizer, context_ids: ContextIds, engine: EngineDescription) -> None:
        self._loop = loop
        self._tokenizer = tokenizer
        self._ids = context_ids
        self._engine = engine
        self._takes_text = engine.engine_type == "openai"
        self._started = int(time.time())
        self._count = 0

    def add_to(self, app: web.Application) -> None:
        """Gives the application its routes."""
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completion)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{model:.+}", self._model)

    # ---------------------------------------------------------------------------------------------------- the routes

    async def _models(self, request: web.Request) -> web.Response:
        engine = self._engine
        shown = {"model_name": engine.model, "tokenizer_name": engine.tokenizer}
        return _answer(ModelList([ModelCard(engine.model, self._started)], [shown]))

    async def _model(self, request: web.Request) -> web.Response:
        self._check_model(request.match_info["model"])
        return _answer(ModelCard(self._engine.model, self._started))

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        asked = decode(await request.read(), ChatRequest)
        check_chat(asked)
        self._check(asked)
        prompt = self._conversation(asked)
        most = self._most([prompt], asked.max_completion_tokens or asked.max_tokens or CHAT_MAX_TOKENS)
        options = chat_options_of(asked) if self._takes_text else None  # else the prompt has them
        sampling = sampling_of(asked, most, chat_logprobs(asked), options)
        answers = ChatAnswers(*self._head("chatcmpl", asked), asked.wants_usage)
        return await self._serve(request, asked, [prompt], sampling, answers)

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        asked = decode(await request.read(), CompletionRequest)
        given = check_completion(asked)
        self._check(asked)
        prompts = [self._prompt(each, place) for place, each in enumerate(given)]
        sampling = sampling_of(asked, self._most(prompts, asked.max_tokens or COMPLETION_MAX_TOKENS), asked.logprobs, None)
        echoes: list[str] = []
        if asked.echo:
            texts = [each if isinstance(each, str) else self._tokenizer.decode(each) for each in given]
            echoes = [text for text in texts for _ in range(asked.n or 1)]
        answers = CompletionAnswers(*self._head("cmpl", asked), asked.wants_usage, echoes)
        return await self._serve(request, asked, prompts, sampling, answers)

    # ---------------------------------------------------------------------------------------------------- the request

    def _check(self, asked: Request) -> None:
        self._check_model(asked.model)
        if asked.parrot is not None:
            raise refusal(
                "Unsupported parameter: 'parrot': this is an engine, which has no sessions; ask its core.",
                "parrot",
                "unsupported_parameter",
            )

    def _check_model(self, model: str) -> None:
        if model not in (self._engine.model, self._engine.engine_name):
            message = f"The model '{model}' does not exist; this engine has '{self._engine.model}'."
            raise ParrotError("not_found", message, param="model", openai_code="model_not_found")

    def _conversation(self, asked: ChatRequest) -> Prompt:
        """The prompt of a chat: in segments as the core makes them, so that an engine says the same with and without one."""
        if self._takes_text:
            turns = [Turn(role, text, begins=True) for role, text in map(fill_of, asked.messages)]
            return Prompt([self._tokenizer.encode(turn.text) for turn in turns], turns)
        segments = asked_conversation(asked, self._tokenizer).segments
        return self._checked(Prompt([encode(self._tokenizer, text, place == 0) for place, text in enumerate(segments)]))

    def _prompt(self, given: str | list[int], place: int) -> Prompt:
        """The prompt of a completion; ids are taken as they are, with nothing at their head."""
        if isinstance(given, str):
            turns = [Turn("user", given)] if self._takes_text else []
            return self._checked(Prompt([encode(self._tokenizer, given, head=not self._takes_text)], turns))
        if self._takes_text:
            raise refusal("Invalid 'prompt': this engine takes text, and no token ids.", "prompt", "invalid_type")
        most = self._tokenizer.vocab_size
        if max(given) >= most:
            raise refusal(f"Invalid 'prompt': token id {max(given)}, and the model has {most} tokens.", f"prompt[{place}]")
        return self._checked(Prompt([list(given)]))

    def _checked(self, prompt: Prompt) -> Prompt:
        if not prompt.tokens:
            raise refusal("Invalid 'prompt': it has no tokens, and the models here need something to continue.", "prompt")
        return prompt

    def _most(self, prompts: Sequence[Prompt], asked: int) -> int:
        """Tokens that each answer may have: as many as asked for, as far as there is room. Raises task_too_large when there is
        none behind a prompt."""
        longest = max(prompt.tokens for prompt in prompts)
        room = min(self._engine.max_seq_len, self._engine.tokens_capacity) - longest
        if room < 1:
            raise ParrotError(
                "task_too_large",
                f"the prompt has {longest} tokens; this engine has room for {longest + room} with the output",
            )
        return min(asked, room)

    def _head(self, kind: str, asked: Request) -> tuple[str, int, str]:
        return f"{kind}-{secrets.token_hex(12)}", int(time.time()), asked.model

    # ---------------------------------------------------------------------------------------------------- its choices

    async def _serve(
        self,
        request: web.Request,
        asked: Request,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        answers: Answers,
    ) -> web.StreamResponse:
        sampling.check()
        n = asked.n or 1
        async with self._choices(prompts, n, sampling) as jobs:
            if asked.stream:
                return await self._stream(request, asked, jobs, prompts, sampling, answers)
            finished = await all_of([_end_of(job) for job in jobs])
            outcomes = [_outcome(asked, end, sampling)._replace(logprobs=logprobs) for end, logprobs in finished]
            usage = _usage([end for end, _ in finished], prompts, n)
            answer = answers.whole(outcomes, usage)
            if _wants_ids(asked):
                choices = [_with_ids(choice, end) for choice, (end, _) in zip(answer.choices, finished, strict=True)]
                answer = msgspec.structs.replace(answer, choices=choices)
            return _answer(answer)

    @asynccontextmanager
    async def _choices(self, prompts: Sequence[Prompt], n: int, sampling: SamplingConfig) -> AsyncIterator[list[Job]]:
        """A job for each choice, submitted; in the end none of them runs, and nothing of them is kept."""
        jobs: list[Job] = []
        contexts: list[int] = []
        try:
            for prompt in prompts:
                shared = [self._ids.new_primitive() for ids in prompt.ids if ids]
                contexts += shared
                for choice in range(n):
                    output = self._ids.new_primitive()
                    contexts.append(output)
                    job = self._job(prompt, shared, output, seeded(sampling, choice, secrets.randbits(31)))
                    jobs.append(job)
                    self._loop.submit(job)
            yield jobs
        finally:
            for job in jobs:
                if not job.ended:
                    self._loop.abort(job.key)
            self._loop.free_contexts(contexts)

    def _job(self, prompt: Prompt, shared: Sequence[int], output: int, sampling: SamplingConfig) -> Job:
        self._count += 1
        key = ("openai", self._count)
        link_ids = [ids for ids in prompt.ids if ids]
        task = EngineTask(
            key=key,
            links=tuple(Link(context, len(ids)) for context, ids in zip(shared, link_ids, strict=True)),
            generate_context_id=output,
            max_gen_length=sampling.max_gen_length,
        )
        return Job(key, f"openai.{self._count}", task, link_ids, sampling, self._loop.now(), texts=prompt.turns)

    async def _stream(
        self,
        request: web.Request,
        asked: Request,
        jobs: Sequence[Job],
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        answers: Answers,
    ) -> web.StreamResponse:
        """Each choice as it comes. What is refused before the first token is an ordinary refusal."""
        writer = StreamWriter(request, EVENT_STREAM)
        turn = asyncio.Lock()  # one piece after the other

        async def choice(index: int, job: Job) -> Finished:
            begun = False
            visible = Visible(_tagged(asked, sampling), bool(sampling.chat_options))
            while True:
                events = await _taken(job)
                parts: list[Any] = []
                for each in events:
                    if not begun and isinstance(each, Tokens | Finished):
                        begun = True
                        parts.append(answers.first(index))
                    if isinstance(each, Tokens):
                        text = visible.add(each.text)
                        if text or each.logprobs:
                            parts.append(answers.delta(index, text, each.logprobs or None))
                    elif isinstance(each, Finished):
                        outcome = _outcome(asked, each, sampling)
                        if rest := outcome.text[visible.shown :]:
                            parts.append(answers.delta(index, rest))
                        parts += answers.end(index, outcome.finish_reason, outcome.tool_calls)
                        if _wants_ids(asked):
                            (last,) = parts[-1].choices
                            parts[-1] = msgspec.structs.replace(parts[-1], choices=[_with_ids(last, each)])
                if data := b"".join([event(part) for part in parts if part is not None]):
                    async with turn:
                        await writer.write(data)
                if isinstance(events[-1], Finished):
                    return events[-1]

        try:
            ended = await all_of([choice(index, job) for index, job in enumerate(jobs)])
            last = event(answers.usage(_usage(ended, prompts, asked.n or 1))) if asked.wants_usage else b""
            await writer.write(last + DONE)
            return await writer.end()
        except ParrotError as error:
            if not writer.begun:
                raise
            await writer.write(event(OpenAIErrorBody(refusal_of(error.info).error)))  # a status cannot be sent any more
            return await writer.end()
        except ConnectionError:
            return writer.response  # the client has gone


def refused(info: ErrorInfo) -> web.Response:
    """An error as an answer on these routes."""
    told = refusal_of(info)
    return web.Response(status=told.status, body=_encode(OpenAIErrorBody(told.error)), headers={**_JSON, **told.headers})


def _answer(data: object) -> web.Response:
    return web.Response(body=_encode(data), headers=_JSON)


def _wants_ids(asked: Request) -> bool:
    return isinstance(asked, CompletionRequest) and bool(asked.return_token_ids)


def _with_ids(choice: CompletionChoice, end: Finished) -> CompletionChoice:
    """The choice with the ids of all its tokens, cut where its text is."""
    return msgspec.structs.replace(choice, token_ids=list(end.ids))


async def _taken(job: Job) -> Sequence[Any]:
    """The next events of the job, some. Raises ParrotError for a failure among them."""
    events = await job.stream.take()
    if not events:
        raise ParrotError("internal", "the output ended without a result")
    last = events[-1]
    if isinstance(last, Failed | Rejected):
        raise ParrotError(last.code, last.message)
    return events


async def _end_of(job: Job) -> tuple[Finished, list[TokenLogprob] | None]:
    """How the job ended, and the log-probabilities of its tokens where they were asked for."""
    logprobs: list[TokenLogprob] | None = None if job.sampling is None or job.sampling.logprobs is None else []
    while True:
        events = await _taken(job)
        if logprobs is not None:
            for each in events:
                if isinstance(each, Tokens):
                    logprobs += each.logprobs
        if isinstance(events[-1], Finished):
            return events[-1], logprobs


def _tagged(asked: Request, sampling: SamplingConfig) -> bool:
    """Whether the model may call tools in its text."""
    return isinstance(asked, ChatRequest) and bool(asked.tools) and asked.tool_choice != "none" and not sampling.chat_options


def _outcome(asked: Request, end: Finished, sampling: SamplingConfig) -> Outcome:
    return outcome_of(end.text, end.reason, _tagged(asked, sampling))


def _usage(ended: Sequence[Finished], prompts: Sequence[Prompt], n: int) -> Any:
    """A prompt counts once, however many choices continue it; as the engine counted it, where that is another's."""
    counted = ended[::n]
    prompt_tokens = sum(end.prompt_tokens or prompt.tokens for end, prompt in zip(counted, prompts, strict=True))
    output_tokens = sum(end.output_tokens or len(end.ids) for end in ended)
    return usage_of(prompt_tokens, output_tokens, sum(end.cached_tokens for end in counted))
