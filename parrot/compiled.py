"""The optional compiled build of the hot modules, and who uses it: `python -m parrot.compiled` builds, `use` loads.

The modules are compiled as they stand, by mypyc, into a folder beside the package's sources that nothing else reads. They
are used only when all of them were built from exactly the sources that lie here; otherwise the sources are, as without a
build. PARROT_PURE=1 in the environment leaves the build out. docs/compiled.md says more.
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
FOLDER = Path(__file__).resolve().parent / "_compiled" / str(sys.implementation.cache_tag)
MANIFEST = FOLDER / "manifest.json"
PURE = "PARROT_PURE"

#: What is compiled, all of it or nothing. None of them defines a msgspec Struct: those stay classes of Python's.
MODULES = (
    "parrot.engine.admission",
    "parrot.engine.blocks",
    "parrot.engine.contexts",
    "parrot.engine.core",
    "parrot.engine.emulated.engine",
    "parrot.engine.lockstep",
    "parrot.engine.running",
    "parrot.latency",
    "parrot.serve.core",
    "parrot.serve.pauses",
    "parrot.serve.policies.least_loaded",
    "parrot.serve.policies.parrot",
    "parrot.serve.queue",
    "parrot.serve.scheduler",
    "parrot.serve.states",
    "parrot.serve.submission",
    "sim.clients",
    "sim.engines",
    "sim.population",
)


def source_of(module: str) -> Path:
    return ROOT / (module.replace(".", "/") + ".py")


def digests() -> dict[str, str]:
    """Module -> sha256 of its source. Raises OSError when one is not there."""
    import hashlib

    return {module: hashlib.sha256(source_of(module).read_bytes()).hexdigest() for module in MODULES}


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


def use() -> bool:
    """Loads the compiled modules from now on, if they are built, fit the sources and are wanted. Whether they are."""
    if os.environ.get(PURE) or not MANIFEST.is_file():
        return False
    import json

    try:
        manifest = json.loads(MANIFEST.read_bytes())
        fits = manifest["sources"] == digests()
        files = {name: FOLDER / file for name, file in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        print("parrot: the compiled modules are not of these sources and are left out; make compiled builds them", file=sys.stderr)
        os.environ[PURE] = "1"  # said once, not by every child
        return False
    sys.meta_path.insert(0, _Finder(files))  # type: ignore[arg-type]
    return True


def build() -> None:
    """Compiles the modules of these sources. Raises SystemExit with a line that says what is missing or went wrong."""
    import json
    import shutil
    import subprocess
    import tempfile

    try:
        import mypyc.build  # noqa: F401 - part of mypy
    except ImportError:
        raise SystemExit("parrot.compiled: mypy is needed to build (pip install mypy setuptools)") from None
    sources = digests()
    with tempfile.TemporaryDirectory() as work:
        config = Path(work) / "mypy.ini"
        config.write_text(_MYPY)
        script = Path(work) / "setup.py"
        script.write_text(_SETUP)
        names = [str(source_of(module).relative_to(ROOT)) for module in MODULES]
        command = [sys.executable, str(script), str(config), *names]
        environment = {**os.environ, PURE: "1", "PYTHONPATH": str(ROOT), "PARROT_BUILD": work}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"parrot.compiled: the build failed\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
        made = Path(work) / "lib"
        files = {}
        for path in sorted(made.rglob("*.so")) + sorted(made.rglob("*.pyd")):
            relative = path.relative_to(made)
            files[".".join([*relative.parent.parts, relative.name.split(".")[0]])] = str(relative)
        missing = [module for module in MODULES if module not in files]
        if missing:
            raise SystemExit(f"parrot.compiled: the build made no {missing[0]}")
        shutil.rmtree(FOLDER, ignore_errors=True)
        shutil.copytree(made, FOLDER)
    MANIFEST.write_text(json.dumps({"sources": sources, "files": files}, indent=2) + "\n")
    print(f"{len(MODULES)} modules compiled into {FOLDER}")


_MYPY = """[mypy]
follow_imports = silent
[mypy-numpy.*,scipy.*,torch.*,transformers.*,simpy.*,pandas.*,pyarrow.*,aiohttp.*,matplotlib.*,rich.*]
follow_imports = skip
"""

_SETUP = """import os, sys
from mypyc.build import mypycify
from setuptools import setup
work, config, names = os.environ["PARROT_BUILD"], sys.argv[1], sys.argv[2:]
extensions = mypycify(["--config-file", config, "--cache-dir", work + "/cache", *names], opt_level="2", target_dir=work + "/c")
setup(name="parrot-compiled", packages=[], py_modules=[], ext_modules=extensions,
      script_args=["--quiet", "build_ext", "--build-lib", work + "/lib", "--build-temp", work + "/o"])
"""

if __name__ == "__main__":
    build()
