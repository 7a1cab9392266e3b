"""Latency profiles that are shipped, and how a configuration names one. Reads files; never fits or invents a number."""

from __future__ import annotations

from pathlib import Path

from parrot.configuration import ConfigurationError, load
from parrot.latency import LatencyProfile

SHIPPED = Path(__file__).parent


def shipped_profiles() -> list[str]:
    """Names of the profiles in this folder, sorted."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def find_profile(name_or_path: str, relative_to: str | Path | None = None) -> LatencyProfile:
    """The profile that `latency_profile` names: a file (relative to the folder `relative_to`), else a shipped one's name.

    Raises ConfigurationError, which names the places that were looked at.
    """
    path = Path(relative_to or ".") / name_or_path
    if path.is_file():
        return load(path, LatencyProfile)
    if name_or_path in shipped_profiles():
        return load(SHIPPED / f"{name_or_path}.json", LatencyProfile)
    known = ", ".join(shipped_profiles()) or "none"
    raise ConfigurationError(
        f"latency_profile {name_or_path!r}: no such file ({path}) and no shipped profile of that name (shipped: {known})"
    )


def profile_for(model: str, device: str, attn_func: str | None = None) -> LatencyProfile | None:
    """The shipped profile of `model` on a `device` of that kind ("cuda:1" is a "cuda"), or None; that of the attention function
    where there is one, else the first by name."""
    kind = device.partition(":")[0]
    found = [load(SHIPPED / f"{name}.json", LatencyProfile) for name in shipped_profiles()]
    found = [profile for profile in found if profile.model == model and profile.device.partition(":")[0] == kind]
    return next((profile for profile in found if profile.attn_func == attn_func), found[0] if found else None)
