"""Programs: what clients want to run, and what must come out of it, computed here alone from the text of each prompt.

An engine's output is a function of its prompt's tokens and the sampling seed, so that every attempt on every engine says
the same. The reference puts each prompt together from the program, not from anything that the system under test made of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from parrot.engine.emulated.output import SyntheticOutput
from parrot.protocol.api import SamplingConfig
from parrot.tokenizer import SYNTHETIC
from sim.faults.dice import Dice
from sim.faults.plan import TOO_LONG, tokenizer_of
from sim.faults.tokenizers import HALVES, load

_OUTPUTS = {name: SyntheticOutput(load(name)) for name in (SYNTHETIC, HALVES)}
_ENCODE = {name: load(name).encode for name in (SYNTHETIC, HALVES)}
_CRITERIA = (None, None, "latency", "throughput", "TTFT", "TPOT")


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Value:
    """A value given with the call."""

    name: str
    text: str


@dataclass(frozen=True)
class Read:
    name: str
    var: str


@dataclass(frozen=True)
class Write:
    """An output. `given`: into a variable that the client has made before."""

    name: str
    var: str
    sampling: SamplingConfig
    given: bool


Segment = Text | Value | Read | Write


@dataclass(frozen=True)
class Call:
    segments: tuple[Segment, ...]
    models: tuple[str, ...] = ()
    cache_prefix: bool = True
    fuse_fill: bool = False
    criteria: str | None = None

    @property
    def writes(self) -> list[Write]:
        return [segment for segment in self.segments if isinstance(segment, Write)]


@dataclass(frozen=True)
class Get:
    """How an output is fetched. `early`: as soon as its variable is known, else when the call is submitted.

    `timeout_s`: the request's own; `gives_up_s`: the client goes away and comes again, once.
    """

    var: str
    stream: bool = False
    early: bool = False
    delay_s: float = 0.0
    criteria: str | None = None
    timeout_s: float | None = None
    gives_up_s: float | None = None


@dataclass(frozen=True)
class Program:
    """`sets`: variables that the client fills, after so many seconds. `ending`: how its session ends."""

    name: str
    tenant: str
    starts_s: float
    calls: tuple[Call, ...]
    sets: dict[str, tuple[str, float]]
    gets: tuple[Get, ...]
    ending: str  # close, leave (to expire), abandon (closed in the middle)
    values: dict[str, str] = field(default_factory=dict)  #: the reference; what is not in it cannot be computed


def reference(calls: Sequence[Call], sets: dict[str, tuple[str, float]], halves: bool) -> dict[str, str]:
    """What each variable holds in the end. Left out: outputs of a prompt that is too long for any engine, and what reads
    them."""
    values = {var: text for var, (text, _) in sets.items()}
    for call in calls:
        tokenizer = tokenizer_of(call.models[0], halves) if call.models else SYNTHETIC
        output, encode = _OUTPUTS[tokenizer], _ENCODE[tokenizer]
        ids: list[int] = []
        for segment in call.segments:
            if isinstance(segment, Write):
                sampling = segment.sampling
                made = output.ids(output.key([ids], sampling), sampling.output_length or sampling.max_gen_length)
                ids += made
                values[segment.var] = output.text(made)
                continue
            if isinstance(segment, Read) and segment.var not in values:
                break
            text = values[segment.var] if isinstance(segment, Read) else segment.text
            ids += encode(text)
            if len(ids) >= TOO_LONG:
                break
    return values


def body_of(call: Call, session: dict[str, Any], ids: dict[str, str]) -> dict[str, Any]:
    """The JSON of POST /v1/semantic_call. `ids`: the client's names of variables -> the server's."""
    template: list[str] = []
    parameters: list[dict[str, Any]] = []
    for segment in call.segments:
        if isinstance(segment, Text):
            template.append(segment.text)
            continue
        template.append("{{" + segment.name + "}}")
        parameter: dict[str, Any] = {"name": segment.name}
        if isinstance(segment, Value):
            parameter["value"] = segment.text
        elif isinstance(segment, Read):
            parameter["var_id"] = ids[segment.var]
        else:
            parameter |= {"is_output": True, "sampling_config": segment.sampling}
            if segment.given:
                parameter["var_id"] = ids[segment.var]
        parameters.append(parameter)
    return session | {
        "template": " ".join(template),
        "parameters": parameters,
        "models": list(call.models),
        "cache_prefix": call.cache_prefix,
        "fuse_fill": call.fuse_fill,
        "output_criteria": call.criteria,
    }


# ------------------------------------------------------------------------------------------------------------ drawing


def draw_program(dice: Dice, number: int, models: Sequence[str], halves: bool, until_s: float) -> Program:
    """Program `number` of a run with engines of these models; it begins within the time of faults."""
    drawn = _Drawing(dice, f"p{number}", models, pinned=halves)
    shape = dice.pick(("chain", "map_reduce", "diamond", "many", "single"))
    getattr(drawn, shape)()
    calls = tuple(drawn.calls)
    gets = tuple(_draw_get(dice, write.var) for write in drawn.fetched())
    ending = "close" if dice.chance(0.85) else dice.pick(("leave", "abandon"))
    tenant = dice.pick(("", "", "tenant-a", "tenant-b"))
    values = reference(calls, drawn.sets, halves)
    return Program(f"p{number}", tenant, dice.between(0.0, 0.7 * until_s), calls, drawn.sets, gets, ending, values)


def _draw_get(dice: Dice, var: str) -> Get:
    return Get(
        var,
        stream=dice.chance(0.5),
        early=dice.chance(0.3),
        delay_s=0.0 if dice.chance(0.5) else dice.between(0.0, 2.0),
        criteria=dice.pick(_CRITERIA),
        timeout_s=dice.pick((None, None, 0.0, 0.5, 3.0)),
        gives_up_s=dice.between(0.0, 1.0) if dice.chance(0.2) else None,
    )


class _Drawing:
    """A program that is being drawn: its calls in an order in which each reads what earlier ones write."""

    def __init__(self, dice: Dice, name: str, models: Sequence[str], pinned: bool) -> None:
        self.calls: list[Call] = []
        self.sets: dict[str, tuple[str, float]] = {}
        self._dice = dice
        self._name = name
        self._models = models
        self._pinned = pinned  # every call says its model, for what is said depends on it
        self._vars = 0

    def single(self) -> None:
        self._call(self._inputs())

    def chain(self) -> None:
        reads = self._inputs()
        for _ in range(self._dice.number(2, 4)):
            reads = [self._call(reads)[-1]]

    def map_reduce(self) -> None:
        maps = [self._call(self._inputs())[-1] for _ in range(self._dice.number(2, 4))]
        self._call(maps)

    def diamond(self) -> None:
        top = self._call(self._inputs())[-1]
        self._call([self._call([top])[-1], self._call([top])[-1]])

    def many(self) -> None:
        """Calls with several outputs each, the later of which continue the earlier."""
        reads = self._inputs()
        for _ in range(self._dice.number(1, 2)):
            reads = self._call(reads, outputs=self._dice.number(2, 3))

    def fetched(self) -> list[Write]:
        """The last call's outputs, and some of the others."""
        last = self.calls[-1]
        return [w for call in self.calls for w in call.writes if call is last or self._dice.chance(0.3)]

    def _inputs(self) -> list[str]:
        """Sometimes a variable that the client sets itself, early or late."""
        if not self._dice.chance(0.4):
            return []
        var = self._variable()
        words = self._dice.pick((0, 3, 8))
        self.sets[var] = (self._words(words), 0.0 if self._dice.chance(0.5) else self._dice.between(0.0, 3.0))
        return [var]

    def _call(self, reads: Sequence[str], outputs: int = 1) -> list[str]:
        dice = self._dice
        common = dice.chance(0.5)
        segments: list[Segment] = [Text("w1 w2 w3 w4 w5 w6 w7 w8" if common else self._words(dice.number(1, 12)))]
        if dice.chance(0.02):
            segments.append(Text("w9 " * TOO_LONG))
        segments += [Read(f"in{place}", var) for place, var in enumerate(reads)]
        if dice.chance(0.3):
            segments.append(Value("value", self._words(dice.number(0, 5))))
        written = []
        for place in range(outputs):
            if place and dice.chance(0.5):
                segments.append(Text(self._words(2)))
            length = dice.number(1, 16)
            most = length if dice.chance(0.7) else length + dice.number(0, 10)
            sampling = SamplingConfig(seed=dice.number(0, 2**20), max_gen_length=most, output_length=length)
            written.append(self._variable())
            segments.append(Write(f"out{place}", written[-1], sampling, dice.chance(0.3)))
        models = () if not self._pinned and dice.chance(0.6) else (dice.pick(self._models),)
        criteria = dice.pick(_CRITERIA[2:]) if dice.chance(0.2) else None
        self.calls.append(Call(tuple(segments), models, dice.chance(0.8), dice.chance(0.15), criteria))
        return written

    def _variable(self) -> str:
        self._vars += 1
        return f"{self._name}.{self._vars}"

    def _words(self, count: int) -> str:
        return " ".join(f"w{self._dice.number(10, 60_000)}" for _ in range(count))
