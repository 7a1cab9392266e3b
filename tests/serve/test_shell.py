"""The loop around the core, with a core that does what a test says, and the pieces it stands on."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from parrot.protocol.errors import ErrorInfo, ParrotError
from parrot.serve.config import ServeCoreConfig
from parrot.serve.effects import AnyEffect, Dispatch, FreeContexts, Reply, SessionEnded
from parrot.serve.events import (
    AnyEvent,
    CancelGet,
    CloseSession,
    Content,
    CreateVariable,
    DescribeSession,
    GetVariable,
    ListVariables,
    OpenSession,
    SetVariable,
    SubmitCall,
    Tick,
)
from parrot.serve.journal import Journal, read
from parrot.serve.ledger import EFFECT, Entry, Ledger, decode_event
from parrot.serve.shell import Shell
from parrot.serve.streams import OutputStream
from parrot.serve.texts import Piece, Texts, content_key, generated_key
from parrot.serve.tokenization import INLINE_CHARACTERS, Tokenization
from tests.serve.http_support import Tokenizers


class FakeCore:
    """Records its instants; `answer` makes the effects."""

    def __init__(self, answer: Callable[[Sequence[AnyEvent]], list[AnyEffect]] = lambda _: []) -> None:
        self.instants: list[tuple[float, list[AnyEvent]]] = []
        self.deadline: float | None = None
        self.answer = answer

    def handle(self, events: Sequence[AnyEvent], now: float) -> list[AnyEffect]:
        self.instants.append((now, list(events)))
        if any(isinstance(event, Tick) for event in events):
            self.deadline = None
        return self.answer(events)

    def take_faults(self) -> list[tuple[str, Exception]]:
        return []

    def next_deadline(self) -> float | None:
        return self.deadline


class Outside:
    def __init__(self) -> None:
        self.ended: list[int] = []

    def dispatch(self, effect: Dispatch) -> None: ...
    def abort(self, effect: Any) -> None: ...
    def free_contexts(self, effect: Any) -> None: ...
    def session_ended(self, session_id: int) -> list[str]:
        self.ended.append(session_id)
        return []


def _get(shell: Shell) -> GetVariable:
    return GetVariable(shell.number(), 1, None, "v")


def _replies(events: Sequence[AnyEvent]) -> list[AnyEffect]:
    return [Reply(event.request, event.request * 10) for event in events if isinstance(event, GetVariable)]


async def test_events_of_one_turn_are_one_instant_in_order() -> None:
    core = FakeCore(_replies)
    shell = Shell(core, Outside())
    futures = [shell.ask(_get(shell)) for _ in range(3)]
    assert core.instants == []
    assert await asyncio.gather(*futures) == [10, 20, 30]
    assert [[event.request for event in events] for _, events in core.instants] == [[1, 2, 3]]


async def test_time_never_goes_back() -> None:
    core = FakeCore(_replies)
    shell = Shell(core, Outside())
    for _ in range(20):
        await shell.ask(_get(shell))
    times = [now for now, _ in core.instants]
    assert times == sorted(times)
    assert times[0] >= 0


async def test_a_refusal_is_the_error_that_the_core_gave() -> None:
    core = FakeCore(lambda events: [Reply(events[0].request, error=ErrorInfo("conflict", "taken"))])
    shell = Shell(core, Outside())
    with pytest.raises(ParrotError, match="taken") as caught:
        await shell.ask(_get(shell))
    assert caught.value.status == 409


async def test_a_reply_is_seen_before_the_effects_behind_it() -> None:
    seen: list[str] = []
    outside = Outside()
    outside.free_contexts = lambda effect: seen.append("freed")  # type: ignore[method-assign]
    core = FakeCore(lambda events: [Reply(events[0].request, 1), FreeContexts(1, (2,))])
    shell = Shell(core, outside)
    await shell.ask(_get(shell), lambda reply: seen.append("reply"))
    assert seen == ["reply", "freed"]


async def test_the_end_of_a_session_is_told_once() -> None:
    outside = Outside()
    shell = Shell(FakeCore(lambda events: [Reply(events[0].request, 1), SessionEnded(7)]), outside)
    await shell.ask(_get(shell))
    assert outside.ended == [7]


async def test_a_deadline_brings_a_tick_once() -> None:
    core = FakeCore()
    shell = Shell(core, Outside())
    core.deadline = 0.02
    shell.post(CancelGet(1))
    while not any(isinstance(event, Tick) for _, events in core.instants for event in events):
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.02)
    ticks = [now for now, events in core.instants if Tick() in events]
    assert len(ticks) == 1
    assert ticks[0] >= 0.02


async def test_an_earlier_deadline_replaces_a_later_one() -> None:
    core = FakeCore()
    shell = Shell(core, Outside())
    core.deadline = 1000.0
    shell.post(CancelGet(1))
    await shell.flushed()
    core.deadline = shell.now() + 0.01
    shell.post(CancelGet(2))
    async with asyncio.timeout(5):
        while not any(Tick() in events for _, events in core.instants):
            await asyncio.sleep(0.005)


async def test_an_exception_of_the_core_is_answered_and_survived() -> None:
    failing = True

    def answer(events: Sequence[AnyEvent]) -> list[AnyEffect]:
        if failing:
            raise RuntimeError("a bug")
        return _replies(events)

    shell = Shell(FakeCore(answer), Outside())
    with pytest.raises(ParrotError) as caught:
        await shell.ask(_get(shell))
    assert caught.value.code == "internal"
    failing = False
    assert await shell.ask(_get(shell)) == 20


async def test_a_cancelled_get_is_told_to_the_core_once() -> None:
    core = FakeCore()
    shell = Shell(core, Outside())
    future = shell.ask(_get(shell))
    future.cancel()
    shell.cancel_get(1)
    shell.cancel_get(1)
    await shell.flushed()
    assert core.instants[0][1][1:] == [CancelGet(1)]


async def test_closing_answers_all_who_wait_and_refuses_new_requests() -> None:
    shell = Shell(FakeCore(), Outside())
    future = shell.ask(_get(shell))
    shell.close()
    with pytest.raises(ParrotError) as caught:
        await future
    assert caught.value.code == "unavailable"
    with pytest.raises(ParrotError):
        shell.ask(_get(shell))


# ----------------------------------------------------------------------------------------------------------- the journal


class FakeJournal:
    """Commits what was appended when it is told to, or fails to."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.waiting: list[Callable[[ErrorInfo | None], None]] = []
        self.failing: ErrorInfo | None = None

    def append(self, entry: Entry) -> None:
        self.entries.append(entry)

    def after_commit(self, callback: Callable[[ErrorInfo | None], None]) -> None:
        self.waiting.append(callback)

    def end(self, error: ErrorInfo | None = None) -> None:
        """The attempt to commit ends."""
        self.failing = error
        waiting, self.waiting = self.waiting, []
        for callback in waiting:
            callback(error)


FULL = ErrorInfo("unavailable", "journal x cannot be written: database or disk is full")


def _journaled(
    answer: Callable[[Sequence[AnyEvent]], list[AnyEffect]], texts: Texts | None = None
) -> tuple[Shell, FakeJournal]:
    journal = FakeJournal()
    return Shell(FakeCore(answer), Outside(), journal, Ledger("recover", texts or Texts())), journal


def _accept(events: Sequence[AnyEvent]) -> list[AnyEffect]:
    """Every request is granted at once."""
    numbers = [request for event in events if (request := getattr(event, "request", None)) is not None]
    return [Reply(number, {}) for number in numbers]


def _refuse(events: Sequence[AnyEvent]) -> list[AnyEffect]:
    return [Reply(event.request, error=ErrorInfo("conflict", "taken")) for event in events]  # type: ignore[union-attr]


def _open(shell: Shell) -> OpenSession:
    return OpenSession(shell.number(), 1, "hash")


def _create(shell: Shell) -> CreateVariable:
    return CreateVariable(shell.number(), 1, "hash")


def _set(shell: Shell) -> SetVariable:
    return SetVariable(shell.number(), 1, "hash", "v", Content("k", {}))


def _submit(shell: Shell) -> SubmitCall:
    return SubmitCall(shell.number(), 1, "hash", ())


def _describe(shell: Shell) -> DescribeSession:
    return DescribeSession(shell.number(), 1, "hash")


def _close(shell: Shell) -> CloseSession:
    return CloseSession(shell.number(), 1, "hash")


def _list(shell: Shell) -> ListVariables:
    return ListVariables(shell.number(), 1, "hash")


async def _turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.parametrize("ask", [_open, _create, _set, _submit, _get])
async def test_a_reply_that_promises_waits_until_its_instant_is_in_the_journal(ask: Callable[[Shell], Any]) -> None:
    shell, journal = _journaled(_accept)
    seen: list[Reply] = []
    future = shell.ask(ask(shell), seen.append)
    await _turns()
    assert len(journal.entries) == len(seen) == 1
    assert not future.done()
    journal.end()
    assert await future == {}


@pytest.mark.parametrize("ask", [_describe, _list, _close])
async def test_a_reply_that_promises_nothing_waits_for_no_disk(ask: Callable[[Shell], Any]) -> None:
    shell, journal = _journaled(_accept)
    assert await shell.ask(ask(shell)) == {}
    assert not journal.waiting


@pytest.mark.parametrize("ask", [_open, _create, _set, _submit])
async def test_a_refusal_waits_for_no_disk(ask: Callable[[Shell], Any]) -> None:
    shell, journal = _journaled(_refuse)
    with pytest.raises(ParrotError, match="taken"):
        await shell.ask(ask(shell))
    assert not journal.waiting


async def test_effects_that_go_to_engines_wait_for_no_disk() -> None:
    sent: list[Any] = []
    shell, journal = _journaled(lambda events: [*_accept(events), FreeContexts(3, (1,))])
    shell._outside.free_contexts = sent.append  # type: ignore[method-assign]
    future = shell.ask(_submit(shell))
    await _turns()
    assert sent == [FreeContexts(3, (1,))]
    assert not future.done()
    journal.end()
    await future


async def test_a_promise_that_cannot_be_written_is_answered_unavailable_and_the_core_keeps_what_it_took() -> None:
    texts = Texts()
    texts.open(1)
    piece = _piece("kept")
    shell, journal = _journaled(_accept, texts)
    keys = texts.hold(1, [piece])
    told: list[Reply] = []

    def on_reply(reply: Reply) -> None:
        told.append(reply)
        if reply.error is not None:
            texts.release(1, keys)

    event = SetVariable(shell.number(), 1, "hash", "v", piece.content())
    future = shell.ask(event, on_reply)
    await _turns()
    journal.end(FULL)
    with pytest.raises(ParrotError, match="disk is full") as caught:
        await future
    assert (caught.value.code, caught.value.status, caught.value.info.retryable) == ("unavailable", 503, True)
    assert [reply.error for reply in told] == [None]  # the core took it: a repeat under the same key will find it
    assert texts.text(piece.key) == "kept"


async def test_while_the_journal_fails_nothing_new_is_promised_and_the_rest_goes_on() -> None:
    shell, journal = _journaled(_accept)
    journal.failing = FULL
    for ask in (_open, _create, _set, _submit):
        with pytest.raises(ParrotError, match="disk is full"):
            shell.ask(ask(shell))
    assert await shell.ask(_describe(shell)) == {}
    got = shell.ask(_get(shell))
    await _turns()
    journal.end()
    assert await got == {}
    opened = shell.ask(_open(shell))
    await _turns()
    journal.end()
    assert await opened == {}


async def test_a_getter_sees_streamed_text_when_it_is_in_the_journal() -> None:
    shell, journal = _journaled(_accept)
    stream = OutputStream()
    stream.add((4, 5), "two words")
    shown = asyncio.ensure_future(shell.show(1, "v", stream))
    await _turns()
    assert [piece.text for entry in journal.entries for piece in entry.shown] == ["two words"]
    assert not shown.done()
    journal.end()
    await shown
    again = asyncio.ensure_future(shell.show(1, "v", stream))
    await _turns()
    assert len(journal.entries) == 1  # the same text is not written twice
    journal.end(FULL)
    with pytest.raises(ParrotError, match="disk is full"):
        await again


async def test_the_journal_of_a_life_holds_every_instant_and_no_secret(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    journal = Journal.open(path, "record")
    journal.begin(1, 0.0, ServeCoreConfig(engine_secret="open sesame"))
    core = FakeCore(_replies)
    shell = Shell(core, Outside(), journal, Ledger("record", Texts(), journal.past))
    await shell.ask(_get(shell))
    shell.post(SetVariable(7, 1, "hash", "v", Content("k", {"words": 3})))
    shell.post(CloseSession(8, 1, "hash"))
    await shell.flushed()
    shell.close()
    journal.close()
    with read(path) as reading:
        found = [(row.t, decode_event(row.body)) for row in reading.rows() if row.kind != EFFECT]
        assert reading.lives[0].config.engine_secret is None
    assert found == [(now, event) for now, events in core.instants for event in events]
    for file in tmp_path.iterdir():
        assert b"open sesame" not in file.read_bytes()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


# ------------------------------------------------------------------------------------------------------------- the texts


def _piece(text: str, **ids: list[int]) -> Piece:
    from parrot.serve.texts import pack_ids

    piece = Piece(content_key(text), text)
    piece.ids = {name: pack_ids(values) for name, values in ids.items()}
    return piece


def test_a_text_goes_with_the_last_session_that_names_it() -> None:
    texts = Texts()
    for session in (1, 2):
        texts.open(session)
        texts.hold(session, [_piece("shared"), _piece(f"own {session}")])
    texts.end(1)
    assert texts.text(content_key("shared")) == "shared"
    assert texts.find(content_key("own 1")) is None
    texts.end(2)
    assert len(texts) == 0


def test_a_refused_request_takes_back_only_its_own_hold() -> None:
    texts = Texts()
    texts.open(1)
    texts.hold(1, [_piece("a")])
    refused = texts.hold(1, [_piece("a"), _piece("b"), _piece("b")])
    texts.release(1, refused)
    assert texts.find(content_key("a")) is not None
    assert texts.find(content_key("b")) is None


def test_a_session_that_is_not_open_stores_nothing() -> None:
    texts = Texts()
    assert texts.hold(1, [_piece("a")]) == []
    assert len(texts) == 0


def test_ids_of_several_texts_are_joined_behind_the_head() -> None:
    texts = Texts()
    texts.open(1)
    keys = tuple(texts.hold(1, [_piece("a", t=[1, 2]), _piece("", t=[]), _piece("b", t=[3])]))
    assert bytes(texts.ids(keys, "t")) == b"[1,2,3]"
    assert bytes(texts.ids(keys, "t", head=9)) == b"[9,1,2,3]"
    assert bytes(texts.ids(keys[:1], "t", head=9)) == b"[9,1,2]"
    assert bytes(texts.ids(keys[1:2], "t", head=9)) == b"[9]"


def test_generated_ids_are_part_of_what_a_generated_text_is() -> None:
    keys = {content_key("x"), generated_key("x", "t", (1,)), generated_key("x", "t", (2,)), generated_key("x", "u", (1,))}
    assert len(keys) == 4


async def test_long_and_short_texts_get_the_same_ids_and_new_tokenizers_reach_stored_ones() -> None:
    texts, tokenizers = Texts(), Tokenizers()
    tokenization = Tokenization(texts, tokenizers.load)
    try:
        await tokenization.learn("t")
        long = "word " * INLINE_CHARACTERS
        pieces = await tokenization.pieces([long, "word"])
        assert [piece.content().lengths for piece in pieces] == [{"t": INLINE_CHARACTERS}, {"t": 1}]
        texts.open(1)
        texts.hold(1, pieces)

        async def submit() -> Piece:
            [piece] = await tokenization.pieces(["more words " * INLINE_CHARACTERS])
            texts.hold(1, [piece])
            return piece

        meanwhile = asyncio.create_task(submit())
        await asyncio.sleep(0)
        await tokenization.learn("u")
        known = texts.lengths("u")
        assert known.items() >= {pieces[0].key: INLINE_CHARACTERS, pieces[1].key: 1}.items()
        piece = await meanwhile
        assert set(piece.ids) == {"t", "u"}
    finally:
        tokenization.close()


async def test_an_output_keeps_its_ids_and_shares_its_key_when_they_are_the_tokenizer_s_own() -> None:
    tokenization = Tokenization(Texts(), Tokenizers().load)
    try:
        await tokenization.learn("t")
        [given] = await tokenization.pieces(["one two"])
        same = await tokenization.output("t", "one two", (1, 2))
        other = await tokenization.output("t", "one two", (5, 6, 7))
        assert same.key == given.key
        assert other.key != given.key
        assert other.content().lengths == {"t": 3}
    finally:
        tokenization.close()
