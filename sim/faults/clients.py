"""Clients: each runs one program over the network, tries again until it is answered, and checks all that it is told.

They know the public HTTP API and nothing else. A request that must not happen twice carries an Idempotency-Key; a getter
whose connection breaks comes again and says how much it has. What they were told goes to the witness, who holds the core
to it for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec

from sim.faults.dice import Dice
from sim.faults.network import Connection, Request
from sim.faults.programs import Call, Get, Program, body_of
from sim.faults.witness import Witness

#: What a client tries again for, whatever it asked.
_WAIT = frozenset({"unavailable", "queue_full", "too_many_sessions", "too_many_tasks", "rate_limited"})
#: What a get of a failed variable may be told.
_FAILURES = frozenset(
    {"no_engine", "engine_failed", "engine_rejected", "task_too_large", "generation_failed", "input_failed", "bad_template"}
)
_PATIENCE_S = 4.0  # for an answer that does not wait for work
_LONG_PATIENCE_S = 15.0  # for one that does

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


class SessionOver(Exception):
    """The client has closed its session while this was under way."""


class Client:
    """Runs `program`. `done` when it has got all that it wanted and has ended its session as the program says."""

    def __init__(self, program: Program, witness: Witness, dice: Dice) -> None:
        self.program = program
        self.done = False
        self._witness = witness
        self._dice = dice
        self._session: dict[str, Any] = {}
        self._closing = False
        self._ids: dict[str, str] = {}  # the program's variables -> the server's
        self._known: dict[str, asyncio.Event] = {}
        self._submitted: dict[str, asyncio.Event] = {}
        self._keys = 0
        self._got: dict[str, str] = {}

    @property
    def session_id(self) -> int | None:
        return self._session.get("session_id")

    async def run(self) -> None:
        """From the opening of the session to its end."""
        program, dice = self.program, self._dice
        await asyncio.sleep(program.starts_s)
        opened = await self._must("POST", "/v1/session", {"api_key": program.tenant or None})
        self._session = {"session_id": opened["session_id"], "session_auth": opened["session_auth"]}
        self._witness.session(opened["session_id"])
        for var in (*program.sets, *(write.var for call in program.calls for write in call.writes)):
            self._known[var], self._submitted[var] = asyncio.Event(), asyncio.Event()
        for var in program.sets:
            await self._create(var)
        work = [asyncio.ensure_future(self._set(var, *what)) for var, what in program.sets.items()]
        work += [asyncio.ensure_future(self._get(get)) for get in program.gets]
        for call in program.calls:
            await self._submit(call)
            if dice.chance(0.3):
                await asyncio.sleep(dice.between(0.0, 0.5))
        if program.ending == "abandon":
            await asyncio.sleep(dice.between(0.0, 1.0))
        else:
            await asyncio.gather(*work)
            await self._look_again()
        await self._end(work)
        self.done = True

    # ----------------------------------------------------------------------------------------------------- the program

    async def _create(self, var: str) -> None:
        answer = await self._must("POST", "/v1/semantic_var", {"var_name": var})
        self._learn(var, answer["var_id"])

    def _learn(self, var: str, var_id: str) -> None:
        self._ids[var] = var_id
        self._known[var].set()
        self._witness.variable(self._session["session_id"], var_id)

    async def _set(self, var: str, text: str, after_s: float) -> None:
        await asyncio.sleep(after_s)
        await self._must("POST", f"/v1/semantic_var/{self._ids[var]}", {"content": text})
        self._witness.value(self._session["session_id"], self._ids[var], text)

    async def _submit(self, call: Call) -> None:
        for write in call.writes:
            if write.given:
                await self._create(write.var)
        key = self._new_key()
        body = body_of(call, self._session, self._ids)
        answer = await self._must("POST", "/v1/semantic_call", body, key)
        self._check_answer(call, answer)
        self._witness.call(self._session["session_id"], answer["request_id"])
        for info in answer["param_info"]:
            if info["is_output"]:
                var = next(write.var for write in call.writes if write.name == info["parameter_name"])
                if var not in self._ids:
                    self._learn(var, info["var_id"])
                self._submitted[var].set()
        if self._dice.chance(0.1):
            again = await self._must("POST", "/v1/semantic_call", body, key)
            self._witness.expect("idempotency", again == answer, f"{key}: answered {answer}, then {again}")

    def _check_answer(self, call: Call, answer: dict[str, Any]) -> None:
        told = {info["parameter_name"] for info in answer["param_info"] if info["is_output"]}
        wanted = {write.name for write in call.writes}
        self._witness.expect("answers", told == wanted, f"a call with outputs {wanted} was answered with {told}")

    async def _get(self, get: Get) -> None:
        await (self._known if get.early else self._submitted)[get.var].wait()
        await asyncio.sleep(get.delay_s)
        fetch = self._stream if get.stream else self._fetch
        if get.gives_up_s is not None:
            try:
                async with asyncio.timeout(get.gives_up_s):
                    await fetch(get)
                    return
            except TimeoutError:
                pass
        await fetch(get)

    async def _fetch(self, get: Get) -> None:
        while True:
            status, answer = await self._ask("GET", self._path(get.var), self._wanted(get), patience_s=_LONG_PATIENCE_S)
            if status == 200:
                return self._take(get.var, answer["content"])
            if self._is_final(get.var, answer["error"]):
                return None
            await self._pause()

    async def _stream(self, get: Get) -> None:
        """Reads the output as it comes; a broken stream goes on from where it broke."""
        text = ""
        while True:
            connection = self._connect(
                "GET", self._path(get.var), self._wanted(get) | {"stream": True, "stream_from": len(text)}
            )
            try:
                async with asyncio.timeout(_LONG_PATIENCE_S):
                    _, status, _ = await connection.receive()
                rest = b""
                while (item := await self._next(connection))[0] != "end":
                    *lines, rest = (rest + item[1]).split(b"\n")
                    for message in map(_decode, lines):
                        if "delta" in message:
                            text += message["delta"]
                            self._see(get.var, text)
                        elif "done" in message:
                            return self._take(get.var, text)
                        elif self._is_final(get.var, message["error"]):
                            return None
                if status != 200 and self._is_final(get.var, _decode(rest)["error"]):
                    return None
            except (ConnectionError, TimeoutError):
                pass
            finally:
                connection.close()
            await self._pause()

    async def _next(self, connection: Connection) -> Any:
        async with asyncio.timeout(_LONG_PATIENCE_S):
            return await connection.receive()

    def _wanted(self, get: Get) -> dict[str, Any]:
        return {"criteria": get.criteria, "timeout": get.timeout_s}

    def _see(self, var: str, text: str) -> None:
        wanted = self.program.values.get(var, "")
        self._witness.expect("streams", wanted.startswith(text), f"{var}: streamed {text!r}, expected {wanted!r}")
        self._witness.shown(self._session["session_id"], self._ids[var], text)

    def _take(self, var: str, text: str) -> None:
        wanted = self.program.values.get(var)
        self._witness.expect("reference", text == wanted, f"{var}: got {text!r}, expected {wanted!r}")
        self._witness.value(self._session["session_id"], self._ids[var], text)

    def _is_final(self, var: str, error: dict[str, Any]) -> bool:
        """Whether the variable has failed; else the get is to be tried again."""
        code = error["code"]
        if code in _FAILURES:
            self._witness.failure(self._session["session_id"], self._ids[var], error, var not in self.program.values)
            return True
        self._check_session(code)
        self._witness.expect("answers", code in _WAIT or code == "timeout", f"a get of {var} was answered {error}")
        return False

    async def _look_again(self) -> None:
        """What it was told is still so; the session is there, with all its calls."""
        for get in self.program.gets:
            if self._dice.chance(0.3):
                await self._fetch(get)
        path = f"/v1/session/{self.session_id}?session_auth={self._session['session_auth']}"
        status, report = await self._ask("GET", path, None)
        told = len(self.program.calls)  # an accepted call runs once, however often it was asked for
        self._witness.expect("answers", status == 200 and sum(report["calls"].values()) == told, f"{told} calls, but {report}")

    async def _end(self, work: Sequence[asyncio.Future[None]]) -> None:
        self._closing = True
        for each in work:
            each.cancel()
        if self.program.ending == "leave":
            return
        path = f"/v1/session/{self.session_id}?session_auth={self._session['session_auth']}"
        status, answer = await self._ask("DELETE", path, None)
        gone = status == 200 or answer["error"]["code"] in ("session_closed", "not_found")
        self._witness.expect("answers", gone, f"closing a session was answered {answer}")

    # ----------------------------------------------------------------------------------------------------- requests

    def _path(self, var: str) -> str:
        return f"/v1/semantic_var/{self._ids[var]}"

    def _new_key(self) -> str:
        self._keys += 1
        return f"{self.program.name}-{self._keys}"

    async def _must(self, method: str, path: str, body: dict[str, Any], key: str | None = None) -> Any:
        """The answer of a request that cannot be refused; asked under one key until it is given."""
        status, answer = await self._ask(method, path, body, key or self._new_key())
        if status != 200:
            self._check_session(answer["error"]["code"])
            self._witness.expect("answers", False, f"{method} {path} was refused: {answer}")
        return answer

    async def _ask(
        self, method: str, path: str, body: dict[str, Any] | None, key: str | None = None, patience_s: float = _PATIENCE_S
    ) -> tuple[int, Any]:
        while True:
            connection = self._connect(method, path, body, key)
            try:
                async with asyncio.timeout(patience_s):
                    _, status, _ = await connection.receive()
                    parts = []
                    while (item := await connection.receive())[0] == "data":
                        parts.append(item[1])
                answer = _decode(b"".join(parts))
                if status == 200 or answer["error"]["code"] not in _WAIT:
                    return status, answer
            except (ConnectionError, TimeoutError):
                pass
            finally:
                connection.close()
            await self._pause()

    def _connect(self, method: str, path: str, body: dict[str, Any] | None, key: str | None = None) -> Connection:
        loop: Any = asyncio.get_running_loop()
        headers = {} if key is None else {"Idempotency-Key": key}
        whole = b"" if body is None else _encode(body | self._session)
        connection: Connection = loop.host.connect("core:9000", Request(method, path, headers, whole), True)
        return connection

    def _check_session(self, code: str) -> None:
        if self._closing and code in ("session_closed", "not_found"):
            raise SessionOver

    async def _pause(self) -> None:
        await asyncio.sleep(self._dice.between(0.01, 0.6))
