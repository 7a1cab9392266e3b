"""Outputs from a journal of a core in mode `record`: what the model said then is said again.

The rule: an output is what the journal has for the same function, the same place among the call's outputs, and the same text
in front of it. Recorded more than once, it is taken in the order of the record, and the last of them from then on. An output
whose prompt the journal does not have takes those of the same function and place in their order, over and over; how many
such there were is told. An output of a function that the journal does not know ends the run.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator

import msgspec

from parrot.configuration import ConfigurationError
from parrot.protocol.api import CallAnswer
from parrot.protocol.engine import TaskId
from parrot.serve import events as ev
from parrot.serve import journal
from parrot.serve.effects import AnyEffect, Reply
from parrot.serve.journal import Reading
from parrot.serve.ledger import EFFECT, KEPT, decode_event
from parrot.serve.texts import content_key
from sim.programs.outputs import OutputError, Wanted
from sim.programs.prompts import prompt_keys

_log = logging.getLogger(__name__)
_EFFECTS = msgspec.msgpack.Decoder(AnyEffect)

_Place = tuple[str, int]  #: the function's name, the output's place in its call


class JournalOutputs:
    """The outputs of the journal at `path`. Raises ConfigurationError when it cannot be read, or has none."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.strangers = 0  #: outputs whose prompt was not in the journal
        self._exact: dict[tuple[_Place, str], deque[str]] = {}
        self._places: dict[_Place, deque[str]] = {}
        try:
            with journal.read(path) as reading:
                if reading.mode != "record":
                    raise ConfigurationError(
                        f"--outputs journal:{path}: its journal_mode is {reading.mode!r}, which forgets texts as sessions end; "
                        'record a run with "journal_mode": "record"'
                    )
                for name, place, prompt, said in _recorded(reading):
                    self._exact.setdefault(((name, place), content_key(prompt)), deque()).append(said)
                    self._places.setdefault((name, place), deque()).append(said)
        except msgspec.DecodeError as error:
            raise ConfigurationError(f"{path}: a row cannot be read: {error}: is it of another version?") from error
        if not self._places:
            raise ConfigurationError(f"--outputs journal:{path}: no output was finished in it")

    def __call__(self, wanted: Wanted) -> str:
        place = (wanted.name, wanted.place)
        exact = self._exact.get((place, content_key(wanted.prompt)))
        if exact is not None:
            return exact.popleft() if len(exact) > 1 else exact[0]
        others = self._places.get(place)
        if others is None:
            known = ", ".join(sorted({name for name, _ in self._places}))
            raise OutputError(f"journal:{self._path} has no output {wanted.place} of function {wanted.name!r}; it has: {known}")
        if not self.strangers:
            _log.warning(
                "journal:%s: no output has the prompt of %r (instance %d); it gets another output of that function, and so "
                "does every such call",
                self._path,
                wanted.name,
                wanted.instance,
            )
        self.strangers += 1
        others.rotate(-1)
        return others[-1]


def _recorded(reading: Reading) -> Iterator[tuple[str, int, str, str]]:
    """Function, place, prompt and text of each finished output, in the order in which they finished."""
    texts = {stored.key: stored.text for stored in reading.texts()}
    calls: dict[tuple[int, int], tuple[ev.SubmitCall, CallAnswer]] = {}
    contents: dict[tuple[int, str], str] = {}  # session and variable -> key
    asked: dict[int, ev.SubmitCall | ev.SetVariable] = {}
    finished: list[tuple[TaskId, str]] = []
    for row in reading.rows():
        if row.kind != EFFECT:
            event = decode_event(row.body)
            if isinstance(event, ev.SubmitCall | ev.SetVariable):
                asked[event.request] = event
            elif isinstance(event, ev.TaskFinished) and row.kind == KEPT:
                finished.append((event.task, event.content.key))
            continue
        effect = _EFFECTS.decode(row.body)
        if not isinstance(effect, Reply) or effect.request not in asked:
            continue
        event = asked.pop(effect.request)
        if effect.error is not None:
            continue
        if isinstance(event, ev.SetVariable):
            contents[event.session_id, event.var_id] = event.content.key
            continue
        answer = msgspec.convert(effect.payload, CallAnswer)
        calls[event.session_id, answer.request_id] = (event, answer)
        given = [segment for segment in event.segments if not isinstance(segment, ev.Constant)]
        for segment, info in zip(given, answer.param_info, strict=True):
            if isinstance(segment, ev.Input) and segment.value is not None:
                contents[event.session_id, info.var_id] = segment.value.key
    for task, key in finished:
        known = calls.get((task.session_id, task.call))
        if known is not None:
            outputs = [info.var_id for info in known[1].param_info if info.is_output]
            contents[task.session_id, outputs[task.output]] = key
    for task, key in finished:
        known = calls.get((task.session_id, task.call))
        prompt = _prompt(task, *known, contents, texts) if known is not None else None
        if known is not None and prompt is not None and key in texts:
            yield known[0].func_name, task.output, prompt, texts[key]


def _prompt(
    task: TaskId,
    event: ev.SubmitCall,
    answer: CallAnswer,
    contents: dict[tuple[int, str], str],
    texts: dict[str, str],
) -> str | None:
    """The text in front of an output; None when a part of it is not in the journal."""
    keys = prompt_keys(event, answer, task.output, lambda var_id: contents.get((task.session_id, var_id)))
    parts = [texts.get(key) if key is not None else None for key in keys]
    return None if None in parts else "".join(filter(None, parts))
