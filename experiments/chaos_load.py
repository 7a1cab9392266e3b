"""The load of the chaos test: applications whose texts are known, each of which checks what it is told while it runs.

An application is a kind and a number; the two decide every prompt, and the outputs are greedy, so that each run of it has to
give the same texts. It raises Contradiction when the core says two different things about one variable or one request.
It never looks at what is being killed.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from experiments.chaos_client import Contradiction, RawSession
from parrot import P

GREEDY = {"temperature": 0.0, "max_gen_length": 24}
SAMPLING = P.SamplingConfig(temperature=0.0, max_gen_length=24)
#: However long a core is away in such a test, no application may give up.
PATIENT = P.RetryPolicy(patience_s=120.0, first_contact_s=120.0, closing_s=120.0, busy_retries=1000, max_wait_s=0.5)

_SPOKEN = "harbour mill tide storm bridge grain rope lantern boat wall gate field market river winter baker"
_WORDS = _SPOKEN.split()


@dataclass
class Ran:
    """What one run of an application gave. `texts`: by the name of the output. The rest counts what was checked."""

    texts: dict[str, str]
    streams: int = 0
    reconnects: int = 0  #: of streaming gets, cut on purpose or by a kill
    repeated_posts: int = 0
    second_gets: int = 0
    lost_connections: int = 0


@dataclass(frozen=True)
class Application:
    """One of the applications. `kind` is a key of KINDS."""

    kind: str
    number: int

    def __str__(self) -> str:
        return f"{self.kind} {self.number}"

    async def run(self, url: str, seed: int) -> Ran:
        """Runs it once; `seed` decides where it cuts its own connections. Raises Contradiction, ParrotError."""
        return await KINDS[self.kind](url, self.number, random.Random(seed))


def applications(numbers: int) -> list[Application]:
    """`numbers` applications of each kind."""
    return [Application(kind, number) for number in range(numbers) for kind in KINDS]


def _text(number: int, part: int, words: int = 30) -> str:
    drawn = random.Random(f"{number}/{part}")
    return " ".join(drawn.choice(_WORDS) for _ in range(words))


def _function(name: str, inputs: list[str], body: str) -> P.SemanticFunction:
    params = [P.Parameter(n, P.ParamType.INPUT_LOC) for n in inputs]
    return P.SemanticFunction(name, [*params, P.Parameter("said", P.ParamType.OUTPUT_LOC, SAMPLING)], body + " {{said}}")


_SHORTEN = _function("shorten", ["text"], "Say this in fewer words. {{text}} Shorter:")
_ANSWER = _function("answer", ["past", "question"], "You are a guide in a museum. {{past}} Visitor: {{question}} Guide:")


def _same(name: str, first: str, second: str | None) -> None:
    if first != second:
        raise Contradiction(f"{name} was {first!r} and is {second!r}")


async def _both(first: Coroutine[Any, Any, str], second: Coroutine[Any, Any, str]) -> tuple[str, str]:
    """Both at once; when one fails the other is left to nobody."""
    tasks = asyncio.ensure_future(first), asyncio.ensure_future(second)
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


# ----------------------------------------------------------------------------------------------- programs of `P`


def _chain(machine: P.VirtualMachine, number: int) -> Ran:
    """Three calls, each of which reads the one before; all are submitted before the first get."""
    steps = [_SHORTEN(_text(number, 0))]
    steps += [_SHORTEN(steps[-1])]
    steps += [_SHORTEN(steps[-1])]
    steps[-1].get(P.PerformanceCriteria.LATENCY)
    return Ran({f"step{n}": step.get() for n, step in enumerate(steps)})


def _chat(machine: P.VirtualMachine, number: int) -> Ran:
    """Turns with time to think between them; each is streamed."""
    past, texts = "", {}
    for turn in range(3):
        question = _text(number, turn, 8)
        answer = _ANSWER(past, question)
        texts[f"turn{turn}"] = "".join(answer.stream())
        _same(f"turn{turn}", texts[f"turn{turn}"], machine.session.get_variable(answer.id, P.PerformanceCriteria.LATENCY))
        past += f" Visitor: {question} Guide: {texts[f'turn{turn}']}"
        time.sleep(0.05)
    return Ran(texts, streams=3, second_gets=3)


async def _map_reduce(machine: P.VirtualMachine, number: int) -> Ran:
    """Four calls of the same kind and one that reads them all; two readers of the last, one of which streams."""
    notes = [await _SHORTEN.ainvoke(_text(number, part)) for part in range(4)]
    names = [f"note{n}" for n in range(len(notes))]
    join = _function("join", names, "Join these notes. " + " ".join(f"{{{{{name}}}}}" for name in names))
    summary = await join.ainvoke(**dict(zip(names, notes, strict=True)))

    async def streamed() -> str:
        pieces = [piece async for piece in machine.session.astream_variable(summary.id, P.PerformanceCriteria.TTFT)]
        return "".join(pieces)

    text, shown = await _both(summary.aget(P.PerformanceCriteria.LATENCY), streamed())
    _same("summary, streamed", shown, text)
    texts = {name: await note.aget() for name, note in zip(names, notes, strict=True)}
    return Ran({**texts, "summary": text}, streams=1, second_gets=1)


async def _of_thread(program: Callable[[P.VirtualMachine, int], Ran], url: str, number: int) -> Ran:
    def run() -> Ran:
        machine = P.VirtualMachine(url, retry=PATIENT)
        with machine.running_scope():
            ran = program(machine, number)
            _check_all(machine.session.variables(), ran)
        ran.lost_connections = machine.stat.lost_connections
        return ran

    return await asyncio.to_thread(run)


async def _of_loop(program: Callable[[P.VirtualMachine, int], Awaitable[Ran]], url: str, number: int) -> Ran:
    machine = P.VirtualMachine(url, retry=PATIENT)
    async with machine.running_scope():
        ran = await program(machine, number)
    ran.lost_connections = machine.stat.lost_connections
    return ran


def _check_all(listed: list[Any], ran: Ran) -> None:
    """Every output that the application has is one that the core lists, word for word."""
    contents = {info.content for info in listed if info.state == "ready"}
    for name, text in ran.texts.items():
        if text not in contents:
            raise Contradiction(f"{name} is {text!r}, which no variable of the session holds")


# --------------------------------------------------------------------------------------------------------- raw HTTP


async def _raw(url: str, number: int, rng: random.Random) -> Ran:
    """What a client without `P` does: keys of its own, requests repeated, streams that it leaves and takes up again."""
    async with RawSession(url, PATIENT) as session:
        first = await session.post("/v1/semantic_var", {"var_name": "first"})
        await session.post("/v1/semantic_call", _call("Tell of this. {{text}} {{said}}", _text(number, 0), first["var_id"]))
        body = _call("And of this, after {{before}} . {{text}} {{said}}", _text(number, 1))
        body["parameters"].append({"name": "before", "var_id": first["var_id"]})
        answer = await session.post("/v1/semantic_call", body)
        second = next(item["var_id"] for item in answer["param_info"] if item["is_output"])
        texts: dict[str, str] = {}
        for name, var_id in (("second", second), ("first", first["var_id"])):
            cuts = sorted(rng.randrange(1, 120) for _ in range(rng.randrange(3)))
            text, shown = await _both(session.get(var_id), session.stream(var_id, cuts))
            _same(f"{name}, streamed", shown, text)
            _same(f"{name}, again", text, await session.get(var_id))
            middle = rng.randrange(len(text) + 1)
            _same(f"{name}, from {middle}", text[middle:], await session.stream(var_id, start=middle))
            texts[name] = text
        repeated = await session.repeat_posts()
        await session.close()
        return Ran(texts, 4, session.reconnects, repeated, 2, session.lost_connections)


def _call(template: str, text: str, var_id: str | None = None) -> dict[str, Any]:
    said = {"name": "said", "is_output": True, "sampling_config": GREEDY} | ({"var_id": var_id} if var_id else {})
    return {"template": template, "func_name": "tell", "parameters": [{"name": "text", "value": text}, said]}


KINDS: dict[str, Callable[[str, int, random.Random], Awaitable[Ran]]] = {
    "chain": lambda url, number, _: _of_thread(_chain, url, number),
    "map-reduce": lambda url, number, _: _of_loop(_map_reduce, url, number),
    "chat": lambda url, number, _: _of_thread(_chat, url, number),
    "raw": _raw,
}
