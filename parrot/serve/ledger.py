"""What an instant leaves in the journal, and who has to wait until it is there.

The ledger decides, with no I/O, which events and effects are kept, which texts go with them, and which replies promise
something. A store (SQLite in `journal.py`; a simulated disk in `sim.faults`) takes its entries, one transaction each, in
their order. What a store gives back when it is opened again is a `Past`, from which `recovery.py` builds a core.

Two modes. `recover` keeps what a restarted core needs and drops a session's rows and texts when it ends; of an ephemeral
session, which ends with this life, it keeps nothing, and no reply to it waits. `record` keeps every event and effect, so that a
fresh core can be shown to do the same (`sim.replay`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import msgspec

from parrot.serve import events as ev
from parrot.serve.effects import AnyEffect, Reply, SessionEnded, TaskEnded
from parrot.serve.events import AnyEvent

Mode = Literal["recover", "record"]

# What a row is. A recovery reads KEPT rows alone.
EVENT, KEPT, EFFECT = 0, 1, 2

_EVENTS = msgspec.msgpack.Decoder(AnyEvent)
_ENCODER = msgspec.msgpack.Encoder()

#: Requests whose answer promises something: it must not be lost when the process dies right after it was given.
PROMISING = (ev.OpenSession, ev.SubmitCall, ev.CreateVariable, ev.SetVariable)
#: A get that is answered with one of these was refused; other errors are what became of its variable.
_REFUSALS = frozenset({"unauthorized", "forbidden", "not_found", "session_closed", "session_expired", "internal"})


class Row(NamedTuple):
    """An event or effect of an instant. `t`: seconds of the core's clock; `session`: whose end takes it away (None: nobody's);
    `body`: MessagePack of the Struct."""

    instant: int
    position: int
    t: float
    session: int | None
    kind: int
    body: bytes


class StoredText(NamedTuple):
    """A text by its content key. `ids`: tokenizer -> token ids as a JSON list, where they are not what the tokenizer itself
    would make of the text (generated ones)."""

    key: str
    text: str
    ids: dict[str, bytes]


class Shown(NamedTuple):
    """What is about to be shown of an output that is still being generated, behind what was stored of it before."""

    session: int
    var_id: str
    ids: tuple[int, ...]
    text: str


class Ended(NamedTuple):
    """A session that is over, and the keys of the texts that nobody else names."""

    session: int
    state: str
    t: float
    keys: tuple[str, ...]


class Entry(msgspec.Struct):
    """One transaction. A store carries out the parts in this order."""

    rows: list[Row] = []
    texts: list[StoredText] = []
    shown: list[Shown] = []
    settled: list[tuple[int, str]] = []  #: outputs (session, variable) of which nothing shown is needed any more
    ended: list[Ended] = []

    def __bool__(self) -> bool:
        return bool(self.rows or self.texts or self.shown or self.settled or self.ended)


class Past(msgspec.Struct):
    """What a journal holds of the lives before. `kept`: (t, event) of sessions that are not over, in order; `ended`: session
    and state, the oldest first; `texts` and `shown` are theirs."""

    epoch: int = 0
    now: float = 0.0
    next_instant: int = 0
    kept: list[tuple[float, AnyEvent]] = []
    ended: list[tuple[int, str]] = []
    texts: dict[str, StoredText] = {}
    shown: dict[tuple[int, str], tuple[list[int], str]] = {}


class Piece(Protocol):
    """A text of the shell's store, as `parrot.serve.texts` keeps it."""

    key: str
    text: str
    stored: bool

    def own_ids(self) -> dict[str, bytes]: ...


class Texts(Protocol):
    """Where the texts are that events name."""

    def find(self, key: str) -> Piece | None: ...


def encode(message: AnyEvent | AnyEffect) -> bytes:
    """A row's body."""
    return _ENCODER.encode(message)


def decode_event(body: bytes) -> AnyEvent:
    """The event of an EVENT or KEPT row. Raises msgspec.DecodeError."""
    event: AnyEvent = _EVENTS.decode(body)
    return event


def session_of(message: Any) -> int | None:
    """Whose row an event or effect is."""
    task = getattr(message, "task", None)
    return task.session_id if task is not None else getattr(message, "session_id", None)


class Ledger:
    """Makes the entries of one life, in order. `past`: what the store held when it was opened."""

    def __init__(self, mode: Mode, texts: Texts, past: Past | None = None) -> None:
        self.mode = mode
        self._texts = texts
        self._instant = past.next_instant if past is not None else 0
        self._unkept: set[int] = set()  # ephemeral sessions of which nothing is kept
        self._unkept_gets: set[int] = set()  # requests of theirs that are not answered yet
        self._shown: dict[int, set[str]] = {}  # session -> outputs of which something shown is stored
        for session_id, var_id in past.shown if past is not None else ():
            self._shown.setdefault(session_id, set()).add(var_id)

    def instant(
        self,
        now: float,
        events: Sequence[AnyEvent],
        effects: Sequence[AnyEffect],
        dropped: Mapping[int, Iterable[str]],
    ) -> tuple[Entry, set[int]]:
        """What an instant adds, and the requests whose replies wait until that is in the store.

        `dropped`: for each session that ended in it, the keys of the texts that only it named.
        """
        entry, record = Entry(), self.mode == "record"
        ended: dict[int, SessionEnded] = {}
        outcomes: list[TaskEnded] = []
        answered: dict[int, Reply] = {}
        for effect in effects:
            kind = type(effect)
            if kind is Reply:
                answered[effect.request] = effect  # type: ignore[union-attr,assignment]
            elif kind is TaskEnded:
                outcomes.append(effect)  # type: ignore[arg-type]
            elif kind is SessionEnded:
                ended[effect.session_id] = effect  # type: ignore[union-attr,assignment]
        promised = set(answered)
        if self._unkept_gets:
            promised -= self._unkept_gets
            self._unkept_gets.difference_update(answered)
        failures: dict[int, list[TaskEnded]] = {}  # by the place of the event that brought them about
        results: set[int] = set()  # places of the events that brought one
        for outcome in outcomes:
            if outcome.error is None:
                results.add(outcome.event)
            else:
                failures.setdefault(outcome.event, []).append(outcome)
        for place, event in enumerate(events):
            session_id = session_of(event)
            if not record and self._passes_by(event, session_id, answered):
                promised.discard(getattr(event, "request", None))
                continue
            if not _promises(event, answered):
                promised.discard(event.request)  # type: ignore[union-attr]
            kept = _is_kept(event, answered, place in results)
            if kept and session_id not in ended:
                self._keep_texts(event, entry)
            if record or (kept and session_id not in ended):
                self._add(entry, now, session_id, KEPT if kept else EVENT, event)
            if place in failures:
                self._give_up(entry, now, failures[place], ended)
        self._give_up(entry, now, failures.get(len(events), ()), ended)
        self._settle(entry, outcomes)
        if record:
            for effect in effects:
                self._add(entry, now, session_of(effect), EFFECT, effect)
        for session_id, end in ended.items():
            self._shown.pop(session_id, None)
            if session_id in self._unkept:
                self._unkept.discard(session_id)
                if not dropped.get(session_id):
                    continue
            entry.ended.append(Ended(session_id, end.state, now, tuple(dropped.get(session_id, ()))))
        if entry.rows:
            self._instant += 1
        return entry, promised

    def show(self, session_id: int, var_id: str, ids: Sequence[int], text: str) -> Entry:
        """What must be in the store before a getter sees `text`, which goes on behind what was stored of that output."""
        self._shown.setdefault(session_id, set()).add(var_id)
        return Entry(shown=[Shown(session_id, var_id, tuple(ids), text)])

    def _passes_by(self, event: AnyEvent, session_id: int | None, answered: Mapping[int, Reply]) -> bool:
        """Whether the event is of an ephemeral session, of which nothing is kept."""
        if type(event) is ev.OpenSession and event.ephemeral:
            reply = answered.get(event.request)
            if reply is not None and reply.error is None:
                self._unkept.add(event.session_id)
            return True
        if type(event) is ev.CancelGet:
            self._unkept_gets.discard(event.request)
            return False
        if session_id not in self._unkept:
            return False
        if type(event) is ev.GetVariable and event.request not in answered:
            self._unkept_gets.add(event.request)
        return True

    def _give_up(self, entry: Entry, now: float, failures: Iterable[TaskEnded], ended: Mapping[int, SessionEnded]) -> None:
        """Behind the event that brought them about, for the next one may build on them."""
        for outcome in failures:
            session_id = outcome.task.session_id
            if session_id in self._unkept:
                continue
            if outcome.error is not None and (self.mode == "record" or session_id not in ended):
                self._add(entry, now, session_id, KEPT, ev.TaskGivenUp(outcome.task, outcome.error))

    def _settle(self, entry: Entry, outcomes: Iterable[TaskEnded]) -> None:
        for outcome in outcomes:
            session_id = outcome.task.session_id
            shown = self._shown.get(session_id)
            if shown is not None and outcome.var_id in shown:
                shown.remove(outcome.var_id)
                entry.settled.append((session_id, outcome.var_id))

    def _keep_texts(self, event: AnyEvent, entry: Entry) -> None:
        for key in content_keys(event):
            piece = self._texts.find(key)
            if piece is not None and not piece.stored:
                piece.stored = True
                entry.texts.append(StoredText(key, piece.text, piece.own_ids()))

    def _add(self, entry: Entry, now: float, session_id: int | None, kind: int, message: AnyEvent | AnyEffect) -> None:
        entry.rows.append(Row(self._instant, len(entry.rows), now, session_id, kind, _ENCODER.encode(message)))


def _promises(event: AnyEvent, answered: Mapping[int, Reply]) -> bool:
    """Whether the answer to `event`, if it is answered in its own instant, promises something. Only gets are answered later,
    and theirs always does: a value, or a failure that stays one."""
    request = getattr(event, "request", None)
    if request is None or request not in answered:
        return True
    error = answered[request].error
    if type(event) is ev.GetVariable:
        return error is None or error.code not in _REFUSALS
    return isinstance(event, PROMISING) and error is None


def _is_kept(event: AnyEvent, answered: Mapping[int, Reply], brought_result: bool) -> bool:
    """Whether a restarted core needs the event: what was accepted, and what made work begin or end."""
    if isinstance(event, PROMISING):
        reply = answered.get(event.request)
        if reply is None or reply.error is not None:
            return False
        return type(event) is not ev.OpenSession or reply.payload == event.session_id  # else it opened nothing: a repeat
    if type(event) is ev.GetVariable:
        reply = answered.get(event.request)  # none: it waits, and its output is wanted; so it is when the answer was a failure
        return reply is None or (reply.error is not None and reply.error.code not in _REFUSALS)
    if type(event) is ev.TaskFinished:
        return brought_result  # else it came too late
    return False


def content_keys(event: AnyEvent) -> list[str]:
    """The keys of the texts that an event brings."""
    if type(event) is ev.SubmitCall:
        found = []
        for segment in event.segments:
            if type(segment) is ev.Constant:
                found.append(segment.content.key)
            elif type(segment) is ev.Input and segment.value is not None:
                found.append(segment.value.key)
        return found
    if isinstance(event, ev.SetVariable | ev.TaskFinished):
        return [event.content.key]
    return []
