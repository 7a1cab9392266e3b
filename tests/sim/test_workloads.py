"""Workloads: equal seeds give equal programs, rates are what was asked for, bad traces are refused with their place."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.workloads import WorkloadError, open_workload
from sim.workloads.program import Program, Read, Text, Write, check, write_programs

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
ROWS = "2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:50.6805900,396,109\r\n2023-11-16 18:15:54.6805900,879,5000"
TRACE = Path(__file__).parents[3] / "shared/traces/azure_llm_2023_conv.csv"


def azure(tmp_path: Path, rows: str, header: str = AZURE) -> str:
    path = tmp_path / "trace.csv"
    path.write_bytes((header + rows).encode())
    return f"azure:{path}"


def encoded(programs: list[Program]) -> bytes:
    return msgspec.json.encode(programs)


@pytest.mark.parametrize("name", ["chain", "map_reduce", "chat"])
@settings(deadline=None)
@given(seed=st.integers(0, 1000), chunks=st.integers(1, 6))
def test_generated_programs_are_sound_ordered_and_the_same_for_the_same_seed(name: str, seed: int, chunks: int) -> None:
    options = {"turns" if name == "chat" else "chunks": chunks}
    programs = list(open_workload(name, rate=3.0, seed=seed, count=5, options=options))
    for program in programs:
        check(program)
    arrivals = [program.arrival_s for program in programs]
    assert arrivals == sorted(arrivals)
    assert encoded(programs) == encoded(list(open_workload(name, rate=3.0, seed=seed, count=5, options=options)))
    assert encoded(programs) != encoded(list(open_workload(name, rate=3.0, seed=seed + 1, count=5, options=options)))


@pytest.mark.parametrize("name", ["chain", "map_reduce", "chat"])
def test_the_rate_moves_arrivals_and_nothing_else(name: str) -> None:
    slow, fast = (list(open_workload(name, rate=rate, count=20)) for rate in (1.0, 4.0))
    for one, other in zip(slow, fast, strict=True):
        assert one.arrival_s == pytest.approx(4 * other.arrival_s)
        assert msgspec.structs.replace(one, arrival_s=0.0) == msgspec.structs.replace(other, arrival_s=0.0)


def test_poisson_arrivals_come_at_the_rate_and_lengths_have_their_mean() -> None:
    programs = list(open_workload("chain:chunks=4,chunk_tokens=300", rate=8.0, count=2000))
    assert programs[-1].arrival_s == pytest.approx(2000 / 8.0, rel=0.1)
    lengths = [s.tokens for p in programs for c in p.calls for s in c.segments if isinstance(s, Text) and "chunk" in s.key]
    assert sum(lengths) / len(lengths) == pytest.approx(300, rel=0.05)


def test_spread_0_makes_every_length_its_mean() -> None:
    program = next(open_workload("map_reduce:chunks=3,spread=0,reduce_tokens=77"))
    assert [s.tokens for c in program.calls for s in c.segments if isinstance(s, Write)] == [50, 50, 50, 77]
    assert [s.var for s in program.calls[-1].segments if isinstance(s, Read)] == ["part0", "part1", "part2"]


def test_chat_turns_wait_for_the_answer_before_and_share_their_system_prompt() -> None:
    programs = list(open_workload("chat:turns=3", count=4))
    assert len({p.calls[0].segments[0] for p in programs}) == 1
    for program in programs:
        assert [edge.get for call in program.calls for edge in call.after] == ["turn0", "turn1"]
        for earlier, later in zip(program.calls, program.calls[1:], strict=False):
            assert later.segments[: len(earlier.segments) - 1] == earlier.segments[:-1]


def test_an_azure_trace_keeps_its_times_lengths_and_limits(tmp_path: Path) -> None:
    programs = list(open_workload(azure(tmp_path, ROWS)))
    assert [p.arrival_s for p in programs] == [0.0, 4.0, 8.0]
    assert [(s.tokens, w.tokens, w.max_gen_length) for s, w in (p.calls[0].segments for p in programs)] == [  # type: ignore[union-attr]
        (374, 44, 2048),
        (396, 109, 2048),
        (879, 5000, 5000),
    ]
    assert {p.tenant for p in programs} == {"trace"}


def test_the_traces_of_2024_have_offsets_in_their_times(tmp_path: Path) -> None:
    rows = "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:01.509930+00:00,2399,6\n"
    assert [p.arrival_s for p in open_workload(azure(tmp_path, rows))] == [0.0, 1.5]


def test_a_rate_scales_the_recorded_gaps(tmp_path: Path) -> None:
    assert [p.arrival_s for p in open_workload(azure(tmp_path, ROWS), rate=1.0)] == [0.0, 1.0, 2.0]
    assert [p.arrival_s for p in open_workload(azure(tmp_path, ROWS), rate=0.5, count=2)] == [0.0, 2.0]


def test_a_file_of_programs_comes_back_as_it_was_and_can_be_scaled(tmp_path: Path) -> None:
    programs = list(open_workload("chat", rate=2.0, count=10))
    path = str(tmp_path / "programs.jsonl")
    write_programs(path, programs)
    assert list(open_workload(path)) == programs
    scaled = [p.arrival_s for p in open_workload(path, rate=5.0)]
    assert (scaled[0], scaled[-1]) == (0.0, pytest.approx(9 / 5.0))


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ("", "no requests"),
        ("2023-11-16 18:15:46.68,374\n", ":2: 2 fields instead of 3"),
        ("2023-11-16 18:15:46.68,374,44\n2023-11-16 18:", ":3: 1 fields instead of 3"),
        ("2023-11-16 18:15:46.68,374,44,Chat\n", ":2: 4 fields instead of 3"),
        ("2023-11-16 18:15:46.68,374,-4\n", ":2: GeneratedTokens is -4"),
        ("2023-11-16 18:15:46.68,0,4\n", ":2: ContextTokens is 0"),
        ("2023-11-16 18:15:46.68,many,4\n", ":2: invalid literal"),
        ("yesterday,3,4\n", ":2: Invalid isoformat"),
        ("2023-11-16 18:15:46,3,4\n2023-11-16 18:15:45,3,4\n", ":3: the time .* is before"),
        ("2023-11-16 18:15:46,3,4\n2024-05-10 00:00:00+00:00,3,4\n", ":3: can't subtract"),
    ],
)
def test_bad_rows_are_refused_with_file_line_and_reason(tmp_path: Path, rows: str, reason: str) -> None:
    with pytest.raises(WorkloadError, match=rf"trace\.csv.*{reason}"):
        list(open_workload(azure(tmp_path, rows)))


def test_a_file_that_is_no_azure_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r":1: not an Azure trace"):
        list(open_workload(azure(tmp_path, ROWS, header='{"timestamp": 0}\n')))


@pytest.mark.parametrize(
    ("spec", "arguments", "reason"),
    [
        ("chain", {"rate": 0.0}, "rate 0: must be"),
        ("chain", {"rate": float("nan")}, "rate nan"),
        ("chain", {"count": 0}, "count 0"),
        ("chain:chunk=3", {}, "unknown field `chunk`.*chunks=8"),
        ("chain:chunks=0", {}, "chunks"),
        ("chain:chunks", {}, "'chunks' is no parameter=value"),
        ("chain", {"options": {"chunks": "many"}}, "chunks"),
        ("mooncake:x", {}, "comes with the simulator's release"),
        ("record:x", {}, "no such file, and none of"),
        ("journal:/nowhere/x.sqlite", {}, "no such journal"),
        ("nonsense", {}, "no such file, and none of chain"),
        ("azure:/nowhere/x.csv", {}, "cannot be read"),
        ("azure:x.csv", {"options": {"a": 1}}, "takes no parameters"),
    ],
)
def test_bad_arguments_are_refused_by_name(spec: str, arguments: dict[str, object], reason: str) -> None:
    with pytest.raises(WorkloadError, match=reason):
        next(open_workload(spec, **arguments))  # type: ignore[arg-type]


def test_arrivals_at_one_time_cannot_be_scaled(tmp_path: Path) -> None:
    same = "2023-11-16 18:15:46,3,4\n" * 2
    with pytest.raises(WorkloadError, match="no gaps to scale"):
        list(open_workload(azure(tmp_path, same), rate=1.0))


@pytest.mark.skipif(not TRACE.exists(), reason="the public trace is not here")
def test_the_public_azure_trace_reads_whole() -> None:
    programs = list(open_workload(f"azure:{TRACE}"))
    assert len(programs) == 19_366
    assert 3400 < programs[-1].arrival_s < 3600
    scaled = list(islice(open_workload(f"azure:{TRACE}", rate=10.0), 19_366))
    assert scaled[-1].arrival_s == pytest.approx(19_365 / 10.0)
