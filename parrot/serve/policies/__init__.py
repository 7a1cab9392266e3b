"""Global-scheduler policies. A policy is one file; `base` is the interface, `registry` finds them by name."""

from __future__ import annotations

from parrot.serve.policies.registry import (
    POLICIES,
    SWITCHES,
    build_policy,
    check_policy,
    find_policy,
    is_clairvoyant,
    parse_policy,
    source_of_policy,
)

__all__ = [
    "POLICIES",
    "SWITCHES",
    "build_policy",
    "check_policy",
    "find_policy",
    "is_clairvoyant",
    "parse_policy",
    "source_of_policy",
]
