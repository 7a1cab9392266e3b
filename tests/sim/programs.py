"""Programs for tests: small ones by hand, and random ones for Hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from parrot.protocol.api import Criteria
from sim.workloads.program import After, Call, Get, Program, Read, Set, Text, Write, check


def one_call(name: str = "one", arrival_s: float = 0.0, prompt: int = 20, output: int = 5, **fields: object) -> Program:
    call = Call((Text(f"{name}/prompt", prompt), Write("answer", output)), name="ask")
    return Program(name, arrival_s, (call,), (Get("g", "answer"),), **fields)  # type: ignore[arg-type]


def chain(length: int, name: str = "chain", arrival_s: float = 0.0, prompt: int = 30, output: int = 6) -> Program:
    calls = [Call((Text(f"{name}/0", prompt), Write("v0", output)), name="step")]
    calls += [
        Call((Text(f"{name}/{i}", prompt), Read(f"v{i - 1}"), Write(f"v{i}", output)), name="step") for i in range(1, length)
    ]
    return Program(name, arrival_s, tuple(calls), (Get("end", f"v{length - 1}"),), application="chain")


def map_reduce(width: int, name: str = "mapreduce", arrival_s: float = 0.0, prompt: int = 40, output: int = 8) -> Program:
    maps = [Call((Text(f"{name}/{i}", prompt), Write(f"m{i}", output)), name="map") for i in range(width)]
    reads = tuple(Read(f"m{i}") for i in range(width))
    reduce = Call((Text("reduce", 5), *reads, Write("r", output)), name="reduce")
    return Program(name, arrival_s, (*maps, reduce), (Get("end", "r"),), application="map_reduce")


def chat(turns: int, think_s: float = 2.0, name: str = "chat", arrival_s: float = 0.0) -> Program:
    """Each turn is asked `think_s` after the one before was answered; two outputs in the last call."""
    calls, gets = [], []
    for turn in range(turns):
        after = (After(f"g{turn - 1}", think_s),) if turn else ()
        history = tuple(Read(f"a{t}") for t in range(turn))
        tail: tuple[Text | Write, ...] = (Write(f"a{turn}", 7),)
        if turn == turns - 1:
            tail = (*tail, Text("title", 3), Write("title", 2))
        calls.append(Call((Text("system", 16), *history, Text(f"{name}/{turn}", 9), *tail), name="turn", after=after))
        gets.append(Get(f"g{turn}", f"a{turn}", Criteria.LATENCY))
    gets.append(Get("t", "title", Criteria.THROUGHPUT))
    return Program(name, arrival_s, tuple(calls), tuple(gets), application="chat")


@st.composite
def programs(draw: st.DrawFn, serial: int = 0) -> Program:
    """Any program whose variables come from earlier calls or sets, with control edges on earlier gets."""
    sets = [Set(f"s{i}", f"set{i}", draw(st.integers(0, 30))) for i in range(draw(st.integers(0, 2)))]
    known = [source.var for source in sets]
    calls: list[Call] = []
    gets: list[Get] = []
    for number in range(draw(st.integers(1, 5))):
        after = []
        for get in draw(st.lists(st.sampled_from(gets), max_size=2, unique_by=lambda g: g.id)) if gets else ():
            after.append(After(get.id, draw(st.sampled_from([0.0, 0.5, 3.0]))))
        if draw(st.booleans()) and draw(st.booleans()):
            after.append(After(None, draw(st.sampled_from([0.0, 1.25]))))
        segments: list[Text | Read | Write] = [Text(f"t{number}", draw(st.integers(1, 60)))]
        new: list[str] = []
        for place in range(draw(st.integers(1, 2))):
            segments += [Read(var) for var in draw(st.lists(st.sampled_from(known), max_size=3))] if known else []
            segments += [Text("shared", draw(st.integers(0, 20)))]
            segments.append(Write(f"v{number}_{place}", draw(st.integers(1, 25))))
            new.append(f"v{number}_{place}")
        calls.append(Call(tuple(segments), name=f"c{number}", after=tuple(after)))
        known += new
        if draw(st.booleans()):
            gets.append(Get(f"g{number}", draw(st.sampled_from(known)), draw(st.sampled_from(list(Criteria)))))
    if not gets:
        gets.append(Get("last", known[-1]))
    program = Program(
        f"p{serial}",
        draw(st.sampled_from([0.0, 0.25, 4.0])),
        tuple(calls),
        tuple(gets),
        tuple(sets),
        tenant=draw(st.sampled_from(["", "t"])),
    )
    check(program)
    return program
