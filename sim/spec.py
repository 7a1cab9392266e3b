"""What to run: a specification (lists of policies, rates, seeds, settings), and each single run that it stands for.

The command line and a JSON file say the same thing through `Specification`; there is no second form. This module also turns
a run's files into what both backends start from: the core's configuration, the engines', and a profile for each engine.
It refuses what cannot be run, with file, key and reason, before anything starts.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from parrot.configuration import ConfigurationError, load, parse, read_json
from parrot.engine.config import EmulatedEngineConfig, EngineConfig, OpenAIEngineConfig, load_engine_config
from parrot.engine.derived import description_of, limits_of, profile_of, rate_limits_of
from parrot.engine.profiles import AnyProfile, find_any_profile, shipped_profiles, shipped_remote_profiles
from parrot.protocol.errors import ParrotError
from parrot.remote_profile import RemoteProfile
from parrot.serve.config import ServeCoreConfig
from parrot.serve.policies import POLICIES, parse_policy
from sim.clients import Mode
from sim.cluster import EngineModel
from sim.metrics import METRICS
from sim.network import read_round_trips, stream
from sim.objectives import Objectives
from sim.workloads import open_workload
from sim.workloads.program import Program

Backend = Literal["sim", "emulated", "real"]

LONGEST_NAME = 200  #: bytes of a run's folder's name; a longer one is cut, and told apart by a hash
KEPT_PLACEMENTS = 1 << 40  #: with `explain`: all of them
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
        raise ConfigurationError("the specification names the same run twice (something in one of its lists is repeated)")
    return runs


def _check(spec: Specification) -> None:
    if bool(spec.workloads) == bool(spec.program):
        raise ConfigurationError("workloads, program: one of the two is needed, and only one")
    if spec.program is None and (spec.inputs is not None or spec.outputs is not None):
        raise ConfigurationError("inputs and outputs are a program's, and there is none")
    if spec.program is not None and spec.client is not Mode.SEMANTIC:
        raise ConfigurationError(f"client {spec.client} is a workload's: a program sends what its own code sends")
    for name in ("policies", "rates", "clients", "seeds"):
        if not getattr(spec, name):
            raise ConfigurationError(f"{name}: at least one is needed")
    for key, values in spec.settings.items():
        if not values:
            raise ConfigurationError(f"settings {key}: at least one value is needed")
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
    for choice in spec.engines:
        for group in choice.groups():
            if group.count < 1:
                raise ConfigurationError(f"engines {group.file}: count {group.count}: at least 1 is needed")
        if not choice.groups():
            raise ConfigurationError("engines: at least one file and one count are needed")
    for count in (choice.count for choice in choices):
        if count is not None and count < 1:
            raise ConfigurationError(f"count {count}: at least 1 program is needed")
    if any(seed < 0 for seed in spec.seeds):
        raise ConfigurationError(f"seed {min(spec.seeds)}: a seed is 0 or more")
    if spec.repeats < 1 or spec.max_gen_length < 1 or spec.engine_delay_ms < 0:
        raise ConfigurationError("repeats and max_gen_length are at least 1, engine_delay_ms at least 0")
    if spec.intervals < 0 or spec.intervals == 1:
        raise ConfigurationError(f"intervals {spec.intervals}: the number of draws a seed is 2 or more, or 0 for none")
    if spec.intervals and spec.backend != "sim":
        raise ConfigurationError(f"intervals: only a simulation draws from a profile's spread; backend is {spec.backend}")
    for metric in spec.metrics:
        if metric not in METRICS:
            close = ", ".join(difflib.get_close_matches(metric, METRICS, 3, 0.3)) or ", ".join(METRICS)
            raise ConfigurationError(f"metrics: {metric!r} is none; expected such as {close}")
    if not 0.0 < spec.confidence < 1.0:
        raise ConfigurationError(f"confidence {spec.confidence:g}: must lie between 0 and 1")
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


# ----------------------------------------------------------------------------------------- from files to a cluster


def core_config_of(run: Run) -> ServeCoreConfig:
    """The core's file with the run's settings, policy and seed. Raises ConfigurationError."""
    assert run.core is not None
    data = read_json(run.core)
    for key, value in run.settings.items():
        if not key.startswith(ENGINE_PREFIX):
            _override(data, key, value)
    config = parse(data, ServeCoreConfig, run.core)
    try:
        scheduler = parse_policy(run.policy, config.global_scheduler)
    except ParrotError as error:
        raise ConfigurationError(f"{run.core}, policy {run.policy!r}: {error}") from None
    kept = KEPT_PLACEMENTS if run.explain else 0
    scheduler = msgspec.structs.replace(scheduler, random_seed=run.seed, explain_placements=kept)
    return msgspec.structs.replace(config, global_scheduler=scheduler)


def _override(data: Any, dotted: str, value: Any) -> None:
    *sections, last = dotted.split(".")
    for section in sections:
        data = data.setdefault(section, {}) if isinstance(data, dict) else data
    if not isinstance(data, dict):
        raise ConfigurationError(f"--set {dotted}: {'.'.join(sections)!r} is no section")
    data[last] = value


def engine_configs_of(run: Run) -> list[EngineConfig]:
    """One configuration an engine, with the run's settings and a name of its own. Raises ConfigurationError."""
    overrides = {key.removeprefix(ENGINE_PREFIX): v for key, v in run.settings.items() if key.startswith(ENGINE_PREFIX)}
    configs: list[EngineConfig] = []
    for group in run.engines:
        configs += [load_engine_config(group.file, overrides)] * group.count
    total = Counter(config.name for config in configs)
    counter = {name: itertools.count() for name in total}
    return [
        msgspec.structs.replace(c, engine_name=f"{c.name}-{next(counter[c.name])}") if total[c.name] > 1 else c for c in configs
    ]


def profiles_of(run: Run, configs: Sequence[EngineConfig]) -> list[tuple[str, AnyProfile]]:
    """For each engine the name or file of its latency profile, and the profile: the run's, else the file's, else the shipped
    one of its model and device. Raises ConfigurationError when there is none, or the run's are of other models."""
    given = [(name, find_any_profile(name)) for name in run.profiles]
    chosen: dict[tuple[Any, ...], tuple[str, AnyProfile]] = {}
    profiles = []
    for config in configs:
        key = (config.model, config.device, config.engine_type, config.latency_profile)
        if key not in chosen:
            chosen[key] = _profile_of(config, given)
        profiles.append(chosen[key])
    return profiles


def _profile_of(config: EngineConfig, given: Sequence[tuple[str, AnyProfile]]) -> tuple[str, AnyProfile]:
    if given:
        fitting = [item for item in given if _fits(item[1], config)]
        if not fitting:
            have = ", ".join(f"{name} is of {_about(profile)}" for name, profile in given)
            raise ConfigurationError(
                f"engine {config.name!r} runs {config.model!r}, but no --profile is of {_needed(config)}: {have}"
            )
        return fitting[0]
    profile = profile_of(config)
    if profile is None:
        remote = isinstance(config, OpenAIEngineConfig)
        shipped = ", ".join(shipped_remote_profiles() if remote else shipped_profiles()) or "none"
        where = "behind an endpoint" if remote else f"on {config.device or config.engine_type!r}"
        raise ConfigurationError(
            f"engine {config.name!r}: no latency profile of {config.model!r} {where}; "
            f"give --profile FILE, or latency_profile in its file (shipped: {shipped})"
        )
    if not _fits(profile, config):
        named = f"its latency_profile {config.latency_profile} is of {_about(profile)}"
        raise ConfigurationError(f"engine {config.name!r} runs {config.model!r}, but {named}")
    return config.latency_profile or profile.name, profile


def _about(profile: AnyProfile) -> str:
    if isinstance(profile, RemoteProfile):
        return f"{profile.model!r} (requests to {profile.endpoint})"
    return f"{profile.model!r} (iterations)"


def _needed(config: EngineConfig) -> str:
    return "requests to it" if isinstance(config, OpenAIEngineConfig) else "it"


def _fits(profile: AnyProfile, config: EngineConfig) -> bool:
    """An engine behind an endpoint has a profile of requests, one of this project's has one of iterations; an emulated one has
    either."""
    if isinstance(profile, RemoteProfile):
        return isinstance(config, OpenAIEngineConfig | EmulatedEngineConfig) and profile.model == config.model
    if isinstance(config, OpenAIEngineConfig):
        return False
    return profile.model == config.model or profile.device == "none"  # "none": a stand-in that is of no device


def engine_models_of(run: Run) -> list[EngineModel]:
    """The engines as the simulator needs them. Raises ConfigurationError.

    In a draw of `intervals` each engine's durations are multiplied by exp(N(0, spread of its profile)), drawn from a stream
    of the seed's own, so that every policy meets the same engines; those of a remote engine's single requests deviate too, each
    engine's by a stream of its own.
    """
    configs = engine_configs_of(run)
    generator = None if run.draw is None else stream(run.seed, f"engines/{run.draw}")
    models = []
    for number, (config, (_, profile)) in enumerate(zip(configs, profiles_of(run, configs), strict=True)):
        limits = limits_of(config)
        description = description_of(config, limits, accepts_output_length=True, latency_profile=profile)
        factor = 1.0 if generator is None else math.exp(profile.spread * generator.standard_normal())
        model = EngineModel(description, limits, profile, factor)
        if isinstance(profile, RemoteProfile):
            draw = None if run.draw is None else stream(run.seed, f"requests/{run.draw}/{number}").random
            model = model._replace(rates=rate_limits_of(config, profile), draw=draw)
        models.append(model)
    return models


def spreads_of(run: Run) -> dict[str, float]:
    """The profiles of the run's engines by name, and the spread that each states: of a remote one, its requests' where its runs
    as a whole have none. Raises ConfigurationError."""
    return {profile.name: _spread_of(profile) for _, profile in profiles_of(run, engine_configs_of(run))}


def _spread_of(profile: AnyProfile) -> float:
    if isinstance(profile, RemoteProfile) and not profile.spread:
        return max(map(abs, (*profile.ttft_residuals, *profile.tpot_residuals)), default=0.0)
    return profile.spread


def check_files(run: Run) -> None:
    """Raises ConfigurationError for whatever in the run's files would stop it, before anything starts."""
    read_round_trips(run.rtt_ms)
    if run.program is not None:
        from sim.programs import check_program  # what only programs need, the server's code for one

        check_program(run)
    if run.core_url is not None:
        return
    core_config_of(run)
    configs = engine_configs_of(run)
    if run.backend != "real":
        profiles_of(run, configs)
    owners: dict[str, str] = {}
    for log, name in [(c.iteration_log, c.name) for c in configs if c.iteration_log is not None and writes_log(run, c)]:
        if owners.setdefault(log, name) != name:
            raise ConfigurationError(
                f"engines {owners[log]!r} and {name!r} would both write iteration_log {log}, and nobody could tell whose a "
                "line is: run one engine of that file, or name a log in a file for each"
            )


def writes_log(run: Run, config: EngineConfig) -> bool:
    """Whether the engine writes the iteration log that its configuration may name: it must have iterations of its own."""
    return run.backend == "real" and not isinstance(config, EmulatedEngineConfig)


def open_programs(run: Run) -> Iterator[Program]:
    """The run's workload. Raises WorkloadError."""
    return open_workload(
        run.workload,
        rate=run.rate,
        seed=run.seed,
        count=run.count,
        max_gen_length=run.max_gen_length,
        arrivals=run.arrivals,
    )
