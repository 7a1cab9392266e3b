"""The disk: what a journal keeps of the entries that it is given, and what is left of it when the process dies.

`SimDisk` outlives the core's processes; a `SimJournal` is one life's way to it, as parrot.serve.journal is to a file. An
entry is there from the moment its group commit is done; one that was under way when the process died may be there or not,
as a whole. A full disk takes nothing: the entries wait, in their order, and who waits for them is told.
"""

from __future__ import annotations

from collections.abc import Callable

from parrot.protocol.errors import ErrorInfo
from parrot.serve.config import ServeCoreConfig
from parrot.serve.ledger import KEPT, Entry, Past, Row, StoredText, decode_event
from sim.faults.dice import Dice
from sim.faults.loops import ProcessLoop

_RETRY_S = 0.5
_FULL = ErrorInfo("unavailable", "the journal cannot be written: no space left on device")

OnCommit = Callable[[ErrorInfo | None], None]


class SimDisk:
    """Committed state, in mode `recover`."""

    def __init__(self) -> None:
        self.full = False
        self.epoch = 0
        self.now = 0.0
        self.next_instant = 0
        self.rows: list[Row] = []
        self.ended: dict[int, str] = {}
        self.texts: dict[str, StoredText] = {}
        self.shown: dict[tuple[int, str], tuple[list[int], str]] = {}

    def apply(self, entry: Entry) -> None:
        """One transaction."""
        for row in entry.rows:
            assert row.kind == KEPT, "mode `recover` keeps nothing else"
            self.rows.append(row)
            self.now = max(self.now, row.t)
            self.next_instant = max(self.next_instant, row.instant + 1)
        for text in entry.texts:
            self.texts[text.key] = text
        for shown in entry.shown:
            ids, so_far = self.shown.get((shown.session, shown.var_id), ([], ""))
            self.shown[shown.session, shown.var_id] = ([*ids, *shown.ids], so_far + shown.text)
        for output in entry.settled:
            self.shown.pop(output, None)
        for end in entry.ended:
            self.now = max(self.now, end.t)
            self.ended[end.session] = end.state
            self.rows = [row for row in self.rows if row.session != end.session]
            for key in [key for key in self.shown if key[0] == end.session]:
                del self.shown[key]
            for text_key in end.keys:
                self.texts.pop(text_key, None)

    def past(self) -> Past:
        """What the next life is given."""
        kept = [(row.t, decode_event(row.body)) for row in sorted(self.rows, key=lambda row: (row.instant, row.position))]
        texts, shown = dict(self.texts), {key: (list(ids), text) for key, (ids, text) in self.shown.items()}
        return Past(self.epoch, self.now, self.next_instant, kept, list(self.ended.items()), texts, shown)


class SimJournal:
    """What the shell of one life writes to."""

    def __init__(self, disk: SimDisk, loop: ProcessLoop, dice: Dice, mean_s: float, count: Callable[[str], None]) -> None:
        self.failing: ErrorInfo | None = None
        self.committing: list[Entry] | None = None
        self._disk = disk
        self._loop = loop
        self._dice = dice
        self._mean_s = mean_s
        self._count = count
        self._entries: list[Entry] = []
        self._callbacks: list[OnCommit] = []
        self._under_way: list[OnCommit] = []

    def begin(self, epoch: int, now: float, config: ServeCoreConfig) -> None:
        """A new life; there when this returns."""
        self._disk.epoch = epoch

    def append(self, entry: Entry) -> None:
        if entry:
            self._entries.append(entry)
            self._commit()

    def after_commit(self, callback: OnCommit) -> None:
        """At once when nothing is left to write."""
        if self._entries:
            self._callbacks.append(callback)
        elif self.committing is not None:
            self._under_way.append(callback)
        else:
            callback(None)

    def close(self) -> None:
        """The process ends in good order: never asked for here."""

    def process_died(self) -> None:
        """What was under way got through, or it did not."""
        if self.committing is not None and not self._disk.full and self._dice.chance(0.5):
            for entry in self.committing:
                self._disk.apply(entry)

    def _commit(self) -> None:
        if self.committing is None and self._entries:
            self.committing, self._entries = self._entries, []
            self._under_way, self._callbacks = self._callbacks, []
            seconds = self._dice.exponential(self._mean_s)
            self._loop.timeline.call_at(self._loop.time() + seconds, self._done)

    def _done(self) -> None:
        """Who waited is told in the process's own time."""
        if not self._loop.alive:
            return
        entries, self.committing = self.committing or [], None
        callbacks, self._under_way = self._under_way, []
        if self._disk.full:
            self._count("commits failed")
            self._entries = entries + self._entries
            self.failing = _FULL
            self._loop.call_soon(self._tell, callbacks + self._callbacks, _FULL)
            self._callbacks = []
            self._loop.call_later(_RETRY_S, self._commit)
            return
        for entry in entries:
            self._disk.apply(entry)
        self._count("commits")
        self.failing = None
        self._loop.call_soon(self._tell, callbacks, None)
        self._commit()

    @staticmethod
    def _tell(callbacks: list[OnCommit], error: ErrorInfo | None) -> None:
        for callback in callbacks:
            callback(error)
