"""Workloads: equal seeds give equal programs, arrivals are what was asked for, bad arguments are refused by name."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.workloads import WorkloadError, open_workload
from sim.workloads import program as program_format
from sim.workloads.program import (
    After,
    Call,
    Get,
    Program,
    Read,
    Segment,
    Set,
    Text,
    Write,
    check,
    read_programs,
    write_programs,
)
from tests.sim.programs import programs as any_programs

GENERATORS = {
    "chain": "chunks",
    "map_reduce": "chunks",
    "chat": "turns",
    "tree_of_thought": "levels",
    "multi_agent": "agents",
    "agent": "steps",
    "shared_prompts": "systems",
}


def encoded(programs: list[Program]) -> bytes:
    return msgspec.json.encode(programs)


def segments(programs: list[Program]) -> Iterator[Segment]:
    return (segment for program in programs for call in program.calls for segment in call.segments)


# -------------------------------------------------------------------------------------------------------- generators


@pytest.mark.parametrize("name", GENERATORS)
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), size=st.integers(1, 5))
def test_generated_programs_are_sound_ordered_and_the_same_for_the_same_seed(name: str, seed: int, size: int) -> None:
    options = {GENERATORS[name]: size}
    programs = list(open_workload(name, rate=3.0, seed=seed, count=5, options=options))
    for program in programs:
        check(program)
    arrivals = [program.arrival_s for program in programs]
    assert arrivals == sorted(arrivals)
    assert encoded(programs) == encoded(list(open_workload(name, rate=3.0, seed=seed, count=5, options=options)))
    assert encoded(programs) != encoded(list(open_workload(name, rate=3.0, seed=seed + 1, count=5, options=options)))


@pytest.mark.parametrize("name", GENERATORS)
def test_texts_with_equal_keys_have_equal_lengths_and_ids_are_unique(name: str) -> None:
    programs = list(open_workload(name, count=30))
    lengths: dict[str, int] = {}
    for segment in segments(programs):
        if isinstance(segment, Text):
            assert lengths.setdefault(segment.key, segment.tokens) == segment.tokens
    assert len({program.id for program in programs}) == 30


@pytest.mark.parametrize("arrivals", [None, "poisson", "gamma:3", "constant"])
@pytest.mark.parametrize("name", GENERATORS)
def test_the_rate_moves_arrivals_and_nothing_else(name: str, arrivals: str | None) -> None:
    slow, fast = (list(open_workload(name, rate=rate, count=20, arrivals=arrivals)) for rate in (1.0, 4.0))
    for one, other in zip(slow, fast, strict=True):
        assert one.arrival_s == pytest.approx(4 * other.arrival_s)
        assert msgspec.structs.replace(one, arrival_s=0.0) == msgspec.structs.replace(other, arrival_s=0.0)


def test_lengths_have_their_mean() -> None:
    programs = list(open_workload("chain:chunks=4,chunk_tokens=300", count=2000))
    lengths = [s.tokens for s in segments(programs) if isinstance(s, Text) and "chunk" in s.key]
    assert sum(lengths) / len(lengths) == pytest.approx(300, rel=0.05)


def test_spread_0_makes_every_length_its_mean() -> None:
    program = next(open_workload("map_reduce:chunks=3,spread=0,reduce_tokens=77"))
    assert [s.tokens for s in segments([program]) if isinstance(s, Write)] == [50, 50, 50, 77]
    assert [s.var for s in program.calls[-1].segments if isinstance(s, Read)] == ["part0", "part1", "part2"]


@pytest.mark.parametrize(("spec", "first"), [("chat:turns=3", "turn"), ("agent:steps=3", "step")])
def test_turns_wait_for_the_answer_before_go_on_from_it_and_share_a_system_prompt(spec: str, first: str) -> None:
    programs = list(open_workload(spec, count=4))
    assert len({p.calls[0].segments[0] for p in programs}) == 1
    for program in programs:
        edges = [edge for call in program.calls for edge in call.after]
        assert [edge.get for edge in edges] == [f"{first}0", f"{first}1"]
        assert all(edge.delay_s > 0 for edge in edges)
        for earlier, later in zip(program.calls, program.calls[1:], strict=False):
            written = earlier.segments[-1]
            assert isinstance(written, Write)
            assert Read(written.var) in later.segments
            assert later.segments[: len(earlier.segments) - 1] == earlier.segments[:-1]


def test_a_tree_of_thought_grows_from_what_it_kept_once_a_level_is_scored() -> None:
    program = next(open_workload("tree_of_thought:levels=2,branches=3,keep=2"))
    proposals = [call for call in program.calls if call.name == "propose"]
    assert len(proposals) == 3 + 2 * 3
    scores = {get.id for get in program.gets if get.id.startswith("score0")}
    parents = []
    for call in proposals[3:]:
        assert {edge.get for edge in call.after} == scores
        parents += [s.var for s in call.segments if isinstance(s, Read)]
    assert [parents.count(parent) for parent in dict.fromkeys(parents)] == [3, 3]


def test_agents_share_the_context_and_all_messages_of_the_rounds_before() -> None:
    program = next(open_workload("multi_agent:agents=3,rounds=2"))
    rounds = program.calls[:3], program.calls[3:6]
    for calls in rounds:
        assert len({call.segments[:-2] for call in calls}) == 1
        assert len({call.segments[-2] for call in calls}) == 3
    assert sum(isinstance(s, Read) for s in rounds[1][0].segments) == 3
    assert sum(isinstance(s, Read) for s in program.calls[-1].segments) == 6


def test_some_system_prompts_are_more_popular_than_others() -> None:
    def share_of_first(zipf: float) -> float:
        programs = list(open_workload(f"shared_prompts:systems=20,zipf={zipf}", count=2000))
        return sum(p.calls[0].segments[0].key.endswith("system0") for p in programs) / 2000  # type: ignore[union-attr]

    harmonic = sum(1 / n for n in range(1, 21))
    assert share_of_first(1.0) == pytest.approx(1 / harmonic, rel=0.15)
    assert share_of_first(0.0) == pytest.approx(1 / 20, rel=0.3)


# ---------------------------------------------------------------------------------------------------------- arrivals


@pytest.mark.parametrize(("arrivals", "variation"), [(None, 1.0), ("poisson", 1.0), ("gamma:2.5", 2.5), ("gamma:0.5", 0.5)])
def test_drawn_arrivals_come_at_the_rate_and_vary_as_asked(arrivals: str | None, variation: float) -> None:
    times = [p.arrival_s for p in open_workload("chain:chunks=1", rate=8.0, count=6000, arrivals=arrivals)]
    gaps = np.diff([0.0, *times])
    assert gaps.mean() == pytest.approx(1 / 8.0, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.1)


def test_constant_arrivals_have_one_gap() -> None:
    times = [p.arrival_s for p in open_workload("chain", rate=4.0, count=5, arrivals="constant")]
    assert times == [0.25, 0.5, 0.75, 1.0, 1.25]


@pytest.fixture
def recorded(tmp_path: Path) -> str:
    """Programs at 1, 2, 5 and 7 seconds."""
    path = tmp_path / "programs.jsonl"
    made = open_workload("chat", count=4)
    write_programs(path, (msgspec.structs.replace(p, arrival_s=t) for p, t in zip(made, (1.0, 2.0, 5.0, 7.0), strict=True)))
    return str(path)


def times_of(spec: str, **arguments: object) -> list[float]:
    return [program.arrival_s for program in open_workload(spec, **arguments)]  # type: ignore[arg-type]


def test_recorded_times_are_kept_scaled_by_a_factor_or_to_a_rate(recorded: str) -> None:
    assert times_of(recorded) == times_of(recorded, arrivals="recorded") == [1.0, 2.0, 5.0, 7.0]
    assert times_of(recorded, arrivals="recorded:0.5") == [0.5, 1.0, 2.5, 3.5]
    assert times_of(recorded, rate=1.0) == [0.0, 0.5, 2.0, 3.0]
    assert times_of(recorded, rate=1.0, count=2) == [0.0, 1.0]


def test_the_papers_workloads_keep_the_pace_that_they_give_themselves_unless_another_is_asked_for() -> None:
    assert times_of("paper:chat", rate=2.0, count=4) == times_of("chat", rate=2.0, count=4)
    assert times_of("paper:chat", rate=4.0, count=3, arrivals="constant") == [0.25, 0.5, 0.75]
    with pytest.raises(WorkloadError, match="no such workload of the paper"):
        times_of("paper:nonsense")


def test_a_process_in_place_of_recorded_times_has_their_rate_or_the_one_asked_for(recorded: str) -> None:
    assert times_of(recorded, arrivals="constant") == [2.0, 4.0, 6.0, 8.0]
    assert times_of(recorded, arrivals="constant", rate=4.0) == [0.25, 0.5, 0.75, 1.0]
    assert times_of(recorded, arrivals="poisson", rate=1.0) == times_of("chat", rate=1.0, count=4)


def test_arrivals_at_one_time_have_no_rate(tmp_path: Path) -> None:
    path = tmp_path / "same.jsonl"
    write_programs(path, (msgspec.structs.replace(p, arrival_s=1.0) for p in open_workload("chain", count=3)))
    with pytest.raises(WorkloadError, match=r"same\.jsonl.*no gaps to scale"):
        times_of(str(path), rate=1.0)
    with pytest.raises(WorkloadError, match=r"same\.jsonl.*arrive at one time"):
        times_of(str(path), arrivals="poisson")


# --------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("spec", "arguments", "reason"),
    [
        ("chain", {"rate": 0.0}, "rate 0: must be"),
        ("chain", {"rate": -2.0}, "rate -2: must be"),
        ("chain", {"rate": float("nan")}, "rate nan"),
        ("chain", {"rate": 1e-320}, "rate 9.99.*e-321: must be .* from 1e-09 to 1e\\+09"),
        ("chain", {"rate": float("inf")}, "rate inf: must be .* from 1e-09 to 1e\\+09"),
        ("chain", {"count": 0}, "count 0"),
        ("chain", {"seed": -1}, "seed -1: must be 0 or more"),
        ("chain", {"max_gen_length": 0}, "max_gen_length 0: must be at least 1"),
        ("chain:chunk=3", {}, "unknown field `chunk`.*chunks=8"),
        ("chain:chunks=0", {}, "chunks"),
        ("chain:chunks", {}, "'chunks' is no parameter=value"),
        ("chain", {"options": {"chunks": "many"}}, "chunks"),
        ("tree_of_thought:keep=0", {}, "keep"),
        ("chat:think_s=inf", {}, "think_s is inf; a finite number is needed; its parameters"),
        ("shared_prompts:zipf=-1", {}, "zipf"),
        ("record:x", {}, "no such file, and none of"),
        ("journal:/nowhere/x.sqlite", {}, "no such journal"),
        ("nonsense", {}, "no such file, and none of chain.*azure:PATH"),
        ("azure:/nowhere/x.csv", {}, "cannot be read"),
        ("mooncake:/nowhere/x.jsonl", {}, "cannot be read"),
        ("burstgpt:/nowhere/x.csv", {}, "cannot be read"),
        ("sharegpt:/nowhere/x.json", {}, "cannot be read"),
        ("azure:", {}, "'azure:': names no file; expected azure:PATH"),
        ("mix:", {}, "'mix:': names no file; expected mix:PATH"),
        ("azure:x.csv", {"options": {"a": 1}}, "unknown field `a`"),
        ("mooncake:x.jsonl:block_tokens=0", {}, "block_tokens"),
        ("burstgpt:x.csv:failed=retry", {}, "failed"),
        ("burstgpt:x.csv:failed=keep,failed.x=y", {}, "'failed' has a value already"),
        ("chain", {"arrivals": "uniform"}, "arrivals 'uniform': must be one of poisson"),
        ("chain", {"arrivals": "gamma"}, "arrivals 'gamma': must be one of"),
        ("chain", {"arrivals": "poisson:2"}, "arrivals 'poisson:2': must be one of"),
        ("chain", {"arrivals": "gamma:0"}, "'0' is not a coefficient of variation above 0"),
        ("chain", {"arrivals": "gamma:x"}, "'x' is not a coefficient"),
        ("chain", {"arrivals": "gamma:1e200"}, "'1e200' is not a coefficient of variation above 0, from 0.001 to 100"),
        ("chain", {"arrivals": "gamma:1e-200"}, "'1e-200' is not a coefficient"),
        ("azure:x.csv", {"arrivals": "recorded:1e308"}, "'1e308' is not a time scale above 0, from 1e-09 to 1e\\+09"),
        ("chain", {"arrivals": "recorded:-1"}, "'-1' is not a time scale above 0"),
        ("chain", {"arrivals": "recorded"}, "no recorded arrivals"),
        ("azure:x.csv", {"arrivals": "recorded:2", "rate": 3.0}, "recorded arrivals have their own rate"),
    ],
)
def test_bad_arguments_are_refused_by_name(spec: str, arguments: dict[str, object], reason: str) -> None:
    with pytest.raises(WorkloadError, match=reason):
        next(open_workload(spec, **arguments))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- the file format


def test_a_file_of_programs_comes_back_as_it_was(tmp_path: Path) -> None:
    programs = list(open_workload("agent", rate=2.0, count=10))
    path = str(tmp_path / "programs.jsonl")
    assert write_programs(path, programs) == 10
    assert list(open_workload(path)) == programs


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    def broken() -> Iterator[Program]:
        yield from open_workload("chat", count=3)
        raise WorkloadError("trace.csv:4: cut off")

    with pytest.raises(WorkloadError):
        write_programs(tmp_path / "programs.jsonl", broken())
    assert list(tmp_path.iterdir()) == []


LINE = msgspec.json.encode(next(open_workload("chat:turns=2", count=1)))
LATER = LINE.replace(b'"arrival_s":0.', b'"arrival_s":9.')


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([LATER, LATER[:60]], "2: Input data was truncated"),
        ([LATER, LINE], r"2: arrival_s 0\.\d+ is before the line above it \(9\.\d+\)"),
        ([LATER, b"2023-11-16 18:15:46.68,374,44"], "2: "),
        ([LATER.replace(b'"tokens":256', b'"tokens":-256')], "1: .*>= 0.*tokens"),
        ([LATER.replace(b'"arrival_s":9', b'"arrival_s":-9')], "1: .*>= 0.*arrival_s"),
        ([LATER.replace(b'"get":"turn0"', b'"get":"turn7"')], "1: an `after` names get 'turn7'"),
        ([LATER.replace(b'"get":"turn0"', b'"get":"turn1"')], "1: .* waits for itself"),
        ([LATER.replace(b'"kind":"read","var":"answer0"', b'"kind":"read","var":"x"')], "1: variable 'x' is read"),
        ([LATER.replace(b'"tokens":256', b'"tokens":255', 1)], "1: the text '.*system.*' has 256 tokens here and 255 before"),
        ([LINE, LATER.replace(b'"tokens":256', b'"tokens":9')], "2: the text '.*system.*' has 9 tokens here and 256 before"),
        ([LATER.replace(b'"id":"turn1"', b'"id":"turn0"')], "1: two gets have the same id"),
        ([re.sub(rb'"gets":\[.*\]', b'"gets":[]', LATER)], "1: `gets` is empty: what nobody fetches is not run"),
    ],
)
def test_a_bad_line_is_refused_with_file_line_and_reason(tmp_path: Path, lines: list[bytes], reason: str) -> None:
    path = tmp_path / "programs.jsonl"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(WorkloadError, match=rf"programs\.jsonl:{reason}"):
        list(open_workload(str(path)))


@st.composite
def tangled_programs(draw: st.DrawFn) -> Program:
    """Programs with control and data edges in any direction, and calls in any order."""
    program = draw(any_programs())
    gets = [get.id for get in program.gets]
    written = [s.var for call in program.calls for s in call.segments if isinstance(s, Write)]
    edges = st.lists(st.builds(After, st.sampled_from([*gets, None])), max_size=2).map(tuple)
    calls = draw(st.permutations(program.calls))
    changed = draw(st.integers(0, len(calls) - 1))
    reads = tuple(Read(var) for var in draw(st.lists(st.sampled_from(written), max_size=1)))
    call = calls[changed]
    calls[changed] = msgspec.structs.replace(call, after=draw(edges), segments=(call.segments[0], *reads, *call.segments[1:]))
    sets = tuple(msgspec.structs.replace(s, after=draw(edges)) for s in program.sets)
    return msgspec.structs.replace(
        program, calls=tuple(calls), sets=sets, gets=tuple(msgspec.structs.replace(g, after=draw(edges)) for g in program.gets)
    )


@settings(deadline=None, max_examples=100)
@given(program=tangled_programs())
def test_a_program_is_refused_exactly_when_something_in_it_waits_for_itself(program: Program) -> None:
    try:
        check(program)
    except ValueError:
        assert not ends(program)
    else:
        assert ends(program)


def ends(program: Program) -> bool:
    """Whether doing whatever waits for nothing, again and again, does everything."""
    steps: list[Set | Call | Get] = [*program.sets, *program.calls, *program.gets]
    known: set[str] = set()
    returned: set[str | None] = {None}
    left = steps
    while left:
        later = []
        for step in left:
            own = {s.var for s in step.segments if isinstance(s, Write)} if isinstance(step, Call) else set()
            reads = {s.var for s in step.segments if isinstance(s, Read)} - own if isinstance(step, Call) else set()
            wanted = {step.var} if isinstance(step, Get) else reads
            if wanted <= known and {edge.get for edge in step.after} <= returned:
                known |= own if isinstance(step, Call) else {step.var}
                returned |= {step.id} if isinstance(step, Get) else set()
            else:
                later.append(step)
        if len(later) == len(left):
            return False
        left = later
    return True


def test_a_long_file_needs_no_more_memory_than_a_short_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_format, "KEPT_TEXTS", 50)  # what the short one has, too
    path = str(tmp_path / "long.jsonl")

    def peak_bytes(count: int) -> int:
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        write_programs(path, open_workload("shared_prompts", count=count))
        assert sum(1 for _ in open_workload(path, rate=3.0)) == count  # read twice
        assert sum(1 for _ in read_programs(path)) == count
        return tracemalloc.get_traced_memory()[1] - before

    tracemalloc.start()
    try:
        peak_bytes(100)  # whatever is made once
        short, long = peak_bytes(300), peak_bytes(3000)
    finally:
        tracemalloc.stop()
    assert long < short + 100_000
