"""The rules of the policies, each where the opposite choice would fail; and what contains a policy that misbehaves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from parrot.protocol.api import Criteria
from parrot.protocol.errors import ParrotError
from parrot.serve import events as ev
from parrot.serve.config import GlobalSchedulerConfig
from parrot.serve.effects import Dispatch
from parrot.serve.engines import Engine
from parrot.serve.graph import Task
from parrot.serve.policies import build_policy, parse_policy
from parrot.serve.policies.base import Cluster, Placement
from parrot.serve.policies.least_loaded import LeastLoaded
from parrot.serve.policies.parameters import Parameter
from parrot.serve.queue import TaskQueue
from tests.serve.driver import Driver, content, described, out, read, text, value


def fetched(d: Driver, session: int, *segments: object, criteria: Criteria | None = None) -> str:
    (x,) = d.outputs(d.submit(session, *segments))
    d.get(session, x, criteria)
    return x


def engines_of(d: Driver) -> list[int]:
    return [dispatch.engine_id for dispatch in d.dispatches]


def test_round_robin_goes_in_turn_and_skips_who_is_full() -> None:
    d = Driver("round_robin")
    for capacity in (9, 1, 9):
        d.engine(tasks_capacity=capacity)
    session = d.open()
    for i in range(5):
        fetched(d, session, text(f"t{i}"), out("x"))
    assert engines_of(d) == [1, 2, 3, 1, 3]


def test_least_loaded_counts_tokens_not_tasks() -> None:
    d = Driver("least_loaded")
    d.engine()
    d.engine()
    session = d.open()
    for i, tokens in enumerate((1000, 10, 10, 10)):
        fetched(d, session, text(f"t{i}", tokens), out("x"))
    assert engines_of(d) == [1, 2, 2, 2]


def map_reduce(d: Driver, session: int, name: str, width: int) -> None:
    maps = [d.outputs(d.submit(session, text(f"{name}{i}"), out("s")))[0] for i in range(width)]
    fetched(d, session, text("reduce"), *[read(f"s{i}", v) for i, v in enumerate(maps)], out("f"), criteria=Criteria.LATENCY)


def test_app_fifo_finishes_the_first_program_before_it_begins_the_second() -> None:
    def order(switches: str) -> list[int]:
        d = Driver(scheduler=dict.fromkeys(switches.split(), True), policy="parrot")
        d.engine(tasks_capacity=1)
        first, second = d.open(), d.open()
        map_reduce(d, first, "a", 2)
        map_reduce(d, second, "b", 2)
        seen = []
        while d.dispatches:
            seen.append(d.dispatches[0].task.session_id)
            d.finish(d.dispatches[0])
        return [session - first for session in seen]

    assert order("app_fifo") == [0, 0, 0, 1, 1, 1]
    assert order("") == [0, 0, 1, 1, 0, 1]


def test_graph_group_puts_a_group_on_one_engine_when_it_fits_and_on_few_when_not() -> None:
    def spread(tasks_capacity: int, **switches: bool) -> list[int]:
        d = Driver("parrot", switches)
        session = d.open()
        map_reduce(d, session, "m", 4)
        for _ in range(4):
            d.engine(tasks_capacity=tasks_capacity)
        # All four were queued before any engine came: the group is complete when it is placed.
        return engines_of(d)

    def spread_at_once(tasks_capacity: int, **switches: bool) -> list[int]:
        d = Driver("parrot", switches)
        for _ in range(4):
            d.engine(tasks_capacity=tasks_capacity)
        session = d.open()
        map_reduce(d, session, "m", 4)
        return engines_of(d)

    assert spread_at_once(8, graph_group=True) == [1, 1, 1, 1]
    assert spread_at_once(8) == [1, 2, 3, 4]
    assert spread_at_once(2, graph_group=True) == [1, 1, 2, 2]
    assert spread(8, graph_group=True) == [1, 1, 1, 1]


def test_a_task_group_over_several_models_is_placed_model_by_model() -> None:
    d = Driver("parrot", {"graph_group": True})
    for model in "ABAB":
        d.engine(model=model)
    session = d.open()
    parts = [d.outputs(d.submit(session, text(f"m{n}"), out("x"), models=("AB"[n % 2],)))[0] for n in range(4)]
    fetched(d, session, text("reduce"), *(read(f"x{n}", var) for n, var in enumerate(parts)), out("y"))
    placed = {dispatch.task.call: dispatch.engine_id for dispatch in d.dispatches}
    assert placed[0] == placed[2]
    assert placed[1] == placed[3]
    assert d.core.scheduler.describe_policy_errors() == {}


def test_ctx_group_keeps_queued_tasks_with_a_common_prefix_together() -> None:
    def placed(**switches: bool) -> dict[str, set[int]]:
        # Six tasks wait; then two engines come in one instant, so that the policy sees all of it at once.
        d = Driver("parrot", switches)
        session = d.open()
        prefixes = {}
        for i, prefix in enumerate("AABBAB"):
            prefixes[fetched(d, session, text(prefix, 100), value("q", f"q{i}"), out("x"))] = prefix
        d.send(*(ev.RegisterEngine(900 + i, described(f"e{i}", tokens_capacity=400)) for i in range(2)))
        found: dict[str, set[int]] = {"A": set(), "B": set()}
        for dispatch in d.dispatches:
            found[prefixes[dispatch.output_var]].add(dispatch.engine_id)
        return found

    together = placed(ctx_group=True)
    assert all(len(engines) == 1 for engines in together.values())
    assert together["A"] != together["B"]
    apart = placed()
    assert any(len(engines) == 2 for engines in apart.values())


def test_ctx_aware_follows_the_prefix_and_leaves_it_when_that_engine_is_full() -> None:
    d = Driver("parrot", {"ctx_aware": True})
    d.engine(tasks_capacity=2)
    d.engine(tasks_capacity=2)
    session = d.open()
    fetched(d, session, text("system", 200), value("q", "0"), out("x"))
    for i in range(2):
        fetched(d, session, text("system", 200), value("q", f"{i + 1}"), out("x"))
    assert engines_of(d) == [1, 1, 2]
    plain = Driver("parrot")
    plain.engine(tasks_capacity=2)
    plain.engine(tasks_capacity=2)
    session = plain.open()
    for i in range(2):
        fetched(plain, session, text("system", 200), value("q", f"{i}"), out("x"))
    assert engines_of(plain) == [1, 2]


def test_ctx_aware_does_not_pile_work_on_a_short_hot_prefix() -> None:
    def spread(**params: float) -> set[int]:
        d = Driver("parrot", {"ctx_aware": True, "params": params})
        for _ in range(4):
            d.engine()
        session = d.open()
        for i in range(20):
            fetched(d, session, text("short", 8), value("q", f"{i}", 100), out("x"))
        return set(engines_of(d))

    assert spread() == {1, 2, 3, 4}
    assert spread(ctx_weight=1e9) == {1}, "as the paper has it"


def test_a_latency_bound_task_lowers_what_its_engine_may_hold() -> None:
    def queued(capacity: int | None) -> int:
        d = Driver("parrot", {"params": {"latency_capacity": capacity}})
        d.engine()
        session = d.open()
        fetched(d, session, text("chat", 50), out("x"), criteria=Criteria.LATENCY)
        for i in range(5):
            fetched(d, session, text(f"bulk{i}", 50), out("x"), criteria=Criteria.THROUGHPUT)
        return len(d.core.scheduler.queue)

    assert queued(None) == 0
    assert queued(200) == 3


def test_throughput_work_avoids_engines_with_latency_bound_tasks() -> None:
    d = Driver("parrot")
    d.engine()
    d.engine()
    session = d.open()
    fetched(d, session, text("chat", 10), out("x"), criteria=Criteria.LATENCY)
    for i in range(3):
        fetched(d, session, text(f"bulk{i}", 500), out("x"), criteria=Criteria.THROUGHPUT)
    assert engines_of(d) == [1, 2, 2, 1], "kept away from the chat, but not for good"


def test_nothing_overtakes_a_task_that_waits_for_room() -> None:
    d = Driver("least_loaded")
    d.engine(tokens_capacity=200)
    session = d.open()
    for i, tokens in enumerate((100, 150, 1)):
        fetched(d, session, text(f"t{i}", tokens), out("x"))
    assert len(d.dispatches) == 1
    d.finish(d.dispatches[0])
    assert [dispatch.chain[0].keys for dispatch in d.dispatches] == [("t1",), ("t2",)]


class Raising:
    name = "raising"
    work_conserving = False
    clairvoyant = False
    share_by = ""
    uses_prefix_groups = False
    parameters: ClassVar[dict[str, Parameter]] = {}

    def __init__(self, parameters: object = None, generator: object = None) -> None:
        """Takes what a policy is built with."""

    def order(self, task: Task) -> int:
        return task.sequence

    def place(self, queue: TaskQueue, cluster: Cluster, now: float) -> Iterator[Placement]:
        raise RuntimeError("no idea")
        yield


class Overloading(Raising):
    def place(self, queue: TaskQueue, cluster: Cluster, now: float) -> Iterator[Placement]:
        for lane in queue.lanes():
            for task in queue.in_order(lane):
                yield Placement(task, cluster.engines(lane)[0])


@pytest.mark.parametrize("policy", [Raising(), Overloading()])
def test_a_policy_that_misbehaves_is_contained(policy: Raising) -> None:
    d = Driver()
    d.core.scheduler.policy = policy  # type: ignore[assignment]
    d.engine(tasks_capacity=1)
    d.engine(tasks_capacity=1)
    session = d.open()
    for i in range(4):
        fetched(d, session, text(f"t{i}"), out("x"))
    while d.dispatches:
        assert len(d.dispatches) <= 2
        d.finish(d.dispatches[0])
    assert d.core.counts()["finished"] == 4
    assert len(d.faults) == 1, "told once, however often it happened"
    assert sum(d.core.scheduler.describe_policy_errors().values()) >= 1


def test_a_policy_that_cannot_order_a_task_has_it_last_and_the_event_goes_through() -> None:
    class Unordered(LeastLoaded):
        def order(self, task: Task) -> int:
            if task.sequence % 2:
                raise RuntimeError("odd")
            return task.sequence

    d = Driver()
    d.core.scheduler.policy = Unordered({}, None)  # type: ignore[arg-type]
    d.engine(tasks_capacity=1)
    session = d.open()
    for i in range(5):
        fetched(d, session, text(f"t{i}"), out("x"))
    done = []
    while d.dispatches:
        done.append(d.dispatches[0].chain[0].keys[0])
        d.finish(d.dispatches[0])
    assert done == ["t0", "t1", "t3", "t2", "t4"]
    assert len(d.faults) == 1


def test_a_policy_that_fails_on_one_task_places_the_others_itself() -> None:
    class Picky(LeastLoaded):
        def choose(self, task: Task, queue: TaskQueue, cluster: Cluster) -> list[Placement]:
            if task.sequence == 2:
                raise RuntimeError("not this one")
            return [Placement(task, cluster.engines(task.call.lane)[-1])]

    d = Driver()
    d.core.scheduler.policy = Picky({}, None)  # type: ignore[arg-type]
    session = d.open()
    for i in range(3):
        fetched(d, session, text(f"t{i}"), out("x"))
    d.send(*(ev.RegisterEngine(900 + i, described(f"e{i}")) for i in range(2)))
    assert engines_of(d) == [2, 1, 2]
    assert [p.fallback for p in d.core.scheduler.explanations.last(3)] == [False, True, False]  # type: ignore[union-attr]
    assert len(d.faults) == 1


@pytest.mark.parametrize("wrong", [None, "engine 1", Placement(None, None)])  # type: ignore[arg-type]
def test_what_is_no_placement_is_contained(wrong: Placement) -> None:
    class Wrong(Raising):
        def place(self, queue: TaskQueue, cluster: Cluster, now: float) -> Iterator[Placement]:
            yield wrong

    d = Driver()
    d.core.scheduler.policy = Wrong()
    d.engine()
    fetched(d, d.open(), text("t"), out("x"))
    assert len(d.dispatches) == 1
    assert len(d.faults) == 1


def test_policy_names_and_parameters_are_checked() -> None:
    base = GlobalSchedulerConfig()
    assert parse_policy("parrot:all", base).ctx_aware
    some = parse_policy("parrot:app_fifo+ctx_aware+ctx_weight=4", base)
    assert (some.app_fifo, some.graph_group, some.ctx_group, some.ctx_aware) == (True, False, False, True)
    assert some.params == {"ctx_weight": 4}
    assert parse_policy("parrot:ctx_weight=4", base).params == {"ctx_weight": 4}
    for bad in ("nobody", "parrot:fast", "round_robin:all", "parrot:ctx_weight=fast", "parrot:speed=1", "parrot:ctx_weight=-1"):
        with pytest.raises(ParrotError) as caught:
            parse_policy(bad, base)
        assert bad.split(":")[-1].split("=")[0] in str(caught.value)
    for params in ({"nothing": 1}, {"latency_capacity": "many"}, {"latency_capacity": True}, {"ctx_weight": True}):
        with pytest.raises(ParrotError):
            build_policy(GlobalSchedulerConfig(params=params))


def test_a_class_of_ones_own_is_module_and_class_with_its_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_policies.py").write_text(
        "from parrot.serve.policies.base import InOrder, first_fit\n"
        "from parrot.serve.policies.parameters import Parameter\n"
        "class Last(InOrder):\n"
        "    name = 'last'\n"
        "    parameters = {'skip': Parameter(int, 0, 'engines to leave out', at_least=0)}\n"
        "    def __init__(self, parameters, generator):\n"
        "        super().__init__(parameters, generator)\n"
        "        self._skip = parameters['skip']\n"
        "    def choose(self, task, queue, cluster):\n"
        "        found = first_fit(task, cluster.engines(task.call.lane)[::-1][self._skip:], cluster)\n"
        "        return () if found is None else (found,)\n"
        "class Nothing:\n"
        "    pass\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    section = parse_policy("own_policies:Last:skip=1", GlobalSchedulerConfig())
    assert (section.policy, section.params) == ("own_policies:Last", {"skip": 1})
    d = Driver("own_policies:Last", {"params": {"skip": 1}})
    for _ in range(3):
        d.engine()
    fetched(d, d.open(), text("t"), out("x"))
    assert engines_of(d) == [2]
    for name, reason in (
        ("own_policies:Nothing", "no method place"),
        ("own_policies:number", "not a class"),
        ("own_policies:Missing", "cannot be loaded"),
        ("no_such_module:Last", "cannot be loaded: .* the current folder and on PYTHONPATH"),
        ("own_policies:", "'own_policies:': a class of your own is module:Class"),
        (":Last", "':Last': a class of your own is module:Class"),
        ("own_policies:Last:skip=-1", "at least 0"),
    ):
        with pytest.raises(ParrotError, match=reason):
            parse_policy(name, GlobalSchedulerConfig())


def test_a_placement_keeps_the_engines_that_were_weighed() -> None:
    d = Driver("least_loaded", {"explain_placements": 2})
    for capacity in (1, 8, 8):
        d.engine(tasks_capacity=capacity)
    session = d.open()
    for i, tokens in enumerate((10, 500, 100, 10)):
        fetched(d, session, text(f"t{i}", tokens), out("x"))
    assert engines_of(d) == [1, 2, 3, 3]
    last, before = d.core.scheduler.explanations.last(9)  # type: ignore[union-attr]
    assert (last.engine_id, last.terms, last.queued) == (3, {"reserved_tokens": 116, "tasks": 1}, 1)
    assert [(c.engine_id, c.fits, c.terms["reserved_tokens"]) for c in last.candidates] == [
        (1, False, 26), (3, True, 116), (2, True, 516),
    ]  # fmt: skip
    assert before.task.call == 2


@pytest.mark.parametrize("policy", ["least_loaded", "round_robin", "parrot"])
def test_a_task_that_found_no_engine_is_offered_only_to_those_that_have_more_room_since(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    fits = Cluster.fits

    def watched(self: Cluster, task: Task, engine: Engine, bound: int | None = None) -> bool:
        asked.append(engine.id)
        return fits(self, task, engine, bound)

    monkeypatch.setattr(Cluster, "fits", watched)
    d = Driver(policy)
    session = d.open()
    for _ in range(100):
        d.engine(tokens_capacity=200)
    for n in range(100):  # two tasks an engine, with 100 tokens each
        fetched(d, session, text(f"a{n}", 84), out("x"))
        fetched(d, session, text(f"b{n}", 84), out("x"))
    large = fetched(d, session, text("large", 180), out("x"))
    assert large not in {dispatch.output_var for dispatch in d.dispatches}
    first, other = d.dispatches[0], d.dispatches[0]
    for other in d.dispatches[1:]:
        if other.engine_id == first.engine_id:
            break
    asked.clear()
    d.finish(first)  # room for one more of the small ones, not for the large one
    assert asked == [first.engine_id]
    d.finish(other)
    assert d.dispatches[-1].output_var == large
    assert d.dispatches[-1].engine_id == first.engine_id


def test_a_task_that_found_no_engine_is_offered_to_all_when_many_have_changed() -> None:
    d = Driver("least_loaded")
    for _ in range(80):
        d.engine(tokens_capacity=200)
    session = d.open()
    for n in range(160):
        fetched(d, session, text(f"a{n}", 84), out("x"))
    large = fetched(d, session, text("large", 180), out("x"))
    by_engine: dict[int, list[Dispatch]] = {}
    for dispatch in d.dispatches:
        by_engine.setdefault(dispatch.engine_id, []).append(dispatch)
    halves = [two[0] for two in by_engine.values()]
    ended = [ev.TaskFinished(h.epoch, h.task, h.attempt, content(f"o{n}", 5), 5) for n, h in enumerate(halves)]
    last = by_engine[7][1]
    d.send(ev.TaskFinished(last.epoch, last.task, last.attempt, content("o", 5), 5), *ended)  # 81 changes in one instant
    assert d.dispatches[-1].output_var == large
    assert d.dispatches[-1].engine_id == 7
