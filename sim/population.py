"""Simulated clients: one conversation a program, over a network, with the cluster of `sim.cluster`; and a whole run.

Decides nothing about what a program sends (`sim.clients` does) nor about where it runs (the core does): it turns actions
into events at the moment they arrive at the core, and replies into answers at the moment they arrive at the client.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import msgspec
from mypy_extensions import mypyc_attr

from parrot.protocol.api import CallAnswer, SamplingConfig
from parrot.protocol.errors import ERRORS, ErrorInfo
from parrot.serve import events
from parrot.serve.config import ServeCoreConfig
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
from sim.clients import Mode, new_player
from sim.cluster import AUTH, Asker, Author, Cluster
from sim.engine_models import EngineModel, Observe
from sim.network import Network
from sim.player import Player
from sim.recorder import Recorder
from sim.slots import Slots
from sim.timeline import Timeline
from sim.workloads.program import Call, Program

RETRY_AFTER_S: Final = 1.0  #: when a refusal does not say how long to wait
STUCK_AFTER_S: Final = 24 * 3600.0  #: of simulated time in which every answer was a refusal
KEPT_SAMPLINGS: Final = 65_536  #: outputs of the same lengths share what says so


# By names of this module's own that never change: the compiled module need not look up what each event is.
_next: Final = next
_OPEN_SESSION: Final = events.OpenSession
_CLOSE_SESSION: Final = events.CloseSession
_SUBMIT_CALL: Final = events.SubmitCall
_GET_VARIABLE: Final = events.GetVariable
_CONSTANT: Final = events.Constant
_INPUT: Final = events.Input
_OUTPUT: Final = events.Output


class StuckError(Exception):
    """The run cannot end. The message says which program waits for what."""


class Population:
    """The clients of a run: starts each program when it arrives, reading the workload as it goes, and ends with the last.

    clients: None: programs arrive at their `arrival_s`. A number: a closed loop of so many clients, each of which starts the
    next program, whatever its `arrival_s`, in the instant in which its last one ended.
    """

    def __init__(
        self,
        cluster: Cluster,
        programs: Iterator[Program],
        mode: Mode,
        network: Network,
        recorder: Recorder,
        max_gen_length: int,
        on_ended: Callable[[], None] | None = None,
        clients: int | None = None,
    ) -> None:
        self.cluster = cluster
        self.network = network
        self.recorder = recorder
        self.answered_s = 0.0  #: when an answer other than a refusal last came
        self._programs = programs
        self._mode = mode
        self._max_gen_length = max_gen_length
        self._on_ended = on_ended
        self._live = Slots()  # conversations
        self._serial = 0
        self._sessions = 0
        self._samplings: dict[int, SamplingConfig] = {}
        self._next: Program | None = next(self._programs, None)
        self._closed = clients is not None
        if clients is None:
            self._await_next()
        for _ in range(clients or 0):
            self.cluster.calendar.call_at(0.0, self._arrive)

    def ended(self, conversation: Conversation) -> None:
        """A program has ended, well or badly."""
        self.recorder.program_ended(conversation.player)
        self._live.take(conversation.slot)
        if self._on_ended is not None:
            self._on_ended()
        if self.is_over():
            self.cluster.calendar.stop()
        elif self._closed:
            self.cluster.calendar.call_at(0.0, self._arrive)

    def is_over(self) -> bool:
        """Whether every program has arrived and ended."""
        return self._next is None and not len(self._live)

    def new_session_id(self) -> int:
        self._sessions += 1
        return self._sessions

    def sampling(self, into: Into) -> SamplingConfig:
        lengths = into.max_gen_length << 32 | into.output_length  # one number: it is hashed faster than two
        found = self._samplings.get(lengths)
        if found is None:
            if len(self._samplings) >= KEPT_SAMPLINGS:
                self._samplings.clear()
            found = SamplingConfig(seed=0, max_gen_length=into.max_gen_length, output_length=into.output_length)
            self._samplings[lengths] = found
        return found

    def check_progress(self) -> None:
        """Raises StuckError when refusals are all that has come for a day."""
        if self.cluster.calendar.now - self.answered_s > STUCK_AFTER_S:
            raise StuckError(f"nothing but refusals for {STUCK_AFTER_S:g} simulated seconds; {self.waiting()}")

    def waiting(self) -> str:
        """Which programs wait for what; the first few of them."""
        first: list[Conversation] = sorted(self._live, key=lambda conversation: conversation.player.serial)[:5]
        lines = [f"program {c.player.program.id!r} waits for {c.player.waits_for()}{c.work()}" for c in first]
        more = f"; and {len(self._live) - 5} more" if len(self._live) > 5 else ""
        return "; ".join(lines) + more

    def _await_next(self) -> None:
        if self._next is not None:
            self.cluster.calendar.call_at(self._next.arrival_s, self._arrive)

    def _arrive(self) -> None:
        program = self._next
        calendar = self.cluster.calendar
        if program is None:  # more clients than programs
            return
        self._next = _next(self._programs, None)
        if self._closed:
            program = msgspec.structs.replace(program, arrival_s=calendar.now)
        serial = self._serial
        self._serial += 1
        far = not self.network.is_local
        player = new_player(program, self._mode, serial=serial, max_gen_length=self._max_gen_length, preallocate=far)
        if not len(self._live):
            self.answered_s = calendar.now
        conversation = Conversation(self, player)
        conversation.slot = self._live.put(conversation)
        if not self._closed:
            self._await_next()
        conversation.perform(player.start(calendar.now))


class Conversation(Author):
    """One program's client: its player, and what the core's end knows of its session."""

    __slots__ = ("_calls", "_numbers", "_over", "_session_id", "exchanges", "player", "population", "slot")

    def __init__(self, population: Population, player: Player) -> None:
        self.player = player
        self.population = population
        self.slot = 0  #: in the population
        self.exchanges: dict[Exchange, None] | None = None  # requests of the baseline that are at the core
        self._session_id = 0
        self._calls = 0  # that the session has
        self._numbers: list[int] | None = None  # of those in the program; None: it numbers them as the session does
        self._over = False

    def perform(self, actions: Iterable[Action]) -> None:
        """Sends the player's actions on their way."""
        for action in actions:
            population = self.population
            if isinstance(action, Wait):
                calendar = population.cluster.calendar
                calendar.call_at(calendar.now + action.delay_s, functools.partial(self._answer, action, None, None))
            elif population.network.is_local:
                self._arrive(action, 0.0)
            else:
                calendar = population.cluster.calendar
                half_s = population.network.round_trip_s() / 2
                calendar.call_at(calendar.now + half_s, functools.partial(self._arrive, action, half_s))
        if self.player.ended and not self._over:
            self._over = True
            for exchange in list(self.exchanges or ()):  # a program that has failed drops its connections
                exchange.give_up()
            self.population.ended(self)

    def work(self) -> str:
        """What the core says of the session's tasks, for a message."""
        calls = self.population.cluster.calls(self._session_id)
        states = [f"{task.state} (attempts: {task.attempt})" for call in calls for task in call.tasks]
        return f"; its tasks are {', '.join(states[:5])}" if states else ""

    # ---------------------------------------------------------------------------------------------- the core's end

    def _arrive(self, action: Action, half_s: float) -> None:
        """The action's request reaches the core."""
        cluster, session_id = self.population.cluster, self._session_id
        if isinstance(action, Complete):
            if not self._over:
                Exchange(self, action, half_s)
            return
        request = cluster.ask(_Asked(self, action, half_s))
        event: events.AnyEvent
        if isinstance(action, Fetch):
            deadline_s = action.deadline_s
            event = _GET_VARIABLE(request, session_id, AUTH, action.var_id, action.criteria, None, False, deadline_s)
        elif isinstance(action, Submit):
            event = self.submit_call(request, session_id, action.spec, action.pieces)
        elif isinstance(action, Open):
            self._session_id = self.population.new_session_id()
            event = _OPEN_SESSION(request, self._session_id, AUTH, action.tenant)
        elif isinstance(action, Close):
            self.record(session_id, range(self._calls) if self._numbers is None else self._numbers)
            event = _CLOSE_SESSION(request, session_id, AUTH)
        elif isinstance(action, Create):
            event = events.CreateVariable(request, session_id, AUTH, action.var)
        else:
            assert isinstance(action, Assign)
            content = cluster.content(action.value.key, action.value.tokens)
            event = events.SetVariable(request, session_id, AUTH, action.var_id, content)
        cluster.post(event)

    def submit_call(self, request: int, session_id: int, call: Call, pieces: Sequence[Piece]) -> events.SubmitCall:
        cluster = self.population.cluster
        content = cluster.content
        segments: list[events.Segment] = []
        for piece in pieces:
            if isinstance(piece, Into):
                segments.append(_OUTPUT(piece.name, self.population.sampling(piece), piece.var_id))
            elif isinstance(piece, Reference):
                segments.append(_INPUT(piece.name, piece.var_id))
            elif isinstance(piece, Given):
                segments.append(_INPUT(piece.name, None, content(piece.value.key, piece.value.tokens)))
            else:
                segments.append(_CONSTANT(content(piece.key, piece.tokens)))
        # by place: a name would cost as much as its value
        model_type = cluster.model_types.of(call)
        return _SUBMIT_CALL(request, session_id, AUTH, tuple(segments), call.name, call.models, model_type, call.cache_prefix)

    def record(self, session_id: int, numbers: Sequence[int], first: int = 0) -> None:
        """Takes down what the core knows of the session before it closes; as `Recorder.calls_ended`."""
        population = self.population
        population.recorder.calls_ended(self.player.serial, population.cluster.calls(session_id), numbers, first)

    def output_key(self, call: int, output: int) -> str:
        """As `Author` has it."""
        return self.player.output_key(call if self._numbers is None else self._numbers[call], output)

    def replied(self, payload: Any, error: ErrorInfo | None, action: Action, half_s: float) -> None:
        """The core has answered; the answer goes back."""
        answer: Any = None
        if error is None:
            if isinstance(action, Submit):
                answer = self._submitted(action.call, payload)
            elif isinstance(action, Create):
                answer = payload["var_id"]
            elif isinstance(action, Fetch):
                answer = Value(payload, 0)
            elif isinstance(action, Open):
                self.population.cluster.name_outputs(self._session_id, self)
        if half_s or error is not None:
            self.send_back(action, half_s, answer, error)
        else:  # as `_answer` does: what happens most takes the fewest steps
            population = self.population
            now = population.answered_s = population.cluster.calendar.now
            self.perform(self.player.answer(action, answer, now))

    def _submitted(self, number: int, answer: CallAnswer) -> tuple[str, ...]:
        """The session has the program's call `number`: the ids of its outputs."""
        if number != self._calls and self._numbers is None:
            self._numbers = list(range(self._calls))
        if self._numbers is not None:
            self._numbers.append(number)
        self._calls += 1
        return outputs_of(answer)

    def send_back(self, action: Action, half_s: float, answer: Any, error: ErrorInfo | None) -> None:
        if half_s:
            calendar = self.population.cluster.calendar
            calendar.call_at(calendar.now + half_s, functools.partial(self._answer, action, answer, error))
        else:
            self._answer(action, answer, error)

    # -------------------------------------------------------------------------------------------- the client's end

    def _answer(self, action: Action, answer: Any, error: ErrorInfo | None) -> None:
        now = self.population.cluster.calendar.now
        player = self.player
        if error is None:
            if not isinstance(action, Wait):
                self.population.answered_s = now
            self.perform(player.answer(action, answer, now))
        elif ERRORS[error.code].status == 429:
            self.population.check_progress()
            self.perform(player.refuse(action, float(error.details.get("retry_after_s", RETRY_AFTER_S)), now))
        else:
            self.perform(player.fail(action, error, now))


@mypyc_attr(acyclic=True)
class _Asked(Asker):
    """An action at the core, and how long its answer is under way."""

    __slots__ = ("_action", "_conversation", "_half_s")

    def __init__(self, conversation: Conversation, action: Action, half_s: float) -> None:
        self._conversation = conversation
        self._action = action
        self._half_s = half_s

    def replied(self, payload: Any, error: ErrorInfo | None) -> None:
        self._conversation.replied(payload, error, self._action, self._half_s)


class Exchange(Author):
    """A request of the baseline at the core's end: open, submit, get, close, with no network in between."""

    __slots__ = ("_action", "_conversation", "_half_s", "_over", "_session_id", "_submits")

    def __init__(self, conversation: Conversation, action: Complete, half_s: float) -> None:
        self._conversation = conversation
        self._action = action
        self._half_s = half_s
        self._over = False
        self._submits = True  # its call has not been taken in yet
        if conversation.exchanges is None:
            conversation.exchanges = {}
        conversation.exchanges[self] = None
        population = conversation.population
        cluster = population.cluster
        self._session_id = population.new_session_id()
        request = cluster.expect(self._opened)
        cluster.post(_OPEN_SESSION(request, self._session_id, AUTH, action.tenant))
        request = cluster.expect(self._submitted)
        cluster.post(conversation.submit_call(request, self._session_id, action.spec, action.pieces))

    def _opened(self, _: Any, error: ErrorInfo | None) -> None:
        if error is not None:
            self._end()  # the submission fails too, for want of a session
            self._conversation.send_back(self._action, self._half_s, None, error)
        else:
            self._conversation.population.cluster.name_outputs(self._session_id, self)

    def output_key(self, call: int, output: int) -> str:
        """As `Author` has it."""
        return self._conversation.player.output_key(self._action.call, self._action.output + output)

    def _submitted(self, answer: CallAnswer | None, error: ErrorInfo | None) -> None:
        if self._over:
            return
        if error is not None:
            self._close(None, error)
            return
        assert answer is not None
        action, cluster = self._action, self._conversation.population.cluster
        self._submits = False
        (var_id,) = outputs_of(answer)
        request = cluster.expect(self._fetched)
        deadline_s = action.deadline_s
        cluster.post(_GET_VARIABLE(request, self._session_id, AUTH, var_id, action.criteria, None, False, deadline_s))

    def _fetched(self, key: str | None, error: ErrorInfo | None) -> None:
        if self._over:
            return
        if error is not None:
            self._close(None, error)
            return
        assert key is not None
        into = self._action.pieces[-1]
        assert isinstance(into, Into)
        self._close(Value(key, into.output_length), None)

    def give_up(self) -> None:
        """The client has gone: closes the session, whatever it still does."""
        conversation, cluster = self._conversation, self._conversation.population.cluster
        self._end()
        conversation.record(self._session_id, () if self._submits else (self._action.call,), self._action.output)
        cluster.post(_CLOSE_SESSION(cluster.expect(_ignore), self._session_id, AUTH))

    def _close(self, value: Value | None, error: ErrorInfo | None) -> None:
        self.give_up()
        self._conversation.send_back(self._action, self._half_s, value, error)

    def _end(self) -> None:
        self._over = True
        if self._conversation.exchanges is not None:
            del self._conversation.exchanges[self]


def outputs_of(answer: CallAnswer) -> tuple[str, ...]:
    """The ids of a call's outputs, in order."""
    return tuple([item.var_id for item in answer.param_info if item.is_output])


def _ignore(_: Any, __: ErrorInfo | None) -> None:
    """For answers that nobody waits for."""


def simulate(
    programs: Iterable[Program],
    config: ServeCoreConfig,
    engines: Sequence[EngineModel],
    *,
    mode: Mode = Mode.SEMANTIC,
    network: Network,
    max_gen_length: int = 2048,
    jump: bool = True,
    engine_delay_s: float = 0.0,
    tables: bool = True,
    observe: Observe | None = None,
    on_ended: Callable[[], None] | None = None,
    clients: int | None = None,
    strict: bool = False,
) -> Recorder:
    """Runs `programs`, which arrive in order of `arrival_s`, to the end of the last. Raises StuckError when there is none.

    clients: a closed loop of so many clients (see `Population`). Raises ValueError when it is below 1.
    strict: an iteration outside the range that its engine's latency profile was fitted in raises parrot.latency.OutOfRange;
        without, `Recorder.outside` says how far it went.
    """
    if clients is not None and clients < 1:
        raise ValueError(f"clients is {clients}; a closed loop has at least 1")
    timeline = Timeline()
    cluster = Cluster(timeline, config, engines, engine_delay_s=engine_delay_s, jump=jump, observe=observe, strict=strict)
    recorder = Recorder(mode, tables, names=config.global_scheduler.explain_placements > 0)
    population = Population(cluster, iter(programs), mode, network, recorder, max_gen_length, on_ended, clients)
    try:
        if not population.is_over() and not timeline.calendar.run_to_stop():
            raise StuckError(f"nothing more can happen, but {population.waiting()}")
        recorder.outside = cluster.outside()
        cluster.explain(recorder)
    finally:
        cluster.dissolve()  # the process may have more runs before it
    return recorder
