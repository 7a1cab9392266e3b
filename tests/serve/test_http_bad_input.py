"""What the core's server refuses, how it says so, and that everything else goes on."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from parrot.protocol.engine import Failed, Started
from tests.serve.http_support import Client, Cluster, cluster, eventually

OUTPUT = {"name": "x", "is_output": True}


async def _still_works(c: Cluster) -> None:
    session = await c.client.session()
    var_id = (await c.client.send("POST", "/v1/semantic_var", session))[1]["var_id"]
    assert await c.client.send("POST", f"/v1/semantic_var/{var_id}", {**session, "content": "alive"}) == (200, {})
    assert await c.client.get(session, var_id) == (200, {"content": "alive"})


@pytest.mark.parametrize(
    ("call", "code", "named"),
    [
        ({"template": "a {{x}", "parameters": [OUTPUT]}, "bad_template", "{{x}"),
        ({"template": "a {{x y}}", "parameters": [OUTPUT]}, "bad_template", "{{x y}}"),
        ({"template": "a {{z}} {{x}}", "parameters": [OUTPUT]}, "bad_template", "z"),
        ({"template": "a {{x}}", "parameters": [OUTPUT, OUTPUT]}, "bad_template", "'x'"),
        ({"template": "a {{x}}", "parameters": [OUTPUT, {"name": "y", "value": "v"}]}, "bad_template", "'y'"),
        ({"template": "{{x}} a", "parameters": [OUTPUT]}, "bad_template", "'x'"),
        ({"template": "a {{x}} {{x}}", "parameters": [OUTPUT]}, "bad_template", "'x'"),
        ({"template": "a {{i}} {{x}}", "parameters": [{"name": "i"}, OUTPUT]}, "bad_template", "'i'"),
        ({"template": "a {{i}}", "parameters": [{"name": "i", "value": "v"}]}, "bad_template", "output"),
        ({"template": "a {{i}} {{x}}", "parameters": [{"name": "i", "var_id": "nope"}, OUTPUT]}, "not_found", "nope"),
        ({"template": "a {{x}}", "parameters": [OUTPUT], "colour": 1}, "bad_request", "colour"),
        ({"template": "a {{x}}", "parameters": [{**OUTPUT, "colour": 1}]}, "bad_request", "colour"),
        ({"template": "a {{x}}"}, "bad_request", "parameters"),
        ({"template": 7, "parameters": [OUTPUT]}, "bad_request", "template"),
        ({"template": "a {{x}}", "parameters": [OUTPUT], "model_type": "pixels"}, "bad_request", "pixels"),
        ({"template": "a {{x}}", "parameters": [OUTPUT], "output_criteria": "FAST"}, "bad_criteria", "TPOT"),
        (
            {"template": "a {{x}}", "parameters": [{**OUTPUT, "sampling_config": {"temperature": -1}}]},
            "bad_sampling",
            "temperature",
        ),
        ({"template": "a {{x}}", "parameters": [{**OUTPUT, "sampling_config": {"warmth": 1}}]}, "bad_sampling", "warmth"),
        ({"template": "a {{x}}", "parameters": [{**OUTPUT, "sampling_config": {"n": 2}}]}, "bad_sampling", "n is 2"),
        ({"template": "a {{x}}", "parameters": [{**OUTPUT, "sampling_config": {"top_k": 2**70}}]}, "bad_sampling", "top_k"),
        (
            {"template": "a {{x}}", "parameters": [{**OUTPUT, "sampling_config": {"logit_bias": {"1": 1e300}}}]},
            "bad_sampling",
            "logit_bias",
        ),
    ],
)
async def test_a_call_that_does_not_fit_together_is_refused_whole(call: dict[str, Any], code: str, named: str) -> None:
    async with cluster() as c:
        session = await c.client.session()
        status, answer = await c.client.send("POST", "/v1/semantic_call", {**session, **call})
        assert answer["error"]["code"] == code, answer
        assert status in (400, 404)
        assert named in answer["error"]["message"]
        assert (await c.client.send("GET", "/v1/semantic_var", session))[1] == {"vars": []}
        await _still_works(c)


async def test_an_output_has_one_producer_and_is_not_set_from_outside() -> None:
    async with cluster() as c:
        session = await c.client.session()
        var_id = (await c.client.send("POST", "/v1/semantic_var", session))[1]["var_id"]
        call = {**session, "template": "a {{x}}", "parameters": [{**OUTPUT, "var_id": var_id}]}
        status, answer = await c.client.send("POST", "/v1/semantic_call", call)
        assert (status, answer["param_info"][0]["var_id"]) == (200, var_id)
        status, answer = await c.client.send("POST", "/v1/semantic_call", call)
        assert (status, answer["error"]["code"]) == (409, "conflict")
        status, answer = await c.client.send("POST", f"/v1/semantic_var/{var_id}", {**session, "content": "mine"})
        assert (status, answer["error"]["code"]) == (409, "conflict")
        assert var_id in answer["error"]["message"]
        await c.engine()
        assert await c.client.get(session, var_id) == (200, {"content": "fine thanks"})


async def test_the_place_in_the_template_is_told() -> None:
    async with cluster() as c:
        session = await c.client.session()
        call = {**session, "template": "one\ntwo {{y}} {{x}}", "parameters": [OUTPUT]}
        _, answer = await c.client.send("POST", "/v1/semantic_call", call)
        assert {k: answer["error"]["details"][k] for k in ("line", "column", "offset")} == {"line": 2, "column": 5, "offset": 8}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/v1/session", b"{no json", 400, "bad_request"),
        ("POST", "/v1/session", b"\xff\xfe", 400, "bad_request"),
        ("POST", "/v1/session", b"[1]", 400, "bad_request"),
        ("POST", "/v1/session", b'{"apps":' + b"[" * 50_000 + b"]" * 50_000 + b"}", 400, "bad_request"),
        ("POST", "/v1/session", {"apps": {}, "unknown": 1}, 400, "bad_request"),
        ("POST", "/v1/semantic_call", b"", 400, "bad_request"),
        ("GET", "/v1/nothing", None, 404, "not_found"),
        ("GET", "/", None, 404, "not_found"),
        ("GET", "/v1/session/", None, 404, "not_found"),
        ("GET", "/v1/session/77", {"session_auth": "a"}, 404, "not_found"),
        ("GET", "/v1/session/abc", {"session_auth": "a"}, 400, "bad_request"),
        ("PUT", "/v1/session", None, 405, "method_not_allowed"),
        ("DELETE", "/v1/semantic_var/v", None, 405, "method_not_allowed"),
        ("GET", "/v1/semantic_var", None, 400, "bad_request"),
        ("GET", "/v1/semantic_var/v?session_id=1&stream=perhaps", None, 400, "bad_request"),
        ("GET", "/v1/semantic_var/v?session_id=1&criteria=fast", None, 400, "bad_criteria"),
        ("GET", "/v1/semantic_var/v?session_id=1&timeout=inf", None, 400, "bad_request"),
        ("GET", "/v1/semantic_var/v?session_id=1&timeout=nan", None, 400, "bad_request"),
        ("GET", "/v1/semantic_var/v?session_id=1&timeout=-1", None, 400, "bad_request"),
        ("POST", "/v1/py_native_call", {"session_id": 1}, 501, "not_implemented"),
        ("POST", "/register_engine", {"engine_config": {}}, 400, "bad_request"),
        ("POST", "/engine_heartbeat", {"engine_id": 99, "engine_name": "e"}, 404, "not_found"),
    ],
)
async def test_a_request_of_the_wrong_form_is_answered_with_its_error(
    method: str, path: str, body: Any, status: int, code: str
) -> None:
    async with cluster() as c:
        found, answer = await c.client.send(method, path, body)
        assert (found, answer["error"]["code"]) == (status, code), answer
        assert set(answer["error"]) == {"code", "message", "details"}
        assert "Traceback" not in str(answer)
        await _still_works(c)


async def test_a_wrong_method_is_told_which_there_are() -> None:
    async with cluster() as c:
        await c.client.send("PUT", "/v1/semantic_var")
        assert c.client.headers["Allow"] == "GET, POST"


async def test_a_body_that_is_not_encoded_as_it_says_is_400_and_leaves_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    async with cluster() as c:
        status, answer = await c.client.send(
            "POST", "/v1/session", b"{}  ", headers={"Content-Encoding": "gzip", "Connection": "close"}
        )
        assert (status, answer["error"]["code"]) == (400, "bad_request")
        assert "gzip" in answer["error"]["message"]
        await _still_works(c)
    assert "Traceback" not in caplog.text


async def test_a_body_over_the_limit_is_413_whether_its_length_is_told_or_not() -> None:
    async def chunks() -> Any:
        for _ in range(20):
            yield b"x" * 100

    async with cluster(max_body_bytes=1000) as c:
        status, answer = await c.client.send("POST", "/v1/session", b"x" * 2000)
        assert (status, answer["error"]["code"]) == (413, "body_too_large")
        assert "1000" in answer["error"]["message"]
        status, answer = await c.client.send("POST", "/v1/session", data=chunks())
        assert (status, answer["error"]["code"]) == (413, "body_too_large")
        await _still_works(c)


@pytest.mark.parametrize("key", ["", "k" * 300, "ä"])
async def test_an_idempotency_key_has_a_sane_form(key: str) -> None:
    async with cluster() as c:
        status, answer = await c.client.send("POST", "/v1/session", {}, headers={"Idempotency-Key": key})
        assert (status, answer["error"]["code"]) == (400, "bad_request")


@pytest.mark.parametrize(
    "line",
    [
        b"GET /v1/semantic_var/\xff\xfe?session_id=1 HTTP/1.1",
        b"nonsense",
        b"GET /v1/models HTTP/1.1\r\nno header",
        b"GET /v1/models?" + b"x" * 20_000 + b" HTTP/1.1",
        b"POST /v1/session HTTP/1.1\r\nContent-Length: many",
    ],
)
async def test_bytes_that_are_no_clean_request_are_400(line: bytes) -> None:
    async with cluster() as c:
        host, port = c.client.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(line + b"\r\nHost: x\r\n\r\n")
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        assert head.split()[1:2] == [b"400"]
        assert msgspec.json.decode(body)["error"]["code"] == "bad_request"
        await _still_works(c)


async def test_an_expired_session_is_410() -> None:
    async with cluster(session_life_span=0.05) as c:
        session = await c.client.session()
        await eventually(lambda: c.server.core.counts()["sessions"] == 0)
        status, answer = await c.client.send("GET", "/v1/semantic_var", session)
        assert (status, answer["error"]["code"]) == (410, "session_expired")


async def test_one_session_too_many_is_429_with_retry_after() -> None:
    async with cluster(max_sessions_num=1) as c:
        await c.client.session()
        status, answer = await c.client.send("POST", "/v1/session", {})
        assert (status, answer["error"]["code"]) == (429, "too_many_sessions")
        assert int(c.client.headers["Retry-After"]) >= 1


async def test_a_full_queue_is_429_with_retry_after() -> None:
    async with cluster(global_scheduler={"max_queue_size": 1}) as c:
        session, late = await c.client.session(), await c.client.session()
        call = {"template": "a {{x}}", "parameters": [OUTPUT], "output_criteria": "latency"}
        assert (await c.client.send("POST", "/v1/semantic_call", {**session, **call}))[0] == 200
        status, answer = await c.client.send("POST", "/v1/semantic_call", {**late, **call})
        assert (status, answer["error"]["code"]) == (429, "queue_full")
        assert int(c.client.headers["Retry-After"]) >= 1


async def test_a_client_that_goes_away_in_a_get_ends_that_get_and_nothing_else() -> None:
    async with cluster() as c:
        engine = await c.engine()
        go_on = asyncio.Event()
        engine.script(Started(), go_on, engine.finished("late answer"))
        session = await c.client.session()
        var_id = await c.client.ask(session, "hello")
        for stream in (False, True):
            waiting = asyncio.create_task(Client(c.client.url, c.client.http).get(session, var_id, stream=stream))
            await eventually(lambda: c.server.core.counts()["gets"] == 1)
            waiting.cancel()
            await eventually(lambda: c.server.core.counts()["gets"] == 0)
        go_on.set()
        assert await c.client.get(session, var_id) == (200, {"content": "late answer"})


async def test_a_prompt_longer_than_the_model_s_context_fails_by_name() -> None:
    async with cluster() as c:
        await c.engine()
        session = await c.client.session()
        status, answer = await c.client.get(session, await c.client.ask(session, "word " * 3000))
        assert (status, answer["error"]["code"]) == (400, "task_too_large")
        await _still_works(c)


async def test_a_failed_producer_fails_its_consumers_with_its_reason() -> None:
    async with cluster() as c:
        engine = await c.engine()
        engine.script(Started(), Failed("generation_failed", "NaN in layer 3"))
        session = await c.client.session()
        first = await c.client.ask(session, "hello")
        answer = await c.client.call(
            session, "then {{i}} {{o}}", [{"name": "i", "var_id": first}, {"name": "o", "is_output": True}]
        )
        status, answer = await c.client.get(session, answer["param_info"][-1]["var_id"])
        assert (status, answer["error"]["code"]) == (424, "input_failed")
        assert "NaN in layer 3" in answer["error"]["message"]


async def test_an_exception_inside_the_core_is_answered_internal_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster() as c:

        def explode(*_: Any) -> None:
            raise RuntimeError("secret detail")

        with monkeypatch.context() as patch:
            patch.setattr(c.server.core, "handle", explode)
            status, answer = await c.client.send("POST", "/v1/session", {})
        assert (status, answer["error"]["code"]) == (500, "internal")
        assert "secret detail" not in str(answer)
        await _still_works(c)
