"""What to run: a specification (lists of policies, rates, seeds, settings), and each single run that it stands for.

The command line (`sim.flags`) and a JSON file say the same thing through `Specification`; there is no second form. It refuses
what the specification alone shows cannot be run, and opens no file that one names (`sim.configs` does).
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import msgspec

from parrot.configuration import ConfigurationError, load
from parrot.serve.policies import POLICIES
from sim.clients import Mode
from sim.metrics import METRICS
from sim.objectives import Objectives

Backend = Literal["sim", "emulated", "real"]

LONGEST_NAME = 200  #: bytes of a run's folder's name; a longer one is cut, and told apart by a hash
EVERY = "*"  #: among policies: every shipped one that is not named
ENGINE_PREFIX = "engine."  #: settings with this prefix are of the engines' files; the rest are of the core's


class EngineGroup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`count` engines of one configuration file."""

    file: str
    count: int = 1


class EngineChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A group of engines in a specification. Several files, or several counts, are tried each."""

    file: str | tuple[str, ...]
    count: int | tuple[int, ...] = 1

    def groups(self) -> list[EngineGroup]:
        """Every group that it stands for; files outermost."""
        files = (self.file,) if isinstance(self.file, str) else self.file
        counts = (self.count,) if isinstance(self.count, int) else self.count
        return [EngineGroup(file, count) for file in files for count in counts]


class WorkloadChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A workload with rates, or a number of programs, of its own, which stand in the place of the specification's."""

    workload: str
    rates: tuple[float | None, ...] | None = None
    count: int | None = None


class Specification(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A sweep: every combination of `workloads`, `engines`, `policies`, the values of `settings`, `rates` or `clients`, and
    `seeds`, `repeats` times each.

    about: one line for a reader. workloads: names, or objects with rates or a count of their own. policies: `*` is every
    shipped policy that the list does not name. rates: programs per second; null keeps a trace's recorded times. clients:
    programs under way at any time (a closed loop, in which arrival times do not count); null: programs arrive. arrivals: how
    they arrive, as `sim.workloads.open_workload` has it. settings: a configuration key (`engine.` in front of an engine's) ->
    the values to try. rtt_ms: milliseconds, or a file of measured ones. profiles: files or shipped names, which stand above the
    engines' own. strict: an iteration outside a profile's range ends the run. core_url: a cluster that already runs. intervals:
    runs a seed with durations drawn from the profiles' spread, beside the one without. confidence: of every interval. metrics:
    the columns of the table on the terminal. tables, trace, explain, report: what is written beside the summaries. program: in
    the place of workloads, an application's own code, with the inputs of its instances and where outputs come from
    (`sim.programs`).
    """

    about: str = ""
    workloads: tuple[str | WorkloadChoice, ...] = ()
    program: str | None = None
    inputs: str | None = None
    outputs: str | None = None
    core: str | None = None
    engines: tuple[EngineChoice, ...] = ()
    policies: tuple[str, ...] = ("parrot",)
    rates: tuple[float | None, ...] = (None,)
    clients: tuple[int | None, ...] = (None,)
    arrivals: str | None = None
    seeds: tuple[int, ...] = (0,)
    repeats: int = 1
    intervals: int = 0
    client: Mode = Mode.SEMANTIC
    rtt_ms: float | str = 0.0
    settings: dict[str, tuple[Any, ...]] = {}
    profiles: tuple[str, ...] = ()
    strict: bool = False
    count: int | None = None
    max_gen_length: int = 2048
    backend: Backend = "sim"
    core_url: str | None = None
    jump: bool = True
    engine_delay_ms: float = 0.0
    objectives: Objectives = Objectives()
    confidence: float = 0.95
    metrics: tuple[str, ...] = ()
    tables: bool = True
    trace: bool = False
    explain: bool = False
    report: bool = True


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One run of a specification. `name` is its folder's. draw: null, or the number of its draw of `intervals`, from 1."""

    name: str
    workload: str
    program: str | None
    inputs: str | None
    outputs: str | None
    core: str | None
    engines: tuple[EngineGroup, ...]
    policy: str
    rate: float | None
    clients: int | None
    arrivals: str | None
    seed: int
    repeat: int
    draw: int | None
    client: Mode
    rtt_ms: float | str
    settings: dict[str, Any]
    profiles: tuple[str, ...]
    strict: bool
    count: int | None
    max_gen_length: int
    backend: Backend
    core_url: str | None
    jump: bool
    engine_delay_ms: float
    objectives: Objectives
    tables: bool
    trace: bool
    explain: bool


def cell_of(run: Run) -> Run:
    """What is the same for all runs of a cell: the run without its name, seed, repeat and draw, and without what is written of
    it, which draws have none of."""
    return msgspec.structs.replace(run, name="", seed=0, repeat=0, draw=None, tables=True, trace=False, explain=False)


_VARIED = {
    "workload", "engines", "policy", "rate", "clients", "seed", "settings", "count", "tables", "trace", "explain",
}  # fmt: skip
_SHARED = set(Run.__struct_fields__) & set(Specification.__struct_fields__) - _VARIED


def load_specification(path: str) -> Specification:
    """The specification in a JSON file. Raises ConfigurationError."""
    return load(path, Specification)


def with_every_policy(spec: Specification) -> Specification:
    """`spec` with `*` among its policies written out: the shipped ones that the list does not name, and that can run on the
    backend (what only a simulation knows, a real cluster cannot be asked for)."""
    if EVERY not in spec.policies:
        return spec
    named = {policy.partition(":")[0] for policy in spec.policies}
    others = [name for name in POLICIES if name not in named and (spec.backend == "sim" or not is_clairvoyant(name))]
    written = itertools.chain.from_iterable(others if policy == EVERY else [policy] for policy in spec.policies)
    return msgspec.structs.replace(spec, policies=tuple(dict.fromkeys(written)))


def is_clairvoyant(policy: str) -> bool:
    """Whether the policy that `policy` names (as in a specification) knows what only a simulation does."""
    name = policy.partition(":")[0]
    return name in POLICIES and bool(getattr(POLICIES[name], "clairvoyant", False))


def choices_of(spec: Specification) -> list[WorkloadChoice]:
    """The workloads, each with its rates and its number of programs; one without a name where there is a program instead."""
    found = []
    for item in spec.workloads or (spec.program or "",):
        own = WorkloadChoice(item) if isinstance(item, str) else item
        rates = spec.rates if own.rates is None else own.rates
        found.append(WorkloadChoice(own.workload, rates, spec.count if own.count is None else own.count))
    return found


def runs_of(spec: Specification) -> list[Run]:
    """Every run of `spec`: workloads outermost, then engines, policies, settings, rates, clients, seeds, repeats, draws.

    Raises ConfigurationError for what the specification alone shows to be wrong.
    """
    spec = with_every_policy(spec)
    _check(spec)
    shared = {name: getattr(spec, name) for name in Run.__struct_fields__ if name in _SHARED}
    clusters = list(itertools.product(*(choice.groups() for choice in spec.engines)))
    values = list(itertools.product(*spec.settings.values()))
    draws = [None, *range(1, spec.intervals + 1)]
    runs = []
    for choice in choices_of(spec):
        for engines, policy, chosen, rate, clients, seed, repeat, draw in itertools.product(
            clusters, spec.policies, values, choice.rates or (), spec.clients, spec.seeds, range(spec.repeats), draws
        ):
            if draw is not None and repeat:  # in simulation the same run as that of the first repeat
                continue
            run = Run(
                name="",
                workload=choice.workload,
                count=choice.count,
                engines=engines,
                policy=policy,
                settings=dict(zip(spec.settings, chosen, strict=True)),
                rate=rate,
                clients=clients,
                seed=seed,
                repeat=repeat,
                draw=draw,
                tables=spec.tables and draw is None,
                trace=spec.trace and draw is None,
                explain=spec.explain and draw is None,
                **shared,
            )
            runs.append(msgspec.structs.replace(run, name=_name(spec, run, len(clusters))))
    if len({run.name for run in runs}) != len(runs):
        ((twice, _),) = Counter(run.name for run in runs).most_common(1)
        raise ConfigurationError(f"the specification names run {twice} twice: something in one of its lists is repeated")
    return runs


def _check(spec: Specification) -> None:
    """Raises ConfigurationError for the first thing that is wrong."""
    _check_program(spec)
    _check_lists(spec)
    _check_load(spec)
    _check_numbers(spec)
    _check_presentation(spec)
    _check_cluster(spec)


def _check_program(spec: Specification) -> None:
    if bool(spec.workloads) == bool(spec.program):
        raise ConfigurationError("workloads, program: one of the two is needed, and only one")
    if spec.program is None and (spec.inputs is not None or spec.outputs is not None):
        raise ConfigurationError("inputs and outputs are a program's, and there is none")
    if spec.program is not None and spec.client is not Mode.SEMANTIC:
        raise ConfigurationError(f"client {spec.client} is a workload's: a program sends what its own code sends")


def _check_lists(spec: Specification) -> None:
    for name in ("policies", "rates", "clients", "seeds"):
        if not getattr(spec, name):
            raise ConfigurationError(f"{name}: at least one is needed")
    for key, values in spec.settings.items():
        if not values:
            raise ConfigurationError(f"settings {key}: at least one value is needed")


def _check_load(spec: Specification) -> None:
    choices = choices_of(spec)
    for rate in (rate for choice in choices for rate in choice.rates or ()):
        if rate is not None and not (rate > 0 and math.isfinite(rate)):
            raise ConfigurationError(f"rate {rate:g}: a rate is above 0 programs per second")
    if any(choice.rates == () for choice in choices):
        raise ConfigurationError("workloads: the rates of one are an empty list: leave them out, or give one")
    for clients in spec.clients:
        if clients is not None and clients < 1:
            raise ConfigurationError(f"clients {clients}: at least 1 is needed")
    given = any(choice.rates != (None,) for choice in choices)
    if spec.clients != (None,) and (given or spec.arrivals is not None):
        raise ConfigurationError("clients: in a closed loop a program starts when one ends; no rate and no arrivals beside it")


def _check_numbers(spec: Specification) -> None:
    for choice in spec.engines:
        for group in choice.groups():
            if group.count < 1:
                raise ConfigurationError(f"engines {group.file}: count {group.count}: at least 1 is needed")
        if not choice.groups():
            raise ConfigurationError("engines: at least one file and one count are needed")
    for count in (choice.count for choice in choices_of(spec)):
        if count is not None and count < 1:
            raise ConfigurationError(f"count {count}: at least 1 program is needed")
    if any(seed < 0 for seed in spec.seeds):
        raise ConfigurationError(f"seed {min(spec.seeds)}: a seed is 0 or more")
    for name, least in (("repeats", 1), ("max_gen_length", 1), ("engine_delay_ms", 0)):
        if not least <= getattr(spec, name) < math.inf:
            raise ConfigurationError(f"{name} {getattr(spec, name):g}: at least {least} is needed")
    if spec.intervals < 0 or spec.intervals == 1:
        raise ConfigurationError(f"intervals {spec.intervals}: the number of draws a seed is 2 or more, or 0 for none")
    if spec.intervals and spec.backend != "sim":
        raise ConfigurationError(f"intervals: only a simulation draws from a profile's spread; backend is {spec.backend}")


def _check_presentation(spec: Specification) -> None:
    for metric in spec.metrics:
        if metric not in METRICS:
            close = ", ".join(difflib.get_close_matches(metric, METRICS, 3, 0.3)) or ", ".join(METRICS)
            raise ConfigurationError(f"metrics: {metric!r} is none; expected such as {close}")
    if not 0.0 < spec.confidence < 1.0:
        raise ConfigurationError(f"confidence {spec.confidence:g}: must lie between 0 and 1")


def _check_cluster(spec: Specification) -> None:
    if spec.core_url is not None:
        if spec.backend == "sim":
            raise ConfigurationError("core_url: a running cluster is no simulation; use backend real")
        return
    if spec.core is None:
        raise ConfigurationError("core: the configuration file of the core is needed")
    if not spec.engines:
        raise ConfigurationError("engines: the configuration file of at least one engine is needed")


def _name(spec: Specification, run: Run, clusters: int) -> str:
    """What tells the run from the others, policy and seed always."""
    parts = [run.policy]
    if len(spec.workloads) > 1:
        parts.append(run.workload)
    if clusters > 1:
        parts.append("+".join(f"{Path(group.file).stem}x{group.count}" for group in run.engines))
    if run.rate is not None:
        parts.append(f"rate{run.rate:g}")
    if run.clients is not None:
        parts.append(f"clients{run.clients}")
    parts.append(f"seed{run.seed}")
    parts += [f"{key}={value}" for key, value in run.settings.items() if len(spec.settings[key]) > 1]
    if spec.repeats > 1:
        parts.append(f"repeat{run.repeat}")
    if run.draw is not None:
        parts.append(f"draw{run.draw}")
    name = "_".join(parts).replace("/", "-").replace(":", "-")
    if len(name.encode()) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME // 4]}_{hashlib.sha256(name.encode()).hexdigest()[:16]}"
