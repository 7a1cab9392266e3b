"""The paper's workloads come from the file that is named, have its lengths, and refuse what is not in it."""

from __future__ import annotations

from itertools import islice, pairwise
from pathlib import Path

import msgspec
import pytest

from sim.workloads.paper import Article, calls_of, chunk_tokens, open_paper
from sim.workloads.program import Program, Read, Text, WorkloadError, Write, check

FILE = {
    "chain_summary_and_map_reduce": {
        "articles": {
            "article_0": {"words": 900, "calls_by_chunk_size": {"512": 12, "1024": 6, "2048": 3}},
            "article_1": {"words": 800, "calls_by_chunk_size": {"512": 10, "1024": 40, "2048": 3}},
        },
        "instruction_tokens_approx": {"map": 25, "refine": 85},
        "output_tokens": [25, 50],
    },
    "bing_copilot": {
        "prompt_tokens": [120, 140, 130],
        "shared_prefix_tokens": 100,
        "figure14_pairs_prompt_output": [[120, 30], [140, 50]],
    },
    "gpts": {
        "apps": [
            {"app_name": "a", "prompt_length": 70, "query_length": 7, "output_length": 9, "percentage": 0.9},
            {"app_name": "b", "prompt_length": 20, "query_length": 4, "output_length": 5, "percentage": 0.1},
        ]
    },
    "mixed": {"chats": 4, "map_reduce_apps": 3, "map_reduce_gaps_s": [0.5, 10], "chunk_size": 1024, "output_tokens": 50},
}


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "workloads.json"
    path.write_bytes(msgspec.json.encode(FILE))
    return str(path)


def programs(rest: str, *, rate: float | None = None, seed: int = 0, count: int | None = 8) -> list[Program]:
    found = list(open_paper(rest, rate=rate, seed=seed, count=count))
    for program in found:
        check(program)
    return found


@pytest.mark.parametrize("name", ["chain_summary", "map_reduce", "bing_copilot", "gpts", "chat"])
def test_every_workload_is_valid_in_order_and_the_same_for_the_same_seed(file: str, name: str) -> None:
    found = programs(f"{name},file={file}", rate=2.0, seed=3)
    assert len(found) == 8
    assert all(a.arrival_s <= b.arrival_s for a, b in pairwise(found))
    assert found == programs(f"{name},file={file}", rate=2.0, seed=3)
    assert [p.calls for p in found] == [p.calls for p in programs(f"{name},file={file}", rate=9.0, seed=3)]
    assert [p.arrival_s for p in found] != [p.arrival_s for p in programs(f"{name},file={file}", rate=2.0, seed=4)]


def test_a_chain_has_the_files_calls_and_each_refines_the_summary_before(file: str) -> None:
    (program,) = programs(f"chain_summary,file={file},article=article_0,chunk_size=1024,output_tokens=25", count=1)
    assert len(program.calls) == 6
    for number, call in enumerate(program.calls[1:], 1):
        assert [s.var for s in call.segments if isinstance(s, Read)] == [f"summary{number - 1}", f"chunk{number}"]
        assert sum(s.tokens for s in call.segments if isinstance(s, Text)) == 85
    assert {s.tokens for call in program.calls for s in call.segments if isinstance(s, Write)} == {25}
    assert {source.tokens for source in program.sets} == {chunk_tokens(1024)} == {340}
    assert [get.var for get in program.gets] == ["summary5"]


def test_articles_are_taken_in_turn(file: str) -> None:
    found = programs(f"map_reduce,file={file},chunk_size=512", count=4)
    assert [len(program.calls) for program in found] == [13, 11, 13, 11]  # one more call reduces


def test_a_count_that_contradicts_the_other_chunk_sizes_is_not_taken() -> None:
    article = Article({"512": 10, "1024": 40, "2048": 3})
    assert calls_of(article, 512) == 10
    assert calls_of(article, 1024) == round(6144 / 1024)  # the median of 5120, 40960 and 6144 over the size
    assert calls_of(article, 1536) == 4  # not listed


def test_copilot_requests_share_their_prefix_unless_told_not_to(file: str) -> None:
    shared = programs(f"bing_copilot,file={file},output_tokens=20", count=4)
    heads = [program.calls[0].segments[0] for program in shared]
    assert set(heads) == {Text("paper/copilot", 100)}
    assert [program.sets[0].tokens for program in shared] == [20, 40, 30, 20]
    apart = programs(f"bing_copilot,file={file},share=false", count=4)
    assert len({program.calls[0].segments[0] for program in apart}) == 4
    assert [program.calls[0].segments[-1].tokens for program in apart] == [30, 50, 30, 50]  # type: ignore[union-attr]


def test_gpts_applications_come_equally_often(file: str) -> None:
    found = programs(f"gpts,file={file}", count=400)
    assert 150 < sum(program.application == "a" for program in found) < 250  # the percentages are ignored, as they were
    texts = {program.application: program.calls[0].segments[0] for program in found}
    assert texts == {"a": Text("paper/gpts/a", 70), "b": Text("paper/gpts/b", 20)}


def test_mixed_has_the_papers_arrivals(file: str) -> None:
    found = programs(f"mixed,file={file}", count=None)
    assert [(p.application, p.arrival_s) for p in found if p.application == "map_reduce"] == [
        ("map_reduce", 0.0),
        ("map_reduce", 0.5),
        ("map_reduce", 10.5),
    ]
    assert [p.arrival_s for p in found if p.application == "chat"] == [0.0, 1.0, 2.0, 3.0]
    with pytest.raises(WorkloadError, match="its arrivals are the paper's; leave the rate out"):
        open_paper(f"mixed,file={file}", rate=1.0, seed=0, count=None)


def test_chat_lengths_have_the_means_that_are_named_and_stay_within_the_limits() -> None:
    found = programs("chat,prompt_spread=0.3,output_spread=0.3", count=2000)
    prompts = [program.sets[0].tokens for program in found]
    outputs = [program.calls[0].segments[-1].tokens for program in found]  # type: ignore[union-attr]
    assert 155 < sum(prompts) / 2000 < 167
    assert 325 < sum(outputs) / 2000 < 350
    wide = programs("chat", count=2000)
    assert max(program.sets[0].tokens for program in wide) <= 1024


def test_a_long_workload_is_never_held() -> None:
    endless = open_paper("chat", rate=1.0, seed=0, count=10**12)
    assert len(list(islice(endless, 5))) == 5


@pytest.mark.parametrize(
    ("rest", "reason"),
    [
        ("nothing", "paper:nothing: no such workload of the paper; it has: chain_summary,"),
        ("gpts", "its lengths come from a file; name it: paper:gpts,file=PATH"),
        ("gpts,file=none.json", "none.json: cannot be read"),
        ("gpts,fast", "'fast' is no parameter=value"),
        ("chat,turns=3", r"unknown field `turns`; its parameters and defaults: prompt_tokens=161"),
        ("chat,prompt_tokens=0", "prompt_tokens"),
        ("chat,most_prompt_tokens=1", "10000 chats in a row were longer than most_prompt_tokens=1 or most_tokens=2048"),
        ("chat,output_tokens=9000,output_spread=0", "10000 chats in a row were longer than"),
    ],
)
def test_what_is_wrong_is_named(rest: str, reason: str) -> None:
    with pytest.raises(WorkloadError, match=reason):
        next(open_paper(rest, rate=None, seed=0, count=None))


def test_a_file_of_another_kind_and_an_unknown_article_are_refused(tmp_path: Path, file: str) -> None:
    (tmp_path / "other.json").write_text('{"gpts": 1}')
    with pytest.raises(WorkloadError, match=r"other.json: not the paper's workloads: "):
        open_paper(f"gpts,file={tmp_path / 'other.json'}", rate=None, seed=0, count=None)
    with pytest.raises(WorkloadError, match="has no article 'x'; it has: article_0, article_1"):
        open_paper(f"map_reduce,file={file},article=x", rate=None, seed=0, count=None)
    with pytest.raises(WorkloadError, match="rate 0: must be"):
        open_paper("chat", rate=0.0, seed=0, count=None)


def test_chats_can_have_the_lengths_of_a_recorded_trace(file: str, tmp_path: Path) -> None:
    trace = tmp_path / "azure.csv"
    rows = [(400, 30), (1100, 20), (1000, 1100), (200, 7)]  # the second and the third are longer than the artifact takes
    lines = [f"2023-11-16 18:15:{10 + i}.0000000,{prompt},{output}" for i, (prompt, output) in enumerate(rows)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]) + "\n")
    found = programs(f"chat,lengths={trace}", count=50)
    assert {(p.sets[0].tokens, p.calls[0].segments[-1].tokens) for p in found} == {(400, 30), (200, 7)}  # type: ignore[union-attr]
    mixed = [p for p in programs(f"mixed,file={file},lengths={trace}", count=None) if p.application == "chat"]
    assert {p.sets[0].tokens for p in mixed} <= {400, 200}
    with pytest.raises(WorkloadError, match=r"azure.csv: no request of at most 100 prompt tokens, 2048 in all"):
        programs(f"chat,lengths={trace},most_prompt_tokens=100")
