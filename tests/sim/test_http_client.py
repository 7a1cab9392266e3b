"""The simulator's client over HTTP against a core that dies and comes back."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest

from parrot.frontend.wire import RetryPolicy
from sim.http_client import Api, Refusal
from tests.frontend.fake_server import FakeServer

POLICY = RetryPolicy(first_wait_s=0.01, max_wait_s=0.05)


async def test_a_post_is_made_once_however_often_it_is_sent() -> None:
    with FakeServer() as server:
        async with aiohttp.ClientSession() as http:
            api = Api(server.address, http, POLICY)
            who = json.loads(await api.call("POST", "/v1/session", {}))
            server.faults = ["drop", "drop"]
            await api.call("POST", "/v1/semantic_var", {**who, "var_name": "v"})
            assert server.work["create"] == 1
            assert len(set(server.keys[1:])) == 1
            server.start_dying(0.15)
            await api.call("POST", "/v1/semantic_var", {**who, "var_name": "w"})
            assert server.work["create"] == 2


async def test_no_room_is_told_at_once_and_a_dead_core_in_the_end() -> None:
    with FakeServer() as server:
        async with aiohttp.ClientSession() as http:
            api = Api(server.address, http, RetryPolicy(first_contact_s=0.05, patience_s=0.05, first_wait_s=0.001))
            server.faults = ["busy"]
            with pytest.raises(Refusal) as refused:
                await api.call("POST", "/v1/session", {})
            assert refused.value.info.code == "queue_full"
            await asyncio.to_thread(server.die)
            with pytest.raises(Refusal) as lost:
                await api.call("POST", "/v1/session", {})
            assert lost.value.info.code == "unavailable"
            assert server.address in lost.value.info.message
