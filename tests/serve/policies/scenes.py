"""What the scenarios of the policies share: programs in a line, and who was placed where."""

from __future__ import annotations

from parrot.latency_profile import FixedCost, Hinge, LatencyProfile
from parrot.protocol.api import Criteria, SamplingConfig
from parrot.serve.effects import Dispatch
from parrot.serve.events import Output
from tests.serve.driver import Driver, out, read, text


def profile(fixed_s: float = 0.0, token_s: float = 0.0, name: str = "p") -> LatencyProfile:
    """An iteration costs `fixed_s`, and `token_s` for each of its tokens."""
    return LatencyProfile(name, "m", "d", "a", (FixedCost(1, fixed_s),), (Hinge(0.0, token_s),), 0.0, 0.0)


def ask(
    d: Driver,
    session: int,
    key: str,
    tokens: int = 10,
    *,
    most: int = 16,
    criteria: Criteria | None = None,
    func_name: str = "",
    length: int | None = None,
) -> str:
    """A call of one prompt, fetched. Returns its output's variable."""
    output = Output("x", SamplingConfig(max_gen_length=most, output_length=length))
    (x,) = d.outputs(d.submit(session, text(key, tokens), output, func_name=func_name))
    d.get(session, x, criteria)
    return x


def map_reduce(d: Driver, session: int, name: str, width: int, tokens: int = 10, most: int = 16) -> None:
    """`width` calls in parallel, and one over their outputs, which is fetched."""
    maps = [d.outputs(d.submit(session, text(f"{name}{i}", tokens), out("s", max_gen_length=most)))[0] for i in range(width)]
    (f,) = d.outputs(d.submit(session, text("reduce"), *[read(f"s{i}", v) for i, v in enumerate(maps)], out("f")))
    d.get(session, f, Criteria.LATENCY)


def engines_of(d: Driver) -> list[int]:
    return [dispatch.engine_id for dispatch in d.dispatches]


def heads(d: Driver) -> list[str]:
    """What the prompts of the tasks in flight begin with."""
    return [dispatch.chain[0].keys[0] for dispatch in d.dispatches]


def begun(d: Driver, key: str) -> Dispatch:
    """The task in flight whose prompt begins with `key`."""
    return next(dispatch for dispatch in d.dispatches if dispatch.chain[0].keys[0] == key)


def run_out(d: Driver) -> list[str]:
    """Ends one task after the other, the longest in flight first: what their prompts began with, in that order."""
    done = []
    while d.dispatches:
        done.append(heads(d)[0])
        d.finish(d.dispatches[0])
    return done


def rules(d: Driver) -> list[str]:
    """Of all placements that are remembered, the oldest first."""
    assert d.core.scheduler.explanations is not None
    return [report.rule for report in reversed(d.core.scheduler.explanations.last(1000))]
