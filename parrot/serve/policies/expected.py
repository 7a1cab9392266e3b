"""Expected times from engines' latency profiles: what a fill, a decode, a group of tasks would take there.

An engine without a profile is taken for one whose iteration costs 25 ms and 0.1 ms for every token above 100: about a 7B model
on a data-centre GPU. Where no engine has a profile only ratios matter, and any such figures rank alike.
"""

from __future__ import annotations

from parrot.latency import BatchShape, LatencyModel
from parrot.latency_profile import FixedCost, Hinge, LatencyProfile
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


def group_s(model: LatencyModel, members: int, prompt: float, outputs: float) -> float:
    """Seconds that `members` tasks of `prompt` new tokens and `outputs` tokens each take together on an engine of their own:
    first all prompts, then all outputs."""
    tokens = round(members * prompt)
    fill = model.duration(BatchShape(0, members, tokens, round(tokens * (prompt + 1) / 2), 0, 0))
    return fill + decode_s(model, outputs, members, round(members * (prompt + outputs / 2)))


def knee(model: LatencyModel, members: int, prompt: float, outputs: float, most: int) -> int:
    """Over how many engines, `most` at the highest, a group of equal tasks is best spread.

    With T(k) the time on k engines, the speed-up is T(1) / T(k) and the efficiency T(1) / (k · T(k)); the knee is where their
    product is largest, so where k · T(k)² is least (Eager, Zahorjan and Lazowska, Speedup versus efficiency in parallel
    systems, IEEE ToC 1989). Work whose batch costs little more than one of its tasks stays together; work that costs the sum
    of its tasks is spread; there is nothing to tune.
    """
    best, least = 1, group_s(model, members, prompt, outputs) ** 2
    share = members
    for k in range(2, min(members, most) + 1):
        if -(-members // k) == share:
            continue  # one engine more, and no member fewer on the fullest
        share = -(-members // k)
        cost = k * group_s(model, share, prompt, outputs) ** 2
        if cost < least:
            best, least = k, cost
    return best
