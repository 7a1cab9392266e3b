"""A simulated cluster as a whole: what holds for any programs on it, under any policy."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from parrot.engine.emulated.events import Iterations
from parrot.serve.config import GlobalSchedulerConfig, ServeCoreConfig
from parrot.serve.policies import POLICIES, parse_policy
from sim.clients import Mode
from sim.network import Constant, Measured, Network, stream
from sim.population import StuckError, simulate
from sim.recorder import Recorder
from sim.timeline import Timeline
from sim.workloads.program import Call, Get, Program, Text, Write
from tests.sim.clusters import engine
from tests.sim.programs import chain, chat, map_reduce, one_call, programs

LOCAL = Constant(0.0)
NO_SHRINK = (Phase.explicit, Phase.reuse, Phase.generate)  # a failure is found at once; making it small takes minutes
POLICY_NAMES = ("parrot", "parrot:all", "round_robin", "least_loaded")


def config(policy: str = "parrot", **fields: object) -> ServeCoreConfig:
    scheduler = parse_policy(policy, GlobalSchedulerConfig())
    return msgspec.structs.replace(ServeCoreConfig(), global_scheduler=scheduler, **fields)


def run(some: list[Program], policy: str = "parrot", network: Network = LOCAL, **options: object) -> Recorder:
    engines = options.pop("engines", [engine("e0"), engine("e1")])
    options.setdefault("max_gen_length", 64)  # low, so that an engine takes several tasks at once
    return simulate(some, config(policy), engines, network=network, **options)  # type: ignore[arg-type]


def several(strategy: st.SearchStrategy[Program]) -> st.SearchStrategy[list[Program]]:
    def numbered(drawn: list[Program]) -> list[Program]:
        arriving = sorted(drawn, key=lambda p: p.arrival_s)
        return [msgspec.structs.replace(p, id=f"p{i}") for i, p in enumerate(arriving)]

    return st.lists(strategy, min_size=1, max_size=5).map(numbered)


def rows(recorder: Recorder) -> list[list[tuple[object, ...]]]:
    return [sorted(kind, key=repr) for kind in (recorder.programs, recorder.gets, recorder.calls, recorder.tasks)]


@settings(max_examples=60, deadline=None, phases=NO_SHRINK)
@given(several(programs()), st.sampled_from(Mode), st.sampled_from(POLICY_NAMES), st.sampled_from([0.0, 0.3]))
def test_every_program_finishes_and_no_effect_comes_before_its_cause(
    some: list[Program], mode: Mode, policy: str, rtt_s: float
) -> None:
    recorder = run(some, policy, Constant(rtt_s), mode=mode)
    counts = recorder.counts
    assert counts["programs"] == counts["finished"] == len(some)
    done = [task for task in recorder.tasks if task.state == "finished"]
    for task in done:
        times = [task.ready_s, task.dispatched_s, task.started_s, task.first_token_s, task.finished_s]
        assert None not in times
        assert times == sorted(times)  # type: ignore[type-var]
    lengths = {
        (n, c, o): write.tokens
        for n, p in enumerate(some)
        for c, call in enumerate(p.calls)
        for o, write in enumerate(s for s in call.segments if hasattr(s, "max_gen_length"))
    }
    for task in done:
        assert task.output_tokens == lengths[task.program, task.call, task.output]
    assert counts["output_tokens"] == sum(task.output_tokens for task in done)
    assert all(row.jct_s is not None and row.jct_s >= 0 for row in recorder.programs)


@settings(max_examples=40, deadline=None, phases=NO_SHRINK)
@given(
    several(programs()),
    st.sampled_from(Mode),
    st.sampled_from(["parrot:all", "round_robin"]),
    st.sampled_from([0, 1]),
    st.sampled_from([256, 4096]),
)
def test_jumping_over_equal_iterations_changes_nothing(
    some: list[Program], mode: Mode, policy: str, depth: int, kv_tokens: int
) -> None:
    def outcome(jump: bool) -> list[list[tuple[object, ...]]]:
        engines = [engine(name, kv_tokens=kv_tokens, jump_depth=depth, max_seq_len=4096) for name in ("e0", "e1")]
        return rows(run(some, policy, mode=mode, jump=jump, engines=engines))

    assert outcome(True) == outcome(False)


def workload(count: int = 30) -> Iterator[Program]:
    kinds = (one_call, lambda **k: chain(4, **k), lambda **k: map_reduce(5, **k), lambda **k: chat(3, **k))
    for number in range(count):
        yield kinds[number % 4](name=f"p{number}", arrival_s=0.2 * number)


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_the_same_seed_gives_the_same_results(policy: str) -> None:
    def outcome(seed: int) -> list[list[tuple[object, ...]]]:
        network = Measured([0.05, 0.1, 0.2], stream(seed, "network"))
        return rows(run(list(workload()), policy, network))

    assert outcome(1) == outcome(1) != outcome(2)


def test_a_program_is_slower_in_request_mode_the_farther_away_it_is() -> None:
    def jct_s(mode: Mode, rtt_s: float) -> float:
        return run([chain(8)], network=Constant(rtt_s), mode=mode).programs[0].jct_s  # type: ignore[return-value]

    assert jct_s(Mode.REQUEST, 0.25) - jct_s(Mode.REQUEST, 0.0) == pytest.approx(8 * 0.25)
    assert jct_s(Mode.SEMANTIC, 0.25) - jct_s(Mode.SEMANTIC, 0.0) == pytest.approx(3 * 0.25)


def test_think_time_is_neither_work_nor_waiting_of_the_engine() -> None:
    (row,) = run([chat(3, think_s=5.0)]).programs
    assert row.jct_s is not None
    assert 10.0 < row.jct_s < 12.0


def test_a_shared_prefix_is_found_in_memory_under_ctx_aware() -> None:
    some = [one_call(f"p{i}", arrival_s=5.0 * i, tenant="t") for i in range(4)]
    some = [msgspec.structs.replace(p, calls=one_call("same", prompt=320).calls) for p in some]
    cached = [row.cached_tokens for row in run(some, "parrot:all").tasks]
    assert cached == [0, 319, 319, 319]  # the last token is computed again: the next one is sampled from it


def test_refusals_are_counted_and_every_program_still_finishes() -> None:
    scheduler = GlobalSchedulerConfig(max_queue_size=1)
    core = ServeCoreConfig(global_scheduler=scheduler, max_sessions_num=3)
    some = [one_call(f"p{i}") for i in range(12)]
    recorder = simulate(some, core, [engine(batch=1)], network=LOCAL)
    assert recorder.counts["finished"] == 12
    assert recorder.counts["refused"] > 0


def test_a_program_that_fails_is_counted_and_named_and_hurts_no_other() -> None:
    recorder = run([one_call("big", prompt=5000), one_call("small")])
    assert (recorder.counts["finished"], recorder.counts["failed"]) == (1, 1)
    assert recorder.errors == {"task_too_large": 1}
    assert recorder.programs[0].error is not None or recorder.programs[1].error is not None


def test_a_run_that_cannot_end_says_which_program_waits_for_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(POLICIES["round_robin"], "place", lambda *_: iter(()))
    with pytest.raises(StuckError, match="program 'stuck' waits for get 'g' of variable 'answer'"):
        run([one_call("stuck")], "round_robin")


def test_of_a_client_without_variables_the_requests_under_way_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(POLICIES["round_robin"], "place", lambda *_: iter(()))
    for program, awaited in (
        (one_call("stuck"), "output 'answer' of call 0 "),
        (chain(3, "stuck"), "output '[^']*' of call 0 "),
        (map_reduce(2, "stuck"), "output '[^']*' of call 0 .*, output '[^']*' of call 1 "),
    ):
        with pytest.raises(StuckError, match=f"program 'stuck' waits for {awaited}") as stuck:
            run([program], "round_robin", mode=Mode.REQUEST)
        assert "control edges" not in str(stuck.value)


class Watched(Program, gc=True, weakref=True):
    """A program of which can be seen whether somebody still has it."""


def watched(some: list[Program], known: list[weakref.ref[Program]]) -> Iterator[Program]:
    """Each of `some`, anew, as the run asks for it; `known` gets a reference to it."""
    for program in some:
        mine = Watched(*msgspec.structs.astuple(program))
        known.append(weakref.ref(mine))
        yield mine
        del mine


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("rtt_s", [0.0, 0.4])
def test_a_program_that_has_ended_is_let_go_of_at_once(mode: Mode, rtt_s: float) -> None:
    known: list[weakref.ref[Program]] = []
    left: list[int] = []

    def ended() -> None:
        left.append(sum(program() is not None for program in known))

    kinds = (one_call, lambda name, at_s: chat(3, name=name, arrival_s=at_s), lambda name, at_s: chain(3, name, at_s))
    some = [kind(f"p{n}", 1000.0 * n) for n, kind in enumerate(kinds * 3)]
    some.append(one_call("fails", 1000.0 * len(some), prompt=5000))
    gc.collect()
    gc.disable()
    try:
        recorder = simulate(watched(some, known), config(), [engine()], mode=mode, network=Constant(rtt_s), on_ended=ended)
    finally:
        gc.enable()
    assert (recorder.counts["finished"], recorder.counts["failed"]) == (9, 1)
    assert left == [2] * 9 + [1]  # the one that is ending, and the next


@pytest.mark.parametrize("mode", Mode)
def test_a_run_that_cannot_end_keeps_no_program(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(POLICIES["round_robin"], "place", lambda *_: iter(()))
    known: list[weakref.ref[Program]] = []
    some = [one_call(f"p{n}") for n in range(3)]
    with pytest.raises(StuckError, match="program 'p0' waits"):
        simulate(watched(some, known), config("round_robin"), [engine()], mode=mode, network=LOCAL)
    gc.collect()
    assert [program() for program in known] == [None] * 3


def test_engines_name_tasks_as_their_logs_do() -> None:
    named: list[str] = []

    def observe(_: str, edges: Iterations) -> None:
        named.extend(repr(key) for key in edges.keys)

    run([one_call("p0")], observe=observe)
    assert set(named) == {"1.0.0#1"}


def test_an_event_at_an_absolute_time_arrives_at_exactly_that_time() -> None:
    timeline = Timeline()
    seen: list[float] = []
    times = [0.1 + 0.2, 1e9 / 3, 0.7]
    timeline.call_at(0.3, lambda: [timeline.call_at(t, lambda: seen.append(timeline.now)) for t in times])
    timeline.timeout(5.0)  # SimPy's own events live beside them
    timeline.run()
    assert seen == sorted(times)


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("rtt_s", [0.0, 0.3])
def test_a_program_that_fails_gives_up_what_it_has_under_way_and_all_of_it_is_counted(mode: Mode, rtt_s: float) -> None:
    calls = [Call((Text(f"p{n}", 20), Write(f"x{n}", 200))) for n in range(3)]
    calls.append(Call((Text("too large", 5000), Write("z", 5))))
    gets = tuple(Get(f"get {var}", var) for var in ("x0", "x1", "x2", "z"))
    failing = Program("failing", 0.0, tuple(calls), gets)
    later = one_call("later", arrival_s=50.0)
    for some in ([failing], [failing, later]):
        recorder = run(some, network=Constant(rtt_s), mode=mode, max_gen_length=256)
        states = sorted(call.state for call in recorder.calls if call.program == 0)
        assert len(states) == 4
        assert states.count("failed") == 1
        assert "finished" not in states


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("rtt_s", [0.0, 0.1])
@pytest.mark.parametrize("clients", [1, 3])
def test_in_a_closed_loop_the_next_program_starts_in_the_instant_in_which_one_ends(
    mode: Mode, rtt_s: float, clients: int
) -> None:
    some = [msgspec.structs.replace(p, arrival_s=1000.0 * n) for n, p in enumerate(workload(8))]
    ended: list[int] = []
    recorder = run(some, network=Constant(rtt_s), mode=mode, clients=clients, on_ended=lambda: ended.append(1))
    programs = sorted(recorder.programs)
    assert [program.id for program in programs] == [p.id for p in some]  # started in the order of the workload
    assert len(ended) == recorder.counts["finished"] == 8
    starts = [program.started_s for program in programs]
    assert starts[:clients] == [0.0] * clients
    assert starts == sorted(starts)
    assert starts[-1] < 1000.0  # arrival times count for nothing
    for program in programs:
        assert program.arrival_s == program.started_s
        assert program.ended_s is not None
        assert program.jct_s == program.ended_s - program.started_s > 0.0
    for start in starts:  # a client that is closing its session (a network away) is not free yet
        assert sum(p.started_s <= start < (p.ended_s or 0.0) for p in programs) <= clients
    if rtt_s == 0.0:
        assert starts[clients:] == sorted(p.ended_s for p in programs)[: 8 - clients]


def test_a_closed_loop_may_have_more_clients_than_programs_and_has_at_least_one() -> None:
    assert run([one_call("p0"), one_call("p1")], clients=5).counts["finished"] == 2
    assert run([], clients=2).counts["programs"] == 0
    with pytest.raises(ValueError, match="clients is 0; a closed loop has at least 1"):
        run([one_call()], clients=0)


def test_a_closed_loop_that_cannot_end_says_which_program_waits_for_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(POLICIES["round_robin"], "place", lambda *_: iter(()))
    with pytest.raises(StuckError, match="program 'stuck' waits for get 'g' of variable 'answer'"):
        run([one_call("stuck"), one_call("never begun")], "round_robin", clients=1)
