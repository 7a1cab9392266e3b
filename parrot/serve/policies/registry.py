"""Policies by name: the shipped ones, those of installed packages (entry-point group `parrot.policies`), and `module:Class`.

A shipped name always means the shipped policy; an entry point cannot replace one.
"""

from __future__ import annotations

import inspect
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import msgspec
import numpy as np

from parrot.protocol.errors import ParrotError
from parrot.serve.config import GlobalSchedulerConfig
from parrot.serve.policies.atlas import Atlas
from parrot.serve.policies.base import Policy
from parrot.serve.policies.cache_aware import CacheAware
from parrot.serve.policies.clairvoyant import Clairvoyant
from parrot.serve.policies.kv_cost import KVCost
from parrot.serve.policies.least_loaded import LeastLoaded
from parrot.serve.policies.lmetric import LMetric
from parrot.serve.policies.lookahead import Lookahead
from parrot.serve.policies.parameters import Parameter
from parrot.serve.policies.parrot import Parrot
from parrot.serve.policies.parrot_artifact import ParrotArtifact
from parrot.serve.policies.plas import Plas
from parrot.serve.policies.power_of_two import PowerOfTwo
from parrot.serve.policies.preble_e2 import PrebleE2
from parrot.serve.policies.random import Random
from parrot.serve.policies.round_robin import RoundRobin
from parrot.serve.policies.session_hash import SessionHash
from parrot.serve.policies.vtc import Vtc
from parrot.serve.policies.weighted import Weighted

SHIPPED: tuple[type[Policy], ...] = (
    Parrot,
    RoundRobin,
    LeastLoaded,
    Random,
    PowerOfTwo,
    SessionHash,
    CacheAware,
    Weighted,
    KVCost,
    LMetric,
    PrebleE2,
    ParrotArtifact,
    Plas,
    Atlas,
    Vtc,
    Lookahead,
    Clairvoyant,
)

POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in SHIPPED}

SWITCHES = ("app_fifo", "graph_group", "ctx_group", "ctx_aware")

ENTRY_POINTS = "parrot.policies"  #: the group in which an installed package offers policies

_SHARES = ("", "program", "tenant")


def parse_policy(text: str, config: GlobalSchedulerConfig) -> GlobalSchedulerConfig:
    """The section with the policy that `text` names: NAME[:OPTION+OPTION…].

    NAME: a shipped policy's, an installed package's, or module:Class. An option is PARAMETER=VALUE (JSON, or a bare word),
    added to the section's own params; for `parrot` also a switch, or `all` that it has. Where switches are named the others
    are off; a bare `parrot` keeps the section's. Raises `bad_request`, which names what would be right.
    """
    parts = text.split(":")
    width = 1 if parts[0] in POLICIES or len(parts) == 1 or "=" in parts[1] else 2
    name, options = ":".join(parts[:width]), ":".join(parts[width:])
    changes: dict[str, Any] = {"policy": name}
    params: dict[str, Any] = {}
    wanted: list[str] = []
    switches = [switch for switch in SWITCHES if switch in find_policy(name).parameters]
    for option in options.split("+") if options else ():
        key, equals, value = option.partition("=")
        if equals:
            params[key] = _value(value)
        elif not switches:
            raise ParrotError("bad_request", f"policy {text!r}: {key!r} is no PARAMETER=VALUE, and {name!r} has no switches")
        elif key == "all":
            wanted += switches
        elif key in switches:
            wanted.append(key)
        else:
            raise ParrotError("bad_request", f"policy {text!r}: unknown switch {key!r}; use all, or {' + '.join(switches)}")
    if wanted:
        changes.update({switch: switch in wanted for switch in SWITCHES})
    if params:
        changes["params"] = {**config.params, **params}
    changed = msgspec.structs.replace(config, **changes)
    check_policy(changed)
    return changed


def _value(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text


@cache
def find_policy(name: str) -> type[Policy]:
    """The class of that name. Raises `bad_request` when there is none, it cannot be imported, or it is no policy."""
    shipped = POLICIES.get(name)
    if shipped is not None:
        return shipped
    module, colon, attribute = name.partition(":")
    if colon and not (module and attribute):
        raise ParrotError("bad_request", f"global_scheduler.policy {name!r}: a class of your own is module:Class", policy=name)
    if colon:
        point = EntryPoint(name, f"{module}:{attribute}", ENTRY_POINTS)
    else:
        offered = offered_policies()
        if name not in offered:
            known = ", ".join(sorted({*POLICIES, *offered}))
            raise ParrotError(
                "bad_request",
                f"global_scheduler.policy {name!r} is unknown; known are {known}; a class of your own is module:Class",
                policy=name,
            )
        point = offered[name]
    try:
        found = point.load()
    except Exception as error:  # whatever their module does
        reason = f"{type(error).__name__}: {error}"
        if module in POLICIES:
            reason += f"; {module!r} alone is a shipped policy, whose switches and params are keys of global_scheduler"
        elif isinstance(error, ModuleNotFoundError):
            reason += "; modules are looked for in the current folder and on PYTHONPATH"
        raise ParrotError("bad_request", f"global_scheduler.policy {name!r} cannot be loaded: {reason}", policy=name) from error
    fault = fault_of(found)
    if fault:
        raise ParrotError("bad_request", f"global_scheduler.policy {name!r} is no policy: {fault}", policy=name)
    policy: type[Policy] = found
    return policy


def source_of_policy(text: str) -> str | None:
    """The file with the class that `text` names (as for `parse_policy`); None for a shipped policy, and where there is none.
    Raises `bad_request`."""
    name = parse_policy(text, GlobalSchedulerConfig()).policy
    if name in POLICIES:
        return None
    try:
        return inspect.getsourcefile(find_policy(name))
    except TypeError:  # a class that was not made in a file
        return None


def offered_policies() -> dict[str, EntryPoint]:
    """What installed packages offer, by name."""
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def fault_of(found: Any) -> str | None:
    """What a class lacks to be a policy (`parrot.serve.policies.base.Policy`); None when it is one."""
    if not isinstance(found, type):
        return f"it is {type(found).__name__}, not a class; derive one from parrot.serve.policies.base.InOrder"
    for method in ("place", "order"):
        if not callable(getattr(found, method, None)):
            return f"it has no method {method}; derive it from parrot.serve.policies.base.InOrder"
    if not isinstance(getattr(found, "name", None), str):
        return "it has no class attribute `name`, a str"
    if not isinstance(getattr(found, "work_conserving", None), bool):
        return "it has no class attribute `work_conserving`, a bool"
    parameters = getattr(found, "parameters", None)
    if not isinstance(parameters, dict) or not all(isinstance(p, Parameter) for p in parameters.values()):
        return "its class attribute `parameters` must map names to parrot.serve.policies.parameters.Parameter"
    if getattr(found, "share_by", "") not in _SHARES:
        return f"its class attribute `share_by` must be one of {', '.join(map(repr, _SHARES))}"
    return None


def is_clairvoyant(config: GlobalSchedulerConfig) -> bool:
    """Whether the policy reads the true lengths of outputs, which no real engine knows. Raises `bad_request`."""
    return bool(getattr(find_policy(config.policy), "clairvoyant", False))


def check_policy(config: GlobalSchedulerConfig) -> dict[str, Any]:
    """The policy's parameters, defaults filled in. Raises `bad_request` for an unknown policy or parameter."""
    policy = find_policy(config.policy)
    parameters = {name: parameter.default for name, parameter in policy.parameters.items()}
    for switch in SWITCHES:
        if switch in policy.parameters:  # the configuration's own keys
            parameters[switch] = getattr(config, switch)
    for name, value in config.params.items():
        if name not in policy.parameters:
            known = ", ".join(policy.parameters) or "none"
            raise ParrotError(
                "bad_request",
                f"global_scheduler.params.{name}: policy {config.policy!r} has no such parameter (it has: {known})",
            )
        parameters[name] = policy.parameters[name].check(f"global_scheduler.params.{name}", value)
    return parameters


def build_policy(config: GlobalSchedulerConfig) -> Policy:
    """The configured policy. Its generator is the stream named `policy` of the section's random_seed."""
    parameters = check_policy(config)
    generator = np.random.default_rng([config.random_seed, *b"policy"])
    return find_policy(config.policy)(parameters, generator)
