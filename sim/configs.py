"""A run's files, with its settings over them: the core's configuration, the engines' and a latency profile for each, the
workload. Both backends start from what is said here.

It refuses what the files alone show cannot be run, with file, key and reason; it starts nothing.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from parrot.configuration import ConfigurationError, parse, read_json
from parrot.engine.config import EmulatedEngineConfig, EngineConfig, OpenAIEngineConfig, load_engine_config
from parrot.engine.derived import description_of, limits_of, profile_of, rate_limits_of
from parrot.engine.profiles import AnyProfile, find_any_profile, shipped_profiles, shipped_remote_profiles
from parrot.protocol.errors import ParrotError
from parrot.remote_profile import RemoteProfile
from parrot.serve.config import ServeCoreConfig
from parrot.serve.policies import parse_policy
from sim.engine_models import EngineModel
from sim.network import read_round_trips, stream
from sim.spec import ENGINE_PREFIX, Run
from sim.workloads import open_workload
from sim.workloads.program import Program

KEPT_PLACEMENTS = 1 << 40  #: with `explain`: all of them
DECIDED = {
    "global_scheduler.policy": "policies (--policy)",
    "global_scheduler.random_seed": "seeds (--seed)",
    "global_scheduler.explain_placements": "explain (--explain)",
}  #: keys of the core's configuration that a run sets itself -> from what


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
    """Raises ConfigurationError for whatever in the run's files would stop it, and for settings that would change nothing,
    before anything starts."""
    for key in run.settings:
        if key in DECIDED:
            raise ConfigurationError(f"--set {key}: every run takes it from {DECIDED[key]}; a setting would change nothing")
        if run.core_url is not None:
            raise ConfigurationError(f"--set {key}: the cluster at {run.core_url} has a configuration of its own")
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
