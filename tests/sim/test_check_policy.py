"""`python -m sim.check_policy`: every shipped policy passes, every wrong one fails where it is wrong, every check can fail."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from typing import Any

import pytest

from parrot.serve import events as ev
from parrot.serve.config import GlobalSchedulerConfig
from parrot.serve.fault import Fault
from parrot.serve.policies import POLICIES, parse_policy
from sim.check_policy import main, parser
from sim.conformance.laws import check_all, tasks_of
from sim.conformance.play import Play, Violation
from sim.conformance.script import Script, draw_config
from sim.conformance.suite import CHECKS, run
from sim.faults.dice import Dice

WRONG = "tests.sim.wrong_policies"

#: Policy -> the check that it fails, and what the message says.
FAILS = {
    "OverCapacity": ("containment", r"ValueError: placed task .* over its capacity"),
    "Raising": ("containment", "RuntimeError: depth is not understood"),
    "Unordered": ("containment", "KeyError: "),
    "Starving": ("liveness", "tasks are queued"),
    "Idle": ("work conservation", r"claimed, but task .* waits while engine \d+ .* admits it"),
    "Global": ("determinism", r"the same events: at instant \d+ of \d+ it said Dispatch"),
    "Hashing": ("other processes", "depends on hashes"),
    "Booking": ("read-only views", r"`place` changed engine \d+: its reserved was 0, is 1"),
    "Reordering": ("read-only views", "`place` changed the queue: its _lines was"),
    "Marking": ("read-only views", r"`order` changed task .*: its depth was \d, is \d"),
    "Lying": ("explanations", "which is not among the candidates"),
    "Endless": ("explanations", "terms that are no finite numbers: score"),
    "Watched": ("explanations", "with(out)? explanations: at instant"),
    "Right:wrong=everything": ("liveness", "tasks are queued"),
}


def checked(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = main(list(arguments))
    return status, capsys.readouterr().out


@pytest.mark.parametrize("policy", [*sorted(POLICIES), "parrot:all"])
def test_every_shipped_policy_passes(policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = checked(capsys, policy, "--examples", "20")
    assert status == 0, out
    assert "all 16 checks passed" in out


@pytest.mark.parametrize("policy", list(FAILS))
def test_a_wrong_policy_fails_where_it_is_wrong(policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    check, message = FAILS[policy]
    status, out = checked(capsys, f"{WRONG}:{policy}", "--examples", "25")
    assert status == 1
    failed = re.findall(r"^(\S.*?) +FAIL", out, re.MULTILINE)
    assert check in failed, out
    assert re.search(message, out), out


def test_the_command_that_it_prints_shows_the_failure_again_in_as_few_steps_as_it_takes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, out = checked(capsys, f"{WRONG}:OverCapacity", "--examples", "25")
    command = next(line for line in out.splitlines() if "--steps" in line)
    arguments = shlex.split(command)[3:]
    steps = int(arguments[-1])
    status, again = checked(capsys, *arguments)
    assert status == 1
    assert re.search(FAILS["OverCapacity"][1], again)
    assert steps > 1
    assert checked(capsys, *arguments[:-1], str(steps - 1))[0] == 0


def test_parameters_are_given_to_it_however_they_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--examples", "10"]
    assert checked(capsys, f"{WRONG}:Right", *few)[0] == 0
    assert checked(capsys, f"{WRONG}:Right", "--param", "wrong=nothing", *few)[0] == 0
    assert checked(capsys, f"{WRONG}:Right", "--param", "wrong=everything", *few)[0] == 1
    assert "policy parrot:all+ctx_weight=3:" in checked(capsys, "parrot:all", "--param", "ctx_weight=3", "--examples", "1")[1]


def test_it_lists_policies_and_their_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    status, out = checked(capsys, "--list")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == sorted(POLICIES)
    assert "round_robin        engines in turn, blind to load" in out
    status, out = checked(capsys, "--list", "parrot")
    assert "  app_fifo = false: programs in order of arrival" in out
    assert "  latency_capacity = null: " in out
    assert "it has no parameters" in checked(capsys, "--list", "round_robin")[1]
    assert main(["--list", "nobody"]) == 1
    with pytest.raises(SystemExit):
        main([])


def test_the_example_of_its_help_runs(capsys: pytest.CaptureFixture[str]) -> None:
    example = shlex.split((parser().epilog or "").removeprefix("Example: "))
    assert example[:3] == ["python", "-m", "sim.check_policy"]
    assert checked(capsys, *example[3:], "--examples", "1")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nobody"], "'nobody' is unknown; known are"),
        (["round_robin", "--param", "speed=1"], "has no such parameter"),
        ([f"{WRONG}:Right", "--param", "wrong=a little"], "expected one of nothing, everything"),
        (["json:JSONDecoder"], "is no policy: it has no method place"),
    ],
)
def test_what_is_no_policy_is_refused_in_one_line(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert named in captured.err


def test_the_same_seed_prints_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (checked(capsys, f"{WRONG}:Idle", "--examples", "8", "--seed", "5") for _ in range(2))
    assert first == second


# ------------------------------------------------------------------------------------- every law can be seen to fail


def played(steps: int = 30, seed: int = 3) -> Play:
    """A core in the middle of an example, with tasks in flight."""
    dice = Dice(seed, "conformance")
    play = Play(draw_config(dice, parse_policy("least_loaded", GlobalSchedulerConfig(explain_placements=10))))
    script = Script(play, dice)
    for _ in range(steps):
        script.step()
    while not play.flying:
        script.step()
    check_all(play)
    return play


def _running(play: Play) -> Any:
    return next(task for task in tasks_of(play) if task.engine is not None)


def _other_domain(play: Play) -> None:
    node = _running(play).contexts[0].node
    node.domain = "another's"


def _fault(play: Play) -> None:
    play.core.scheduler.faults.append(Fault("planted", RuntimeError("planted")))
    play.send(ev.Tick())


def _second_reply(play: Play) -> None:
    event = play.request_for(ev.OpenSession, 99, "auth99")
    play.send(event, event)


def _forgotten_session(play: Play) -> None:
    play.bring_to_its_end()
    play.core.scheduler.prefixes._root("nobody's")
    play.close_everything()


BREAKS: dict[str, list[Callable[[Play], object]]] = {
    "capacity": [
        lambda play: setattr(_running(play).engine, "reserved", 1),
        lambda play: setattr(_running(play).engine, "latency_tasks", 99),
    ],
    "conservation": [
        lambda play: setattr(_running(play).call.session, "active", 99),
        lambda play: setattr(_running(play), "state", "queued"),
        lambda play: play.flying.clear(),
    ],
    "causality": [lambda play: setattr(_running(play), "ready_at", play.now + 1)],
    "contexts": [
        lambda play: play.contexts[_running(play).engine.id].add(9999),
        lambda play: setattr(_running(play).contexts[0], "tasks", 99),
    ],
    "isolation": [_other_domain],
    "no faults": [_fault],
    "answers": [_second_reply],
    "nothing left": [_forgotten_session],
}


@pytest.mark.parametrize(("check", "number"), [(check, n) for check, ways in BREAKS.items() for n in range(len(ways))])
def test_a_core_that_breaks_a_law_is_seen(check: str, number: int) -> None:
    play = played()

    def broken() -> None:
        BREAKS[check][number](play)
        check_all(play)

    with pytest.raises(Violation) as caught:
        broken()
    assert caught.value.check == check


def test_every_check_has_been_seen_to_fail() -> None:
    assert set(CHECKS) <= {check for check, _ in FAILS.values()} | set(BREAKS)


def test_a_shorter_script_is_the_beginning_of_a_longer_one() -> None:
    section = parse_policy("parrot:all", GlobalSchedulerConfig())
    short, long = played(20).history, played(30).history
    assert long[: len(short)] == short
    assert run(section, 4) == run(section, 4)
    assert run(section, 4).digest != run(section, 5).digest
