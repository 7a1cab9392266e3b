"""Drives an engine behind a remote endpoint: each job is one request, its text streamed back as it comes.

The remote side schedules. Here it is decided how many requests are in flight (`tasks_capacity`), when one is sent (rate
limits, pauses that the endpoint asked for) and whether one is sent again. A request is sent again by this engine only
while none of its text has been handed on; after that the attempt fails, and the core goes on from what was shown.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

from openai import AsyncOpenAI

from parrot.engine.config import OpenAIEngineConfig
from parrot.engine.iteration_log import IterationLog
from parrot.engine.jobs import Job
from parrot.engine.openai.pace import Pace
from parrot.engine.openai.refusals import Refusal, refusal_of
from parrot.engine.openai.request_log import RequestLine
from parrot.engine.openai.requests import is_chat, logprobs_of, messages_of, prompt_of, sampling_of
from parrot.protocol.engine import RuntimeInfo, TokenLogprob
from parrot.protocol.errors import ParrotError
from parrot.protocol.openai import FunctionCall, ToolCall
from parrot.protocol.tool_calls import with_calls
from parrot.tokenizer import Tokenizer

log = logging.getLogger(__name__)

MILLION = 1_000_000


class _Piece(NamedTuple):
    """A part of an answer: text, how it ended, the endpoint's counts, log-probabilities, parts of tool calls, token ids; each
    where it came."""

    text: str = ""
    reason: str | None = None
    usage: Any = None
    logprobs: tuple[TokenLogprob, ...] = ()
    calls: Sequence[Any] = ()
    ids: Sequence[int] = ()


class _Broken(Exception):
    """The request did not come to its end."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


class RemoteLoop:
    """One engine: its client, its requests in flight. Contexts are texts, which every request carries whole."""

    def __init__(
        self,
        client: AsyncOpenAI,
        config: OpenAIEngineConfig,
        tokenizer: Tokenizer,
        request_log: IterationLog | None = None,
    ) -> None:
        """`tokenizer` counts tokens where the endpoint does not; with `send_token_ids` the prompt is sent as its ids."""
        self.on_evicted: Callable[[Sequence[int]], None] = lambda ids: None
        self._client = client
        self._model = config.model
        self._instance = config.instance
        self._capacity = config.tasks_capacity
        self._tokenizer = tokenizer
        self._log = request_log
        self._started = time.monotonic()
        self._pace = Pace(self._instance.requests_per_minute, self._instance.tokens_per_minute, self.now, config.random_seed)
        self._jobs: dict[Hashable, tuple[Job, asyncio.Task[None]]] = {}
        self._sent = 0  # requests in flight at the endpoint
        self._recent_s: deque[float] = deque(maxlen=64)
        self._closed = False

    # ------------------------------------------------------------------------------------------------ what is asked

    def now(self) -> float:
        return time.monotonic() - self._started

    def submit(self, job: Job) -> None:
        if self._closed:
            job.fail("unavailable", "the engine is shutting down")
        elif job.sampling is None:  # only fills: the text is kept by who asked
            job.start(0)
            job.finish_text("", "length", job.prompt_tokens, 0, 0.0)
        elif len(self._jobs) >= self._capacity:
            job.reject("engine_rejected", f"{len(self._jobs)} requests are in flight; tasks_capacity is {self._capacity}")
        else:
            task = asyncio.create_task(self._run(job), name=f"request {job.label}")
            self._jobs[job.key] = (job, task)

    def abort(self, key: Hashable) -> None:
        found = self._jobs.pop(key, None)
        if found is not None:
            found[1].cancel()  # closes the stream

    def free_contexts(self, ids: Iterable[int]) -> int:
        return 0

    def context_ids(self) -> list[int]:
        return []

    def runtime_info(self) -> RuntimeInfo:
        mean = sum(self._recent_s) / len(self._recent_s) if self._recent_s else 0.0
        return RuntimeInfo(num_running_jobs=self._sent, num_total_jobs=len(self._jobs), recent_average_latency=mean)

    async def close(self, reason: str) -> None:
        self._closed = True
        running = list(self._jobs.values())
        self._jobs.clear()
        for job, task in running:
            task.cancel()
            job.fail("unavailable", reason, retryable=True)
        await asyncio.gather(*(task for _, task in running), return_exceptions=True)
        await self._client.close()
        if self._log is not None:
            self._log.close()

    # ------------------------------------------------------------------------------------------------- one request

    async def _run(self, job: Job) -> None:
        try:
            await self._try_until_it_ends(job)
        except ParrotError as error:
            job.fail(error.code, str(error))
        except Exception as error:
            log.exception("request %s failed", job.label)
            job.fail("engine_failed", f"the engine failed on the request: {type(error).__name__}: {error}", retryable=True)
        finally:
            self._jobs.pop(job.key, None)

    async def _try_until_it_ends(self, job: Job) -> None:
        tries = 0
        while True:
            request = _Request(job, self._instance, self._tokenizer)
            await self._pace.turn(request.tokens)
            tries += 1
            job.start(0)
            self._sent += 1
            sent_at, running = self.now(), self._sent
            refusal: Refusal | None = None
            try:
                await self._exchange(job, request)
            except _Broken as broken:
                refusal = broken.refusal
            except asyncio.CancelledError:  # it was in flight, and slowed others down
                self._note(job, request, sent_at, running, tries, Refusal("cancelled", "given up", False))
                raise
            except Exception as error:
                refusal = refusal_of(error)
            finally:
                self._sent -= 1
            again = refusal is not None and refusal.again and not request.begun and tries <= self._instance.max_retries
            self._note(job, request, sent_at, running, tries, refusal)
            if refusal is None:
                return
            if not again:
                self._give_up(job, refusal, tries)
                return
            pause_s = self._pace.pause_s(tries, refusal.retry_after_s)
            if refusal.retry_after_s is not None:
                self._pace.hold(refusal.retry_after_s)  # it is the endpoint that is busy, not this request
            log.info("request %s, try %d: %s; again in %.1f s", job.label, tries, refusal.message, pause_s)
            await asyncio.sleep(pause_s)

    async def _exchange(self, job: Job, request: _Request) -> None:
        """Sends the request and hands its text on. Returns when the output is whole; raises what the client raises."""
        reason: str | None = None
        async for piece in self._pieces(request):
            if piece.usage is not None:
                request.usage = piece.usage
            request.ids += piece.ids
            if piece.text:
                text = request.add(piece.text)
                if text:
                    job.tokens((), text, self.now(), piece.logprobs)
                    request.told_logprobs += len(piece.logprobs)
            for call in piece.calls:
                request.add_call(call)
            reason = piece.reason or reason
        if reason == "content_filter":
            raise _Broken(Refusal("content_filtered", "the endpoint's content filter cut the output", False))
        if reason is None:
            raise _Broken(Refusal("engine_failed", "the stream ended before the output did", True))
        request.finish()
        if request.wants_logprobs and request.text and not request.told_logprobs:
            raise _Broken(Refusal("remote_refused", "the endpoint gives no log-probabilities, which were asked for", False))
        if request.calls:
            request.text = with_calls(request.text, request.tool_calls())
            request.reason = "tool_calls"
        else:
            request.reason = "length" if reason == "length" else "stop_str" if job.sampling and job.sampling.stops else "eos"
        job.cached_tokens = request.cached_tokens
        cost = request.prompt_tokens * self._instance.prompt_price + request.output_tokens * self._instance.output_price
        counts = (request.prompt_tokens, request.output_tokens, cost / MILLION)
        job.finish_text(request.text, request.reason, *counts, request.output_ids())

    async def _pieces(self, request: _Request) -> AsyncIterator[_Piece]:
        if self._instance.api_endpoint == "chat":
            create: Any = self._client.chat.completions.create
        else:
            create = self._client.completions.create
        async with await create(model=self._model, stream=True, **request.parameters) as chunks:
            async for chunk in chunks:
                usage = getattr(chunk, "usage", None)
                choice = chunk.choices[0] if chunk.choices else None
                if choice is None:
                    yield _Piece(usage=usage)
                    continue
                calls: Sequence[Any] = ()
                text = None
                if self._instance.api_endpoint != "chat":
                    text = choice.text
                elif choice.delta is not None:
                    text, calls = choice.delta.content, choice.delta.tool_calls or ()
                ids = getattr(choice, "token_ids", None) or ()
                yield _Piece(text or "", choice.finish_reason, usage, logprobs_of(choice.logprobs), calls, ids)

    def _give_up(self, job: Job, refusal: Refusal, tries: int) -> None:
        message = refusal.message if tries == 1 else f"{refusal.message} (sent {tries} times)"
        if refusal.code == "engine_rejected":
            job.reject(refusal.code, message)
        else:
            job.fail(refusal.code, message, retryable=refusal.again)

    def _note(self, job: Job, request: _Request, sent_at: float, running: int, tries: int, refusal: Refusal | None) -> None:
        now = self.now()
        self._recent_s.append(now - sent_at)
        if self._log is None:
            return
        first_at = job.first_token_at
        line = RequestLine(
            t=round(sent_at, 6),
            task=job.label,
            wait_s=round(sent_at - job.arrived, 6),
            running=running,
            prompt_tokens=request.prompt_tokens,
            cached_tokens=request.cached_tokens,
            output_tokens=request.output_tokens,
            counted=request.usage is not None,
            ttft_s=None if first_at is None else round(first_at - sent_at, 6),
            decode_s=0.0 if first_at is None else round(now - first_at, 6),
            max_gap_s=round(job.max_gap_s, 6),
            total_s=round(now - sent_at, 6),
            limit_tokens=request.tokens,
            tries=tries,
            reason=request.reason if refusal is None else refusal.code,
        )
        self._log.line("request", line._asdict())


class _Request:
    """What is sent for a job, and what has come back. An earlier attempt may have shown a part of the output (`forced_text`):
    a completion goes on behind it; a chat is asked anew, and has to say the same as far as that part goes."""

    def __init__(self, job: Job, instance: Any, tokenizer: Tokenizer) -> None:
        sampling = job.sampling
        assert sampling is not None
        self._tokenizer = tokenizer
        self._chat = instance.api_endpoint == "chat"
        self._shown = job.forced_text  # what must not be said otherwise, and is not handed on again
        self._prompt_tokens = job.prompt_tokens
        shown_tokens = len(tokenizer.encode(self._shown)) if self._shown and not self._chat else 0
        self._shown_tokens = shown_tokens
        max_tokens = max(1, sampling.max_gen_length - shown_tokens)
        self.parameters = sampling_of(sampling, instance, max_tokens)
        if instance.stream_usage if instance.stream_usage is not None else not instance.is_azure:
            self.parameters["stream_options"] = {"include_usage": True}
        if self._chat:
            self.parameters["messages"] = messages_of(job.texts)
        elif instance.send_token_ids:
            if is_chat(job.texts):
                ids = tokenizer.encode(prompt_of(job.texts, tokenizer))
            else:
                ids = [i for link in job.link_ids for i in link]
            self.parameters["prompt"] = [*ids, *(tokenizer.encode(self._shown) if self._shown else ())]
        else:
            self.parameters["prompt"] = prompt_of(job.texts, tokenizer) + self._shown
        if instance.return_token_ids:
            self.parameters["extra_body"] = {**self.parameters.get("extra_body", {}), "return_token_ids": True}
        self.ids: list[int] = []  # of the tokens that have come
        self.wants_logprobs = sampling.logprobs is not None
        self.told_logprobs = 0
        self.calls: dict[int, list[str]] = {}  # id, name and arguments of the tool calls, as far as they have come
        self.tokens = self._prompt_tokens + sampling.max_gen_length
        self.text = "" if self._chat else self._shown
        self.usage: Any = None
        self.begun = False  # some of its text was handed on
        self.reason = ""

    def add(self, text: str) -> str:
        """More of the output; what of it is to be handed on. Raises _Broken when it contradicts what was shown."""
        before = max(len(self.text), len(self._shown))
        self.text += text
        common = min(len(self.text), len(self._shown))
        if self.text[:common] != self._shown[:common]:
            raise self._contradiction()
        new = self.text[before:]
        self.begun = self.begun or bool(new)
        return new

    def add_call(self, delta: Any) -> None:
        """A part of a tool call."""
        call = self.calls.setdefault(delta.index, ["", "", ""])
        if delta.id:
            call[0] = delta.id
        if delta.function is not None:
            call[1] += delta.function.name or ""
            call[2] += delta.function.arguments or ""

    def output_ids(self) -> tuple[int, ...]:
        """The ids of the output, where the endpoint gave those of its text and of nothing more (a stop string's, say)."""
        if not self.ids:
            return ()
        ids = [*(self._tokenizer.encode(self._shown) if self._shown else ()), *self.ids]
        return tuple(ids) if self._tokenizer.decode(ids) == self.text else ()

    def tool_calls(self) -> list[ToolCall]:
        """The tool calls, in their order."""
        return [ToolCall(call[0], FunctionCall(call[1], call[2])) for _, call in sorted(self.calls.items())]

    def finish(self) -> None:
        """The output is whole. Raises _Broken when it is shorter than what was shown."""
        if len(self.text) < len(self._shown):
            raise self._contradiction()

    def _contradiction(self) -> _Broken:
        message = (
            "a part of this output was already streamed when its attempt failed, and the endpoint, asked again, says something "
            "else; with api_endpoint 'completion', or with temperature 0 and a seed, it can go on"
        )
        return _Broken(Refusal("generation_failed", message, False))

    @property
    def prompt_tokens(self) -> int:
        """As the endpoint counted, what an earlier attempt had shown taken off; else by the tokenizer."""
        if self.usage is None:
            return self._prompt_tokens
        return max(0, int(self.usage.prompt_tokens) - self._shown_tokens)

    @property
    def cached_tokens(self) -> int:
        details = getattr(self.usage, "prompt_tokens_details", None)
        return int(getattr(details, "cached_tokens", 0) or 0)

    @property
    def output_tokens(self) -> int:
        if self.usage is None:
            return len(self._tokenizer.encode(self.text)) if self.text else 0
        return int(self.usage.completion_tokens) + self._shown_tokens
