"""The core's end of what programs ask: the server's own handlers, over the cluster of the simulator instead of HTTP.

A request is decoded, checked, tokenized and made into an event by `parrot.serve.api_routes`, as on the network. What is put in
the place of the server's shell hands the event to the cluster in the present instant, and the reply back to the handler. The
texts are here too: the prompts that were given, and what the model says to them, whose tokens say how long it takes.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from parrot.engine.launch import bos_tokens, tokenizer_or_synthetic
from parrot.frontend.wire import Request
from parrot.protocol.api import CallAnswer, SamplingConfig
from parrot.protocol.errors import ErrorInfo, ParrotError
from parrot.serve import events as ev
from parrot.serve.api_routes import ApiRoutes
from parrot.serve.credentials import hashed
from parrot.serve.effects import Dispatch, Reply
from parrot.serve.graph import Call
from parrot.serve.routing import Routes
from parrot.serve.streams import OutputStream, OutputStreams
from parrot.serve.texts import Piece, Texts, content_key, pack_ids
from parrot.serve.tokenization import Tokenization
from parrot.tokenizer import SYNTHETIC, Tokenizer, find_stop
from sim.cluster import FLUSH, Cluster, EngineModel
from sim.faults.stand_ins import SimStreamResponse, serve
from sim.programs.accounts import Account
from sim.programs.loops import VirtualLoop
from sim.programs.outputs import Outputs, cut
from sim.programs.prompts import prompt_keys
from sim.programs.strands import Strand, Strands

_FLUSHED = FLUSH + 0.25  #: SimPy priority: when the core has handled the instant's events, before anything else happens


# --------------------------------------------------------------------------------------------------------- tokenizers


class _Counted:
    """A tokenizer of which only the number of tokens matters: a simulated engine is sent no ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.bos_id = tokenizer.bos_id
        self._tokenizer = tokenizer

    def encode(self, text: str) -> Sequence[int]:
        synthetic = self._tokenizer.name == SYNTHETIC
        return range(len(text.split()) if synthetic else len(self._tokenizer.encode(text)))


def with_tokenizers(engines: Iterable[EngineModel]) -> tuple[list[EngineModel], dict[str, Tokenizer]]:
    """The engines with tokenizers that can be had (`synthetic` in the place of others, which is said), and these by name."""
    tokenizers: dict[str, Tokenizer] = {}
    wanted: dict[str, Tokenizer] = {}
    fitted = []
    for model in engines:
        name = model.description.tokenizer
        tokenizer = wanted.get(name) or wanted.setdefault(name, tokenizer_or_synthetic(name))
        tokenizers[tokenizer.name] = tokenizer
        description = msgspec.structs.replace(
            model.description, tokenizer=tokenizer.name, bos_tokens=bos_tokens(tokenizer), accepts_output_length=True
        )
        fitted.append(model._replace(description=description))
    return fitted, tokenizers


# ---------------------------------------------------------------------------------------------------------- exchanges


class Exchange:
    """One request and its answer on their way, `half_s` each. The client's end: `status`, `parts`, `ended`, `abandon`; `notify`
    is called when anything of the answer has come. The server's end: `request`, `send`."""

    def __init__(self, door: Door, request: Request, half_s: float, notify: Callable[[], None]) -> None:
        self.request = request
        self.status: int | None = None
        self.retry_after: str | None = None
        self.parts: deque[bytes] = deque()
        self.ended = False
        self.answered = False
        self.task: asyncio.Task[None] | None = None
        self._door = door
        self._half_s = half_s
        self._notify = notify
        self._gone = False

    def abandon(self) -> None:
        """The client does not want the answer any more."""
        if not self.ended:
            self.ended = True
            self._door.later(self._half_s, self._leave)

    def send(self, item: Any) -> None:
        """The next item of the answer: a head (status, headers), data, or the end."""
        if self._gone:
            raise ConnectionResetError("the client has gone")
        self.answered = True
        self._door.later(self._half_s, lambda: self._arrive(item))

    def _arrive(self, item: Any) -> None:
        if self.ended:
            return
        if item[0] == "head":
            self.status, self.retry_after = item[1], item[2].get("Retry-After")
            return  # its end, or its first line, is what a client waits for
        if item[0] == "data":
            self.parts.append(item[1])
        else:
            self.ended = True
        self._notify()

    def _leave(self) -> None:
        self._gone = True
        if self.task is not None and not self.task.done():
            self.task.cancel()
            self._door.wake()


# ----------------------------------------------------------------------------------------------------------- the door


class _Credentials:
    """Session ids of a counter, so that runs repeat; what they open is nobody's secret."""

    def __init__(self) -> None:
        self._last = 0

    def new_session_id(self) -> int:
        self._last += 1
        return self._last

    @staticmethod
    def auth(session_id: int) -> str:
        return hashlib.blake2b(b"%d" % session_id, digest_size=8).hexdigest()


class _Session:
    """What the door knows of an open session. `contents`: variable -> content key."""

    def __init__(self) -> None:
        self.owner: Account | None = None
        self.number = 0
        self.calls: list[tuple[ev.SubmitCall, CallAnswer]] = []
        self.contents: dict[str, str] = {}
        self.said: dict[tuple[int, int], tuple[str, int]] = {}  # (call, output) -> text and tokens, for another attempt


class Door:
    """Takes requests for `cluster`. `closed` gets each session's calls as it closes, with the account that it belongs to."""

    def __init__(
        self,
        cluster: Cluster,
        engines: Sequence[EngineModel],
        tokenizers: dict[str, Tokenizer],
        strands: Strands,
        outputs: Outputs,
        closed: Callable[[Account, Sequence[Call], Mapping[str, tuple[int, int]]], None],
    ) -> None:
        self._cluster = cluster
        self._timeline = cluster.timeline
        self._tokenizers = tokenizers
        self._tokenizer_of = {
            node.id: engine.description.tokenizer for node, engine in zip(cluster.engines, engines, strict=True)
        }
        self._outputs = outputs
        self._closed = closed
        self._sessions: dict[int, _Session] = {}
        self._texts = Texts()
        self._tokenization = Tokenization(self._texts, lambda name: _Counted(tokenizers[name]))
        self._strand = Strand(strands, "the core", self._live, is_program=False)
        self.loop = VirtualLoop(self._strand, inline=True)
        api: Any = ApiRoutes(
            _Port(self, cluster),  # type: ignore[arg-type]
            cluster.core.models,
            self._texts,
            self._tokenization,
            OutputStreams(),
            _Credentials(),  # type: ignore[arg-type]
            SimStreamResponse,  # type: ignore[arg-type]
        )
        self._routes = Routes(api.paths())
        cluster.generate = self._generate

    def open(self) -> None:
        """Begins to take requests."""
        self._strand.begin()

    def close(self) -> None:
        """The run is over. What is still under way is given up."""
        if not self._strand.dead:
            self.loop.stop()
            self._strand.go_on()
        self._strand.dying = True
        self._tokenization.close()
        self.loop.close()

    def ask(self, request: Request, half_s: float, notify: Callable[[], None]) -> Exchange:
        """Sends a request on its way."""
        exchange = Exchange(self, request, half_s, notify)
        self.later(half_s, lambda: self._arrive(exchange))
        return exchange

    def opened(self, session_id: int, account: Account) -> None:
        """The session belongs to that account."""
        session = self._sessions[session_id]
        session.owner, session.number = account, len(account.sessions) - 1

    def close_sessions(self, account: Account) -> None:
        """Closes what an instance that has ended left open."""
        for session_id in account.sessions:
            if session_id in self._sessions:
                self.report(session_id)
                request = self._cluster.expect(lambda *_: None)
                self._cluster.post(ev.CloseSession(request, session_id, hashed(_Credentials.auth(session_id))))
                self.forget(session_id)

    def later(self, seconds: float, what: Callable[[], None]) -> None:
        if seconds:
            self._timeline.call_at(self._timeline.now + seconds, what)
        else:
            what()

    def wake(self) -> None:
        """There is something to do for the handlers."""
        self._strand.wake()

    # -------------------------------------------------------------------------------------------------- the handlers

    def _live(self) -> None:
        for name in dict.fromkeys(self._tokenizer_of.values()):
            self.loop.run_until_complete(self._tokenization.learn(name))
        self.loop.run_forever()
        left = asyncio.all_tasks(self.loop)
        for task in left:
            task.cancel()
        if left:
            self.loop.run_until_complete(asyncio.wait(left))

    def _arrive(self, exchange: Exchange) -> None:
        if not exchange.ended:
            exchange.task = self.loop.create_task(serve(exchange, self._routes.handle))  # type: ignore[arg-type]
            self.wake()

    # ---------------------------------------------------------------------------------------------- what sessions do

    def begin(self, session_id: int) -> None:
        self._sessions[session_id] = _Session()

    def submitted(self, event: ev.SubmitCall, answer: CallAnswer) -> None:
        session = self._sessions[event.session_id]
        if answer.request_id < len(session.calls):
            return  # a repeat
        session.calls.append((event, answer))
        given = [segment for segment in event.segments if not isinstance(segment, ev.Constant)]
        for segment, info in zip(given, answer.param_info, strict=True):
            if isinstance(segment, ev.Input) and segment.value is not None:
                session.contents[info.var_id] = segment.value.key

    def assigned(self, event: ev.SetVariable) -> None:
        self._sessions[event.session_id].contents[event.var_id] = event.content.key

    def report(self, session_id: int) -> None:
        """The session is about to close: what the core knows of it is taken down."""
        session = self._sessions.get(session_id)
        if session is not None and session.owner is not None:
            self._closed(session.owner, self._cluster.calls(session_id), session.owner.outputs_of(session_id))

    def forget(self, session_id: int) -> None:
        """The session has closed."""
        self._sessions.pop(session_id, None)
        self._texts.end(session_id)

    # --------------------------------------------------------------------------------------------------- the outputs

    def _generate(self, effect: Dispatch) -> tuple[int, Callable[[int], ev.Content]]:
        """What an engine generates, as `sim.cluster.Generate` has it."""
        task, name = effect.task, self._tokenizer_of[effect.engine_id]
        session = self._sessions[task.session_id]
        found = session.said.get((task.call, task.output))
        if found is None:
            wanted = _Wanted(effect, session, self._texts, name)
            found = self._bounded(self._outputs(wanted), effect.sampling, name)
            session.said[task.call, task.output] = found
        text, tokens = found

        def content(generated: int) -> ev.Content:
            said = text if generated >= tokens else cut(text, generated, self._tokenizers[name])
            piece = self._piece(said)
            self._texts.hold(task.session_id, (piece,))
            session.said.pop((task.call, task.output), None)
            session.contents[effect.output_var] = piece.key
            return piece.content()

        return max(1, tokens), content

    def _bounded(self, text: str, sampling: SamplingConfig, name: str) -> tuple[str, int]:
        """The text as the engine would end it: at a stop string, or when it is long enough; and its tokens."""
        if sampling.stops:
            end = find_stop(text, sampling.stops)
            text = text if end < 0 else text[:end]
        tokens = len(self._tokenization.encode(name, text))
        if tokens > sampling.max_gen_length:
            text, tokens = cut(text, sampling.max_gen_length, self._tokenizers[name]), sampling.max_gen_length
        return text, tokens

    def _piece(self, text: str) -> Piece:
        """A generated text, with its length under every tokenizer."""
        key = content_key(text)
        piece = self._texts.find(key) or Piece(key, text)
        for name in self._tokenizer_of.values():
            if name not in piece.ids:
                piece.ids[name] = pack_ids(self._tokenization.encode(name, text))
        return piece


class _Wanted:
    """An output that is about to be written (`sim.programs.outputs.Wanted`)."""

    def __init__(self, effect: Dispatch, session: _Session, texts: Texts, tokenizer: str) -> None:
        self.sampling = effect.sampling
        self.tokenizer = tokenizer
        self.call, self.place = effect.task.call, effect.task.output
        self.session = session.number
        self.instance = session.owner.serial if session.owner is not None else 0
        self._session = session
        self._texts = texts
        self._event, self._answer = session.calls[self.call]

    @property
    def name(self) -> str:
        return self._event.func_name

    @property
    def output(self) -> str:
        return [info.parameter_name for info in self._answer.param_info if info.is_output][self.place]

    @property
    def prompt(self) -> str:
        keys = prompt_keys(self._event, self._answer, self.place, self._session.contents.get)
        return "".join([self._texts.text(key) for key in keys if key is not None])

    @property
    def inputs(self) -> dict[str, str]:
        contents = self._session.contents
        known = {info.parameter_name: contents.get(info.var_id) for info in self._answer.param_info}
        return {name: self._texts.text(key) for name, key in known.items() if key is not None}


class _Port:
    """The surface of `parrot.serve.shell.Shell` that the handlers use, over the cluster."""

    def __init__(self, door: Door, cluster: Cluster) -> None:
        self._door = door
        self._cluster = cluster
        self._asked: dict[int, _Asked] = {}

    def number(self) -> int:
        asked = _Asked(self._door)
        number = asked.number = self._cluster.expect(asked.replied)
        self._asked[number] = asked
        return number

    def ask(self, event: Any, on_reply: Callable[[Reply], None] | None = None) -> asyncio.Future[Any]:
        asked = self._asked.pop(event.request)
        asked.event, asked.on_reply = event, on_reply
        asked.future = self._door.loop.create_future()
        if type(event) is ev.CloseSession:
            self._door.report(event.session_id)
        self._cluster.post(event)
        return asked.future

    def cancel_get(self, request: int) -> None:
        self._cluster.post(ev.CancelGet(request))

    async def flushed(self) -> None:
        future = self._door.loop.create_future()
        timeline = self._cluster.timeline
        timeline.call_at(timeline.now, lambda: self._settle(future), _FLUSHED)
        await future

    async def show(self, session_id: int, var_id: str, stream: OutputStream) -> None:
        stream.shown = True

    def _settle(self, future: asyncio.Future[None]) -> None:
        if not future.done():
            future.set_result(None)
            self._door.wake()


class _Asked:
    """An event that waits for its reply."""

    def __init__(self, door: Door) -> None:
        self.number = 0
        self.event: Any = None
        self.on_reply: Callable[[Reply], None] | None = None
        self.future: asyncio.Future[Any]
        self._door = door

    def replied(self, payload: Any, error: ErrorInfo | None) -> None:
        if self.on_reply is not None:
            self.on_reply(Reply(self.number, payload, error))
        if error is None:
            self._note(payload)
        if not self.future.done():
            if error is None:
                self.future.set_result(payload)
            else:
                self.future.set_exception(ParrotError.of(error))
                self.future.exception()  # retrieved: nobody need wait any more
            self._door.wake()

    def _note(self, payload: Any) -> None:
        kind, event = type(self.event), self.event
        if kind is ev.SubmitCall:
            self._door.submitted(event, payload)
        elif kind is ev.OpenSession and payload == event.session_id:
            self._door.begin(payload)
        elif kind is ev.SetVariable:
            self._door.assigned(event)
        elif kind is ev.CloseSession:
            self._door.forget(event.session_id)
