"""The core's side of its engines: who is registered and alive, and what is asked of them.

It decides when an engine counts as lost: its heartbeat is late, a heartbeat says that its loop stands still, its task stream
broke and a ping finds nobody, another process registers at its address, or it registers as something else. Where a task runs,
and what becomes of it when its engine is lost, is the core's affair.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Coroutine
from typing import Any

import msgspec

from parrot.protocol.engine import AbortRequest, EngineDescription, FreeContextRequest, RegisterAnswer, TaskId
from parrot.protocol.errors import ParrotError
from parrot.serve.effects import Abort, Dispatch, FreeContexts, Reply
from parrot.serve.engine_http import EngineHttp, Exchange
from parrot.serve.events import ContextsEvicted, EngineLost, RegisterEngine, TaskFailed
from parrot.serve.shell import Shell
from parrot.serve.streams import OutputStreams
from parrot.serve.task_stream import TaskStream
from parrot.serve.texts import Texts
from parrot.serve.tokenization import Tokenization

_log = logging.getLogger(__name__)

#: Contexts that are freed within this time travel together; an engine that needs room sooner evicts them itself.
_FREE_WINDOW_S = 0.01
_ASK_S = 5.0

#: What may follow the end of a task on its stream, for the connection to be used again.
_TAIL_S = 1.0
_TAIL_BYTES = 65536


class EngineLink:
    """One live engine."""

    __slots__ = ("description", "engine_id", "epoch", "freed", "http", "instance", "last_heard_s", "ping", "running")

    def __init__(
        self,
        engine_id: int,
        epoch: int,
        description: EngineDescription,
        instance: str,
        now: float,
        trust: ssl.SSLContext | None = None,
    ) -> None:
        self.engine_id = engine_id
        self.epoch = epoch
        self.description = description
        self.instance = instance
        self.last_heard_s = now
        self.http = EngineHttp(description.host, description.port, secure=description.tls, trust=trust)
        self.running: dict[tuple[TaskId, int], asyncio.Task[None]] = {}
        self.freed: list[int] = []  #: contexts to free in the next request
        self.ping: asyncio.Task[None] | None = None


class EngineLinks:
    """All live engines. `attach` gives it the shell before the first use."""

    def __init__(
        self,
        texts: Texts,
        tokenization: Tokenization,
        streams: OutputStreams,
        heartbeat_s: float,
        stall_s: float = 120.0,
        trust: ssl.SSLContext | None = None,
    ) -> None:
        """`trust`: whose certificates of engines it believes (None: the system's authorities')."""
        self._texts = texts
        self._tokenization = tokenization
        self._streams = streams
        self._heartbeat_s = heartbeat_s
        self._stall_s = stall_s
        self._trust = trust
        self._shell: Shell
        self._loop = asyncio.get_running_loop()
        self._links: dict[int, EngineLink] = {}
        self._registering: dict[str, asyncio.Future[RegisterAnswer]] = {}
        self._measured: set[str] = set()  # tokenizers of which the core has all lengths
        self._background: set[asyncio.Task[None]] = set()
        self._watch: asyncio.TimerHandle | None = None
        self._watch_due_s = 0.0

    def attach(self, shell: Shell) -> None:
        """Where events go."""
        self._shell = shell

    def __len__(self) -> int:
        return len(self._links)

    # ------------------------------------------------------------------------------------ registration, heartbeats

    async def register(self, description: EngineDescription, instance: str) -> RegisterAnswer:
        """Registers an engine, or answers as before when the same process asks again. One that describes itself otherwise
        than before (another model, another address) is another engine, which takes the place of the first.

        Raises ParrotError: its tokenizer cannot be loaded, or the core refuses it.
        """
        for link in self._links.values():
            if instance and link.instance == instance and link.description == description:
                link.last_heard_s = self._shell.now()
                return RegisterAnswer(link.engine_id, link.epoch)
        if instance in self._registering:
            return await asyncio.shield(self._registering[instance])
        future: asyncio.Future[RegisterAnswer] = self._loop.create_future()
        if instance:
            self._registering[instance] = future
        try:
            answer = await self._register(description, instance)
        except BaseException as error:
            failure = error if isinstance(error, ParrotError) else ParrotError("unavailable", "registration was interrupted")
            future.set_exception(failure)
            future.exception()
            raise
        else:
            future.set_result(answer)
            return answer
        finally:
            self._registering.pop(instance, None)

    async def _register(self, description: EngineDescription, instance: str) -> RegisterAnswer:
        name = description.tokenizer
        await self._tokenization.learn(name)
        if description.bos_tokens not in (0, 1) or (description.bos_tokens and self._tokenization.bos_id(name) is None):
            raise ParrotError(
                "bad_request",
                f"engine {description.engine_name!r} puts {description.bos_tokens} tokens at the head of a chain, "
                f"but tokenizer {name!r} has {'no' if self._tokenization.bos_id(name) is None else 'one'} BOS token",
            )
        self._displace(description, instance)
        lengths = {} if name in self._measured else self._texts.lengths(name)

        def on_reply(reply: Reply) -> None:
            # At once, not when the waiter wakes up: the core may dispatch to it with the next effect.
            if reply.error is None:
                self._measured.add(name)
                self._add(reply.payload, description, instance)

        event = RegisterEngine(self._shell.number(), description, lengths)
        answer: RegisterAnswer = await self._shell.ask(event, on_reply)
        return answer

    def _displace(self, description: EngineDescription, instance: str) -> None:
        """Loses the engines in whose place this one comes."""
        for link in list(self._links.values()):
            if (link.description.host, link.description.port) == (description.host, description.port):
                self._lose(link, f"engine {description.engine_name!r} registered at its address {link.http.url}")
            elif instance and link.instance == instance:
                self._lose(link, f"its process registered as engine {description.engine_name!r}, model {description.model!r}")

    def _add(self, answer: RegisterAnswer, description: EngineDescription, instance: str) -> None:
        self._displace(description, instance)  # again: others may have registered at the same moment
        link = EngineLink(answer.engine_id, answer.epoch, description, instance, self._shell.now(), self._trust)
        self._links[answer.engine_id] = link
        _log.info(
            "engine %d %r registered: %s, model %s", link.engine_id, description.engine_name, link.http.url, description.model
        )
        if self._watch is None:
            self._watch_heartbeats()

    def heartbeat(self, engine_id: int, evicted: tuple[int, ...], instance: str = "", stalled_s: float = 0.0) -> None:
        """The engine's process is alive; its loop, which works on tasks, last did something `stalled_s` ago. Raises
        `not_found` for one that is not registered, or no longer as of now."""
        link = self._links.get(engine_id)
        if link is None or (instance and link.instance and instance != link.instance):
            # The id may belong to another process by now: a core that was restarted counts from one again.
            raise ParrotError("not_found", f"engine {engine_id} is not registered; register again", engine_id=engine_id)
        link.last_heard_s = self._shell.now()
        if stalled_s > self._stall_s:
            self._lose(link, f"its loop has work and has done nothing for {stalled_s:.1f} s (it may for {self._stall_s:g} s)")
            raise ParrotError("not_found", f"engine {engine_id} stands still; register when it works", engine_id=engine_id)
        if evicted:
            self._shell.post(ContextsEvicted(engine_id, evicted))

    def _check_heartbeats(self) -> None:
        now = self._shell.now()
        # A check that comes late says that this process stood still: heartbeats may lie unread in the sockets, and engines
        # that got no answer wait before the next one. So everybody's silence begins anew.
        was_awake = now < self._watch_due_s + self._heartbeat_s / 4
        for link in list(self._links.values()):
            if not was_awake:
                link.last_heard_s = now
            silence_s = now - link.last_heard_s
            if silence_s > self._heartbeat_s:
                self._lose(link, f"no heartbeat for {silence_s:.1f} s")
        self._watch = None
        if self._links:
            self._watch_heartbeats()

    def _watch_heartbeats(self) -> None:
        period_s = self._heartbeat_s / 4
        self._watch_due_s = self._shell.now() + period_s
        self._watch = self._loop.call_later(period_s, self._check_heartbeats)

    def _lose(self, link: EngineLink, reason: str) -> None:
        if self._links.pop(link.engine_id, None) is None:
            return
        _log.warning("engine %d %r is lost: %s", link.engine_id, link.description.engine_name, reason)
        for task in list(link.running.values()):
            task.cancel()
        self._start(link.http.close())
        self._shell.post(EngineLost(link.engine_id, reason))

    # ---------------------------------------------------------------------------------------------------- effects

    def dispatch(self, effect: Dispatch) -> None:
        """Sends a task to its engine; its events go to the shell."""
        link = self._links.get(effect.engine_id)
        if link is None:
            self._fail(effect, f"engine {effect.engine_id} is not connected")
            return
        stores = (self._texts, self._tokenization, self._streams)
        stream = TaskStream(effect, link.description, *stores, self._shell.post, link.instance)
        key = (effect.task, effect.attempt)
        task = self._loop.create_task(self._run(link, stream, effect))
        link.running[key] = task
        task.add_done_callback(lambda _: link.running.pop(key, None))

    async def _run(self, link: EngineLink, stream: TaskStream, effect: Dispatch) -> None:
        try:
            body = stream.request_body()
        except Exception:
            _log.exception("task %s could not be put together", effect.task)
            self._fail(effect, "the task could not be put together; the server's log has the details", "internal")
            return
        reason = "it closed the connection before the task ended"
        try:
            exchange = await link.http.post("/task", body)
            try:
                if exchange.status == 200:
                    while not stream.ended and (chunk := await exchange.read()):
                        await stream.feed(chunk)
                    if stream.ended and not stream.spoilt:
                        await _read_tail(exchange)
                else:
                    stream.refused(exchange.status, await exchange.read_all())
            finally:
                exchange.close()
        except OSError as error:
            reason = f"{type(error).__name__}: {error}"
        except Exception as error:
            _log.exception("task %s: its stream could not be taken in", effect.task)
            reason = f"{type(error).__name__}: {error}"
        if not stream.ended:
            # Asked first: a dead engine must not use up the attempts of its tasks. If it is lost, this ends here.
            await self._ping(link)
            stream.broken(reason)

    def _fail(self, effect: Dispatch, message: str, code: str = "engine_failed") -> None:
        self._shell.post(TaskFailed(effect.epoch, effect.task, effect.attempt, code, message, code == "engine_failed"))

    def abort(self, effect: Abort) -> None:
        """Gives up an attempt: its stream is closed, and the engine is told."""
        link = self._links.get(effect.engine_id)
        if link is None:
            return
        task = link.running.get((effect.task, effect.attempt))
        if task is not None:
            task.cancel()
        self._tell(link, "/abort", AbortRequest(effect.epoch, effect.task, effect.attempt))

    def free_contexts(self, effect: FreeContexts) -> None:
        """Tells the engine, with all others of the next moments in one request."""
        link = self._links.get(effect.engine_id)
        if link is None:
            return
        if not link.freed:
            self._loop.call_later(_FREE_WINDOW_S, self._send_freed, link)
        link.freed.extend(effect.context_ids)

    def session_ended(self, session_id: int) -> list[str]:
        """Forgets the session's texts; the keys of those that no other session names."""
        self._streams.end(session_id)
        return self._texts.end(session_id)

    def _send_freed(self, link: EngineLink) -> None:
        ids, link.freed = tuple(link.freed), []
        if self._links.get(link.engine_id) is link:
            self._tell(link, "/free_context", FreeContextRequest(context_ids=ids, epoch=link.epoch))

    # -------------------------------------------------------------------------------------------------- in passing

    def _tell(self, link: EngineLink, path: str, message: Any) -> None:
        """Sends what needs no answer. A failure matters to nobody: an engine that is lost has forgotten anyway."""

        async def send() -> None:
            try:
                await link.http.ask(path, msgspec.json.encode(message), _ASK_S)
            except OSError as error:
                _log.info("%s%s failed: %r", link.http.url, path, error)

        self._start(send())

    async def _ping(self, link: EngineLink) -> None:
        """A stream broke: asks the engine whether it is there, once for all that broke together; else it is lost."""
        if link.ping is None or link.ping.done():
            link.ping = self._start(self._try_ping(link))
        await asyncio.shield(link.ping)

    async def _try_ping(self, link: EngineLink) -> None:
        try:
            status, _ = await link.http.ask("/ping", b"{}", _ASK_S)
            problem = None if status == 200 else f"its ping answered {status}"
        except OSError as error:
            problem = f"its ping failed: {type(error).__name__}: {error}"
        if problem is not None:
            self._lose(link, problem)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def close(self) -> None:
        """Aborts all running tasks by closing their streams, and waits until nothing is left."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        links = list(self._links.values())
        running = [task for link in links for task in link.running.values()]
        self._links.clear()
        for task in running:
            task.cancel()
        _, late = await asyncio.wait({*running, *self._background}, timeout=1.0) if running or self._background else (None, ())
        for task in late:
            task.cancel()
        await asyncio.gather(*running, *self._background, return_exceptions=True)
        for link in links:
            await link.http.close()


async def _read_tail(exchange: Exchange) -> None:
    """Reads on to the end of an answer whose task has ended, so that its connection can be kept. An engine that does not come
    to an end is not waited for."""
    left = _TAIL_BYTES
    with contextlib.suppress(OSError):  # a TimeoutError is one
        async with asyncio.timeout(_TAIL_S):
            while left > 0 and (part := await exchange.read()):
                left -= len(part)
