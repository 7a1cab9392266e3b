"""Global-scheduler policies by name. A policy is one file; `base` is the interface."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from parrot.protocol.errors import ParrotError
from parrot.serve.config import GlobalSchedulerConfig
from parrot.serve.policies.base import Policy
from parrot.serve.policies.least_loaded import LeastLoaded
from parrot.serve.policies.parrot import Parrot
from parrot.serve.policies.round_robin import RoundRobin

POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (Parrot, RoundRobin, LeastLoaded)}

SWITCHES = ("app_fifo", "graph_group", "ctx_group", "ctx_aware")


def parse_policy(text: str, config: GlobalSchedulerConfig) -> GlobalSchedulerConfig:
    """The section with the policy named `text`: NAME, `parrot:all`, or `parrot:SWITCH+SWITCH`.

    A bare `parrot` keeps the section's own switches. Raises `bad_request`, which names what would be right.
    """
    name, _, switches = text.partition(":")
    changes: dict[str, Any] = {"policy": name}
    if switches:
        if name != "parrot":
            raise ParrotError("bad_request", f"policy {text!r}: only 'parrot' has switches", policy=text)
        wanted = SWITCHES if switches == "all" else tuple(switches.split("+"))
        unknown = [switch for switch in wanted if switch not in SWITCHES]
        if unknown:
            raise ParrotError(
                "bad_request",
                f"policy {text!r}: unknown switch {unknown[0]!r}; use all, or {' + '.join(SWITCHES)}",
                policy=text,
            )
        changes.update({switch: switch in wanted for switch in SWITCHES})
    changed = msgspec.structs.replace(config, **changes)
    check_policy(changed)
    return changed


def check_policy(config: GlobalSchedulerConfig) -> dict[str, Any]:
    """The policy's parameters, defaults filled in. Raises `bad_request` for an unknown policy or parameter."""
    policy = POLICIES.get(config.policy)
    if policy is None:
        raise ParrotError(
            "bad_request",
            f"global_scheduler.policy {config.policy!r} is unknown; known are {', '.join(sorted(POLICIES))}",
            policy=config.policy,
        )
    parameters = {name: default for name, (_, default, _) in policy.parameters.items()}
    if config.policy == "parrot":
        parameters.update({switch: getattr(config, switch) for switch in SWITCHES})
    for name, value in config.params.items():
        if name not in policy.parameters:
            known = ", ".join(policy.parameters) or "none"
            raise ParrotError(
                "bad_request",
                f"global_scheduler.params.{name}: policy {config.policy!r} has no such parameter (it has: {known})",
            )
        kind, default, _ = policy.parameters[name]
        numbers = (int, float) if kind is float else kind
        accepted = isinstance(value, numbers) and (kind is bool or not isinstance(value, bool))
        if not accepted and not (value is None and default is None):
            raise ParrotError("bad_request", f"global_scheduler.params.{name} is {value!r}; expected {kind.__name__}")
        parameters[name] = value
    return parameters


def build_policy(config: GlobalSchedulerConfig) -> Policy:
    """The configured policy. Its generator is the stream named `policy` of the section's random_seed."""
    parameters = check_policy(config)
    generator = np.random.default_rng([config.random_seed, *b"policy"])
    return POLICIES[config.policy](parameters, generator)
