"""The public API over real HTTP: what a client sends, what it is answered."""

from __future__ import annotations

import asyncio

import pytest

from parrot.protocol.engine import Started, Tokens
from tests.serve.http_support import Client, cluster, eventually


async def test_a_call_and_a_get_give_the_engine_s_text() -> None:
    async with cluster() as c:
        engine = await c.engine()
        session = await c.client.session()
        assert session["session_id"] < 2**53
        answer = await c.client.call(
            session,
            "How are {{who}} today {{reply}} and now {{more}}",
            [
                {"name": "who", "value": "you"},
                {"name": "reply", "is_output": True, "sampling_config": {"temperature": 0.0}},
                {"name": "more", "is_output": True},
            ],
            func_name="greet",
        )
        assert [item["parameter_name"] for item in answer["param_info"]] == ["who", "reply", "more"]
        assert [item["is_output"] for item in answer["param_info"]] == [False, True, True]
        assert all(item["placeholder_name"] == item["parameter_name"] for item in answer["param_info"])
        var_ids = {item["parameter_name"]: item["var_id"] for item in answer["param_info"]}
        assert await c.client.get(session, var_ids["who"]) == (200, {"content": "you"})
        assert await c.client.get(session, var_ids["more"], criteria="latency") == (200, {"content": "fine thanks"})
        first, second = engine.tasks
        decode = c.tokenizers.load("words").decode
        assert " ".join(decode(link.token_ids) for link in first.chain) == "How are you today"
        assert " ".join(decode(link.token_ids) for link in second.chain) == "How are you today fine thanks and now"
        assert first.generate.sampling.temperature == 0.0
        assert first.generate.sampling.seed is not None


async def test_a_bos_stands_at_the_head_of_a_chain_and_nowhere_else() -> None:
    async with cluster() as c:
        engine = await c.engine(bos_tokens=1)
        session = await c.client.session()
        answer = await c.client.call(
            session, "a {{x}} b {{y}}", [{"name": "x", "is_output": True}, {"name": "y", "is_output": True}]
        )
        await c.client.get(session, answer["param_info"][1]["var_id"])
        ids = [i for link in engine.tasks[-1].chain for i in link.token_ids]
        assert ids[0] == 0
        assert 0 not in ids[1:]


async def test_fused_fills_are_one_link() -> None:
    async with cluster() as c:
        engine = await c.engine()
        session = await c.client.session()
        answer = await c.client.call(
            session, "a {{x}} b {{y}}", [{"name": "x", "value": "in"}, {"name": "y", "is_output": True}], fuse_fill=True
        )
        await c.client.get(session, answer["param_info"][1]["var_id"])
        [link] = engine.tasks[0].chain
        assert c.tokenizers.load("words").decode(link.token_ids) == "a in b"


async def test_every_call_needs_the_session_s_own_auth() -> None:
    async with cluster() as c:
        mine, other = await c.client.session(), await c.client.session()
        assert mine["session_auth"] != other["session_auth"]
        var_id = (await c.client.send("POST", "/v1/semantic_var", {**mine, "var_name": "v"}))[1]["var_id"]
        requests = [
            ("GET", f"/v1/session/{mine['session_id']}", {}),
            ("DELETE", f"/v1/session/{mine['session_id']}", {}),
            ("POST", "/v1/semantic_call", {"template": "a {{x}}", "parameters": [{"name": "x", "is_output": True}]}),
            ("GET", "/v1/semantic_var", {}),
            ("POST", "/v1/semantic_var", {"var_name": "v"}),
            ("POST", f"/v1/semantic_var/{var_id}", {"content": "text"}),
            ("GET", f"/v1/semantic_var/{var_id}", {}),
            ("GET", f"/v1/semantic_var/{var_id}", {"stream": True}),
        ]
        for method, path, body in requests:
            if "/session/" not in path:
                body = {**body, "session_id": mine["session_id"]}
            status, answer = await c.client.send(method, path, body)
            assert (status, answer["error"]["code"]) == (401, "unauthorized"), path
            status, answer = await c.client.send(method, path, {**body, "session_auth": other["session_auth"]})
            assert (status, answer["error"]["code"]) == (403, "forbidden"), path
        assert (await c.client.send("GET", f"/v1/session/{mine['session_id']}", {"session_auth": mine["session_auth"]}))[
            0
        ] == 200


async def test_arguments_of_get_and_delete_may_be_in_the_query() -> None:
    async with cluster() as c:
        await c.engine()
        session = await c.client.session()
        var_id = await c.client.ask(session, "hello")
        query = {**session, "criteria": "TTFT", "timeout": "5"}
        assert await c.client.send("GET", f"/v1/semantic_var/{var_id}", params=query) == (200, {"content": "fine thanks"})
        path = f"/v1/session/{session['session_id']}"
        auth = {"session_auth": session["session_auth"]}
        status, report = await c.client.send("GET", path, params={**auth, "calls": "true"})
        assert status == 200
        assert report["reports"][0]["tasks"][0]["output_tokens"] == 2
        assert "reports" not in (await c.client.send("GET", path, params=auth))[1]
        assert await c.client.send("DELETE", path, params=auth) == (200, {})
        assert (await c.client.send("GET", path, params=auth))[0] == 410


async def test_variables_are_made_set_once_listed_and_read() -> None:
    async with cluster() as c:
        session = await c.client.session()
        status, made = await c.client.send("POST", "/v1/semantic_var", {**session, "var_name": "topic"})
        assert status == 200
        path = f"/v1/semantic_var/{made['var_id']}"
        assert await c.client.send("POST", path, {**session, "content": "zebras äöü"}) == (200, {})
        status, answer = await c.client.send("POST", path, {**session, "content": "again"})
        assert (status, answer["error"]["code"]) == (409, "conflict")
        assert await c.client.get(session, made["var_id"]) == (200, {"content": "zebras äöü"})
        _, listed = await c.client.send("GET", "/v1/semantic_var", session)
        assert listed == {"vars": [{"var_id": made["var_id"], "var_name": "topic", "state": "ready", "content": "zebras äöü"}]}


async def test_a_get_waits_for_a_value_and_its_timeout_cancels_nothing() -> None:
    async with cluster() as c:
        session = await c.client.session()
        var_id = (await c.client.send("POST", "/v1/semantic_var", session))[1]["var_id"]
        status, answer = await c.client.get(session, var_id, timeout=0.01)
        assert (status, answer["error"]["code"]) == (408, "timeout")
        waiting = asyncio.create_task(c.client.get(session, var_id))
        await eventually(lambda: c.server.core.counts()["gets"] == 1)
        other = Client(c.client.url, c.client.http)
        await other.send("POST", f"/v1/semantic_var/{var_id}", {**session, "content": "now"})
        assert await waiting == (200, {"content": "now"})


async def test_repeated_posts_with_one_idempotency_key_are_one() -> None:
    async with cluster() as c:
        await c.engine()
        key = {"headers": {"Idempotency-Key": "k1"}}
        first = await c.client.send("POST", "/v1/session", {}, **key)
        assert await c.client.send("POST", "/v1/session", {}, **key) == first
        assert (await c.client.send("POST", "/v1/session", {"api_key": "other"}, **key))[1] != first[1]
        session = first[1]
        call = {**session, "template": "a {{x}}", "parameters": [{"name": "x", "is_output": True}]}
        answers = [await c.client.send("POST", "/v1/semantic_call", call, headers={"Idempotency-Key": "k2"}) for _ in range(3)]
        assert answers[0][0] == 200
        assert answers[1:] == answers[:2]
        made = [await c.client.send("POST", "/v1/semantic_var", session, headers={"Idempotency-Key": "k3"}) for _ in range(2)]
        assert made[0] == made[1]
        path = f"/v1/semantic_var/{made[0][1]['var_id']}"
        body = {**session, "content": "text"}
        for _ in range(2):
            assert await c.client.send("POST", path, body, headers={"Idempotency-Key": "k4"}) == (200, {})


async def test_an_idempotency_key_is_of_one_path_and_means_nothing_on_another() -> None:
    async with cluster() as c:
        session = await c.client.session()
        again = {"headers": {"Idempotency-Key": "k"}}
        _, made = await c.client.send("POST", "/v1/semantic_var", session, **again)
        path = f"/v1/semantic_var/{made['var_id']}"
        assert await c.client.send("POST", path, {**session, "content": "set indeed"}, **again) == (200, {})
        assert await c.client.get(session, made["var_id"]) == (200, {"content": "set indeed"})
        _, called = await c.client.send(
            "POST",
            "/v1/semantic_call",
            {**session, "template": "a {{x}}", "parameters": [{"name": "x", "is_output": True}]},
            **again,
        )
        assert called["param_info"][0]["parameter_name"] == "x"


async def test_a_client_that_waits_for_100_continue_is_asked_for_its_body() -> None:
    async with cluster() as c:
        host, port = c.client.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = "POST /v1/session HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n"
        writer.write(head.encode())
        async with asyncio.timeout(5):
            assert (await reader.readuntil(b"\r\n\r\n")).split()[1] == b"100"
            writer.write(b"{}")
            assert (await reader.readline()).split()[1] == b"200"
        writer.close()


async def test_models_are_those_of_live_engines() -> None:
    async with cluster() as c:
        status, answer = await c.client.send("GET", "/v1/models")
        assert (status, answer["models"]) == (200, [])
        await c.engine("e1", model="m1")
        await c.engine("e2", model="m2", tokenizer="other")
        _, answer = await c.client.send("GET", "/v1/models")
        assert {(m["model_name"], m["tokenizer_name"]) for m in answer["models"]} == {("m1", "words"), ("m2", "other")}
        assert await c.client.send("GET", "/health") == (200, {"status": "ok", "engines": 2})


async def test_two_engines_with_different_tokenizers_read_the_same_texts() -> None:
    async with cluster() as c:
        session = await c.client.session()
        made = (await c.client.send("POST", "/v1/semantic_var", session))[1]
        await c.client.send("POST", f"/v1/semantic_var/{made['var_id']}", {**session, "content": "came before any engine"})
        engines = {"m1": await c.engine("e1", model="m1"), "m2": await c.engine("e2", model="m2", tokenizer="other")}
        engines["m1"].text = "said by one"
        source = made["var_id"]
        for model, expected in (("m1", "came before any engine"), ("m2", "said by one")):
            answer = await c.client.call(
                session, "x {{i}} {{o}}", [{"name": "i", "var_id": source}, {"name": "o", "is_output": True}], models=[model]
            )
            source = answer["param_info"][-1]["var_id"]
            assert (await c.client.get(session, source))[0] == 200
            engine = engines[model]
            shown = [c.tokenizers.load(engine.tokenizer).decode(link.token_ids) for link in engine.tasks[-1].chain]
            assert expected in " ".join(shown)


async def test_a_finished_session_leaves_no_text_behind() -> None:
    async with cluster() as c:
        await c.engine()
        one, two = await c.client.session(), await c.client.session()
        for session in (one, two):
            await c.client.get(session, await c.client.ask(session, "shared words"))
        texts = c.server.links._texts
        await c.client.send("DELETE", f"/v1/session/{one['session_id']}", {"session_auth": one["session_auth"]})
        assert await c.client.get(two, (await c.client.send("GET", "/v1/semantic_var", two))[1]["vars"][0]["var_id"])
        assert len(texts) > 0
        await c.client.send("DELETE", f"/v1/session/{two['session_id']}", {"session_auth": two["session_auth"]})
        assert len(texts) == 0


# ------------------------------------------------------------------------------------------------------------ streaming


async def test_a_stream_shows_text_as_it_comes_and_ends_with_done() -> None:
    async with cluster() as c:
        engine = await c.engine()
        go_on = asyncio.Event()
        engine.script(Started(), Tokens((1,), "one"), go_on, Tokens((2,), " two"), engine.finished("one two"))
        session = await c.client.session()
        lines = []
        async for line in c.client.stream(session, await c.client.ask(session, "count")):
            lines.append(line)
            go_on.set()
        assert lines[0] == {"delta": "one"}
        assert "".join(line.get("delta", "") for line in lines) == "one two"
        assert lines[-1] == {"done": True}


@pytest.mark.parametrize("stream_from", [0, 3, 7, 100])
async def test_a_stream_starts_where_the_client_says(stream_from: int) -> None:
    async with cluster() as c:
        engine = await c.engine()
        engine.text = "one two three"
        session = await c.client.session()
        var_id = await c.client.ask(session, "count")
        for _ in range(2):  # while it is generated, and when it is ready
            lines = [line async for line in c.client.stream(session, var_id, stream_from=stream_from)]
            assert "".join(line.get("delta", "") for line in lines) == "one two three"[stream_from:]
            assert lines[-1] == {"done": True}


async def test_a_task_placed_again_goes_on_behind_what_was_streamed() -> None:
    async with cluster() as c:
        engine = await c.engine()
        break_now = asyncio.Event()
        ids = c.tokenizers.load("words").encode("one two")
        engine.script(Started(), Tokens((ids[0],), "one"), break_now, None)
        engine.script(Started(), Tokens((ids[1],), " two"), engine.finished("one two"))
        session = await c.client.session()
        lines = []
        async for line in c.client.stream(session, await c.client.ask(session, "count")):
            lines.append(line)
            break_now.set()
        assert lines == [{"delta": "one"}, {"delta": " two"}, {"done": True}]
        assert engine.tasks[1].generate.forced_ids == (ids[0],)
        assert engine.tasks[1].generate.forced_text == "one"
        assert engine.tasks[1].attempt > engine.tasks[0].attempt


async def test_a_task_placed_again_starts_over_when_nobody_saw_its_text() -> None:
    async with cluster() as c:
        engine = await c.engine()
        engine.script(Started(), Tokens((1,), "one"), None)
        engine.script(Started(), engine.finished("another"))
        session = await c.client.session()
        assert await c.client.get(session, await c.client.ask(session, "count")) == (200, {"content": "another"})
        assert engine.tasks[1].generate.forced_ids == ()


async def test_a_failure_ends_a_stream_with_an_error() -> None:
    from parrot.protocol.engine import Failed

    async with cluster() as c:
        engine = await c.engine()
        go_on = asyncio.Event()
        engine.script(Started(), Tokens((1,), "one"), go_on, Failed("generation_failed", "the model broke"))
        session = await c.client.session()
        var_id = await c.client.ask(session, "count")
        lines = []
        async for line in c.client.stream(session, var_id):
            lines.append(line)
            go_on.set()
        assert lines[0] == {"delta": "one"}
        assert lines[-1]["error"]["code"] == "generation_failed"
        status, answer = await c.client.get(session, var_id, stream=True)  # nothing to show: an ordinary refusal
        assert (status, answer["error"]["code"]) == (500, "generation_failed")
