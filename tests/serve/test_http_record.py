"""What a running core records is enough to make another core do the same, effect for effect."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import msgspec

from parrot.protocol.engine import Rejected, Started, Tokens
from parrot.serve.core import ServeCore
from parrot.serve.effects import AnyEffect
from parrot.serve.events import AnyEvent
from parrot.serve.record import Header, Instant
from tests.serve.http_support import Cluster, cluster


async def _busy_life(c: Cluster) -> None:
    """Two engines, several sessions, a broken stream, a rejection, a timeout, a refused call, a closed session."""
    one, two = await c.engine("one"), await c.engine("two", tokenizer="other")
    one.script(Started(), Tokens((1,), "x"), None)
    two.script(Rejected("engine_rejected", "no room"))
    sessions = [await c.client.session() for _ in range(4)]
    for session in sessions:
        call = await c.client.call(
            session,
            "You are {{who}} . {{first}} then {{second}}",
            [
                {"name": "who", "value": "brief"},
                {"name": "first", "is_output": True},
                {"name": "second", "is_output": True},
            ],
        )
        status, _ = await c.client.get(session, call["param_info"][2]["var_id"], criteria="latency")
        assert status == 200
    made = (await c.client.send("POST", "/v1/semantic_var", sessions[0]))[1]["var_id"]
    assert (await c.client.get(sessions[0], made, timeout=0.01))[0] == 408
    assert (await c.client.send("POST", f"/v1/semantic_var/{made}", {**sessions[0], "content": "set"}))[0] == 200
    assert (await c.client.send("POST", f"/v1/semantic_var/{made}", {**sessions[0], "content": "set"}))[0] == 409
    auth = {"session_auth": sessions[1]["session_auth"]}
    assert (await c.client.send("DELETE", f"/v1/session/{sessions[1]['session_id']}", auth))[0] == 200
    await asyncio.sleep(0.02)


async def test_a_record_replays_to_the_same_effects(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    done: list[tuple[float, list[AnyEffect]]] = []
    async with cluster(record_path=str(path), global_scheduler={"ctx_aware": True, "graph_group": True}) as c:
        handle = c.server.core.handle

        def spy(events: Sequence[AnyEvent], now: float) -> list[AnyEffect]:
            effects = handle(events, now)
            done.append((now, effects))
            return effects

        c.server.core.handle = spy  # type: ignore[method-assign]
        await _busy_life(c)
    header, *lines = path.read_bytes().splitlines()
    core = ServeCore(msgspec.json.decode(header, type=Header).config)
    instants = [msgspec.json.decode(line, type=Instant) for line in lines]
    replayed = [(instant.t, core.handle(instant.events, instant.t)) for instant in instants]
    assert len(done) > 20
    assert replayed[: len(done)] == done
    assert b"brief" not in path.read_bytes()
