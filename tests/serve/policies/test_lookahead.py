"""`lookahead` and `clairvoyant`: the critical path, the earliest finish, reuse, and what knowing lengths changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from parrot.configuration import ConfigurationError
from parrot.serve.http_server import _configuration, _parser
from tests.serve.driver import Driver, out, read, text, value
from tests.serve.policies.scenes import ask, engines_of, heads, profile, rules, run_out

UNIT = profile(0.01, 0.001)


def test_the_task_on_the_critical_path_goes_first() -> None:
    def order(policy: str) -> list[str]:
        d = Driver(policy)
        d.engine(tasks_capacity=1, latency_profile=UNIT)
        session = d.open()
        ask(d, d.open(), "runs")
        # Three branches join: a chain of three, and two of one call, which deduction makes ready first.
        output = out("x", max_gen_length=5)
        link = d.outputs(d.submit(session, text("long0"), output))[0]
        for i in (1, 2):
            (link,) = d.outputs(d.submit(session, text(f"long{i}"), read("x", link), output))
        short = [d.outputs(d.submit(session, text(f"short{i}"), output))[0] for i in range(2)]
        inputs = [read(f"i{n}", variable) for n, variable in enumerate([*short, link])]
        (joined,) = d.outputs(d.submit(session, text("join"), *inputs, output))
        d.get(session, joined)
        return run_out(d)[1:]

    assert order("lookahead")[:2] == ["long0", "long1"]
    assert order("least_loaded")[:2] == ["short1", "short0"]


@pytest.mark.parametrize(("programs", "first"), [("shortest", "short"), ("together", "long")])
def test_between_programs_the_shortest_path_goes_first_or_all_are_one(programs: str, first: str) -> None:
    d = Driver("lookahead", {"params": {"programs": programs}})
    d.engine(tasks_capacity=1, latency_profile=UNIT)
    ask(d, d.open(), "runs")
    ask(d, d.open(), "long", 500, most=100)
    ask(d, d.open(), "short", 10, most=10)
    assert run_out(d)[1] == first


def test_a_program_that_waits_is_not_overtaken_for_ever() -> None:
    d = Driver("lookahead", {"params": {"ageing": 0.5}})
    d.engine(tasks_capacity=1, latency_profile=UNIT)
    ask(d, d.open(), "runs")
    ask(d, d.open(), "long", 500, most=100)  # its path takes 1.6 s, a short one's 0.13 s
    d.now += 10.0
    ask(d, d.open(), "short", 10, most=10)
    assert run_out(d) == ["runs", "long", "short"]


def engine_for(policy: str = "lookahead", **of_second: Any) -> Driver:
    d = Driver(policy)
    d.engine(latency_profile=UNIT)
    d.engine(**({"latency_profile": UNIT} | of_second))
    return d


def test_the_engine_that_ends_first_is_taken_though_it_is_more_loaded() -> None:
    d = engine_for(latency_profile=profile(0.1, 0.01, "slow"))
    session = d.open()
    for i in range(3):
        ask(d, session, f"t{i}", 50)
    assert engines_of(d) == [1, 1, 1], "one that is ten times as slow stays idle"
    blind = engine_for("least_loaded", latency_profile=profile(0.1, 0.01, "slow"))
    session = blind.open()
    for i in range(3):
        ask(blind, session, f"t{i}", 50)
    assert engines_of(blind) == [1, 2, 1]


def test_a_prefix_is_reused_where_that_ends_sooner() -> None:
    def where(prefix_tokens: int) -> int:
        d = engine_for()
        session = d.open()
        (x,) = d.outputs(d.submit(session, text("system", prefix_tokens), value("q", "a"), out("x")))
        d.get(session, x)
        d.first(d.dispatches[0])  # it decodes now
        (x,) = d.outputs(d.submit(session, text("system", prefix_tokens), value("q", "b"), out("x")))
        d.get(session, x)
        assert rules(d)[1] == ("earliest_finish_reusing" if engines_of(d)[1] == 1 else "earliest_finish")
        return engines_of(d)[1]

    assert where(500) == 1
    assert where(1) == 2


def test_prompts_that_are_still_to_be_computed_delay_the_next() -> None:
    d = engine_for()
    session = d.open()
    ask(d, session, "large", 4000)
    ask(d, session, "t1")
    ask(d, session, "t2")
    assert engines_of(d) == [1, 2, 2]
    d.first(d.dispatches[0])
    ask(d, session, "t3")
    assert engines_of(d)[-1] == 1, "its prompt is computed"


def test_lengths_are_learnt_by_function() -> None:
    d = engine_for()
    session = d.open()
    for i in range(3):
        ask(d, session, f"t{i}", most=500, func_name="summarise")
        d.finish(d.dispatches[0], key=f"o{i}", tokens=20)
    ask(d, session, "known", most=500, func_name="summarise")
    ask(d, session, "other", most=10, func_name="translate")
    service = d.core.scheduler.service
    assert service is not None
    known, other = (d.core.scheduler.engines.live[e].tasks for e in engines_of(d))
    assert service.expected_output(next(iter(known))) == 20
    assert service.expected_output(next(iter(other))) == 10, "no more than its limit"


def test_clairvoyant_chooses_otherwise_because_the_true_length_differs() -> None:
    def order(policy: str) -> list[str]:
        d = Driver(policy)
        d.engine(tasks_capacity=1, latency_profile=UNIT)
        ask(d, d.open(), "runs", length=1)
        ask(d, d.open(), "looks short", most=50, length=50)
        ask(d, d.open(), "looks long", most=100, length=5)
        return run_out(d)

    assert order("lookahead") == ["runs", "looks short", "looks long"]
    assert order("clairvoyant") == ["runs", "looks long", "looks short"]


def test_without_profiles_engines_are_taken_to_be_alike() -> None:
    d = Driver("lookahead")
    d.engine()
    d.engine()
    session = d.open()
    for i in range(4):
        ask(d, session, f"t{i}", 200)
    assert engines_of(d) == [1, 2, 1, 2]


def test_on_a_large_cluster_each_profile_has_its_candidates() -> None:
    d = Driver("lookahead")
    for i in range(40):
        d.engine(latency_profile=UNIT if i == 30 else profile(0.1, 0.01, "slow"))
    ask(d, d.open(), "t", 100)
    assert heads(d) == ["t"]
    assert engines_of(d) == [31]


def test_a_server_refuses_a_policy_that_reads_true_lengths(tmp_path: Path) -> None:
    file = tmp_path / "core.json"
    file.write_text('{"global_scheduler": {"policy": "clairvoyant"}, "journal_path": null}')
    with pytest.raises(ConfigurationError) as caught:
        _configuration(_parser().parse_args(["--config_path", str(file)]))
    assert "'clairvoyant' reads the true lengths of outputs" in str(caught.value)
    assert "\n" not in str(caught.value)
    told = _configuration(_parser().parse_args(["--config_path", str(file), "--lengths_are_told"]))
    assert told.global_scheduler.policy == "clairvoyant"
