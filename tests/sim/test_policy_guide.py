"""docs/policies.md as a newcomer follows it: its policy is the example's, and its commands do what it says."""

from __future__ import annotations

import inspect
import json
import re
import shlex
from pathlib import Path

import pytest

import sim.check_policy
import sim.explain
import sim.run
from examples.my_policy import LeastWork
from parrot.serve.config import GlobalSchedulerConfig
from parrot.serve.policies import POLICIES, build_policy
from parrot.serve.policies.base import claims_conservation
from sim.conformance.suite import CHECKS
from tests.serve.driver import Driver, out, text, value
from tests.serve.http_support import cluster

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "policies.md").read_text()
COMMANDS = {"sim.check_policy": sim.check_policy.main, "sim.run": sim.run.main, "sim.explain": sim.explain.main}


def blocks(kind: str) -> list[str]:
    """The fenced blocks of that language."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
    return [content for language, content in fenced if language == kind]


def commands() -> list[list[str]]:
    """Those of the section "Try it", in order."""
    (block,) = [block for block in blocks("sh") if "sim.run" in block]
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]


def test_the_policy_of_the_guide_is_the_one_of_the_examples() -> None:
    (shown,) = blocks("python")
    source = inspect.getsource(LeastWork)
    assert shown.strip() == re.sub(r'\n    """.*?"""\n\n', "\n", source, count=1, flags=re.DOTALL).strip()
    assert len(shown.splitlines()) <= 30


def test_the_commands_of_the_guide_run_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    steps = commands()
    assert [step[:2] for step in steps] == [["python", "-m"]] * 3
    assert [step[2] for step in steps] == list(COMMANDS)
    for _, _, module, *arguments in steps:
        given = [argument.replace("results/mine", str(tmp_path / "mine")) for argument in arguments]
        fewer = {"sim.check_policy": ["--examples", "30"], "sim.run": ["--no-report", "--workers", "1"]}
        assert COMMANDS[module]([*given, *fewer.get(module, [])]) == 0, capsys.readouterr()
    shown = next(block for block in blocks("") if block.startswith("task "))
    printed = capsys.readouterr().out
    assert shown in printed, "the printed example is that command's"
    runs = [json.loads(line) for line in printed.splitlines() if line.startswith('{"kind":"run"')]
    assert [run["policy_errors"] for run in runs] == [{}, {}]
    mine, other = runs
    assert mine["cached_tokens"] > other["cached_tokens"]


async def test_the_configuration_of_the_guide_runs_it_on_a_core() -> None:
    (section,) = blocks("json")
    async with cluster(**json.loads(f"{{{section}}}")) as c:
        await c.engine()
        session = await c.client.session()
        assert (await c.client.get(session, await c.client.ask(session, "hello")))[0] == 200
        _, answer = await c.client.send("GET", "/v1/debug/placements?limit=3")
        assert answer["policy"] == "examples.my_policy:LeastWork"
        assert set(answer["placements"][0]["terms"]) == {"score", "reserved_tokens", "missing_tokens"}


def test_it_follows_a_prefix_as_far_as_the_parameter_says() -> None:
    def engines(weight: float) -> list[int]:
        d = Driver("examples.my_policy:LeastWork", {"params": {"prompt_weight": weight}})
        d.engine()
        d.engine()
        session = d.open()
        for i in range(3):
            (x,) = d.outputs(d.submit(session, text("system", 200), value("q", f"{i}", 50), out("x", max_gen_length=300)))
            d.get(session, x)
        return [dispatch.engine_id for dispatch in d.dispatches]

    assert engines(10.0) == [1, 1, 1]
    assert engines(0.0) == [1, 2, 1]


def test_the_guide_names_every_shipped_policy_and_every_check() -> None:
    for name in (*POLICIES, *CHECKS):
        assert f"| `{name}`" in GUIDE or f", `{name}` |" in GUIDE or f"| {name} |" in GUIDE


def test_the_guide_names_the_policies_that_claim_no_work_conservation() -> None:
    (said,) = re.findall(r"Of the shipped ones (.*?)\.\n", GUIDE, re.DOTALL)
    sections = {name: GlobalSchedulerConfig(policy=name) for name in POLICIES}
    unclaimed = {name for name, section in sections.items() if not claims_conservation(build_policy(section))}
    assert set(re.findall(r"`(\w+)`", said)) == unclaimed
