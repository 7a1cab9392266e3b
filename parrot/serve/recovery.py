"""Builds a core, and what its shell keeps beside it, from what a journal holds of the lives before.

It decides nothing: sessions, variables, calls and results are taken in as they were accepted, in their order, and the
policy is not asked. What was in flight waits in the queue; the shell hands the core a `Restarted` as its first event.
"""

from __future__ import annotations

import msgspec

from parrot.serve import events as ev
from parrot.serve.config import ServeCoreConfig
from parrot.serve.core import ServeCore
from parrot.serve.ledger import Past, StoredText, content_keys
from parrot.serve.streams import OutputStreams
from parrot.serve.texts import Ids, Piece, Texts


class RecoveryError(Exception):
    """A journal contradicts itself. The message says where."""


def recover(config: ServeCoreConfig, past: Past, epoch: int) -> ServeCore:
    """The core as it was, in its life number `epoch`. Raises RecoveryError, ConfigurationError (the policy)."""
    core = ServeCore(config, epoch=epoch)
    for session_id, state in past.ended:
        core.recall_ended(session_id, state)
    for place, (t, event) in enumerate(past.kept):
        try:
            core.recall(event, t)
        except Exception as error:
            raise RecoveryError(f"event {place} of {len(past.kept)}, at {t:.3f} s: {error}") from error
    return core


def restore(past: Past, texts: Texts, streams: OutputStreams) -> None:
    """Fills the stores of a shell. Raises RecoveryError when a text is missing that an event names."""
    pieces: dict[str, Piece] = {}
    for _, event in past.kept:
        if type(event) is ev.OpenSession:
            texts.open(event.session_id)
            continue
        held: list[Piece] = []
        for key in content_keys(event):
            if key not in pieces:
                stored = past.texts.get(key)
                if stored is None:
                    raise RecoveryError(f"{type(event).__name__} names text {key}, which is not there")
                pieces[key] = _piece(stored)
            held.append(pieces[key])
        if held:
            texts.hold(event.task.session_id if type(event) is ev.TaskFinished else event.session_id, held)  # type: ignore[union-attr]
    for (session_id, var_id), (ids, text) in past.shown.items():
        streams.restore(session_id, var_id, ids, text)


def _piece(stored: StoredText) -> Piece:
    piece = Piece(stored.key, stored.text, next(iter(stored.ids), ""))
    piece.stored = True
    for tokenizer, ids in stored.ids.items():
        piece.ids[tokenizer] = Ids(ids, len(msgspec.json.decode(ids, type=list[int])))
    return piece
