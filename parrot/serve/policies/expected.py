"""Expected times from engines' latency profiles: what a fill, a decode, a group of tasks would take there.

An engine without a profile is taken for one whose iteration costs 25 ms and 0.1 ms for every token above 100: about a 7B model
on a data-centre GPU. Where no engine has a profile only ratios matter, and any such figures rank alike.
"""

from __future__ import annotations

from parrot.latency import BatchShape, LatencyModel
from parrot.latency_profile import FixedCost, Hinge, LatencyProfile
from parrot.serve.engine_index import EngineIndex
from parrot.serve.engines import Engine

ASSUMED = LatencyProfile(
    name="assumed",
    model="",
    device="",
    attn_func="",
    fixed=(FixedCost(1, 0.025),),
    hinges=(Hinge(100.0, 0.0001),),
    pair_s=0.0,
    kv_s=0.0,
)

MOST_ENGINES = 8192  #: that are remembered; above it all are looked at anew


class ExpectedTimes:
    """The latency models of engines, one for each different profile. `kinds`: those profiles' models, by number."""

    def __init__(self) -> None:
        self.kinds: list[LatencyModel] = []
        self._kind_of: dict[int, int] = {}

    def kind(self, engine: Engine) -> int:
        """The number of its profile: engines with equal profiles share one."""
        found = self._kind_of.get(engine.id)
        if found is None:
            profile = engine.description.latency_profile or ASSUMED
            found = next((n for n, model in enumerate(self.kinds) if model.profile == profile), len(self.kinds))
            if found == len(self.kinds):
                self.kinds.append(LatencyModel(profile))
            if len(self._kind_of) >= MOST_ENGINES:
                self._kind_of.clear()
            self._kind_of[engine.id] = found
        return found

    def model(self, engine: Engine) -> LatencyModel:
        return self.kinds[self.kind(engine)]


def fill_s(model: LatencyModel, new_tokens: int, cached_tokens: int, rows: int, kv_tokens: int) -> float:
    """Seconds until `new_tokens` behind `cached_tokens` are computed, beside `rows` that decode over `kv_tokens`."""
    pairs = new_tokens * cached_tokens + new_tokens * (new_tokens + 1) // 2
    return model.duration(BatchShape(rows, 1, new_tokens, pairs, kv_tokens, kv_tokens))


def decode_s(model: LatencyModel, outputs: float, rows: int, kv_tokens: int) -> float:
    """Seconds in which each of `rows` tasks that read `kv_tokens` together generates `outputs` tokens."""
    return outputs * model.duration(BatchShape(decode_rows=rows, decode_kv=kv_tokens, decode_kv_unique=kv_tokens))


def part_s(model: LatencyModel, members: int, prompt: float, outputs: float, beside: Engine) -> tuple[float, float]:
    """What `members` tasks of `prompt` new tokens and `outputs` tokens each mean for an engine as loaded as `beside`: (seconds
    until they end: first what it has still to fill, then all prompts, then all outputs; seconds of the engine that they
    take). Beside others they do not pay again for what an iteration costs anyway; alone, both are the same."""
    rows, kv_tokens = beside.running, beside.prompt_tokens
    tokens = round(members * prompt)
    pairs = round(tokens * (prompt + 1) / 2)
    fill = model.duration(BatchShape(rows, members, tokens, pairs, kv_tokens, kv_tokens))
    decode = decode_s(model, outputs, rows + members, kv_tokens + round(members * (prompt + outputs / 2)))
    own = decode_s(model, outputs + 1, rows, kv_tokens) if rows else 0.0
    waits = model.tokens_s(beside.prefill_tokens) if beside.prefill_tokens else 0.0
    return waits + fill + decode, fill + decode - own


def knee(model: LatencyModel, members: int, prompt: float, outputs: float, engines: EngineIndex) -> int:
    """Over how many of `engines`, the least loaded first, a group of equal tasks is best spread: where the time until it ends,
    times the engines' time that it takes, is least; each part as on the most loaded of those engines.

    On idle engines that is k · T(k)², T(k) being the time on k of them: the knee of speed-up T(1) / T(k) and efficiency
    T(1) / (k · T(k)), where their product is largest (Eager, Zahorjan and Lazowska, Speedup versus efficiency in parallel
    systems, IEEE ToC 1989). Work whose batch costs little more than one of its tasks stays together there; work that costs
    the sum of its tasks is spread. Where engines are busy iterations go on anyway, so that a part costs what its own
    tokens add: then a group gains nothing by staying together. There is nothing to tune.
    """
    best, least, share = 1, 0.0, 0
    for k in range(1, min(members, len(engines)) + 1):
        if -(-members // k) == share:
            continue  # one engine more, and no member fewer on the fullest
        share = -(-members // k)
        ends_s, taken_s = part_s(model, share, prompt, outputs, engines.at(k - 1))
        cost = ends_s * k * taken_s
        if k == 1 or cost < least:
            best, least = k, cost
    return best
