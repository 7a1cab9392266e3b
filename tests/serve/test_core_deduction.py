"""What gets make of the graph, by hand: criteria, depth, stages, and who may batch."""

from __future__ import annotations

import gc
from collections.abc import Iterable

import pytest

from parrot.protocol.api import Criteria
from parrot.serve import events as ev
from parrot.serve.deduction import Deduction
from parrot.serve.graph import Call, Task
from tests.serve.driver import Driver, out, read, text

L, T, TTFT, TPOT = Criteria.LATENCY, Criteria.THROUGHPUT, Criteria.TTFT, Criteria.TPOT


class Program:
    """Calls of one output each, by name. They may be submitted in any order: their variables are there beforehand."""

    def __init__(self, d: Driver | None = None) -> None:
        self.d = d or Driver()
        self.session = self.d.open()
        self.variables: dict[str, str] = {}

    def variable(self, name: str) -> str:
        if name not in self.variables:
            self.variables[name] = self.d.variable(self.session, name)
        return self.variables[name]

    def call(self, name: str, reads: str = "") -> None:
        inputs = [read(f"r{source}", self.variable(source)) for source in reads.split()]
        self.d.submit(self.session, text(name), *inputs, out("o", self.variable(name)), func_name=name)

    def get(self, name: str, criteria: Criteria = L) -> None:
        self.d.get(self.session, self.variable(name), criteria)

    def task(self, name: str) -> Task:
        return next(c.tasks[0] for c in self.d.core.calls(self.session) if c.func_name == name)

    def group(self, name: str) -> set[str]:
        group = self.task(name).group
        return set() if group is None else {member.call.func_name for member in group.members}

    def sensitive(self, names: str) -> str:
        return " ".join(name for name in names.split() if self.task(name).latency_sensitive)

    def finish(self, name: str) -> None:
        self.d.finish(next(x for x in self.d.dispatches if x.output_var == self.variables[name]))

    def criteria(self, names: Iterable[str]) -> list[Criteria | None]:
        return [self.task(name).criteria for name in names]


def test_map_reduce_twice_groups_each_stage_and_not_what_stands_between() -> None:
    p = Program()
    p.call("a1")
    p.call("a2")
    p.call("middle", "a1 a2")
    p.call("b1", "middle")
    p.call("b2", "middle")
    p.call("final", "b1 b2")
    p.get("final")
    assert p.group("a1") == {"a1", "a2"}
    assert p.group("b1") == {"b1", "b2"}
    assert p.group("middle") == p.group("final") == set()
    assert p.sensitive("a1 a2 middle b1 b2 final") == "middle final"
    assert [p.task(n).depth for n in ("final", "b1", "middle", "a2")] == [0, 1, 2, 3]
    group = p.task("a1").group
    assert group is not None
    assert group.latency_bound, "its members may batch, but somebody waits for the whole"
    assert (group.root, group.depth) == (p.task("final").id, 3)


def test_chains_side_by_side_are_a_group_stage_by_stage() -> None:
    p = Program()
    for branch in "12":
        p.call(f"draft{branch}")
        p.call(f"polish{branch}", f"draft{branch}")
    p.call("join", "polish1 polish2")
    p.get("join")
    assert p.group("draft1") == {"draft1", "draft2"}
    assert p.group("polish2") == {"polish1", "polish2"}
    assert p.sensitive("draft1 draft2 polish1 polish2 join") == "join"


def test_a_diamond_and_a_branch_that_is_shorter_than_the_other() -> None:
    p = Program()
    p.call("top")
    p.call("left1", "top")
    p.call("left2", "left1")
    p.call("right", "top")
    p.call("bottom", "left2 right")
    p.get("bottom")
    assert [p.task(n).depth for n in ("bottom", "left2", "right", "left1", "top")] == [0, 1, 1, 2, 3]
    assert p.group("right") == {"left2", "right"}
    assert p.sensitive("top left1 left2 right bottom") == "top left1 bottom"


def test_siblings_that_come_later_make_a_group_of_what_was_alone() -> None:
    p = Program()
    p.get("final")
    p.call("final", "m1 m2 m3")
    p.call("m1")
    assert p.sensitive("m1") == "m1"
    assert p.group("m1") == set()
    p.call("m2")
    assert p.group("m1") == {"m1", "m2"}
    assert p.sensitive("m1 m2") == ""
    p.call("m3")
    assert p.group("m1") == {"m1", "m2", "m3"}


def test_what_has_ended_before_the_get_is_in_no_group_and_who_is_left_is_alone() -> None:
    p = Program()
    p.d.engine()
    p.call("m1")
    p.call("m2")
    p.get("m1", T)
    p.finish("m1")
    p.call("final", "m1 m2")
    p.get("final")
    assert p.task("final").producers() == [p.task("m1"), p.task("m2")]
    assert p.task("final").awaited() == [p.task("m2")]
    assert p.sensitive("m2 final") == "m2 final"


def test_the_last_of_a_group_stays_a_member_and_the_group_knows_who_is_left() -> None:
    p = Program()
    p.d.engine()
    p.call("m1")
    p.call("m2")
    p.call("final", "m1 m2")
    p.get("final")
    p.finish("m1")
    group = p.task("m2").group
    assert group is not None
    assert group.unended() == [p.task("m2")]
    assert len(group.members) == 2


def test_a_task_that_feeds_two_groups_belongs_to_the_farther_stage() -> None:
    p = Program()
    for name in ("shared", "a", "b"):
        p.call(name)
    p.call("near", "shared a")
    p.call("far1", "shared b")
    p.call("far", "far1")
    p.get("near")
    assert p.group("shared") == {"shared", "a"}
    p.get("far")
    assert p.group("shared") == {"shared", "b"}
    assert p.group("a") == set()
    assert p.sensitive("shared a b near far1 far") == "a near far1 far"


def test_what_is_alone_before_one_output_is_latency_sensitive_in_the_group_of_another() -> None:
    for order in (("answer", "summary"), ("summary", "answer")):
        p = Program()
        for name in ("d1", "d2", "d3"):
            p.call(name)
        p.call("answer", "d1")
        p.call("summary", "d1 d2 d3")
        for name in order:
            p.get(name)
        assert p.sensitive("d1 d2 d3 answer summary") == "d1 answer summary"


def test_a_later_get_of_something_else_loosens_nothing() -> None:
    p = Program()
    p.call("t")
    p.call("w")
    p.call("c1", "t")
    p.call("c2", "t")
    p.call("x", "c1 c2")
    p.call("y1", "t w")
    p.call("y2", "y1")
    p.call("y", "y2")
    p.get("x")
    assert p.sensitive("t") == "t", "all of the next stage waits for it"
    p.get("y")
    assert p.group("t") == {"t", "w"}
    assert p.sensitive("t w") == "t"


def test_a_member_that_is_fetched_for_itself_is_latency_sensitive_whenever_that_is_said() -> None:
    for first, second in (("m1", "final"), ("final", "m1")):
        p = Program()
        for name in ("m1", "m2"):
            p.call(name)
        p.call("final", "m1 m2")
        p.get(first)
        p.get(second)
        assert p.group("m1") == {"m1", "m2"}
        assert p.sensitive("m1 m2") == "m1"


def test_a_throughput_get_leaves_the_groups_of_a_latency_get_as_they_are() -> None:
    p = Program()
    for name in ("m1", "m2"):
        p.call(name)
    p.call("final", "m1 m2")
    p.call("log1", "m1")
    p.call("log2", "log1")
    p.get("final", L)
    p.get("log2", T)
    assert p.group("m1") == {"m1", "m2"}
    assert p.criteria(("m1", "log1", "log2")) == [L, T, T]
    assert p.task("m1").depth == 2, "the longest way to anything that is fetched"


def test_throughput_makes_all_that_leads_to_it_throughput() -> None:
    p = Program()
    p.call("a")
    p.call("b", "a")
    p.call("c", "b")
    p.get("c", T)
    assert p.criteria("abc") == [T, T, T]
    p.get("b", L)
    assert p.criteria("abc") == [L, L, T], "only what leads to the output that is now wanted sooner"


@pytest.mark.parametrize(
    ("gets", "at", "behind"),
    [
        ([TTFT], TTFT, L),
        ([TPOT], TPOT, T),
        ([TPOT, TTFT], L, L),
        ([TTFT, TPOT], L, L),
        ([T, TPOT], TPOT, T),
        ([T, L], L, L),
        ([L, T, TPOT], L, L),
    ],
)
def test_ttft_and_tpot_constrain_what_they_name(gets: list[Criteria], at: Criteria, behind: Criteria) -> None:
    for first in (True, False):
        p = Program()
        if first:
            for criteria in gets:
                p.get("x", criteria)
        p.call("before")
        p.call("x", "before")
        if not first:
            for criteria in gets:
                p.get("x", criteria)
        assert p.criteria(("x", "before")) == [at, behind]
        assert p.task("x").latency_sensitive
        assert p.task("before").latency_sensitive == (behind is L)
        assert p.task("x").output.criteria is at


def test_output_criteria_is_a_get() -> None:
    d = Driver()
    session = d.open()
    (a,) = d.outputs(d.submit(session, text("A"), out("a")))
    d.submit(session, text("B"), read("a", a), out("b"), output_criteria=TTFT)
    first, second = (call.tasks[0] for call in d.core.calls(session))
    assert (first.criteria, second.criteria, second.output.criteria) == (L, TTFT, TTFT)


def test_queries_outlive_readiness_and_see_consumers_that_come_later() -> None:
    p = Program()
    p.d.engine()
    p.call("a")
    p.call("b", "a")
    p.get("a")
    p.finish("a")
    p.call("c", "a")
    assert [t.call.func_name for t in p.task("a").consumers()] == ["b", "c"]
    assert p.task("c").producers() == [p.task("a")]
    assert p.task("c").awaited() == []


def test_prefix_hashes_are_those_of_the_content_whoever_asks_and_however_it_is_filled() -> None:
    def hashes(cache_prefix: bool = True, tenant: str = "", fuse_fill: bool = False) -> tuple[list[str], list[str]]:
        d = Driver()
        session = d.open(tenant=tenant)
        question = d.variable(session)
        segments = (text("system"), read("q", question), text("end"), out("x"))
        (x,) = d.outputs(d.submit(session, *segments, cache_prefix=cache_prefix, fuse_fill=fuse_fill))
        (task,) = d.core.calls(session)[0].tasks
        early = task.prefix_hashes()
        d.set(session, question, "why")
        d.get(session, x)
        assert task.path is not None
        assert [node.prefix_hash for node in task.path] == task.prefix_hashes()
        assert [node.static for node in task.path] == [cache_prefix and not fuse_fill] + [False] * (len(task.path) - 1)
        return early, task.prefix_hashes()

    early, known = hashes()
    assert len(set(known)) == 3
    assert early == known[:1], "as far as its inputs are known"
    assert hashes(cache_prefix=False) == hashes(tenant="somebody") == (early, known)
    assert hashes(fuse_fill=True)[1] == known[-1:], "one boundary instead of three, and the same prefix there"
    assert known[0] == "8b123d20bd04e840c67de0dbaa4c4e5e", "in every process and version"


def test_a_session_that_ends_gives_its_memory_back_at_once() -> None:
    gc.collect()
    gc.disable()
    try:
        others = {id(o) for o in gc.get_objects() if isinstance(o, Task | Call)}
        p = Program()
        p.d.engine()
        for name in ("m1", "m2"):
            p.call(name)
        p.call("final", "m1 m2")
        p.get("final")
        p.finish("m1")
        p.d.send(ev.CloseSession(10_000, p.session, p.d.auths[p.session]))
        assert {id(o) for o in gc.get_objects() if isinstance(o, Task | Call)} <= others
    finally:
        gc.enable()


class Deduced:
    """A deduction of its own over the tasks of a program, with a callback that may fail."""

    def __init__(self, fails_at: str = "") -> None:
        self.p = Program()
        for name, reads in (("a", ""), ("b", ""), ("end", "a b"), ("other", "a")):
            self.p.call(name, reads)
        self.fails_at = fails_at
        self.told: list[str] = []
        self.deduction = Deduction(self._changed)

    def _changed(self, task: Task) -> None:
        name = task.call.func_name
        self.told.append(name)
        if name == self.fails_at:
            raise RuntimeError(f"no place for {name}")

    def fetch(self, name: str, criteria: Criteria = T) -> None:
        task = self.p.task(name)
        task.output.criteria = criteria
        self.told = []
        self.deduction.fetch(task)

    def state(self) -> list[object]:
        names = ("a", "b", "end", "other")
        sensitive, groups = self.p.sensitive(" ".join(names)), [self.p.group(name) for name in names]
        return [self.told, self.p.criteria(names), sensitive, groups, [self.p.task(name).touched for name in names]]


def after_both(x: Deduced, error: type[Exception] | tuple[type[Exception], ...] | None = None) -> list[object]:
    """What `x` is after two gets, the first of which fails with `error`, if any."""
    if error is None:
        x.fetch("end")
    else:
        with pytest.raises(error):
            x.fetch("end")
    assert set(x.told) == {"a", "b", "end"}, "the others are told of all the same"
    x.fails_at = ""
    x.p.task("a").sources = None
    x.fetch("other", L)
    return x.state()


def test_a_task_that_cannot_be_told_of_costs_no_other_and_leaves_nothing_behind() -> None:
    assert after_both(Deduced(fails_at="a"), RuntimeError) == after_both(Deduced())


def test_a_task_that_cannot_be_visited_costs_no_other_and_leaves_nothing_behind() -> None:
    x = Deduced()
    x.p.task("a").sources = [None]  # type: ignore[list-item]  # a graph that a bug has left so
    assert after_both(x, (AttributeError, TypeError)) == after_both(Deduced())
