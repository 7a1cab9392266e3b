"""API keys: who is let in, who is refused and how; what a configuration must not say; the command that makes keys."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from parrot.configuration import ConfigurationError
from parrot.protocol.errors import ParrotError
from parrot.serve.config import ServeCoreConfig, TenantConfig
from parrot.serve.http_server import main as core_main
from parrot.serve.keys import Keys, hash_of, main
from tests.serve.http_support import cluster

KEY, OTHER = "parrot-key-of-acme", "parrot-key-of-umbrella"
TENANTS = {"acme": {"api_keys": [hash_of(KEY)]}, "umbrella": {"api_keys": [f"sha256:{hash_of(OTHER)}"]}}


def bearer(key: str) -> dict[str, Any]:
    return {"headers": {"Authorization": f"Bearer {key}"}}


# ------------------------------------------------------------------------------------------------------- at the door


@pytest.mark.parametrize("options", [{"json": {"api_key": KEY}}, bearer(KEY), {"headers": {"Authorization": f"bearer  {KEY}"}}])
async def test_a_session_opens_with_the_key_in_the_body_or_in_the_header_and_is_the_tenant_s(options: dict[str, Any]) -> None:
    async with cluster(tenants=TENANTS) as c:
        await c.engine()
        status, session = await c.client.send("POST", "/v1/session", **options)
        assert status == 200
        assert c.server.core.sessions[session["session_id"]].tenant == "acme"
        x = await c.client.ask(session, "how")  # its own token is enough from here on
        assert await c.client.get(session, x) == (200, {"content": "fine thanks"})


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({}, "unauthorized"),
        ({"json": {"api_key": ""}}, "unauthorized"),
        ({"headers": {"Authorization": "Basic abc"}}, "unauthorized"),
        ({"headers": {"Authorization": "Bearer "}}, "unauthorized"),
        (bearer(KEY + "x"), "invalid_api_key"),
        (bearer(hash_of(KEY)), "invalid_api_key"),
        ({"json": {"api_key": "x" * 100_000}}, "invalid_api_key"),
        ({"json": {"api_key": "schlüssel 🔑"}}, "invalid_api_key"),
        ({"json": {"api_key": KEY}, **bearer("wrong")}, "invalid_api_key"),
    ],
)
async def test_without_a_key_or_with_a_wrong_one_no_session_opens(options: dict[str, Any], code: str) -> None:
    async with cluster(tenants=TENANTS) as c:
        status, answer = await c.client.send("POST", "/v1/session", **options)
        assert (status, answer["error"]["code"]) == (401, code)
        assert c.client.headers["WWW-Authenticate"] == "Bearer"
        assert not c.server.core.sessions


async def test_the_models_are_told_to_tenants_alone() -> None:
    async with cluster(tenants=TENANTS) as c:
        assert (await c.client.send("GET", "/v1/models"))[0] == 401
        assert (await c.client.send("GET", "/v1/models", **bearer(OTHER)))[0] == 200
        assert (await c.client.send("GET", "/health"))[0] == 200


async def test_a_wrong_key_beside_a_session_s_token_is_refused() -> None:
    async with cluster(tenants=TENANTS) as c:
        session = await c.client.session(api_key=KEY)
        path = f"/v1/session/{session['session_id']}"
        status, answer = await c.client.send("GET", path, session, **bearer("wrong"))
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert (await c.client.send("GET", path, session, **bearer(KEY)))[0] == 200
        assert (await c.client.send("GET", path, session))[0] == 200


async def test_tenants_limits_are_of_the_key_s_owner() -> None:
    limited = {name: {**entry, "max_sessions": 1} for name, entry in TENANTS.items()}
    async with cluster(tenants=limited) as c:
        await c.client.session(api_key=KEY)
        status, answer = await c.client.send("POST", "/v1/session", {"api_key": KEY})
        assert (status, answer["error"]["code"]) == (429, "too_many_sessions")
        await c.client.session(api_key=OTHER)


async def test_a_call_above_the_limit_a_minute_is_told_when_to_come_again() -> None:
    async with cluster(tenants={"acme": {"api_keys": [hash_of(KEY)], "requests_per_minute": 2}}) as c:
        await c.engine()
        session = await c.client.session(api_key=KEY)
        for question in "ab":
            await c.client.ask(session, question)
        body = {**session, "template": "c {{x}}", "parameters": [{"name": "x", "is_output": True}]}
        status, answer = await c.client.send("POST", "/v1/semantic_call", body)
        assert (status, answer["error"]["code"]) == (429, "rate_limited")
        assert 1 <= int(c.client.headers["Retry-After"]) <= 30


async def test_without_configured_keys_everybody_is_let_in_and_a_key_is_a_tenant_by_its_hash() -> None:
    async with cluster() as c:
        for options in ({"json": {"api_key": KEY}}, bearer(KEY)):
            _, session = await c.client.send("POST", "/v1/session", **options)
            assert c.server.core.sessions[session["session_id"]].tenant == hash_of(KEY)
        session = await c.client.session()
        assert c.server.core.sessions[session["session_id"]].tenant == ""


async def test_neither_journal_nor_log_nor_answers_have_a_key_or_its_hash(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    path = tmp_path / "core.sqlite"
    secret = {"journal_path": str(path), "journal_mode": "record", "engine_secret": "cluster-secret"}
    async with cluster(tenants=TENANTS, **secret) as c:
        session = await c.client.session(api_key=KEY)
        told = [await c.client.send("GET", f"/v1/session/{session['session_id']}", session, params={"calls": "true"})]
        told.append(await c.client.send("POST", "/v1/session", {"api_key": "wrong-key-that-was-sent"}))
        assert "cluster-secret" not in repr(c.server._config)
    written = b"".join(file.read_bytes() for file in tmp_path.glob("core.sqlite*"))
    assert b"acme" in written
    for secret_text in (KEY, hash_of(KEY), "cluster-secret", "wrong-key-that-was-sent"):
        assert secret_text.encode() not in written
        assert secret_text not in caplog.text + json.dumps(told)


def test_all_owners_are_looked_at_whatever_the_key_is(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[bytes] = []

    def compare(a: bytes, b: bytes) -> bool:
        looked.append(a)
        return a == b

    monkeypatch.setattr("parrot.serve.keys.hmac.compare_digest", compare)
    keys = Keys({f"t{n}": TenantConfig(api_keys=(hash_of(f"k{n}"),)) for n in range(5)})
    assert keys.tenant("Bearer k1") == "t1"
    with pytest.raises(ParrotError):
        keys.tenant("Bearer nobody's")
    assert len(looked) == 10


# ------------------------------------------------------------------------------------------------- the configuration


@pytest.mark.parametrize(
    ("tenants", "complaint"),
    [
        ({"a": ["my-plain-key"]}, r"'tenants.a.api_keys\[0\]' is neither a SHA-256 in hex"),
        ({"a": [hash_of("k")[:-1]]}, "64 digits"),
        ({"a": ["env:NOT_THERE"]}, "the environment has no NOT_THERE"),
        ({"a": ["env:EMPTY"]}, "the environment has no EMPTY"),
        ({"a": [hash_of("k")], "b": [hash_of("k").upper()]}, r"'tenants.b.api_keys\[0\]': tenant 'a' has the same key already"),
        ({"a": [hash_of("k"), hash_of("k")]}, "this tenant has the same key already"),
        ({"a": [hash_of("of the environment"), "env:THERE"]}, "this tenant has the same key already"),
        ({"*": [hash_of("k")]}, "'\\*' is no tenant of its own"),
    ],
)
def test_a_wrong_entry_stops_the_start_and_is_not_told(tenants: dict[str, list[str]], complaint: str) -> None:
    config = {name: TenantConfig(api_keys=tuple(keys)) for name, keys in tenants.items()}
    with pytest.raises(ConfigurationError, match=complaint) as refused:
        Keys(config, {"THERE": "of the environment", "EMPTY": ""})
    assert "my-plain-key" not in str(refused.value)
    assert hash_of("k") not in str(refused.value)


def test_a_key_may_stand_in_the_environment() -> None:
    keys = Keys({"a": TenantConfig(api_keys=("env:A_KEY",))}, {"A_KEY": "from outside"})
    assert keys.tenant("Bearer from outside") == "a"
    assert "from outside" not in repr(keys)


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"tenants": {"a": {"api_keys": ["my-plain-key"]}}}, "neither a SHA-256 in hex"),
        ({"tenants": {"a": {"api_keys": "my-plain-key"}}}, "key 'tenants.a.api_keys' is '***': expected"),
        ({"tenants": {"a": {"api_keys": [None]}}}, "tenants.a.api_keys"),
        ({"engine_secret": ["my-plain-key"]}, "key 'engine_secret' is '***': expected"),
        ({"ssl_certfile": "nowhere.pem", "ssl_keyfile": "nowhere.key"}, "ssl_certfile 'nowhere.pem' cannot be read"),
        ({"ssl_certfile": "nowhere.pem"}, "missing key 'ssl_keyfile'"),
        ({"engine_ca_file": "nowhere.pem"}, "engine_ca_file 'nowhere.pem' cannot be read"),
        ({"cors_origins": ["example.org"]}, "key 'cors_origins' has 'example.org'"),
        ({"body_timeout": 0}, "body_timeout"),
        ({"tenants": {"a": {"requests_per_minute": 0}}}, "tenants.a.requests_per_minute"),
    ],
)
def test_the_command_ends_with_one_line_that_names_the_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: dict[str, Any], complaint: str
) -> None:
    file = tmp_path / "core.json"
    file.write_text(json.dumps({"port": 0, **keys}))
    assert core_main(["--config_path", str(file)]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert complaint in told
    assert str(file) in told
    assert "my-plain-key" not in told


# ------------------------------------------------------------------------------------------------------- the command


def test_the_command_shows_a_new_key_once_and_the_line_that_lets_it_in(capsys: pytest.CaptureFixture[str]) -> None:
    lines = []
    for _ in range(2):
        assert main(["new", "acme"]) == 0
        lines.append(capsys.readouterr().out.splitlines())
    (key, line), (other, _) = lines
    assert key != other
    assert len(key) > 40
    assert key not in line
    config = ServeCoreConfig(tenants={n: TenantConfig(**e) for n, e in json.loads(f"{{{line}}}").items()})
    assert Keys(config.tenants).tenant(f"Bearer {key}") == "acme"


def test_the_command_hashes_a_key_from_the_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("my own key\n"))
    assert main(["hash", "acme"]) == 0
    assert json.loads(f"{{{capsys.readouterr().out}}}") == {"acme": {"api_keys": [hash_of("my own key")]}}
    assert main(["hash", "acme"]) == 1
    assert main(["new", "*"]) == 1
