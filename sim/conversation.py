"""One program's client at work: its player's actions become events at the moment they arrive at the core, replies become
answers at the moment they arrive at the client.

Decides nothing about what a program sends (its player does, `sim.player`), when it starts (`sim.population`) nor where it runs
(the core does).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, Final

from mypy_extensions import mypyc_attr

from parrot.protocol.api import CallAnswer, SamplingConfig
from parrot.protocol.errors import ERRORS, ErrorInfo
from parrot.serve import events
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
from sim.cluster import AUTH, Asker, Author, Cluster
from sim.network import Network
from sim.player import Player
from sim.recorder import Recorder
from sim.workloads.program import Call

RETRY_AFTER_S: Final = 1.0  #: when a refusal does not say how long to wait
KEPT_SAMPLINGS: Final = 65_536  #: outputs of the same lengths share what says so

# By names of this module's own that never change: the compiled module need not look up what each event is.
_OPEN_SESSION: Final = events.OpenSession
_CLOSE_SESSION: Final = events.CloseSession
_SUBMIT_CALL: Final = events.SubmitCall
_GET_VARIABLE: Final = events.GetVariable
_CONSTANT: Final = events.Constant
_INPUT: Final = events.Input
_OUTPUT: Final = events.Output


class Access:
    """The way to the core, which the clients of a run share: the cluster behind a network, and what requests have in common."""

    def __init__(self, cluster: Cluster, network: Network, recorder: Recorder) -> None:
        self.cluster = cluster
        self.network = network
        self.recorder = recorder
        self.answered_s = 0.0  #: when an answer other than a refusal last came, to any of them
        self._sessions = 0
        self._samplings: dict[int, SamplingConfig] = {}

    def new_session_id(self) -> int:
        self._sessions += 1
        return self._sessions

    def submit_call(self, request: int, session_id: int, call: Call, pieces: Sequence[Piece]) -> events.SubmitCall:
        """The event of a call, as the session submits it."""
        cluster = self.cluster
        content = cluster.content
        segments: list[events.Segment] = []
        for piece in pieces:
            if isinstance(piece, Into):
                segments.append(_OUTPUT(piece.name, self._sampling(piece), piece.var_id))
            elif isinstance(piece, Reference):
                segments.append(_INPUT(piece.name, piece.var_id))
            elif isinstance(piece, Given):
                segments.append(_INPUT(piece.name, None, content(piece.value.key, piece.value.tokens)))
            else:
                segments.append(_CONSTANT(content(piece.key, piece.tokens)))
        # by place: a name would cost as much as its value
        model_type = cluster.model_types.of(call)
        return _SUBMIT_CALL(request, session_id, AUTH, tuple(segments), call.name, call.models, model_type, call.cache_prefix)

    def _sampling(self, into: Into) -> SamplingConfig:
        lengths = into.max_gen_length << 32 | into.output_length  # one number: it is hashed faster than two
        found = self._samplings.get(lengths)
        if found is None:
            if len(self._samplings) >= KEPT_SAMPLINGS:
                self._samplings.clear()
            found = SamplingConfig(seed=0, max_gen_length=into.max_gen_length, output_length=into.output_length)
            self._samplings[lengths] = found
        return found


class Host:
    """Whose conversations they are."""

    __slots__ = ()

    def ended(self, conversation: Conversation) -> None:
        """A program has ended, well or badly."""
        raise NotImplementedError

    def check_progress(self) -> None:
        """A request was refused; raises an exception when nothing comes of trying it again."""
        raise NotImplementedError


class Conversation(Author):
    """One program's client: its player, and what the core's end knows of its session. `slot`: for its host's use."""

    __slots__ = ("_calls", "_host", "_numbers", "_over", "_session_id", "access", "exchanges", "player", "slot")

    def __init__(self, host: Host, access: Access, player: Player) -> None:
        self.player = player
        self.access = access
        self.slot = 0
        self._host = host
        self.exchanges: dict[Exchange, None] | None = None  # requests of the baseline that are at the core
        self._session_id = 0
        self._calls = 0  # that the session has
        self._numbers: list[int] | None = None  # of those in the program; None: it numbers them as the session does
        self._over = False

    def perform(self, actions: Iterable[Action]) -> None:
        """Sends the player's actions on their way."""
        for action in actions:
            access = self.access
            if isinstance(action, Wait):
                calendar = access.cluster.calendar
                calendar.call_at(calendar.now + action.delay_s, functools.partial(self._answer, action, None, None))
            elif access.network.is_local:
                self._arrive(action, 0.0)
            else:
                calendar = access.cluster.calendar
                half_s = access.network.round_trip_s() / 2
                calendar.call_at(calendar.now + half_s, functools.partial(self._arrive, action, half_s))
        if self.player.ended and not self._over:
            self._over = True
            for exchange in list(self.exchanges or ()):  # a program that has failed drops its connections
                exchange.give_up()
            self._host.ended(self)

    def work(self) -> str:
        """What the core says of the session's tasks, for a message."""
        calls = self.access.cluster.calls(self._session_id)
        states = [f"{task.state} (attempts: {task.attempt})" for call in calls for task in call.tasks]
        return f"; its tasks are {', '.join(states[:5])}" if states else ""

    # ---------------------------------------------------------------------------------------------- the core's end

    def _arrive(self, action: Action, half_s: float) -> None:
        """The action's request reaches the core."""
        cluster, session_id = self.access.cluster, self._session_id
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
            event = self.access.submit_call(request, session_id, action.spec, action.pieces)
        elif isinstance(action, Open):
            self._session_id = self.access.new_session_id()
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

    def record(self, session_id: int, numbers: Sequence[int], first: int = 0) -> None:
        """Takes down what the core knows of the session before it closes; as `Recorder.calls_ended`."""
        access = self.access
        access.recorder.calls_ended(self.player.serial, access.cluster.calls(session_id), numbers, first)

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
                self.access.cluster.name_outputs(self._session_id, self)
        if half_s or error is not None:
            self.send_back(action, half_s, answer, error)
        else:  # as `_answer` does: what happens most takes the fewest steps
            access = self.access
            now = access.answered_s = access.cluster.calendar.now
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
            calendar = self.access.cluster.calendar
            calendar.call_at(calendar.now + half_s, functools.partial(self._answer, action, answer, error))
        else:
            self._answer(action, answer, error)

    # -------------------------------------------------------------------------------------------- the client's end

    def _answer(self, action: Action, answer: Any, error: ErrorInfo | None) -> None:
        now = self.access.cluster.calendar.now
        player = self.player
        if error is None:
            if not isinstance(action, Wait):
                self.access.answered_s = now
            self.perform(player.answer(action, answer, now))
        elif ERRORS[error.code].status == 429:
            self._host.check_progress()
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
        access = conversation.access
        cluster = access.cluster
        self._session_id = access.new_session_id()
        request = cluster.expect(self._opened)
        cluster.post(_OPEN_SESSION(request, self._session_id, AUTH, action.tenant))
        request = cluster.expect(self._submitted)
        cluster.post(access.submit_call(request, self._session_id, action.spec, action.pieces))

    def _opened(self, _: Any, error: ErrorInfo | None) -> None:
        if error is not None:
            self._end()  # the submission fails too, for want of a session
            self._conversation.send_back(self._action, self._half_s, None, error)
        else:
            self._conversation.access.cluster.name_outputs(self._session_id, self)

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
        action, cluster = self._action, self._conversation.access.cluster
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
        conversation, cluster = self._conversation, self._conversation.access.cluster
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
