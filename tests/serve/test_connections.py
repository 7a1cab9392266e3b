"""The connection itself: TLS between clients, core and engines; how long a request may take to come and to be answered; pages
of other origins."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from parrot import P
from parrot.engine.config import EmulatedEngineConfig, ServeCoreAddress, load_engine_config
from parrot.engine.http_server import main as engine_main
from parrot.engine.launch import start_emulated
from parrot.protocol.errors import ParrotError
from parrot.serve.config import ServeCoreConfig
from parrot.serve.server import Server
from parrot.tokenizer import load_tokenizer
from tests.serve.http_support import cluster, eventually

ZERO = Path(__file__).parents[2] / "sample_configs" / "engine" / "emulated-zero.json"
ORIGIN = "https://app.example.org"
_SLOW = 0.1  # s: long enough for a request that comes at once


# ---------------------------------------------------------------------------------------------------------------- TLS


async def test_a_program_a_core_and_an_engine_speak_tls_all_the_way(tmp_path: Path) -> None:
    from tests.certificates import certificates

    files = certificates(tmp_path)
    shown = {"ssl_certfile": files.certfile, "ssl_keyfile": files.keyfile}
    config = msgspec.convert({"host": "127.0.0.1", "port": 0, "engine_ca_file": files.ca_file, **shown}, ServeCoreConfig)
    server = Server(config, load=load_tokenizer)
    [(_, port)] = await server.start()
    loaded = load_engine_config(ZERO, {"host": "127.0.0.1", "port": 0, **shown})
    assert isinstance(loaded, EmulatedEngineConfig)
    address = ServeCoreAddress("127.0.0.1", port, tls=True, ca_file=files.ca_file)
    engine = await start_emulated(msgspec.structs.replace(loaded, serve_core=address))
    try:
        await eventually(lambda: len(server.core.engines) == 1)
        assert engine.url.startswith("https://")
        url = f"https://127.0.0.1:{port}"
        said = await asyncio.to_thread(_run, url, files.ca_file)
        assert len(said.split()) == 3
        assert len((await _arun(url, files.ca_file)).split()) == 3
        with pytest.raises(ParrotError, match=r"certificate of https://127.0.0.1:.* is not believed"):
            await asyncio.to_thread(_run, url, None)
        with pytest.raises(ParrotError, match="is not believed"):
            await _arun(url, None)
        async with aiohttp.ClientSession() as http:
            with pytest.raises(aiohttp.ClientError):
                await http.get(f"http://127.0.0.1:{port}/health")
    finally:
        await engine.close()
        await server.stop()


@P.semantic_function()
def short(x: P.Output(P.SamplingConfig(output_length=3, max_gen_length=3))) -> None:  # type: ignore[valid-type]
    """Say something short: {{x}}"""


def _run(url: str, ca_file: str | None) -> str:
    machine = P.VirtualMachine(url, ca_file=ca_file)
    said: list[str] = []
    machine.run(lambda: said.append(short().get()))
    return said[0]


async def _arun(url: str, ca_file: str | None) -> str:
    async with P.VirtualMachine(url, ca_file=ca_file).running_scope():
        return str(await (await short.ainvoke()).aget())


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"ssl_certfile": "nowhere.pem"}, "missing key 'ssl_keyfile'"),
        ({"ssl_certfile": "nowhere.pem", "ssl_keyfile": "nowhere.key"}, "cannot be read"),
        ({"serve_core": {"tls": True, "ca_file": "nowhere.pem"}}, "serve_core.ca_file 'nowhere.pem' cannot be read"),
        ({"serve_core": {"ca_file": "nowhere.pem"}}, "serve_core.tls is false"),
    ],
)
def test_an_engine_with_wrong_files_does_not_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: dict[str, Any], complaint: str
) -> None:
    file = tmp_path / "engine.json"
    base = {"model": "m", "engine_type": "emulated", "latency_profile": "zero", "port": 0}
    file.write_bytes(msgspec.json.encode({**base, **keys}))
    assert engine_main(["--config_path", str(file)]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert complaint in told


# --------------------------------------------------------------------------------------------------------------- time


async def _raw(url: str, *parts: bytes) -> bytes:
    """What comes back for bytes sent one after the other, up to the error or until the server closes the connection."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.01)
        told = b""
        async with asyncio.timeout(5):
            while b'"error"' not in told and (part := await reader.read(65536)):
                told += part
        return told
    finally:
        writer.close()


@pytest.mark.parametrize(
    "parts",
    [
        (),
        (b"GET /health HTTP/1.1\r\nHost:",),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /hea"),
    ],
    ids=["silence", "half a head", "half a second head"],
)
async def test_a_head_that_does_not_come_is_waited_for_no_longer_than_header_timeout(parts: tuple[bytes, ...]) -> None:
    async with cluster(header_timeout=_SLOW) as c:
        told = await _raw(c.client.url, *parts)
        assert b"HTTP/1.1 408 Request Timeout" in told
        assert b'"code":"request_timeout"' in told


async def test_a_connection_between_requests_may_be_idle_for_longer() -> None:
    async with cluster(header_timeout=_SLOW) as c:
        await c.client.session()
        await asyncio.sleep(2 * _SLOW)
        await c.client.session()
        assert len(c.server._runner.server.connections) == 1  # type: ignore[union-attr]


async def test_a_body_that_does_not_come_is_waited_for_no_longer_than_body_timeout() -> None:
    async with cluster(body_timeout=_SLOW) as c:
        head = b"POST /v1/session HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
        told = await _raw(c.client.url, head, b'{"api_', b'key": ')
        assert told.startswith(b"HTTP/1.1 408")
        assert b"the body has not come within 0.1 s" in told


async def test_a_body_above_the_limit_is_refused() -> None:
    async with cluster(max_body_bytes=100) as c:
        status, answer = await c.client.send("POST", "/v1/session", {"api_key": "x" * 100})
        assert (status, answer["error"]["code"]) == (413, "body_too_large")


async def test_a_request_that_is_not_answered_within_request_timeout_is_told_so_and_its_work_goes_on() -> None:
    async with cluster(request_timeout=_SLOW) as c:
        engine = await c.engine()
        gate = asyncio.Event()
        engine.script(gate, engine.finished("at last"))
        session = await c.client.session()
        x = await c.client.ask(session, "how")
        status, answer = await c.client.get(session, x)
        assert (status, answer["error"]["code"]) == (408, "request_timeout")
        gate.set()
        await eventually(lambda: c.server.core.sessions[session["session_id"]].variables[x].state == "ready")
        assert await c.client.get(session, x) == (200, {"content": "at last"})


async def test_a_stream_that_takes_longer_than_request_timeout_breaks() -> None:
    from parrot.protocol.engine import Started, Tokens

    async with cluster(request_timeout=2 * _SLOW) as c:
        engine = await c.engine()
        engine.script(Started(), Tokens((1,), "fine "), asyncio.Event())
        session = await c.client.session()
        x = await c.client.ask(session, "how")
        lines: list[Any] = []

        async def read() -> None:
            async for each in c.client.stream(session, x):
                lines.append(each)

        with pytest.raises(aiohttp.ClientPayloadError):
            await read()
        assert lines == [{"delta": "fine "}]


# --------------------------------------------------------------------------------------------------------------- CORS

PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type, x-stainless-lang",
}


async def test_pages_of_other_origins_are_told_nothing_unless_they_are_named() -> None:
    async with cluster() as c:
        assert (await c.client.send("OPTIONS", "/v1/session", headers=PREFLIGHT))[0] == 405
        await c.client.send("POST", "/v1/session", headers={"Origin": ORIGIN})
        assert not [name for name in c.client.headers if name.startswith("Access-Control")]


@pytest.mark.parametrize("origins", [[ORIGIN], ["*"], ["http://localhost:3000", ORIGIN.upper().replace("HTTPS", "https")]])
async def test_a_page_of_a_named_origin_may_ask_and_read(origins: list[str]) -> None:
    async with cluster(cors_origins=origins) as c:
        async with c.client.http.options(f"{c.client.url}/v1/session", headers=PREFLIGHT) as response:
            assert response.status == 204
            assert "POST" in response.headers["Access-Control-Allow-Methods"]
            assert "x-stainless-lang" in response.headers["Access-Control-Allow-Headers"]
            assert response.headers["Access-Control-Allow-Origin"] in (ORIGIN, "*")
        status, _ = await c.client.send("POST", "/v1/session", headers={"Origin": ORIGIN})
        assert (status, c.client.headers["Access-Control-Allow-Origin"]) == (200, "*" if "*" in origins else ORIGIN)
        status, _ = await c.client.send("GET", "/v1/session/1", headers={"Origin": ORIGIN})  # an error can be read too
        assert status != 200
        assert "Access-Control-Allow-Origin" in c.client.headers


async def test_a_stream_can_be_read_by_a_page_of_a_named_origin() -> None:
    async with cluster(cors_origins=[ORIGIN]) as c:
        await c.engine()
        session = await c.client.session()
        x = await c.client.ask(session, "how")
        query = {"session_id": str(session["session_id"]), "session_auth": session["session_auth"], "stream": "true"}
        url = f"{c.client.url}/v1/semantic_var/{x}"
        async with c.client.http.get(url, params=query, headers={"Origin": ORIGIN}) as response:
            assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
            assert re.search(b'"done": ?true', await response.read())


async def test_a_page_of_another_origin_is_let_in_nowhere() -> None:
    async with cluster(cors_origins=[ORIGIN]) as c:
        elsewhere = {**PREFLIGHT, "Origin": "https://elsewhere.example"}
        async with c.client.http.options(f"{c.client.url}/v1/session", headers=elsewhere) as response:
            assert "Access-Control-Allow-Origin" not in response.headers
            assert "Access-Control-Allow-Methods" not in response.headers
        await c.client.send("POST", "/v1/session", headers={"Origin": "https://elsewhere.example"})
        assert "Access-Control-Allow-Origin" not in c.client.headers
        assert c.client.headers["Vary"] == "Origin"
