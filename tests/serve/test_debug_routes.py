"""GET /v1/debug/placements: the last placements, whose they are, what the policy did wrong, and who may see it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec
import pytest

from parrot.serve.explanations import PlacementsAnswer
from parrot.serve.graph import Task
from parrot.serve.policies.base import Cluster, Placement
from parrot.serve.policies.least_loaded import LeastLoaded
from parrot.serve.queue import TaskQueue
from tests.serve.driver import Driver, out, text
from tests.serve.http_support import cluster

PATH = "/v1/debug/placements"


async def test_the_last_placements_come_newest_first_with_their_candidates() -> None:
    async with cluster(global_scheduler={"policy": "least_loaded"}) as c:
        await c.engine("one")
        await c.engine("two")
        sessions = [await c.client.session() for _ in range(2)]
        for session in sessions:
            for question in ("hello", "and again"):
                assert (await c.client.get(session, await c.client.ask(session, question)))[0] == 200
        status, answer = await c.client.send("GET", PATH)
        assert status == 200
        assert (answer["policy"], answer["policy_errors"], answer["kept"]) == ("least_loaded", {}, 1024)
        ids = [session["session_id"] for session in sessions]
        assert [p["task"] for p in answer["placements"]] == [[ids[1], 1, 0], [ids[1], 0, 0], [ids[0], 1, 0], [ids[0], 0, 0]]
        newest = answer["placements"][0]
        assert newest["engine_name"] == "one"
        assert [x["engine_name"] for x in newest["candidates"]] == ["one", "two"]
        assert set(newest["candidates"][0]["terms"]) == {"reserved_tokens", "tasks"}
        msgspec.convert(answer, PlacementsAnswer)
        _, some = await c.client.send("GET", f"{PATH}?limit=1&session_id={ids[0]}")
        assert [p["task"] for p in some["placements"]] == [[ids[0], 1, 0]]
        _, same = await c.client.send("GET", PATH, {"limit": 1, "session_id": ids[0]})
        assert same == some


async def test_where_there_is_a_cluster_secret_it_is_needed() -> None:
    async with cluster(engine_secret="open sesame") as c:
        session = await c.client.session()
        assert (await c.client.send("GET", PATH))[0] == 401
        assert (await c.client.send("GET", f"{PATH}?session_id={session['session_id']}"))[0] == 401
        assert (await c.client.send("GET", PATH, {"secret": "x"}))[0] == 403
        assert (await c.client.send("GET", PATH, {"secret": "open sesame"}))[0] == 200


@pytest.mark.parametrize(
    ("query", "named"), [("limit=0", "limit"), ("limit=many", "limit"), ("task=1", "unknown field 'task'; expected are limit")]
)
async def test_a_wrong_argument_is_named(query: str, named: str) -> None:
    async with cluster() as c:
        status, answer = await c.client.send("GET", f"{PATH}?{query}")
        assert status == 400
        assert named in answer["error"]["message"]


async def test_a_core_that_keeps_none_says_so() -> None:
    async with cluster(global_scheduler={"explain_placements": 0}) as c:
        await c.engine()
        session = await c.client.session()
        await c.client.get(session, await c.client.ask(session, "hello"))
        assert (await c.client.send("GET", PATH))[1] == {
            "policy": "parrot", "policy_errors": {}, "kept": 0, "placements": [],
        }  # fmt: skip


async def test_what_a_policy_did_wrong_is_counted_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd_policy.py").write_text(
        "from parrot.serve.policies.least_loaded import LeastLoaded\n"
        "class Odd(LeastLoaded):\n"
        "    name = 'odd'\n"
        "    def choose(self, task, queue, cluster):\n"
        "        raise RuntimeError('odd indeed')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    async with cluster(global_scheduler={"policy": "odd_policy:Odd"}) as c:
        await c.engine()
        session = await c.client.session()
        for question in ("hello", "and again"):
            assert (await c.client.get(session, await c.client.ask(session, question)))[0] == 200
        _, answer = await c.client.send("GET", PATH)
        assert answer["policy_errors"] == {"RuntimeError in policy 'odd_policy:Odd': odd indeed": 2}
        assert [(p["policy"], p["fallback"]) for p in answer["placements"]] == [("least_loaded", True)] * 2


def test_terms_that_are_no_finite_numbers_are_null_and_numpys_are_numbers() -> None:
    class Strange(LeastLoaded):
        def choose(self, task: Task, queue: TaskQueue, cluster: Cluster) -> Iterable[Placement]:
            import numpy as np

            terms = {"a": np.float32(1.5), "b": np.int64(2), "c": float("nan"), "d": "far", "e": float("inf"), "f": 3}
            yield Placement(task, cluster.engines(task.call.lane)[0], terms)  # type: ignore[arg-type]

    d = Driver()
    d.core.scheduler.policy = Strange({}, None)  # type: ignore[arg-type]
    d.engine()
    (x,) = d.outputs(d.submit(session := d.open(), text("t"), out("x")))
    d.get(session, x)
    answer = msgspec.json.decode(msgspec.json.encode(d.core.placements(1)), type=PlacementsAnswer)
    assert answer.placements[0].terms == {"a": 1.5, "b": 2, "c": None, "d": None, "e": None, "f": 3}
    assert answer.placements[0].candidates[0].terms == answer.placements[0].terms
    assert d.faults == []
