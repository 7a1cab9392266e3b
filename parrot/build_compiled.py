"""`python -m parrot.build_compiled`: compiles the hot modules with mypyc, for `parrot.compiled` to load.

Needs mypy, setuptools, a C compiler and Python's headers. It writes one folder, whole or not at all, and changes no source.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from parrot.compiled import FOLDER, MANIFEST, MODULES, PURE, ROOT, digest_of, source_of


def build() -> None:
    """Compiles the modules of these sources. Raises SystemExit with a line that says what is missing or went wrong."""
    _check_tools()
    sources = {str(path.relative_to(ROOT)): digest_of(path) for path in _read_by(MODULES)}
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
            raise SystemExit(f"parrot.build_compiled: the build failed\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
        made = Path(work) / "lib"
        files = {}
        for path in sorted(made.rglob("*.so")) + sorted(made.rglob("*.pyd")):
            relative = path.relative_to(made)
            files[".".join([*relative.parent.parts, relative.name.split(".")[0]])] = str(relative)
        missing = [module for module in MODULES if module not in files]
        if missing:
            raise SystemExit(f"parrot.build_compiled: the build made no {missing[0]}")
        shutil.rmtree(FOLDER, ignore_errors=True)
        shutil.copytree(made, FOLDER)
    MANIFEST.write_text(json.dumps({"sources": sources, "files": files}, indent=2) + "\n")  # last: without it nothing is used
    print(f"{len(MODULES)} modules compiled into {FOLDER}")


def _check_tools() -> None:
    """Raises SystemExit for what a build needs and is not there: found out now, not after half a minute."""
    for name in ("mypyc", "setuptools"):  # mypyc is part of mypy
        if find_spec(name) is None:
            raise SystemExit(f"parrot.build_compiled: {name} is needed to build: pip install mypy setuptools")
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "").split()
    if compiler and shutil.which(compiler[0]) is None:
        raise SystemExit(f"parrot.build_compiled: there is no C compiler {compiler[0]!r}; install gcc, or set CC")
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        raise SystemExit(f"parrot.build_compiled: Python's headers are not in {headers}: install them (python3-dev)")


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
      script_args=["--quiet", "build_ext", "--build-lib", work + "/lib", "--build-temp", work + "/o"])
"""

if __name__ == "__main__":
    build()
