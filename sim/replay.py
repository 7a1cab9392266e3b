"""`python -m sim.replay JOURNAL`: feeds what a core was told to a fresh one, which must decide the same, effect for effect.

It decides what counts as the same: every effect of every instant, in order, byte for byte as the journal has it. Under
another configuration (`--config`) decisions may differ, and it counts the tasks that went to another engine. It reads one
instant at a time and never changes the journal.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from parrot.configuration import ConfigurationError, load
from parrot.protocol.engine import TaskId
from parrot.protocol.errors import ParrotError
from parrot.serve import journal
from parrot.serve.config import ServeCoreConfig
from parrot.serve.core import ServeCore
from parrot.serve.effects import AnyEffect, Dispatch, SessionEnded
from parrot.serve.events import AnyEvent, TaskGivenUp
from parrot.serve.journal import Reading
from parrot.serve.ledger import EFFECT, Row, decode_event, encode
from parrot.serve.recovery import RecoveryError, recover

_EFFECTS = msgspec.msgpack.Decoder(AnyEffect)
_PROGRESS_S = 2.0
_SHOWN_CHARACTERS = 600  # of an event or effect


class Difference(NamedTuple):
    """The first instant in which the fresh core did otherwise. `recorded`, `replayed`: effects, in order."""

    epoch: int
    instant: int
    t: float
    events: list[AnyEvent]
    recorded: list[AnyEffect]
    replayed: list[AnyEffect]


class Decision(NamedTuple):
    """An attempt that went to another engine under another configuration. None: not dispatched on that side."""

    epoch: int
    task: TaskId
    attempt: int
    recorded: int | None
    replayed: int | None


class Replayed(msgspec.Struct):
    """What a replay found. `decisions`: attempts that either side dispatched; `changed` of them differ in their engine."""

    lives: int = 0
    instants: int = 0
    events: int = 0
    effects: int = 0
    faults: int = 0
    difference: Difference | None = None
    decisions: int = 0
    changed: int = 0
    first_changed: Decision | None = None


class _Instant(NamedTuple):
    number: int
    t: float
    events: list[AnyEvent]
    effects: list[bytes]


def replay(
    path: str | Path,
    *,
    life: int | None = None,
    config: ServeCoreConfig | None = None,
    watch: Callable[[Replayed], None] = lambda _: None,
) -> Replayed:
    """Replays a `record` journal, or only the life of that number; stops at the first difference.

    config: another configuration for every life; then nothing is a difference, and decisions are compared. Each life begins
    with what the recorded one found. `watch` is called after each instant.

    Raises ConfigurationError: the journal cannot be read, was not written in mode `record`, or has no such life.
    """
    with journal.read(path) as reading:
        found = Replayed()
        for config_of_life, epoch, begin, end in _lives(reading, life):
            found.lives += 1
            past = reading.past(begin)
            try:
                core = recover(config or config_of_life, past, epoch)
            except (RecoveryError, ParrotError) as error:
                raise ConfigurationError(f"{path}: life {epoch} cannot be begun: {error}") from error
            instants = _instants(path, reading.rows(begin, end))
            if config is not None:
                _compare_decisions(core, epoch, instants, found, watch)
            elif not _compare_effects(core, epoch, instants, found, watch):
                break
        return found


def _lives(reading: Reading, wanted: int | None) -> Iterator[tuple[ServeCoreConfig, int, int, int | None]]:
    """Configuration, epoch, and the instants `begin` … `end` - 1 of each life (None: to the last)."""
    if reading.mode != "record":
        raise ConfigurationError(
            f"{reading.path}: its journal_mode is {reading.mode!r}, which keeps only what a restart needs; "
            'set "journal_mode": "record", with a journal_path of its own, and run again'
        )
    lives = reading.lives
    if wanted is not None and wanted not in {life.epoch for life in lives}:
        known = ", ".join(str(life.epoch) for life in lives) or "none"
        raise ConfigurationError(f"{reading.path}: it has no life {wanted}; it has: {known}")
    for number, life in enumerate(lives):
        if wanted is None or life.epoch == wanted:
            yield life.config, life.epoch, life.instant, lives[number + 1].instant if number + 1 < len(lives) else None


def _instants(path: str | Path, rows: Iterator[Row]) -> Iterator[_Instant]:
    for number, group in groupby(rows, lambda row: row.instant):
        events: list[AnyEvent] = []
        effects: list[bytes] = []
        t = 0.0
        for row in group:
            t = row.t
            if row.kind == EFFECT:
                effects.append(row.body)
                continue
            try:
                event = decode_event(row.body)
            except msgspec.DecodeError as error:
                raise ConfigurationError(f"{path}: instant {number}, position {row.position}: not an event: {error}") from error
            if type(event) is not TaskGivenUp:  # the ledger's own note for a recovery, which no core was told
                events.append(event)
        yield _Instant(number, t, events, effects)


def _compare_effects(
    core: ServeCore, epoch: int, instants: Iterator[_Instant], found: Replayed, watch: Callable[[Replayed], None]
) -> bool:
    """Whether the core did the same in all of them."""
    for instant in instants:
        effects = _handle(core, instant, found)
        if [encode(effect) for effect in effects] != instant.effects:
            recorded = [_decoded(body) for body in instant.effects]
            found.difference = Difference(epoch, instant.number, instant.t, instant.events, recorded, effects)
            return False
        watch(found)
    return True


def _compare_decisions(
    core: ServeCore, epoch: int, instants: Iterator[_Instant], found: Replayed, watch: Callable[[Replayed], None]
) -> None:
    """Both sides may decide at different instants, so a decision waits for its other side until its session ends."""
    waiting: dict[int, dict[tuple[TaskId, int], tuple[bool, int]]] = {}  # session -> attempt -> is it replayed, its engine

    def one_sided(session_id: int) -> None:
        for (task, attempt), (is_replayed, engine) in waiting.pop(session_id, {}).items():
            sides = (None, engine) if is_replayed else (engine, None)
            _count(found, Decision(epoch, task, attempt, *sides))

    for instant in instants:
        replayed = _handle(core, instant, found)
        for is_replayed, effects in ((False, map(_decoded, instant.effects)), (True, iter(replayed))):
            for effect in effects:
                if type(effect) is Dispatch:
                    of_session = waiting.setdefault(effect.task.session_id, {})
                    side, engine = of_session.pop((effect.task, effect.attempt), (is_replayed, effect.engine_id))
                    if side is is_replayed:
                        of_session[effect.task, effect.attempt] = (is_replayed, effect.engine_id)
                    else:
                        sides = (engine, effect.engine_id) if is_replayed else (effect.engine_id, engine)
                        _count(found, Decision(epoch, effect.task, effect.attempt, *sides))
        for effect in replayed:
            if type(effect) is SessionEnded:
                one_sided(effect.session_id)
        watch(found)
    for session_id in list(waiting):
        one_sided(session_id)


def _count(found: Replayed, decision: Decision) -> None:
    found.decisions += 1
    if decision.recorded != decision.replayed:
        found.changed += 1
        found.first_changed = found.first_changed or decision


def _handle(core: ServeCore, instant: _Instant, found: Replayed) -> list[AnyEffect]:
    effects = core.handle(instant.events, instant.t)
    found.instants += 1
    found.events += len(instant.events)
    found.effects += len(instant.effects)
    found.faults += len(core.take_faults())
    return effects


def _decoded(body: bytes) -> AnyEffect:
    try:
        effect: AnyEffect = _EFFECTS.decode(body)
    except msgspec.DecodeError as error:
        raise ConfigurationError(f"an effect of the journal cannot be read ({error}): is it of another version?") from error
    return effect


# --------------------------------------------------------------------------------------------------------- the command


def describe(difference: Difference) -> str:
    """A difference for a reader: what the core was told, and what it did then and now, the first that differs marked."""
    epoch, instant, t, events, recorded, replayed = difference
    then, now = ([encode(effect) for effect in side] for side in (recorded, replayed))
    pairs = zip(then, now, strict=False)
    first = next((number for number, (one, other) in enumerate(pairs) if one != other), min(len(then), len(now)))
    lines = [f"the first difference is in life {epoch}, instant {instant}, at {t:.6f} s", "events:"]
    lines += [f"    {_shown(event)}" for event in events]
    for title, side in (("recorded effects", recorded), ("replayed effects", replayed)):
        lines.append(f"{title}:")
        lines += [f"{'--> ' if number == first else '    '}{_shown(effect)}" for number, effect in enumerate(side)]
        if first >= len(side):
            lines.append("--> (none)")
    return "\n".join(lines)


def _shown(message: Any) -> str:
    """An event or effect in one line of bounded length."""
    fields = msgspec.to_builtins(message)
    name = fields.pop("type")
    text = f"{name} {msgspec.json.encode(fields).decode()}"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}… ({len(text)} characters)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Exit status: 0 the same, 1 a difference, 2 it could not be done."""
    parser = argparse.ArgumentParser(
        prog="python -m sim.replay",
        description="Feeds a journal's events to a fresh core and compares what it decides with what the journal says.",
    )
    parser.add_argument("journal", metavar="JOURNAL", help='a journal written with "journal_mode": "record"')
    parser.add_argument("--life", type=int, metavar="N", help="only this life of the core (default: every one)")
    parser.add_argument(
        "--config", metavar="FILE", help="replay under this configuration of a core, and say which decisions change"
    )
    flags = parser.parse_args(arguments)
    begun_s = time.perf_counter()
    try:
        config = load(flags.config, ServeCoreConfig) if flags.config else None
        found = replay(flags.journal, life=flags.life, config=config, watch=_progress(begun_s))
    except (ConfigurationError, ParrotError) as error:
        print(f"sim.replay: {error}", file=sys.stderr)
        return 2
    counts = f"{found.lives} lives, {found.instants} instants, {found.events} events, {found.effects} effects"
    took = f"{time.perf_counter() - begun_s:.1f} s"
    if found.faults:
        print(f"sim.replay: the core contained {found.faults} faults of its own or of its policy", file=sys.stderr)
    if found.difference is not None:
        print(f"{counts}, {took}: a difference\n{describe(found.difference)}")
        return 1
    if config is None:
        print(f"{counts}, {took}: the same effects")
        return 0
    print(f"{counts}, {took}: {found.changed} of {found.decisions} decisions differ under {flags.config}")
    if found.first_changed is not None:
        epoch, task, attempt, recorded, replayed = found.first_changed
        where = [f"engine {engine}" if engine is not None else "no engine" for engine in (recorded, replayed)]
        print(
            f"the first: life {epoch}, session {task.session_id}, call {task.call}, output {task.output}, attempt {attempt}: "
            f"{where[0]} as recorded, {where[1]} here"
        )
    return 0


def _progress(begun_s: float) -> Callable[[Replayed], None]:
    """A line on a terminal's stderr now and then."""
    if not sys.stderr.isatty():
        return lambda _: None
    next_s = begun_s + _PROGRESS_S

    def show(found: Replayed) -> None:
        nonlocal next_s
        if time.perf_counter() >= next_s:
            next_s = time.perf_counter() + _PROGRESS_S
            print(f"\r{found.instants} instants, {found.events} events", end="", file=sys.stderr, flush=True)

    return show


if __name__ == "__main__":
    sys.exit(main())
