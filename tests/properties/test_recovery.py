"""ServeCore killed again and again: what was in the journal holds, what was not is as if it had never been asked.

The machine of `serve_laws` with a ledger and a journal behind it. `kill` throws the core away with a tail of what was
not committed; a new one is made of the rest. In mode `record` the run is then replayed from its rows alone, life by
life, to the same effects byte for byte (invariant 5).
"""

from __future__ import annotations

import copy
import os
from typing import Any, NamedTuple

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from parrot.serve import events as ev
from parrot.serve import states
from parrot.serve.core import ServeCore
from parrot.serve.effects import Dispatch, Reply, SessionEnded, TaskEnded
from parrot.serve.graph import Task
from parrot.serve.ledger import EFFECT, Entry, Ledger, Mode, content_keys, decode_event, encode
from parrot.serve.recovery import recover, restore
from parrot.serve.streams import OutputStreams
from parrot.serve.texts import Piece, Texts
from tests.properties.journal_model import MemoryJournal
from tests.properties.serve_laws import ServeCoreMachine, closure
from tests.serve.driver import content, described

#: What may happen together in one instant.
KINDS = ("create", "set", "submit", "get", "close", "task", "task", "twice", "lose")


class Moment(NamedTuple):
    """All that must be found again if the core dies right after this: the core's side and the clients'."""

    core: Any
    sessions: dict[int, list[str]]
    answers: dict[tuple[type, int, str], Any]
    wanted: dict[int, set[str]]
    shown: dict[tuple[int, str], tuple[list[int], str]]


def variables(core: ServeCore) -> Any:
    """What clients can come to know: sessions in their order, with their variables, and the sessions that are over."""
    return [
        (
            s.id,
            s.auth,
            s.tenant,
            dict(s.answers or {}),
            [(v.id, v.name, v.state, v.content, v.error) for v in s.variables.values()],
        )
        for s in core.sessions.values()
    ], list(core.registry.ended.items())


def calls(core: ServeCore) -> Any:
    """Calls with their tasks: in flight and queued are one, since a death ends every attempt."""

    def task(t: Task) -> Any:
        if t.ended:
            return t.id, t.output.id, t.state
        state = "queued" if t.state in states.IN_FLIGHT else t.state
        group = t.group and (t.group.root, t.group.depth)
        return t.id, t.output.id, state, t.activated, t.criteria, t.depth, group, t.deadline_s, t.wanted_until_s

    return [
        (c.number, c.func_name, c.segments, c.lane.models, c.fuse_fill, c.cache_prefix, [task(t) for t in c.tasks])
        for s in core.sessions.values()
        for c in s.calls
    ]


class Kills(ServeCoreMachine):
    """Every instant goes through the ledger; `unwritten` entries wait for their commit."""

    def __init__(self) -> None:
        super().__init__()
        self.unwritten: list[tuple[Entry, Moment]] = []
        self.shown: dict[tuple[int, str], tuple[list[int], str]] = {}
        self.sound = True  # nothing is wrong yet, so that the end may be looked at

    @initialize(mode=st.sampled_from(["recover", "record"]))
    def begin_journal(self, mode: Mode) -> None:
        self.mode = mode
        self.journal = MemoryJournal(mode)
        self.journal.begin(0, 0.0)
        self.texts, self.streams = Texts(), OutputStreams()
        self.ledger = Ledger(mode, self.texts)
        self.durable = Moment((([], []), []), {}, {}, {}, {})

    # -------------------------------------------------------------------------------------------- the shell's side

    def send(self, *events: ev.AnyEvent) -> list[Any]:
        held = {}
        for event in events:
            if type(event) is ev.OpenSession:
                self.texts.open(event.session_id)
            pieces = [Piece(key, f"text of {key}") for key in content_keys(event)]
            if pieces:
                owner = event.task.session_id if isinstance(event, ev.TaskFinished) else event.session_id  # type: ignore[union-attr]
                held[getattr(event, "request", None)] = (owner, self.texts.hold(owner, pieces))
        requests = {event.request: event for event in events if hasattr(event, "request")}
        effects = super().send(*events)
        dropped = {e.session_id: self.texts.end(e.session_id) for e in effects if type(e) is SessionEnded}
        entry, promised = self.ledger.instant(self.now, events, effects, dropped)
        for effect in effects:
            if isinstance(effect, Reply):
                self.check_promise(requests.get(effect.request), effect, promised)
                if effect.error is not None and effect.request in held:
                    self.texts.release(*held[effect.request])
            elif isinstance(effect, TaskEnded):
                self.shown.pop((effect.task.session_id, effect.var_id), None)
            elif isinstance(effect, SessionEnded):
                self.shown = {key: said for key, said in self.shown.items() if key[0] != effect.session_id}
        self.append(entry)
        return effects

    @staticmethod
    def check_promise(event: Any, reply: Reply, promised: set[int]) -> None:
        """What is told as done waits for the journal, and so does what a variable holds or why it has failed."""
        if (
            event is None
            or (reply.error is None and isinstance(event, ev.OpenSession | ev.SubmitCall | ev.CreateVariable | ev.SetVariable))
            or (reply.error is None and isinstance(event, ev.GetVariable))
        ):  # a get of an earlier instant
            assert reply.request in promised

    def append(self, entry: Entry) -> None:
        moment = copy.deepcopy((self.sessions, self.answers, self.wanted, self.shown))
        self.unwritten.append((entry, Moment((variables(self.core), calls(self.core)), *moment)))

    def commit(self, count: int) -> None:
        for entry, moment in self.unwritten[:count]:
            self.journal.commit(entry)
            self.durable = moment
        del self.unwritten[:count]

    # -------------------------------------------------------------------------------------------- what happens

    @precondition(lambda self: self.unwritten)
    @rule(data=st.data())
    def group_commit(self, data: st.DataObject) -> None:
        self.commit(data.draw(st.integers(1, len(self.unwritten))))

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), said=st.integers(1, 3))
    def show(self, data: st.DataObject, said: int) -> None:
        """A getter is about to see some text of a task in flight."""
        task = self.flying[data.draw(st.sampled_from(sorted(self.flying, key=repr)))]
        key = (task.task.session_id, task.output_var)
        ids, text = self.shown.get(key, ([], ""))
        new = list(range(len(ids), len(ids) + said))
        self.shown[key] = (ids + new, text + "x" * said)
        self.append(self.ledger.show(*key, new, "x" * said))

    @precondition(lambda self: self.sessions)
    @rule(data=st.data(), kinds=st.lists(st.sampled_from(KINDS), min_size=2, max_size=5))
    def many_at_once(self, data: st.DataObject, kinds: list[str]) -> None:
        """Events of one instant, which know nothing of each other: what engines say may come twice, or after a close."""
        events: list[Any] = []
        for kind in kinds:
            if kind == "create":
                events.append(self.create_event(data))
            elif kind == "submit":
                events.append(self.submit_event(data))
            elif kind == "close":
                events.append(self.close_event(data))
            elif kind in {"set", "get"} and any(self.sessions.values()):
                events.append(self.set_event(data) if kind == "set" else self.get_event(data))
            elif kind in {"task", "twice"} and self.flying:
                key = data.draw(st.sampled_from(sorted(self.flying, key=repr)))
                for number in range(1 + (kind == "twice")):
                    events.append(self.outcome(data, self.flying[key], number))
            elif kind == "lose" and self.engines:
                engine = data.draw(st.sampled_from(sorted(self.engines)))
                self.engines.discard(engine)
                events.append(ev.EngineLost(engine, "test"))
        if events:
            self.together(events)

    @staticmethod
    def outcome(data: st.DataObject, dispatch: Dispatch, number: int) -> ev.AnyEvent:
        name = (dispatch.epoch, dispatch.task, dispatch.attempt)
        ways: list[ev.AnyEvent] = [
            ev.TaskFinished(*name, content(f"one{number}", 1 + number), 1 + number),
            ev.TaskFailed(*name, "generation_failed", "no"),
            ev.TaskFailed(*name, "engine_failed", "again", True),
            ev.TaskRejected(*name, "full"),
        ]
        return data.draw(st.sampled_from(ways))

    @precondition(lambda self: self.journal.ended)
    @rule(data=st.data())
    def knock_at_an_ended_session(self, data: st.DataObject) -> None:
        """Whoever comes too late is told that it is over, whichever life it ended in."""
        session = data.draw(st.sampled_from(sorted(self.journal.ended)))
        state = self.journal.ended[session][0].state
        reply = self.ask(self.request_for(ev.CreateVariable, session, f"auth{session}"))
        assert reply is not None
        assert reply.error is not None
        assert reply.error.code == f"session_{state}"

    @precondition(lambda self: self.sessions or len(self.unwritten) > 3)
    @rule(data=st.data())
    def kill(self, data: st.DataObject) -> None:
        """The process dies; the last of what was not committed is lost."""
        self.commit(data.draw(st.integers(0, len(self.unwritten)), label="entries that made it"))
        self.live_again()

    restart = None  # type: ignore[assignment]  # a core that is only told so is the affair of the other machine

    def live_again(self) -> None:
        self.sound = False
        self.unwritten.clear()
        past = self.journal.past()
        assert past.shown == self.durable.shown, "what was shown is known, and of outputs that are over nothing is"
        self.epoch = past.epoch + 1
        self.now = past.now
        self.core, again = (recover(self.config, past, self.epoch) for _ in range(2))
        assert variables(self.core) == self.durable.core[0]
        assert calls(self.core) == self.durable.core[1]
        self.check_queue()
        self.texts, self.streams = Texts(), OutputStreams()
        restore(past, self.texts, self.streams)
        self.ledger = Ledger(self.mode, self.texts, past)
        self.journal.begin(self.epoch, self.now)
        self.sessions, self.answers, self.wanted, self.shown = copy.deepcopy(self.durable[1:])
        self.asked.clear()
        self.engines.clear()
        self.flying.clear()
        self.contexts.clear()
        self.full.clear()
        self.past.clear()
        self.request = 0  # a new process counts anew
        self.too_late.clear()
        effects = self.send(ev.Restarted(self.epoch))
        assert again.handle([ev.Restarted(self.epoch)], self.now) == effects
        assert again.counts() == self.core.counts()
        assert again.next_deadline() == self.core.next_deadline()
        for session in self.sessions:
            assert again.session_report(session, self.now) == self.core.session_report(session, self.now)
        self.sound = True

    def check_queue(self) -> None:
        """What was wanted and can run is queued, and nothing else is."""
        for session in self.core.sessions.values():
            needed = closure(session, self.durable.wanted.get(session.id, set()))
            for call in session.calls:
                for task in call.tasks:
                    ready = all(variable.state == "ready" for variable in task.inputs())
                    assert task.ended or (task.state == "queued") == (task.activated and ready)
                    assert task.ended or not task.activated or task in needed

    # -------------------------------------------------------------------------------------------- laws

    @invariant()
    def nothing_of_ended_sessions_is_kept(self) -> None:
        if hasattr(self, "journal") and self.mode == "recover":
            over = set(self.journal.ended)
            assert not over & {row.session for row in self.journal.rows}
            assert not over & {session for session, _ in self.journal.shown}

    def teardown(self) -> None:
        if not hasattr(self, "core") or not hasattr(self, "journal") or not self.sound:
            return
        self.commit(len(self.unwritten))
        self.goes_on_as_if_nothing_had_been()
        self.close_everything()
        self.commit(len(self.unwritten))
        if self.mode == "record":
            self.replay()
        else:
            assert (self.journal.rows, self.journal.texts, self.journal.shown) == ([], {}, {})
        assert len(self.texts) == 0

    def goes_on_as_if_nothing_had_been(self) -> None:
        """A core made of the journal, and this one told to begin anew, come to the same variables in the end."""
        recovered = recover(self.config, self.journal.past(), self.epoch + 1)
        self.epoch += 1
        self.asked.clear()
        self.engines.clear()
        self.flying.clear()
        self.contexts.clear()
        self.full.clear()
        effects = self.send(ev.Restarted(self.epoch))
        assert not [effect for effect in effects if isinstance(effect, Dispatch)]
        recovered.handle([ev.Restarted(self.epoch)], self.now)
        assert run_to_the_end(recovered, self.now, lambda *events: recovered.handle(events, self.now)) == run_to_the_end(
            self.core, self.now, self.as_engines
        )
        assert variables(recovered) == variables(self.core)

    def as_engines(self, *events: ev.AnyEvent) -> list[Any]:
        for event in events:
            if isinstance(event, ev.RegisterEngine):
                self.asked[event.request] = event
                self.engines.add(self.core.scheduler.engines._next_id + 1)
                self.contexts[self.core.scheduler.engines._next_id + 1] = set()
            elif isinstance(event, ev.TaskFinished):
                del self.flying[event.task, event.attempt]
        return self.send(*events)

    def replay(self) -> None:
        """Invariant 5: the rows alone give a fresh core the same effects, in every life."""
        journal = self.journal
        for life, ends in zip(
            journal.lives, [*[life.instant for life in journal.lives[1:]], journal.past().next_instant], strict=True
        ):
            core = recover(self.config, journal.past(life.instant), life.epoch)
            for instant in range(life.instant, ends):
                rows = [row for row in journal.rows if row.instant == instant]
                events = [decode_event(row.body) for row in rows if row.kind != EFFECT]
                events = [event for event in events if not isinstance(event, ev.TaskGivenUp)]
                effects = core.handle(events, rows[0].t)
                assert [encode(effect) for effect in effects] == [row.body for row in rows if row.kind == EFFECT]


def run_to_the_end(core: ServeCore, now: float, handle: Any) -> int:
    """One large engine for every model finishes all that is queued, each task with a text of its own. How many ran."""
    ran = 0
    ready = [e for name in "mn" for e in handle(ev.RegisterEngine(900_000 + ord(name), described(name, model=name)))]
    waiting = [effect for effect in ready if isinstance(effect, Dispatch)]
    while waiting:
        done = waiting.pop(0)
        key = f"end:{done.task.session_id}:{done.task.call}:{done.task.output}"
        effects = handle(ev.TaskFinished(done.epoch, done.task, done.attempt, content(key, 4), 4))
        waiting.extend(effect for effect in effects if isinstance(effect, Dispatch))
        ran += 1
    assert core.counts()["queue"] == 0
    return ran


Kills.TestCase.settings = settings(
    max_examples=int(os.environ.get("PARROT_EXAMPLES", "60")),
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestKills = Kills.TestCase
