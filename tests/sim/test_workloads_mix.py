"""A mix: parts keep their shares, their tenants and their own draws; what is wrong in it is refused by name."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sim.workloads import WorkloadError, open_workload
from sim.workloads.program import Program, Text, check, write_programs

CHAT = {"workload": "chat:turns=2", "tenant": "talkers"}
CHAIN = {"workload": "chain", "options": {"chunks": 2}}


def mixed(tmp_path: Path, *parts: Mapping[str, Any], **fields: Any) -> str:
    path = tmp_path / "mix.json"
    path.write_text(json.dumps({"parts": parts, **fields}))
    return f"mix:{path}"


def part_of(program: Program) -> str:
    return program.id.split("/")[0]


def test_parts_share_the_rate_by_weight_and_come_merged_with_their_tenants(tmp_path: Path) -> None:
    spec = mixed(tmp_path, {**CHAT, "weight": 3, "name": "talk"}, CHAIN)
    programs = list(open_workload(spec, rate=4.0, count=4000))
    arrivals = [program.arrival_s for program in programs]
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] == pytest.approx(1000, rel=0.1)
    assert Counter(map(part_of, programs))["talk"] == pytest.approx(3000, rel=0.05)
    assert {(part_of(p), p.tenant, p.application) for p in programs} == {("talk", "talkers", "chat"), ("part1", "", "chain")}
    assert len({program.id for program in programs}) == 4000
    for program in programs[:50]:
        check(program)


def test_a_part_may_have_its_own_rate_arrivals_and_count(tmp_path: Path) -> None:
    spec = mixed(tmp_path, {**CHAT, "rate": 10.0, "arrivals": "constant", "count": 3}, CHAIN, rate=1.0)
    programs = list(open_workload(spec, count=50))
    assert [p.arrival_s for p in programs if part_of(p) == "part0"] == pytest.approx([0.1, 0.2, 0.3])
    assert len(programs) == 50
    faster = [p.arrival_s for p in open_workload(spec, count=50, rate=2.0) if part_of(p) == "part1"]
    assert faster == pytest.approx([p.arrival_s / 2 for p in programs if part_of(p) == "part1"])


def test_traces_and_files_keep_their_times_and_none_is_cut_short(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,37,4\n2023-11-16 18:15:56,39,9\n")
    file = tmp_path / "programs.jsonl"
    write_programs(file, open_workload("chain", count=200, arrivals="constant", rate=100.0))
    azure = f"azure:{trace}"
    spec = mixed(tmp_path, {"workload": azure, "tenant": "t"}, {"workload": str(file)}, {"workload": azure})
    programs = list(open_workload(spec))
    assert len(programs) == 204
    assert [p.arrival_s for p in programs if part_of(p) == "part0"] == [0.0, 10.0]
    assert {p.tenant for p in programs} == {"t", "", "part2/trace"}


def test_parts_are_drawn_apart_and_share_no_made_up_text(tmp_path: Path) -> None:
    alone = list(open_workload(mixed(tmp_path, CHAT, rate=1.0), count=20))
    programs = list(open_workload(mixed(tmp_path, CHAT, CHAT, CHAIN, rate=3.0), count=60))
    first, second = ([p for p in programs if part_of(p) == name] for name in ("part0", "part1"))
    together = min(len(first), len(alone))
    assert first[:together] == alone[:together]  # what else is in the mix moves nothing
    assert not texts(first) & texts(second)
    assert [p.arrival_s for p in first[:5]] != [p.arrival_s for p in second[:5]]


def test_two_parts_of_the_paper_draw_apart_share_no_text_and_go_on_as_long_as_the_mix(tmp_path: Path) -> None:
    spec = mixed(tmp_path, {"workload": "paper:chat"}, {"workload": "paper:chat"}, rate=2.0)
    programs = list(open_workload(spec, count=300))
    assert len({program.id for program in programs}) == 300
    first, second = ([p for p in programs if part_of(p) == name] for name in ("part0", "part1"))
    assert min(len(first), len(second)) > 110
    assert [p.arrival_s for p in first[:5]] != [p.arrival_s for p in second[:5]]
    assert not texts(first) & texts(second)


def texts(programs: Iterable[Program]) -> set[str]:
    return {s.key for p in programs for c in p.calls for s in c.segments if isinstance(s, Text)} | {
        source.key for p in programs for source in p.sets
    }


def test_without_a_count_parts_without_an_end_give_100_programs(tmp_path: Path) -> None:
    assert len(list(open_workload(mixed(tmp_path, CHAT, CHAIN)))) == 100
    assert len(list(open_workload(mixed(tmp_path, {**CHAT, "count": 7}, {**CHAIN, "count": 130})))) == 137


def test_the_notes_of_all_parts_are_given(tmp_path: Path) -> None:
    path = tmp_path / "burst.csv"
    path.write_text("Timestamp,Model,Request tokens,Response tokens,Log Type\n1,m,3,0,API log\n2,m,3,4,API log\n")
    notes: list[str] = []
    spec = mixed(tmp_path, {"workload": f"burstgpt:{path}"}, {**CHAIN, "count": 1})
    assert len(list(open_workload(spec, on_note=notes.append))) == 2
    assert len(notes) == 1


@pytest.mark.parametrize(
    ("parts", "fields", "arguments", "reason"),
    [
        ([], {}, {}, "at least one of `parts`"),
        ([CHAT], {"rates": 1}, {}, "unknown key 'rates'"),
        ([{"tenant": "t"}], {}, {}, "missing key .*workload"),
        ([{**CHAT, "weight": 0}], {}, {}, r"parts\[0\]\.weight' is 0"),
        ([{**CHAT, "rate": -1}], {}, {}, r"parts\[0\]\.rate' is -1"),
        ([{**CHAT, "count": 0}], {}, {}, r"parts\[0\]\.count' is 0"),
        ([CHAT], {"rate": 0}, {}, "key 'rate' is 0"),
        ([{**CHAT, "weight": 2}], {}, {}, r"parts\[0\]: a weight shares out a rate"),
        ([{**CHAT, "weight": 2, "rate": 1}], {"rate": 1}, {}, r"parts\[0\] has a rate of its own"),
        ([{**CHAT, "rate": 1}], {}, {"rate": 2.0}, "every part has a rate of its own"),
        ([{**CHAT, "name": "a"}, {**CHAIN, "name": "a"}], {}, {}, "two parts have the name 'a'"),
        ([{**CHAT, "name": "a/b"}], {}, {}, "part name 'a/b'"),
        ([{"workload": "mix:other.json"}], {}, {}, "part 'part0': a mix cannot be part of a mix"),
        ([{"workload": "nothing"}], {}, {}, "part 'part0': workload 'nothing': no such file"),
        ([{**CHAIN, "options": {"chunk": 1}}], {}, {}, "part 'part0': workload chain: .*`chunk`"),
        ([{**CHAT, "arrivals": "gamma"}], {}, {}, "part 'part0': arrivals 'gamma'"),
        ([CHAT], {}, {"arrivals": "recorded"}, "part 'part0': chat: has no recorded arrivals"),
        ([CHAT], {}, {"options": {"turns": 3}}, "takes no parameters"),
    ],
)
def test_a_bad_mix_is_refused_at_once(
    tmp_path: Path, parts: list[Any], fields: dict[str, Any], arguments: dict[str, Any], reason: str
) -> None:
    spec = mixed(tmp_path, *parts, **fields)
    with pytest.raises(WorkloadError, match=f"mix.*{reason}"):
        open_workload(spec, **arguments)


def test_a_mix_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="cannot be read"):
        open_workload(f"mix:{tmp_path / 'none.json'}")
    (tmp_path / "mix.json").write_text('{"parts": [')
    with pytest.raises(WorkloadError, match=r"mix\.json: not valid JSON"):
        open_workload(f"mix:{tmp_path / 'mix.json'}")


def test_parts_that_give_one_text_two_lengths_are_refused(tmp_path: Path) -> None:
    for name, tokens in (("a", 256), ("b", 300)):
        write_programs(tmp_path / f"{name}.jsonl", open_workload("chat", count=2, options={"system_tokens": tokens}))
    spec = mixed(tmp_path, {"workload": str(tmp_path / "a.jsonl")}, {"workload": str(tmp_path / "b.jsonl")})
    with pytest.raises(WorkloadError, match=r"mix.json: program 'part1/chat0': .*'chat/system0' has 300 .* and 256"):
        list(open_workload(spec))
