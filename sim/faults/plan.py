"""What a seed is: sizes, configuration, and which faults happen how often. Swarm testing: every seed switches a random
subset of the faults on, each at a rate of its own, because what happens all the time hides what needs a quiet moment.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from msgspec.structs import replace as replace_fields

from parrot.engine.batches import EngineLimits
from parrot.latency import FixedCost, Hinge, LatencyProfile
from parrot.serve.config import GlobalSchedulerConfig, ServeCoreConfig
from parrot.serve.policies import SWITCHES, parse_policy
from parrot.tokenizer import SYNTHETIC
from sim.faults.dice import Dice
from sim.faults.tokenizers import HALVES

POLICIES = ("parrot", "parrot", "parrot:all", "parrot:app_fifo+ctx_aware", "parrot:graph_group", "round_robin", "least_loaded")
MODELS = ("m", "n")
_NO_POLICY = {"policy": "parrot", "params": {}, **dict.fromkeys(SWITCHES, False)}
TOO_LONG = 2100  #: words of a prompt that no engine takes


@dataclass(frozen=True)
class Wire:
    """Faults of the network between two kinds of processes. Probabilities are per message (`cut`: per connection)."""

    lost: float = 0.0
    doubled: float = 0.0
    delayed: float = 0.0
    cut: float = 0.0
    longest_delay_s: float = 1.0


@dataclass(frozen=True)
class Deaths:
    """How often (mean seconds between, 0: never) something happens to a process, and how long it lasts at most."""

    every_s: float = 0.0
    longest_s: float = 0.0


@dataclass(frozen=True)
class EngineSpec:
    name: str
    model: str
    limits: EngineLimits
    profile: LatencyProfile
    halves: bool = False
    stream_interval_s: float | None = None
    heartbeat_s: float = 1.0

    def tokenizer(self, model: str) -> str:
        """The tokenizer that it uses with that model."""
        return tokenizer_of(model, self.halves)


def tokenizer_of(model: str, halves: bool) -> str:
    return HALVES if halves and model == MODELS[1] else SYNTHETIC


@dataclass(frozen=True)
class Plan:
    """Everything that a run decides before it begins."""

    seed: int
    config: ServeCoreConfig
    engines: tuple[EngineSpec, ...]
    programs: int
    chaos_s: float  #: faults happen until then; after it everything works
    outer: Wire  #: between clients and the core
    inner: Wire  #: between the core and engines
    core_kills: Deaths
    core_hangs: Deaths  #: the process stands still and goes on: its clock jumps
    core_crash: float  #: probability per step of its event loop
    core_boot_s: float
    engine_kills: Deaths
    engine_hangs: Deaths
    engine_changes: float  #: probability that an engine comes back with another model
    disk_full: Deaths
    commit_s: float  #: mean
    turn_s: float  #: at most so long what happens waits for one turn of an event loop
    nonsense: float  #: probability per attempt that the engine's answer is altered
    doubled_events: float  #: probability that an engine's event reaches the core a second time, late

    @property
    def undisturbed(self) -> bool:
        """Whether all that the core says to its engines arrives, once, in order, and both live through it."""
        restless = self.core_kills.every_s or self.core_crash or self.engine_kills.every_s or self.doubled_events
        return not (restless or self.engines_fail)

    @property
    def engines_fail(self) -> bool:
        """Whether an output may fail for good: only the failures of engines, or of what is in between, do that."""
        return bool(
            self.engine_kills.every_s
            or self.engine_hangs.every_s
            or self.engine_changes
            or self.nonsense
            or self.core_hangs.every_s
            or self.inner != Wire(longest_delay_s=self.inner.longest_delay_s)
        )


def draw_plan(seed: int, policy: str | None = None) -> Plan:
    """The plan of a seed. `policy`: in the place of the one that it draws. Raises ParrotError for one that is none."""
    dice = Dice(seed, "plan")
    heartbeat_s = dice.pick((0.5, 1.0, 2.0))
    plan = Plan(
        seed=seed,
        config=_config(dice, heartbeat_s),
        engines=_engines(dice, heartbeat_s),
        programs=dice.number(1, 6),
        chaos_s=dice.between(2.0, 14.0),
        outer=_wire(dice),
        inner=_wire(dice),
        core_kills=_deaths(dice, 0.7, (0.7, 10.0), 3.0),
        core_hangs=_deaths(dice, 0.25, (2.0, 20.0), 4.0 * heartbeat_s + 3.0),
        core_crash=dice.spread(0.0003, 0.01) if dice.chance(0.4) else 0.0,
        core_boot_s=dice.between(0.0, 0.5),
        engine_kills=_deaths(dice, 0.5, (1.0, 15.0), 5.0),
        engine_hangs=_deaths(dice, 0.3, (2.0, 15.0), 6.0 * heartbeat_s),
        engine_changes=0.4 if dice.chance(0.3) else 0.0,
        disk_full=_deaths(dice, 0.3, (1.0, 10.0), 3.0),
        commit_s=dice.spread(0.0005, 0.2),
        turn_s=dice.pick((0.0, 0.0, 0.002, 0.05)),
        nonsense=dice.spread(0.02, 0.4) if dice.chance(0.3) else 0.0,
        doubled_events=dice.spread(0.05, 0.8) if dice.chance(0.5) else 0.0,
    )
    if policy is not None:
        section = parse_policy(policy, replace_fields(plan.config.global_scheduler, **_NO_POLICY))
        plan = replace(plan, config=replace_fields(plan.config, global_scheduler=section))
    if not dice.chance(0.05):
        return plan
    never = Deaths()
    return replace(  # faults for clients and disks alone
        plan, inner=Wire(), core_kills=never, core_hangs=never, core_crash=0.0, engine_kills=never, engine_hangs=never,
        engine_changes=0.0, nonsense=0.0, doubled_events=0.0,
    )  # fmt: skip


def _wire(dice: Dice) -> Wire:
    if dice.chance(0.2):
        return Wire()
    return Wire(
        lost=dice.spread(0.003, 0.2) if dice.chance(0.5) else 0.0,
        doubled=dice.spread(0.01, 0.4) if dice.chance(0.5) else 0.0,
        delayed=dice.spread(0.01, 0.4) if dice.chance(0.5) else 0.0,
        cut=dice.spread(0.01, 0.4) if dice.chance(0.5) else 0.0,
        longest_delay_s=dice.spread(0.02, 3.0),
    )


def _deaths(dice: Dice, probability: float, every_s: tuple[float, float], longest_s: float) -> Deaths:
    if not dice.chance(probability):
        return Deaths()
    return Deaths(dice.spread(*every_s), dice.spread(0.01, longest_s))


def _config(dice: Dice, heartbeat_s: float) -> ServeCoreConfig:
    section = GlobalSchedulerConfig(
        max_attempts=dice.pick((2, 8, 8, 8)),
        max_queue_size=dice.pick((2, 20, 1000, 1000)),
        engine_wait_timeout=dice.pick((1.5, 60.0, 120.0, 120.0)),
        random_seed=dice.number(0, 1000),
    )
    return ServeCoreConfig(
        session_life_span=60.0,
        constant_prefix_var_timeout=dice.pick((2.0, 10.0)),
        engine_heartbeat_timeout=heartbeat_s * dice.pick((3.0, 5.0)),
        max_sessions_num=dice.pick((3, 100, 100)),
        global_scheduler=parse_policy(dice.pick(POLICIES), section),
        journal_path="simulated",
    )


def _engines(dice: Dice, heartbeat_s: float) -> tuple[EngineSpec, ...]:
    models = [MODELS[0]] if dice.chance(0.6) else list(MODELS)
    halves = dice.chance(0.5)  # whether the second model has a tokenizer of its own
    count = max(len(models), dice.number(1, 3))
    interval_s = dice.pick((None, 0.05, 0.2))
    specs = []
    for number in range(count):
        step_s = dice.spread(0.002, 0.06) * (dice.between(5.0, 20.0) if dice.chance(0.1) else 1.0)
        block_size = dice.pick((1, 4, 16))
        tokens = dice.pick((400, 400, 2000))
        limits = EngineLimits(
            num_blocks=-(-tokens // block_size),
            block_size=block_size,
            max_batch_size=dice.pick((1, 4, 16)),
            max_num_batched_tokens=dice.pick((32, 256)),
            max_total_tokens=tokens,
            tasks_capacity=dice.pick((1, 4, 16)),
            max_seq_len=400,
            fill_chunk_size=dice.pick((-1, 16)),
            pipeline_depth=dice.number(0, 1),
        )
        profile = LatencyProfile(
            name="drawn", model="drawn", device="none", attn_func="none", fixed=(FixedCost(1024, step_s),),
            hinges=(Hinge(0.0, step_s / 50.0),), pair_s=0.0, kv_s=0.0, task_overhead_s=dice.pick((0.0, 0.01)),
        )  # fmt: skip
        model = models[number % len(models)]
        specs.append(EngineSpec(f"engine-{number}", model, limits, profile, halves, interval_s, heartbeat_s))
    return tuple(specs)
