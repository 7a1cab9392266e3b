"""An example of the suite: a script under a policy from its first step to its end, and the shortest one that fails.

`CHECKS` are what can fail; `run` finds the first that does.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from parrot.serve.config import GlobalSchedulerConfig, ServeCoreConfig
from parrot.serve.core import ServeCore
from sim.conformance.laws import check_all
from sim.conformance.play import Play, Violation
from sim.conformance.script import STEPS, Script, draw_config
from sim.conformance.watch import watch
from sim.faults.dice import Dice

#: Name -> what it asks, in the order of the table.
CHECKS = {
    "containment": "it never had to be contained: it raises nothing, and places only queued tasks where they fit",
    "read-only views": "`place` and `order` change nothing that they are shown",
    "capacity": "no engine has more tasks or tokens than it takes, by the core's count",
    "conservation": "every task is in one state, and the books agree",
    "causality": "submitted, ready, dispatched, first token, finished: in that order",
    "contexts": "engines hold what the core believes, contexts are counted",
    "isolation": "no session shares contexts across domains",
    "liveness": "when nothing is pending nothing is queued or running",
    "work conservation": "the first task of a lane waits only if no engine admits it (where claimed)",
    "determinism": "the same events have the same effects again, in this process and in another",
    "explanations": "the chosen engine is among the candidates, with room; to explain changes no decision",
    "nothing left": "when all sessions are closed nothing is kept",
    "answers": "every request is answered once, every dispatch goes to an engine that is there",
    "no faults": "nothing in the core fails",
}


class Outcome(NamedTuple):
    """What came of an example. `check`: None, or what failed first; `steps`: how many were played until then; `digest`: of all
    that the core said; `placements`: how many it made."""

    seed: int
    steps: int
    check: str | None
    message: str
    digest: str
    placements: int


def run(section: GlobalSchedulerConfig, seed: int, steps: int = STEPS) -> Outcome:
    """The example of `seed`. `section`: names the policy and its parameters."""
    dice = Dice(seed, "conformance")
    play = Play(draw_config(dice, section))
    watched = watch(play.core)
    done = 0
    violation: Violation | None = None
    try:
        script = Script(play, dice)
        check_all(play)
        while done < steps:
            done += 1
            script.step()
            if watched.found is not None:
                raise watched.found
            check_all(play)
        play.bring_to_its_end()
        check_all(play)
        play.close_everything()
        _replayed(play, play.config, "determinism", "the same events")
        explained = play.config.global_scheduler.explain_placements > 0
        other = replace(play.config.global_scheduler, explain_placements=0 if explained else 1000)
        how = "the same events, without explanations" if explained else "the same events, with explanations"
        _replayed(play, replace(play.config, global_scheduler=other), "explanations", how)
    except Violation as found:
        violation = found
    if watched.found is not None:
        violation = watched.found  # what came of it is no finding of its own
    check, message = (violation.check, str(violation)) if violation is not None else (None, "")
    return Outcome(seed, done, check, message, _digest(play), len(play.past))


def shortest(section: GlobalSchedulerConfig, failed: Outcome) -> Outcome:
    """The same seed with the fewest steps that fail the same check."""
    for steps in range(1, failed.steps):
        outcome = run(section, failed.seed, steps)
        if outcome.check == failed.check:
            return outcome
    return failed


def _replayed(play: Play, config: ServeCoreConfig, check: str, how: str) -> None:
    """Raises the Violation unless a fresh core says what `play`'s said."""
    fresh = ServeCore(config)
    encode = msgspec.json.encode
    for instant, ((events, now), effects) in enumerate(zip(play.history, play.effects, strict=True)):
        again = fresh.handle(events, now)
        if encode(again) != encode(effects):
            before, now_said = next((a, b) for a, b in zip([*effects, None], [*again, None], strict=False) if a != b)
            where = f"at instant {instant} of {len(play.history)}"
            raise Violation(check, f"{how}: {where} it said {now_said!r}, before {before!r}")


def _digest(play: Play) -> str:
    return hashlib.blake2b(msgspec.json.encode(play.effects), digest_size=16).hexdigest()
