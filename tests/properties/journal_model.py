"""A journal in memory: what `ledger.Entry` means, in the plainest form. No files, no crashes; whoever uses it decides which
entries get there.

Other stores (SQLite, simulated disks) are compared with this one: the same entries must give the same `Past`.
"""

from __future__ import annotations

from typing import NamedTuple

from parrot.serve.ledger import EFFECT, KEPT, Ended, Entry, Mode, Past, Row, StoredText, content_keys, decode_event


class Life(NamedTuple):
    """A core's life: its epoch, its first instant, and what time it was."""

    epoch: int
    instant: int
    t: float


class MemoryJournal:
    """Entries in, pasts out."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.lives: list[Life] = []
        self.rows: list[Row] = []
        self.texts: dict[str, StoredText] = {}
        self.shown: dict[tuple[int, str], tuple[list[int], str]] = {}
        self.ended: dict[int, tuple[Ended, int]] = {}  # with the first instant that comes after the end
        self._next_instant = 0
        self._now = 0.0

    def begin(self, epoch: int, now: float) -> None:
        """A new life. What the last one left and no row names is thrown away, as every opening does."""
        if self.mode == "recover":
            for key in self.unnamed_texts():
                del self.texts[key]
        self.lives.append(Life(epoch, self._next_instant, now))
        self._now = max(self._now, now)

    def commit(self, entry: Entry) -> None:
        """One transaction, its parts in the order of their declaration."""
        for row in entry.rows:
            self.rows.append(row)
            self._next_instant = max(self._next_instant, row.instant + 1)
            self._now = max(self._now, row.t)
        for text in entry.texts:
            self.texts.setdefault(text.key, text)
        for session, var_id, ids, text in entry.shown:
            before_ids, before = self.shown.get((session, var_id), ([], ""))
            self.shown[session, var_id] = (before_ids + list(ids), before + text)
        for key in entry.settled:
            self.shown.pop(key, None)
        for end in entry.ended:
            self.ended[end.session] = (end, self._next_instant)
            self._now = max(self._now, end.t)
            self.shown = {key: said for key, said in self.shown.items() if key[0] != end.session}
            if self.mode == "recover":
                self.rows = [row for row in self.rows if row.session != end.session]
                for text_key in end.keys:
                    self.texts.pop(text_key, None)

    def past(self, before: int | None = None) -> Past:
        """What an opening finds now; or what one would have found before instant `before` (mode `record`, and of what was
        shown nothing: it is not kept by instant)."""
        upto = self._next_instant if before is None else before
        ended = [end for end, after in self.ended.values() if after <= upto]
        over = {end.session for end in ended}
        rows = [row for row in self.rows if row.instant < upto]
        kept = [(row.t, decode_event(row.body)) for row in rows if row.kind == KEPT and row.session not in over]
        named = {key for _, event in kept for key in content_keys(event)}
        lives = [life for life in self.lives if life.instant < upto or before is None]
        return Past(
            epoch=max((life.epoch for life in lives), default=0),
            now=self._now if before is None else max([row.t for row in rows] + [life.t for life in lives], default=0.0),
            next_instant=upto,
            kept=kept,
            ended=[(end.session, end.state) for end in ended],
            texts={key: text for key, text in self.texts.items() if key in named},
            shown=dict(self.shown) if before is None else {},
        )

    def unnamed_texts(self) -> set[str]:
        """Keys of texts that no row names."""
        named = {key for row in self.rows if row.kind != EFFECT for key in content_keys(decode_event(row.body))}
        return set(self.texts) - named
