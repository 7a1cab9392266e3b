"""Loads the optional compiled build of the hot modules, which `python -m parrot.build_compiled` makes.

The modules are compiled as they stand, by mypyc, into a folder beside the package's sources that nothing else reads. They
are used only when all of them were built from exactly the sources that lie here, and what they import is unchanged too (they
rely on its types); otherwise the sources are, as without a build. PARROT_PURE=1 in the environment leaves the build out,
PARROT_COMPILED names another folder to look for it in. docs/compiled.md says more.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent  #: the folder of the packages `parrot` and `sim`
ELSEWHERE = "PARROT_COMPILED"
FOLDER = Path(os.environ.get(ELSEWHERE) or Path(__file__).resolve().parent / "_compiled" / str(sys.implementation.cache_tag))
MANIFEST = FOLDER / "manifest.json"
PURE = "PARROT_PURE"

#: What is compiled, all of it or nothing. None of them defines a msgspec Struct: those stay Python's own.
MODULES = (
    "parrot.engine.admission",
    "parrot.engine.batches",
    "parrot.engine.blocks",
    "parrot.engine.bounds",
    "parrot.engine.contexts",
    "parrot.engine.core",
    "parrot.engine.emulated.engine",
    "parrot.engine.emulated.events",
    "parrot.engine.emulated.jobs",
    "parrot.engine.emulated.remote",
    "parrot.engine.emulated.timed",
    "parrot.engine.lockstep",
    "parrot.engine.rate_limits",
    "parrot.engine.running",
    "parrot.engine.state",
    "parrot.latency",
    "parrot.remote_latency",
    "parrot.serve.alarm",
    "parrot.serve.attempts",
    "parrot.serve.backlog",
    "parrot.serve.claims",
    "parrot.serve.client_requests",
    "parrot.serve.containment",
    "parrot.serve.contexts",
    "parrot.serve.core",
    "parrot.serve.dataflow",
    "parrot.serve.deadlines",
    "parrot.serve.deduction",
    "parrot.serve.engine_index",
    "parrot.serve.engines",
    "parrot.serve.gets",
    "parrot.serve.graph",
    "parrot.serve.instant",
    "parrot.serve.lifecycle",
    "parrot.serve.pauses",
    "parrot.serve.policies.atlas",
    "parrot.serve.policies.base",
    "parrot.serve.policies.cache_aware",
    "parrot.serve.policies.clairvoyant",
    "parrot.serve.policies.expected",
    "parrot.serve.policies.kv_cost",
    "parrot.serve.policies.least_loaded",
    "parrot.serve.policies.lmetric",
    "parrot.serve.policies.loaded",
    "parrot.serve.policies.lookahead",
    "parrot.serve.policies.matching",
    "parrot.serve.policies.parrot",
    "parrot.serve.policies.parrot_artifact",
    "parrot.serve.policies.passing",
    "parrot.serve.policies.plas",
    "parrot.serve.policies.power_of_two",
    "parrot.serve.policies.preble_e2",
    "parrot.serve.policies.random",
    "parrot.serve.policies.room",
    "parrot.serve.policies.roster",
    "parrot.serve.policies.round_robin",
    "parrot.serve.policies.session_hash",
    "parrot.serve.policies.share",
    "parrot.serve.policies.vtc",
    "parrot.serve.policies.weighted",
    "parrot.serve.prefixes",
    "parrot.serve.queue",
    "parrot.serve.rates",
    "parrot.serve.reports",
    "parrot.serve.scheduler",
    "parrot.serve.service",
    "parrot.serve.session_registry",
    "parrot.serve.sessions",
    "parrot.serve.states",
    "parrot.serve.submission",
    "parrot.serve.tenants",
    "parrot.serve.variables",
    "sim.actions",
    "sim.calendar",
    "sim.clients",
    "sim.cluster",
    "sim.conversation",
    "sim.engines",
    "sim.model_types",
    "sim.player",
    "sim.population",
    "sim.recorder",
    "sim.request_player",
    "sim.semantic_player",
    "sim.slots",
    "sim.steps",
)


def source_of(module: str) -> Path:
    return ROOT / (module.replace(".", "/") + ".py")


def digest_of(path: Path) -> str:
    """The sha256 of a file. Raises OSError when it is not there."""
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


class _Finder:
    """Finds the extension of a compiled module, and the library that they share."""

    def __init__(self, files: dict[str, Path]) -> None:
        self.files = files

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        file = self.files.get(name)
        if file is None:
            return None
        return spec_from_file_location(name, file, loader=ExtensionFileLoader(name, str(file)))


def in_use() -> bool:
    """Whether this process runs the compiled modules."""
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


def fits() -> bool:
    """Whether there is a build, and it is of the sources that lie here."""
    return MANIFEST.is_file() and isinstance(_files(), dict)


def _files() -> dict[str, Path] | str:
    """Module -> file of the build; or why the build is not of these sources."""
    import json

    name = ""
    try:
        manifest = json.loads(MANIFEST.read_bytes())
        for name, digest in manifest["sources"].items():
            if digest_of(ROOT / name) != digest:
                return f"{name} has changed since"
        return {module: FOLDER / file for module, file in manifest["files"].items()}
    except FileNotFoundError:
        return f"{name} is gone"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"


def use() -> bool:
    """Loads the compiled modules from now on, if they are built, fit the sources and are wanted. Whether they are."""
    if os.environ.get(PURE) or not MANIFEST.is_file():
        return False
    files = _files()
    if isinstance(files, str):
        print(f"parrot: the compiled modules are stale ({files}) and not used; `make compiled` builds them", file=sys.stderr)
        os.environ[PURE] = "1"  # said once, not by every child
        return False
    sys.meta_path.insert(0, _Finder(files))
    return True
