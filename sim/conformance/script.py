"""Random programs, engines and faults, drawn from a seed: what happens to a core in an example of the suite.

A step's draws depend on what the core has said so far, so that a script of fewer steps is the beginning of a longer one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from parrot.latency import FixedCost, Hinge, LatencyProfile
from parrot.protocol.api import Criteria, SamplingConfig
from parrot.protocol.engine import EngineDescription
from parrot.serve import events as ev
from parrot.serve.config import GlobalSchedulerConfig, ServeCoreConfig, TenantConfig
from parrot.serve.effects import Dispatch
from sim.conformance.play import Play
from sim.faults.dice import Dice

STEPS = 60  #: of an example, at most

MODELS = {"m": "t", "n": "u"}  #: model -> its tokenizer; a text has twice as many tokens under "u"
MOST_ENGINES = 6
_CRITERIA = (None, Criteria.LATENCY, Criteria.LATENCY, Criteria.THROUGHPUT, Criteria.TTFT, Criteria.TPOT)
_LIMITS = {
    "a": TenantConfig(weight=3.0, max_tokens_in_flight=150, max_queued_tasks=8),
    "*": TenantConfig(max_tokens_in_flight=400, max_sessions=6),
}
_DEADLINES = (None, None, None, None, 2.0, 20.0)
_WANTED: tuple[tuple[str, ...], ...] = ((), (), (), ("m",), ("n",), ("m", "n"))


def draw_config(dice: Dice, section: GlobalSchedulerConfig) -> ServeCoreConfig:
    """A core's configuration. `section`: names the policy and its parameters."""
    return ServeCoreConfig(
        max_sessions_num=12,
        max_engines_num=MOST_ENGINES,
        session_life_span=30.0,
        constant_prefix_var_timeout=15.0,
        max_tasks_per_session=16,
        global_scheduler=replace(
            section,
            max_attempts=dice.pick((1, 3, 8)),
            max_queue_size=dice.pick((4, 40, 1000)),
            engine_wait_timeout=20.0,
            random_seed=dice.number(0, 1000),
            explain_placements=dice.pick((0, 100_000)),
            patience=dice.pick((None, 0.5, 5.0)),
        ),
        tenants=_LIMITS if dice.chance(0.4) else {},
    )


class Script:
    """Draws steps for `play`; each call of `step` is one thing that happens."""

    def __init__(self, play: Play, dice: Dice) -> None:
        self._play = play
        self._dice = dice
        self._tenants = dice.chance(0.6)
        self._crowded = dice.chance(0.6)  # whether engines have little room
        self._faulty = dice.chance(0.7)
        self._outputs = 0
        actions: list[tuple[int, Callable[[], None]]] = [
            (6, self._program_comes),
            (2, self._call_comes),
            (2, self._get),
            (14, self._attempt_moves),
            (2, self._time_passes),
            (1, self._engine_comes),
            (1, self._value_comes),
            (1, self._session_closes),
        ]
        if self._faulty:
            actions += [
                (1, self._engine_goes),
                (2, self._attempt_fails),
                (1, self._late_event),
                (1, self._eviction),
                (1, self._get_cancelled),
            ]
            if dice.chance(0.2):
                actions.append((1, play.restart))
        self._actions = [action for weight, action in actions for _ in range(weight)]
        for _ in range(dice.number(1, MOST_ENGINES - 2)):
            self._engine_comes()

    def step(self) -> None:
        self._dice.pick(self._actions)()

    # ---------------------------------------------------------------------------------------------------- clients

    def _program_comes(self) -> None:
        """What applications do: a session, calls that build on each other, a get of the end."""
        dice, play = self._dice, self._play
        session_id = play.open(dice.pick(("a", "b")) if self._tenants else "")
        if session_id not in play.sessions:
            return
        models = dice.pick(_WANTED)
        shape = dice.pick(("single", "chain", "map_reduce", "diamond", "several"))
        if shape == "single":
            ends = self._submit(session_id, [], models)
        elif shape == "chain":
            ends = []
            for _ in range(dice.number(2, 4)):
                ends = self._submit(session_id, ends, models)
        elif shape == "map_reduce":
            maps = [out for _ in range(dice.number(2, 5)) for out in self._submit(session_id, [], models)]
            ends = self._submit(session_id, maps, models)
        elif shape == "diamond":
            top = self._submit(session_id, [], models)
            middle = [out for _ in range(2) for out in self._submit(session_id, top, models)]
            ends = self._submit(session_id, middle, models)
        else:
            ends = self._submit(session_id, [], models, outputs=dice.number(2, 3))
        if ends:
            play.get(session_id, ends[-1], dice.pick(_CRITERIA), deadline=dice.pick(_DEADLINES))

    def _submit(self, session_id: int, reads: list[str], models: tuple[str, ...], outputs: int = 1) -> list[str]:
        """A call that reads those variables; its outputs' ids, [] when it is refused or its session is gone."""
        dice = self._dice
        if session_id not in self._play.sessions:
            return []
        common = dice.pick(("S", "S", "T", "none"))
        segments: list[ev.Segment] = [] if common == "none" else [ev.Constant(text(common, 20))]
        segments += [ev.Input(f"in{place}", var_id) for place, var_id in enumerate(reads)]
        if dice.chance(0.5):
            segments.append(ev.Input("value", value=text(f"x{dice.number(0, 4)}", dice.number(0, 12))))
        segments.append(ev.Constant(text(f"q{dice.number(0, 30)}", dice.number(1, 10))))
        for place in range(outputs):
            length = dice.number(1, 30)
            most = length if dice.chance(0.5) else length + dice.number(0, 30)
            segments.append(ev.Output(f"out{place}", SamplingConfig(seed=0, max_gen_length=most, output_length=length)))
        return self._play.submit(
            session_id,
            segments,
            models=models,
            output_criteria=dice.pick(_CRITERIA) if dice.chance(0.1) else None,
            fuse_fill=dice.chance(0.15),
            cache_prefix=dice.chance(0.8),
        )

    def _call_comes(self) -> None:
        """Into an open session, reading what is there."""
        session_id = self._session()
        if session_id:
            known = self._play.sessions[session_id]
            reads = [self._dice.pick(known)] if known and self._dice.chance(0.7) else []
            self._submit(session_id, reads, self._dice.pick(_WANTED))

    def _get(self) -> None:
        session_id = self._session()
        known = self._play.sessions.get(session_id)
        if known:
            timeout = self._dice.pick((None, None, 0.0, 3.0))
            deadline = self._dice.pick(_DEADLINES)
            self._play.get(
                session_id, self._dice.pick(known[-4:]), self._dice.pick(_CRITERIA), timeout=timeout, deadline=deadline
            )

    def _value_comes(self) -> None:
        """A variable that the client fills itself, now or later."""
        session_id = self._session()
        if not session_id:
            return
        play = self._play
        play.create(session_id)
        if self._dice.chance(0.7) and play.sessions.get(session_id):
            play.set(session_id, self._dice.pick(play.sessions[session_id]), text("set", self._dice.number(0, 20)))

    def _session_closes(self) -> None:
        session_id = self._session()
        if session_id:
            self._play.close(session_id)

    def _get_cancelled(self) -> None:
        if self._play.asked:
            self._play.cancel_get(self._dice.pick(sorted(self._play.asked)))

    def _session(self) -> int:
        """An open one, 0 when there is none."""
        open_ones = sorted(self._play.sessions)
        return self._dice.pick(open_ones) if open_ones else 0

    # ---------------------------------------------------------------------------------------------------- engines

    def _engine_comes(self) -> None:
        dice = self._dice
        model = dice.pick(("m", "m", "n"))
        small = self._crowded
        self._play.register(
            EngineDescription(
                engine_name=f"e{len(self._play.history)}",
                model=model,
                tokenizer=MODELS[model],
                host="localhost",
                port=1,
                engine_type="emulated",
                tasks_capacity=dice.number(1, 4) if small else dice.number(4, 32),
                tokens_capacity=dice.number(60, 300) if small else dice.number(300, 5000),
                max_seq_len=dice.pick((60, 5000, 5000)),
                bos_tokens=dice.number(0, 1),
                accepts_output_length=True,
                latency_profile=_profile(dice, model) if dice.chance(0.6) else None,
            )
        )

    def _engine_goes(self) -> None:
        if self._play.engines:
            self._play.lose(self._dice.pick(list(self._play.engines)))

    def _attempt_moves(self) -> None:
        """It begins, shows its first token, or ends well."""
        dispatch = self._flying()
        if dispatch is None:
            return
        move = self._dice.pick(("start", "first", "finish", "finish"))
        if move == "start":
            self._play.started(dispatch)
        elif move == "first":
            self._play.first_token(dispatch)
        else:
            self._outputs += 1
            most = dispatch.sampling.max_gen_length
            tokens = min(dispatch.sampling.output_length or most, most)
            self._play.finish(dispatch, text(f"out{self._outputs}", tokens), tokens)

    def _attempt_fails(self) -> None:
        dispatch = self._flying()
        if dispatch is None:
            return
        how = self._dice.pick(("reject", "again", "for good"))
        if how == "reject":
            self._play.reject(dispatch)
        else:
            self._play.fail(dispatch, retryable=how == "again")

    def _late_event(self) -> None:
        """Of an attempt that is over: it must change nothing."""
        play = self._play
        over = [d for d in play.past[-20:] if (d.task, d.attempt) not in play.flying]
        if over:
            old = self._dice.pick(over)
            play.send(ev.TaskFinished(old.epoch, old.task, old.attempt, text("late", 3), 3))

    def _eviction(self) -> None:
        play = self._play
        if play.engines:
            engine_id = self._dice.pick(list(play.engines))
            ids = play.evictable(engine_id)
            if ids:
                play.evict(engine_id, [context_id for context_id in ids if self._dice.chance(0.5)] or ids[:1])

    def _flying(self) -> Dispatch | None:
        keys = sorted(self._play.flying)
        return self._play.flying[self._dice.pick(keys)] if keys else None

    # ------------------------------------------------------------------------------------------------------- time

    def _time_passes(self) -> None:
        self._play.time_passes(self._dice.pick((0.1, 0.1, 1.0, 5.0, 40.0)))


def text(key: str, tokens: int) -> ev.Content:
    """A text of that many tokens under the first tokenizer. (Its key says its length: equal keys are equal texts.)"""
    return ev.Content(f"{key}:{tokens}", {"t": tokens, "u": 2 * tokens})


def _profile(dice: Dice, model: str) -> LatencyProfile:
    step_s = dice.spread(0.002, 0.06)
    values: dict[str, Any] = {"device": "none", "attn_func": "none", "pair_s": 0.0, "kv_s": step_s / 1e5}
    return LatencyProfile(
        name="drawn",
        model=model,
        fixed=(FixedCost(1024, step_s),),
        hinges=(Hinge(0.0, step_s / 50.0),),
        task_overhead_s=0.0,
        **values,
    )
