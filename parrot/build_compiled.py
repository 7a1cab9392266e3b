"""`python -m parrot.build_compiled`: compiles the hot modules with mypyc, for `parrot.compiled` to load.

Needs mypy, setuptools, a C compiler and Python's headers. It writes one folder, whole or not at all, and changes no source.

With gcc it compiles twice: simulations on the first build show it what is run how often, so that in the second what runs lies
together and what does not is out of the way. That is worth a fifth of the time of a simulation, most of which is the wait for
instructions: an event runs through more code than the processor's first cache holds.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

from parrot.compiled import ELSEWHERE, FOLDER, MANIFEST, MODULES, PURE, ROOT, digest_of, source_of

_FLAGS = "-fno-semantic-interposition"  #: nobody replaces a function of the library
_COUNT = "-fprofile-generate -fprofile-update=single"
_COUNTED = "-fprofile-use -Wno-missing-profile -Wno-coverage-mismatch"

#: What the first build is tried with: every policy, on programs of one call, with shared prefixes and as graphs.
_TRIAL = """-m sim.run --core sample_configs/core/localhost_serve_core.json --engines sample_configs/engine/sim-7b.json:4
--workload shared_prompts map_reduce chat --policy least_loaded,parrot:all,parrot:ctx_aware,* --rate 4 --count 120 --workers 1
--no-report"""


def build(profiled: bool = True) -> None:
    """Compiles the modules of these sources; `profiled`: twice, where the compiler can. Raises SystemExit with a line that says
    what is missing or went wrong."""
    compiler = _check_tools()
    sources = {str(path.relative_to(ROOT)): digest_of(path) for path in _read_by(MODULES)}
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "mypy.ini").write_text(_MYPY)
        (Path(work) / "setup.py").write_text(_SETUP)
        made = Path(work) / "lib"
        gcc = _is_gcc(compiler)
        if gcc and profiled:
            _compile(work, f"{_FLAGS} {_COUNT}")
            _describe(made, sources)
            _run(f"{_TRIAL} --out {work}/trial".split(), {ELSEWHERE: str(made), PURE: ""}, "the build's trial run failed")
        _compile(work, f"{_FLAGS} {_COUNTED if profiled else ''}" if gcc else "")
        _describe(made, sources)
        shutil.rmtree(FOLDER, ignore_errors=True)
        shutil.copytree(made, FOLDER, ignore=shutil.ignore_patterns(MANIFEST.name))
        shutil.copyfile(made / MANIFEST.name, MANIFEST)  # last: without it nothing is used
    print(f"{len(MODULES)} modules compiled into {FOLDER}")


def _compile(work: str, flags: str) -> None:
    """Compiles all modules into work/lib."""
    names = [str(source_of(module).relative_to(ROOT)) for module in MODULES]
    environment = {"PARROT_BUILD": work, "CFLAGS": f"{os.environ.get('CFLAGS', '')} {flags}", PURE: "1"}
    _run([f"{work}/setup.py", f"{work}/mypy.ini", *names], environment, "the build failed")


def _run(arguments: Sequence[str], environment: dict[str, str], wrong: str) -> None:
    """Runs this interpreter on these sources. Raises SystemExit."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"parrot.build_compiled: {wrong}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")


def _describe(made: Path, sources: dict[str, str]) -> None:
    """Writes the manifest of the libraries in `made`. Raises SystemExit when one is missing."""
    files = {}
    for path in sorted(made.rglob("*.so")) + sorted(made.rglob("*.pyd")):
        relative = path.relative_to(made)
        files[".".join([*relative.parent.parts, relative.name.split(".")[0]])] = str(relative)
    missing = [module for module in MODULES if module not in files]
    if missing:
        raise SystemExit(f"parrot.build_compiled: the build made no {missing[0]}")
    (made / MANIFEST.name).write_text(json.dumps({"sources": sources, "files": files}, indent=2) + "\n")


def _is_gcc(compiler: Sequence[str]) -> bool:
    """Whether it takes gcc's options for profiles: clang calls itself gcc too, and has others."""
    command = [*compiler, "-dM", "-E", "-x", "c", os.devnull]
    try:
        macros = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return False
    return "__GNUC__" in macros and "__clang__" not in macros


def _check_tools() -> list[str]:
    """The C compiler. Raises SystemExit for what a build needs and is not there: found out now, not after half a minute."""
    for name in ("mypyc", "setuptools"):  # mypyc is part of mypy
        if find_spec(name) is None:
            raise SystemExit(f"parrot.build_compiled: {name} is needed to build: pip install mypy setuptools")
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "").split()
    if compiler and shutil.which(compiler[0]) is None:
        raise SystemExit(f"parrot.build_compiled: there is no C compiler {compiler[0]!r}; install gcc, or set CC")
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        raise SystemExit(f"parrot.build_compiled: Python's headers are not in {headers}: install them (python3-dev)")
    return compiler


def _read_by(modules: Iterable[str]) -> list[Path]:
    """The sources of `modules`, of all of ours that these import in turn, for types only too, and of what chooses them."""
    found: set[Path] = {ROOT / "parrot" / "compiled.py"}
    todo = [source_of(module) for module in modules]
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            for name in names:
                if name.partition(".")[0] in ("parrot", "sim"):
                    candidates = (source_of(name), source_of(f"{name}.__init__"))
                    todo += [candidate for candidate in candidates if candidate.is_file()]
    return sorted(found)


_MYPY = """[mypy]
follow_imports = silent
[mypy-numpy.*,scipy.*,torch.*,transformers.*,simpy.*,pandas.*,pyarrow.*,aiohttp.*,matplotlib.*,rich.*]
follow_imports = skip
ignore_missing_imports = True
"""

_SETUP = """import os, sys
from mypyc.build import mypycify
from setuptools import setup
work, config, names = os.environ["PARROT_BUILD"], sys.argv[1], sys.argv[2:]
extensions = mypycify(["--config-file", config, "--cache-dir", work + "/cache", *names], opt_level="2", target_dir=work + "/c")
setup(name="parrot-compiled", packages=[], py_modules=[], ext_modules=extensions,
      script_args=["--quiet", "build_ext", "--force", "--build-lib", work + "/lib", "--build-temp", work + "/o"])
"""

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m parrot.build_compiled", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="compile once, without a trial: faster to build, slower to run")
    build(profiled=not parser.parse_args().quick)
