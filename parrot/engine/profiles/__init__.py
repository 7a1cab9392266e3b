"""Latency profiles that are shipped, and how a configuration names one. Reads files; never fits or invents a number.

There are two kinds: of iterations, for engines that this project runs, and of requests to a remote endpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from parrot.configuration import ConfigurationError, parse, read_json
from parrot.latency import LatencyProfile
from parrot.remote_profile import RemoteProfile

SHIPPED = Path(__file__).parent
REMOTE = SHIPPED / "remote"

AnyProfile = LatencyProfile | RemoteProfile


def shipped_profiles() -> list[str]:
    """Names of the profiles of iterations that are shipped, sorted."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def shipped_remote_profiles() -> list[str]:
    """Names of the remote profiles that are shipped, sorted."""
    return sorted(path.stem for path in REMOTE.glob("*.json"))


def find_profile(name_or_path: str, relative_to: str | Path | None = None) -> LatencyProfile:
    """The profile of iterations that `latency_profile` names: as `find_any_profile`. Raises ConfigurationError for a remote one
    too."""
    profile = find_any_profile(name_or_path, relative_to)
    if isinstance(profile, RemoteProfile):
        raise ConfigurationError(
            f"latency_profile {name_or_path!r} is of requests to {profile.endpoint}, for an engine behind a remote endpoint "
            "(engine_type 'openai'); this one needs one of iterations, which sim.calibrate fits to its iteration log"
        )
    return profile


def find_remote_profile(name_or_path: str, relative_to: str | Path | None = None) -> RemoteProfile:
    """The remote profile that `latency_profile` names: as `find_any_profile`. Raises ConfigurationError for one of iterations
    too."""
    profile = find_any_profile(name_or_path, relative_to)
    if isinstance(profile, LatencyProfile):
        raise ConfigurationError(
            f"latency_profile {name_or_path!r} is of iterations of {profile.model!r} on {profile.device!r}; an engine behind a "
            "remote endpoint needs one of requests, which sim.calibrate fits to its request log"
        )
    return profile


def find_any_profile(name_or_path: str, relative_to: str | Path | None = None) -> AnyProfile:
    """A file (relative to the folder `relative_to`), else a shipped one's name. Raises ConfigurationError, which names the
    places that were looked at."""
    path = Path(relative_to or ".") / name_or_path
    if not path.is_file():
        shipped = {f"{name}.json": SHIPPED for name in shipped_profiles()}
        shipped |= {f"{name}.json": REMOTE for name in shipped_remote_profiles()}
        folder = shipped.get(f"{name_or_path}.json")
        if folder is None:
            known = ", ".join(sorted(name.removesuffix(".json") for name in shipped)) or "none"
            missing = f"no such file ({path}) and no shipped profile of that name (shipped: {known})"
            raise ConfigurationError(f"latency_profile {name_or_path!r}: {missing}")
        path = folder / f"{name_or_path}.json"
    return read_profile(path)


def read_profile(path: str | Path) -> AnyProfile:
    """The profile in a file. Raises ConfigurationError."""
    data: Any = read_json(path)
    if isinstance(data, dict) and data.get("kind") == "remote":
        return parse(data, RemoteProfile, path)
    return parse(data, LatencyProfile, path)


def profile_for(model: str, device: str, attn_func: str | None = None) -> LatencyProfile | None:
    """The shipped profile of iterations of `model` on a `device` of that kind ("cuda:1" is a "cuda"), or None; that of the
    attention function where there is one, else the first by name."""
    kind = device.partition(":")[0]
    found = [find_profile(str(SHIPPED / f"{name}.json")) for name in shipped_profiles()]
    found = [profile for profile in found if profile.model == model and profile.device.partition(":")[0] == kind]
    return next((profile for profile in found if profile.attn_func == attn_func), found[0] if found else None)
