"""The optional compiled build: it is used when it is of these very sources, and otherwise as if it were not there."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from parrot import compiled
from parrot.build_compiled import _read_by
from parrot.serve.policies import POLICIES

ORIGIN = "import importlib.util as u, parrot.compiled as c; print(u.find_spec('parrot.latency').origin, c.in_use())"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the package, as far as the loader looks at it."""
    for path in _read_by(compiled.MODULES):
        copy = tmp_path / path.relative_to(compiled.ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    for name in ("__init__.py", "build_compiled.py"):
        shutil.copyfile(compiled.ROOT / "parrot" / name, tmp_path / "parrot" / name)
    return tmp_path


def build(tree: Path) -> Path:
    """What a build of `tree` leaves behind, without its libraries: which file would be loaded is all that is asked."""
    folder = tree / compiled.FOLDER.relative_to(compiled.ROOT)
    folder.mkdir(parents=True)
    sources = {str(p.relative_to(compiled.ROOT)): compiled.digest_of(p) for p in _read_by(compiled.MODULES)}
    files = {module: f"{module}.so" for module in compiled.MODULES}
    manifest = folder / compiled.MANIFEST.name
    manifest.write_text(json.dumps({"sources": sources, "files": files}))
    return manifest


def python(tree: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != compiled.PURE}
    environment = {**inherited, "PYTHONPATH": str(tree), **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd=tree, capture_output=True, text=True, check=True)


def source_line(tree: Path) -> str:
    return f"{tree}/parrot/latency.py False\n"


def test_a_build_of_these_sources_is_loaded_in_their_place(tree: Path) -> None:
    manifest = build(tree)
    done = python(tree, ORIGIN)
    assert done.stdout == f"{manifest.parent}/parrot.latency.so True\n"
    assert done.stderr == ""


def test_without_a_build_the_sources_are_used_and_nothing_is_said(tree: Path) -> None:
    done = python(tree, ORIGIN)
    assert (done.stdout, done.stderr) == (source_line(tree), "")


def test_a_build_can_lie_elsewhere(tree: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.move(build(tree).parent, elsewhere)
    done = python(tree, ORIGIN, **{compiled.ELSEWHERE: str(elsewhere)})
    assert (done.stdout, done.stderr) == (f"{elsewhere}/parrot.latency.so True\n", "")


def test_parrot_pure_leaves_a_build_out_and_says_nothing(tree: Path) -> None:
    build(tree)
    done = python(tree, ORIGIN, **{compiled.PURE: "1"})
    assert (done.stdout, done.stderr) == (source_line(tree), "")


@pytest.mark.parametrize("changed", ["parrot/latency.py", "parrot/serve/events.py"])  # compiled, and imported by compiled ones
def test_a_build_of_other_sources_is_left_out_and_said_once_for_all_processes(tree: Path, changed: str) -> None:
    build(tree)
    (tree / changed).write_text((tree / changed).read_text() + "\n# edited\n")
    child = f"import subprocess, sys, parrot; subprocess.run([sys.executable, '-c', {ORIGIN!r}], check=True)"
    done = python(tree, child)
    assert done.stdout == source_line(tree)
    assert done.stderr.count("make compiled") == 1
    assert changed in done.stderr


@pytest.mark.parametrize("text", ["", "[]", '{"sources": {}}', '{"sources": {"parrot/gone.py": "0"}, "files": {}}'])
def test_a_build_without_a_proper_manifest_is_left_out(tree: Path, text: str) -> None:
    build(tree).write_text(text)
    done = python(tree, ORIGIN)
    assert done.stdout == source_line(tree)
    assert done.stderr.count("make compiled") == 1


def test_a_build_without_a_compiler_is_refused_at_once_and_leaves_everything_as_it_was(tree: Path) -> None:
    manifest = build(tree)
    before = manifest.read_bytes()
    environment = {**os.environ, "PYTHONPATH": str(tree), "CC": "/no/such/compiler"}
    command = [sys.executable, "-m", "parrot.build_compiled"]
    done = subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no C compiler '/no/such/compiler'" in done.stderr
    assert manifest.read_bytes() == before


@pytest.mark.skipif(not compiled.fits(), reason="nothing is compiled, or not of these sources")
@pytest.mark.parametrize("policies", ["parrot:all", ",".join(POLICIES)])
def test_compiled_and_pure_runs_write_the_same_bytes(tmp_path: Path, policies: str) -> None:
    flags = ["--core", "sample_configs/core/localhost_serve_core.json", "--engines", "sample_configs/engine/sim-7b.json:2"]
    flags += ["--workload", "map_reduce", "--count", "30", "--rate", "5", "--policy", policies, "--no-report"]
    written = []
    for pure in ("", "1"):
        out = tmp_path / f"pure{pure}"
        environment = {**os.environ, "PYTHONPATH": str(compiled.ROOT), compiled.PURE: pure}
        command = [sys.executable, "-m", "sim.run", *flags, "--out", str(out)]
        subprocess.run(command, env=environment, cwd=compiled.ROOT, stdout=subprocess.DEVNULL, check=True)
        assert json.loads((out / "timing.json").read_bytes())["compiled"] is (not pure)
        files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name != "timing.json"]
        written.append({str(path.relative_to(out)): path.read_bytes() for path in files})
    assert len(written[0]) > 4
    assert written[0] == written[1]


EXHAUSTS = {
    "any", "all", "sum", "min", "max", "next", "tuple", "list", "set", "dict", "sorted", "deque", "join", "fromkeys", "extend",
}  # fmt: skip


@pytest.mark.parametrize("module", compiled.MODULES)
def test_what_is_compiled_relies_on_nothing_that_mypyc_makes_otherwise(module: str) -> None:
    """A generator expression is made a list, all of it at once, unless what it is given to uses it up (or is any, all or next,
    which mypyc knows); a generator within a function that is called twice fails."""
    nodes = list(ast.walk(ast.parse(compiled.source_of(module).read_bytes())))
    used_up = {a for node in nodes if isinstance(node, ast.Call) and _called(node) in EXHAUSTS for a in node.args}
    used_up |= {node.value for node in nodes if isinstance(node, ast.Starred)}
    lazy = [node.lineno for node in nodes if isinstance(node, ast.GeneratorExp) and node not in used_up]
    assert lazy == [], f"{module}: a list, or a function that yields, in place of the generator expressions of these lines"
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    inner = [g for f in functions for g in ast.walk(f) if isinstance(g, ast.FunctionDef) and g is not f]
    yields = [g.lineno for g in inner if any(isinstance(node, ast.Yield | ast.YieldFrom) for node in ast.walk(g))]
    assert yields == [], f"{module}: a method, or a function of the module, in place of the generators of these lines"


def _called(call: ast.Call) -> str:
    function = call.func
    return function.id if isinstance(function, ast.Name) else function.attr if isinstance(function, ast.Attribute) else ""
