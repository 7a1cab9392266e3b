"""Readers of public traces: times, lengths and sharing come through, and what is wrong is refused with file, line, reason."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sim.workloads import WorkloadError, open_workload, traces
from sim.workloads.describe import describe
from sim.workloads.program import Call, Program, Read, Text, Write, check

SHARED = Path(__file__).parents[3] / "shared/traces"

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
ROWS_2023 = "2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:50.6805900,396,109\r\n2023-11-16 18:15:54.6805900,879,5000"
ROWS_2024 = ROWS_2023.replace("2023-11-16", "2024-05-10").replace("6805900", "680590+00:00").replace("\r", "")
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
BURST_2 = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"

Lengths = list[tuple[int, int, int | None]]


def write(path: Path, content: str) -> str:
    path.write_text(content)
    return str(path)


def lengths(programs: Iterable[Program]) -> Lengths:
    """(prompt, output, limit) of each call."""
    found = []
    for call in (call for program in programs for call in program.calls):
        *texts, output = call.segments
        assert isinstance(output, Write)
        found.append((sum(t.tokens for t in texts if isinstance(t, Text)), output.tokens, output.max_gen_length))
    return found


def single(program: Program) -> Call:
    check(program)
    (call,) = program.calls
    return call


# ------------------------------------------------------------------------------------------------------------- Azure


@pytest.mark.parametrize("rows", [ROWS_2023, ROWS_2024])
def test_an_azure_trace_keeps_its_times_lengths_and_limits(tmp_path: Path, rows: str) -> None:
    spec = "azure:" + write(tmp_path / "trace.csv", AZURE + rows)
    programs = list(open_workload(spec))
    assert [p.arrival_s for p in programs] == [0.0, 4.0, 8.0]
    assert lengths(programs) == [(374, 44, 2048), (396, 109, 2048), (879, 5000, 5000)]
    assert {p.tenant for p in programs} == {"trace"}
    assert len({single(p).segments[0] for p in programs}) == 3
    assert [p.arrival_s for p in open_workload(spec, rate=1.0)] == [0.0, 1.0, 2.0]
    assert [p.arrival_s for p in open_workload(spec, rate=0.5, count=2)] == [0.0, 2.0]
    assert [p.arrival_s for p in open_workload(spec, arrivals="recorded:0.5")] == [0.0, 2.0, 4.0]


def test_an_empty_answer_counts_as_one_token(tmp_path: Path) -> None:
    assert lengths(open_workload("azure:" + write(tmp_path / "t.csv", AZURE + "2023-11-16 18:15:46,9,0\n"))) == [(9, 1, 2048)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", ":1: not an Azure trace: expected 'TIMESTAMP"),
        ('{"timestamp": 0}\n', ":1: not an Azure trace"),
        (AZURE, ": no requests"),
        (AZURE + "2023-11-16 18:15:46.68,374\n", ":2: 2 fields instead of 3"),
        (AZURE + "2023-11-16 18:15:46.68,374,44\n2023-11-16 18:", ":3: 1 fields instead of 3"),
        (AZURE + "2023-11-16 18:15:46.68,374,44,Chat\n", ":2: 4 fields instead of 3"),
        (AZURE + '\n2023-11-16 18:15:46.68,3,4\n{"timestamp": 0, "input_length": 2}\n', ":4: 2 fields instead of 3"),
        (AZURE + "2023-11-16 18:15:46.68,374,-4\n", ":2: GeneratedTokens is -4"),
        (AZURE + "2023-11-16 18:15:46.68,-374,4\n", ":2: ContextTokens is -374"),
        (AZURE + "2023-11-16 18:15:46.68,0,4\n", ":2: ContextTokens is 0"),
        (AZURE + "2023-11-16 18:15:46.68,many,4\n", ":2: invalid literal"),
        (AZURE + "2023-11-16 18:15:46.68,374,\n", ":2: invalid literal"),
        (AZURE + "yesterday,3,4\n", ":2: Invalid isoformat"),
        (AZURE + "2023-11-16 18:15:46,3,4\n2023-11-16 18:15:45,3,4\n", ":3: the time .* is before"),
        (AZURE + "2023-11-16 18:15:46,3,4\n2024-05-10 00:00:00+00:00,3,4\n", ":3: can't subtract"),
    ],
)
def test_a_bad_azure_trace_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    spec = "azure:" + write(tmp_path / "trace.csv", content)
    for arguments in ({}, {"rate": 2.0}):
        with pytest.raises(WorkloadError, match=rf"trace\.csv{reason}"):
            list(open_workload(spec, **arguments))  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["azure:{0}", "burstgpt:{0}", "mooncake:{0}", "sharegpt:{0}", "{0}"])
def test_a_compressed_file_is_refused_as_such(tmp_path: Path, form: str) -> None:
    (tmp_path / "trace.gz").write_bytes(gzip.compress(b"TIMESTAMP,ContextTokens,GeneratedTokens\n"))
    with pytest.raises(WorkloadError, match=r"trace\.gz: cannot be read: it is compressed \(gzip\); unpack it first"):
        list(open_workload(form.format(tmp_path / "trace.gz")))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(AZURE.encode() + b"\xff\xfe\x00")
    with pytest.raises(WorkloadError, match=r"trace\.csv: not a text file"):
        list(open_workload(f"azure:{path}"))


# ---------------------------------------------------------------------------------------------------------- BurstGPT


def test_a_burstgpt_trace_keeps_times_and_lengths_and_leaves_failures_out(tmp_path: Path) -> None:
    rows = "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,100,0,100,API log\n47.5,GPT-4,417,3000,3417,API log\n"
    spec = "burstgpt:" + write(tmp_path / "burst.csv", BURST + rows)
    notes: list[str] = []
    programs = list(open_workload(spec, on_note=notes.append))
    assert [p.arrival_s for p in programs] == [0.0, 42.5]
    assert lengths(programs) == [(472, 18, 2048), (417, 3000, 3000)]
    assert [(single(p).name, single(p).models) for p in programs] == [("Conversation log", ()), ("API log", ())]
    assert "failed requests (0 tokens): 1, left out" in notes[0]
    assert [p.arrival_s for p in open_workload(spec, rate=2.0)] == [0.0, 0.5]
    kept = list(open_workload(spec + ":failed=keep"))
    assert [p.arrival_s for p in kept] == [0.0, 40.0, 42.5]
    assert lengths(kept)[1] == (100, 1, 2048)


def test_later_burstgpt_traces_have_more_columns(tmp_path: Path) -> None:
    rows = "5,31,1.5,ChatGPT,472,18,490,Conversation log\n6.25,,0.5,GPT-4,417,276,693,API log\n"
    programs = list(open_workload("burstgpt:" + write(tmp_path / "burst.csv", BURST_2 + rows)))
    assert [p.arrival_s for p in programs] == [0.0, 1.25]
    assert lengths(programs) == [(472, 18, 2048), (417, 276, 2048)]


def test_models_of_a_burstgpt_trace_are_those_of_engines_when_they_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "burst.csv", BURST + "5,ChatGPT,4,1,5,API log\n6,GPT-4,4,1,5,API log\n")
    spec = f"burstgpt:{path}:model.ChatGPT=org/small:7b,model.GPT-4=large"
    assert [single(p).models for p in open_workload(spec)] == [("org/small:7b",), ("large",)]
    options = {"model": {"ChatGPT": "small"}}
    with pytest.raises(WorkloadError, match=r"burst\.csv:3: no model\.GPT-4=NAME"):
        list(open_workload(f"burstgpt:{path}", options=options))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (AZURE + ROWS_2023, ":1: not a BurstGPT trace: no column Timestamp, Model"),
        (BURST, ": no requests"),
        (BURST + "5,ChatGPT,472,18,490\n", ":2: 5 fields instead of 6"),
        (BURST + "5,ChatGPT,472,18,490,API log\n45,Chat", ":3: 2 fields instead of 6"),
        (BURST + "5,ChatGPT,-472,18,490,API log\n", ":2: Request tokens is -472"),
        (BURST + "5,ChatGPT,472,-18,490,API log\n", ":2: Response tokens is -18"),
        (BURST + "5,ChatGPT,many,18,490,API log\n", ":2: invalid literal"),
        (BURST + "nan,ChatGPT,472,18,490,API log\n", ":2: the Timestamp nan is no time"),
        (BURST + "5,GPT-4,4,1,5,API log\n4,GPT-4,4,1,5,API log\n", r":3: the Timestamp 4 is before the line above it \(5\)"),
    ],
)
def test_a_bad_burstgpt_trace_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    with pytest.raises(WorkloadError, match=rf"burst\.csv{reason}"):
        list(open_workload("burstgpt:" + write(tmp_path / "burst.csv", content)))


# ---------------------------------------------------------------------------------------------------------- Mooncake


def request(**changed: Any) -> str:
    row = {"timestamp": 27482, "input_length": 1200, "output_length": 52, "hash_ids": [46, 47, 2353]}
    return json.dumps({**row, **changed}) + "\n"


def test_a_mooncake_trace_shares_its_equal_blocks_and_ends_in_a_partial_one(tmp_path: Path) -> None:
    rows = request() + request(timestamp=30982, input_length=1024, output_length=0, hash_ids=[46, 47])
    programs = list(open_workload("mooncake:" + write(tmp_path / "moon.jsonl", rows)))
    assert [p.arrival_s for p in programs] == [0.0, 3.5]
    assert lengths(programs) == [(1200, 52, 2048), (1024, 1, 2048)]
    first, second = (single(p).segments for p in programs)
    assert first[:2] == second[:2]
    assert [s.tokens for s in first if isinstance(s, Text)] == [512, 512, 176]
    assert len({p.tenant for p in programs}) == 1


def test_a_partial_block_is_no_whole_one_of_the_same_id(tmp_path: Path) -> None:
    rows = request() + request(input_length=1536) + request(input_length=1201)
    programs = open_workload("mooncake:" + write(tmp_path / "moon.jsonl", rows))
    assert len({single(p).segments[2].key for p in programs}) == 3  # type: ignore[union-attr]


def test_blocks_of_another_size_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "moon.jsonl", request(input_length=130))
    (program,) = open_workload(f"mooncake:{path}:block_tokens=64")
    assert [s.tokens for s in single(program).segments if isinstance(s, Text)] == [64, 64, 2]


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(paths=st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.integers(1, 512)), min_size=1))
def test_merged_blocks_share_what_single_ones_share(tmp_path: Path, paths: list[tuple[list[int], int]]) -> None:
    """As in the real traces, a block's id stands for all blocks up to it."""
    ids: dict[tuple[int, ...], int] = {}
    rows = ""
    for path, left in paths:
        blocks = [ids.setdefault(tuple(path[: i + 1]), len(ids)) for i in range(len(path))]
        rows += request(input_length=512 * (len(path) - 1) + left, hash_ids=blocks)
    spec = "mooncake:" + write(tmp_path / "moon.jsonl", rows)
    single, merged = (list(open_workload(spec, options={"merge": merge})) for merge in (False, True))
    assert lengths(single) == lengths(merged)
    assert describe(single, "w").repeated_tokens == describe(merged, "w").repeated_tokens
    assert all(len(m.calls[0].segments) <= len(s.calls[0].segments) for s, m in zip(single, merged, strict=True))


def test_blocks_that_are_never_parted_are_one_segment_when_merged(tmp_path: Path) -> None:
    rows = request(hash_ids=[1, 2, 3]) + request(input_length=2000, hash_ids=[1, 2, 4, 5])
    programs = open_workload(f"mooncake:{write(tmp_path / 'moon.jsonl', rows)}:merge=true")
    texts = [[(s.key, s.tokens) for s in single(p).segments if isinstance(s, Text)] for p in programs]
    assert texts == [[("moon/1-2", 1024), ("moon/3/176", 176)], [("moon/1-2", 1024), ("moon/4-5/464", 976)]]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ("\n", ": no requests"),
        (request() + request()[:40], ":2: not a Mooncake request, truncated or mixed: .*truncated"),
        (AZURE + ROWS_2023, ":1: not a Mooncake request"),
        (request() + "\n" + json.dumps({"id": "p", "arrival_s": 0}), ":3: not a Mooncake request.*missing required"),
        (request(input_length=-1), ":1: input_length is -1"),
        (request(output_length=-1), ":1: output_length is -1"),
        (request(input_length="many"), ":1: not a Mooncake request.*input_length"),
        (request(input_length=1537), ":1: 3 hash_ids, but an input_length of 1537 has 4 blocks of 512 tokens"),
        (request(hash_ids=[]), ":1: 0 hash_ids"),
        (request() + request(timestamp=27481), r":2: the timestamp 27481 is before the line above it \(27482\)"),
    ],
)
def test_a_bad_mooncake_trace_is_refused(tmp_path: Path, rows: str, reason: str) -> None:
    with pytest.raises(WorkloadError, match=rf"moon\.jsonl{reason}"):
        list(open_workload("mooncake:" + write(tmp_path / "moon.jsonl", rows)))


# ---------------------------------------------------------------------------------------------------------- ShareGPT


def conversation(*messages: tuple[str, str], **fields: Any) -> dict[str, Any]:
    return {"id": "x", "conversations": [{"from": who, "value": text} for who, text in messages], **fields}


QUESTION = ("human", "one two three")
CHAT = conversation(("system", "be brief"), QUESTION, ("gpt", "four five"), ("human", "six"), ("gpt", "seven"))
OTHER = conversation(QUESTION, ("gpt", ""), model='m {["\\" }]')

as_list = json.dumps
as_indented_list: Callable[[Any], str] = lambda values: json.dumps(values, indent=2)  # noqa: E731
as_lines: Callable[[Any], str] = lambda values: "\n".join(map(json.dumps, values))  # noqa: E731
FORMS = pytest.mark.parametrize("form", [as_list, as_indented_list, as_lines])


@FORMS
def test_a_conversation_becomes_a_chat_with_time_to_think(tmp_path: Path, form: Callable[[Any], str]) -> None:
    path = write(tmp_path / "talk.json", form([CHAT, OTHER]))
    first, second = open_workload(f"sharegpt:{path}:tokenizer=synthetic", rate=2.0, seed=3)
    check(first)
    system, question, answer = first.calls[0].segments
    assert [s.tokens for s in first.calls[0].segments] == [2, 3, 2]  # type: ignore[union-attr]
    assert first.calls[1].segments[:3] == (system, question, Read(answer.var))  # type: ignore[union-attr]
    assert [(edge.get, edge.delay_s > 0) for edge in first.calls[1].after] == [("turn0", True)]
    assert second.calls[0].segments[0] == question  # equal texts are equal
    assert lengths([second]) == [(3, 1, 2048)]
    assert first.application == "sharegpt"
    assert [first.arrival_s, second.arrival_s] == [p.arrival_s for p in open_workload("chat", rate=2.0, seed=3, count=2)]


def test_lengths_without_a_tokenizer_are_estimates_and_say_so(tmp_path: Path) -> None:
    path = write(tmp_path / "talk.json", as_list([CHAT]))
    notes: list[str] = []
    (program,) = open_workload(f"sharegpt:{path}:characters_per_token=5", on_note=notes.append)
    assert [s.tokens for s in program.calls[0].segments] == [2, 3, 2]  # type: ignore[union-attr]
    assert program.application == "sharegpt-estimated"
    assert "lengths are estimates, a token for 5 characters" in notes[0]


def test_what_asks_nothing_of_a_model_is_left_out_and_what_is_too_long_is_cut(tmp_path: Path) -> None:
    silent = conversation(("gpt", "hello"), ("human", "are you there"))
    greeted = conversation(("gpt", "hello there"), ("user", "hi"), ("assistant", "so"), ("user", "goodbye now"))
    path = write(tmp_path / "talk.json", as_list([silent, conversation(), greeted, CHAT]))
    notes: list[str] = []
    programs = list(open_workload(f"sharegpt:{path}:tokenizer=synthetic,max_tokens=8", on_note=notes.append))
    assert [len(p.calls) for p in programs] == [1, 1]
    assert lengths(programs) == [(3, 1, 2048), (5, 2, 2048)]
    assert [note.split(": ", 1)[1].split(" ", 1)[0] for note in notes] == ["2", "1"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", ": no conversations"),
        ("[]", ": no conversations"),
        (as_indented_list([CHAT, OTHER])[:-60], ":27: the file ends inside the list: truncated"),
        (as_list([CHAT])[:-1], ":1: the file ends inside the list"),
        (as_list([CHAT]) + "\n{}", ":1: something follows the end of the list"),
        (as_list([CHAT, 7]), ":1: the elements of the list must be objects, found '7"),
        (as_list([CHAT]).replace('"from"', "from"), ":1: not a conversation, truncated or mixed"),
        (as_lines([CHAT, OTHER])[:-9], ":2: not a conversation, truncated or mixed"),
        (as_lines([CHAT]) + "\n" + request(), ":2: not a conversation.*missing required field `conversations`"),
        (as_lines([OTHER, conversation(("robot", "beep"))]), ":2: 'robot' speaks in it; known are .*gpt"),
        (AZURE + ROWS_2023, ":1: not a conversation"),
    ],
)
def test_bad_conversations_are_refused(tmp_path: Path, content: str, reason: str) -> None:
    with pytest.raises(WorkloadError, match=rf"talk\.json{reason}"):
        list(open_workload("sharegpt:" + write(tmp_path / "talk.json", content)))


def test_a_tokenizer_that_cannot_be_had_is_refused_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "talk.json", as_list([CHAT]))
    with pytest.raises(WorkloadError, match="no-such-model"):
        open_workload(f"sharegpt:{path}:tokenizer=/nowhere/no-such-model")


@pytest.mark.parametrize("chunk", [1, 7, 64])
@FORMS
def test_where_a_file_is_cut_into_chunks_does_not_matter(
    tmp_path: Path, form: Callable[[Any], str], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "talk.json", form([CHAT, OTHER, CHAT]))
    expected = list(open_workload(f"sharegpt:{path}"))
    monkeypatch.setattr(traces, "CHUNK_BYTES", chunk)
    assert list(open_workload(f"sharegpt:{path}")) == expected


def test_an_element_that_never_ends_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traces, "LARGEST_ELEMENT_BYTES", 1 << 20)
    path = write(tmp_path / "talk.json", '[{"a": "' + "x" * (3 << 20))
    with pytest.raises(WorkloadError, match=r"talk\.json:1: an element of more than 1 MiB"):
        list(open_workload(f"sharegpt:{path}"))


# ------------------------------------------------------------------------------------------------------------ memory


def azure_row(number: int) -> str:
    return f"2024-05-10 00:{number // 6000:02}:{number // 100 % 60:02}.{number % 100:02}0000+00:00,37,4\n"


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("azure", lambda n: AZURE + "".join(azure_row(i) for i in range(n))),
        ("burstgpt", lambda n: BURST + "".join(f"{i},GPT-4,7,{i % 3},9,API log\n" for i in range(n))),
        ("mooncake", lambda n: "".join(request(timestamp=i) for i in range(n))),
        ("sharegpt", lambda n: as_list([CHAT] * n)),
    ],
)
def test_a_long_trace_needs_no_more_memory_than_a_short_one(
    tmp_path: Path, kind: str, make: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traces, "CHUNK_BYTES", 4096)
    specs = {n: f"{kind}:" + write(tmp_path / f"{n}.txt", make(n)) for n in (100, 1000)}

    def peak_bytes(count: int) -> int:
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        assert sum(1 for _ in open_workload(specs[count], rate=5.0)) > count // 2
        return tracemalloc.get_traced_memory()[1] - before

    tracemalloc.start()
    try:
        peak_bytes(100)  # whatever is made once
        short, long = peak_bytes(100), peak_bytes(1000)
    finally:
        tracemalloc.stop()
    assert long < short + 30_000


# ----------------------------------------------------------------------------------------------------- public traces


@pytest.mark.skipif(not SHARED.exists(), reason="the public traces are not here")
def test_the_public_traces_read_whole() -> None:
    azure = f"azure:{SHARED / 'azure_llm_2023_conv.csv'}"
    programs = list(open_workload(azure))
    assert len(programs) == 19_366
    assert 3400 < programs[-1].arrival_s < 3600
    assert list(open_workload(azure, rate=10.0))[-1].arrival_s == pytest.approx(19_365 / 10.0)
    programs = list(open_workload(f"mooncake:{SHARED / 'mooncake_conversation.jsonl'}"))
    assert len(programs) == 12_031
    assert msgspec.json.encode(programs[0]).count(b'"text"') == 14
