"""How many tasks a second each policy places, and how that grows with the number of engines.

    python benchmarks/policies.py [--policy A,B] [--engines 16,256,2048] [--queued N] [--repeats N]

Every policy of the registry meets the same queue: 2,048 tasks of 128 programs of 8 tenants. A program has a task group of
15 parallel calls, whose results one call reads, and a single call beside it; 32 system prompts of 400 tokens are shared among
programs and cached on two engines each. Explanations are off.

burst    all of the queue is placed in one instant, on engines with room for all of it.
steady   engines are full (two tasks each): one task finishes, one is placed, and 2,048 wait all the time.

A placement is what the core makes of it: the policy's `order` and `place`, the check, and the dispatch with its contexts and
indexes. `policy` is the policy's own share of that at the most engines. `growth` is the exponent g with which the time of a
placement grows as engines^g, from the fewest to the most: 0 is not at all, 1 is in proportion. Seconds are of the CPU, so that
others on the machine count less. Figures are medians over the repeats; compare the columns of one run, not runs.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from parrot.latency import FixedCost, Hinge, LatencyProfile
from parrot.protocol.api import Criteria, SamplingConfig
from parrot.protocol.engine import EngineDescription
from parrot.protocol.errors import ParrotError
from parrot.serve import events as ev
from parrot.serve.config import GlobalSchedulerConfig, ServeCoreConfig
from parrot.serve.core import ServeCore
from parrot.serve.effects import AnyEffect, Dispatch
from parrot.serve.policies import POLICIES, parse_policy
from parrot.serve.policies.base import Placement

VARIANTS = ("parrot:all", "kv_cost:temperature=0.5")  #: measured beside every policy's defaults
WIDTH, TENANTS, PROMPTS = 15, 8, 32
SAMPLING = SamplingConfig(max_gen_length=64, output_length=48)
AUTH = "0" * 64
PROFILE = LatencyProfile(
    name="made-up", model="m", device="none", attn_func="none", fixed=(FixedCost(1024, 0.01),), hinges=(Hinge(0.0, 2e-5),),
    pair_s=1e-9, kv_s=1e-8, task_overhead_s=0.001,
)  # fmt: skip


class Timed:
    """The policy of a core, with a clock: `whole` seconds from the first question of an instant to the last dispatch of it,
    `own` seconds inside the policy."""

    def __init__(self, policy: Any) -> None:
        self._policy = policy
        self.whole = self.own = 0.0
        self.placed = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def reset(self) -> None:
        self.whole = self.own = 0.0
        self.placed = 0

    def order(self, task: Any) -> Any:
        begun = time.process_time()
        key = self._policy.order(task)
        took = time.process_time() - begun
        self.own += took
        self.whole += took
        return key

    def place(self, queue: Any, cluster: Any, now: float) -> Iterator[Placement]:
        begun = asked = time.process_time()
        for placement in self._policy.place(queue, cluster, now):
            self.own += time.process_time() - asked
            self.placed += 1
            yield placement
            asked = time.process_time()
        ended = time.process_time()
        self.own += ended - asked
        self.whole += ended - begun


class Cost(NamedTuple):
    """Seconds of a placement, and the policy's share of them."""

    seconds: float
    share: float


def text(key: str, tokens: int) -> ev.Constant:
    return ev.Constant(ev.Content(key, {"t": tokens}))


def programs(count: int, first: int) -> list[ev.AnyEvent]:
    """All events of `count` programs, numbered from `first`; each leaves WIDTH + 1 tasks ready."""
    events: list[ev.AnyEvent] = []
    for number in range(first, first + count):
        system = text(f"system{number % PROMPTS}", 400)
        events.append(ev.OpenSession(0, number, AUTH, f"tenant{number % TENANTS}"))
        for place in range(WIDTH):
            part = (system, text(f"part{number}/{place}", 100 + 10 * place), ev.Output("part", SAMPLING))
            events.append(ev.SubmitCall(0, number, AUTH, part, "map"))
        reads = tuple(ev.Input(f"part{place}", f"v{place}") for place in range(WIDTH))
        events.append(ev.SubmitCall(0, number, AUTH, (system, *reads, ev.Output("all", SAMPLING)), "reduce"))
        question = (system, text(f"question{number}", 50), ev.Output("answer", SAMPLING))
        events.append(ev.SubmitCall(0, number, AUTH, question, "ask", output_criteria=Criteria.LATENCY))
        criteria = Criteria.LATENCY if number % 2 else Criteria.THROUGHPUT
        events.append(ev.GetVariable(0, number, AUTH, f"v{WIDTH}", criteria))
    return events


def new_core(policy: str, engines: int, tasks_capacity: int) -> tuple[ServeCore, Timed]:
    """A core whose engines hold the system prompts already, each on two of them."""
    section = parse_policy(policy, GlobalSchedulerConfig(max_queue_size=1 << 30, explain_placements=0))
    core = ServeCore(ServeCoreConfig(max_sessions_num=1 << 20, max_engines_num=1 << 20, global_scheduler=section))
    timed = Timed(core.scheduler.policy)
    for number in range(engines):
        description = EngineDescription(
            f"e{number}", "m", "t", "localhost", 1, "emulated", tasks_capacity=tasks_capacity, tokens_capacity=1 << 24,
            max_seq_len=8192, accepts_output_length=True, latency_profile=PROFILE,
        )  # fmt: skip
        core.handle([ev.RegisterEngine(number, description)], 0.0)
    for prompt in range(PROMPTS):
        for copy in range(2):
            _cache(core, 1_000_000 + 2 * prompt + copy, f"system{prompt}", (prompt + copy * (engines // 2)) % engines)
    core.scheduler.policy = timed
    return core, timed


def _cache(core: ServeCore, session: int, system: str, engine: int) -> None:
    """Runs a task with that prompt on that engine, while the others are made to look suspect."""
    others = [e for place, e in enumerate(core.engines.values()) if place != engine]
    for other in others:
        other.state = "suspect"
    segments = (text(system, 400), text(f"warm{session}", 1), ev.Output("out", SAMPLING))
    effects = core.handle(
        [
            ev.OpenSession(0, session, AUTH),
            ev.SubmitCall(0, session, AUTH, segments, "warm", output_criteria=Criteria.THROUGHPUT),
        ],
        0.0,
    )
    for other in others:
        other.state = "live"
    finish(core, dispatched(effects)[0], 0.0)


def dispatched(effects: list[AnyEffect]) -> list[Dispatch]:
    return [effect for effect in effects if isinstance(effect, Dispatch)]


def finish(core: ServeCore, dispatch: Dispatch, now: float) -> list[AnyEffect]:
    content = ev.Content(f"out{dispatch.task}", {"t": 48})
    return core.handle([ev.TaskFinished(0, dispatch.task, dispatch.attempt, content, 48, 600, 400, 0.5, 0.01)], now)


def burst(policy: str, engines: int, queued: int) -> Cost:
    core, timed = new_core(policy, engines, tasks_capacity=4096)
    events = programs(queued // (WIDTH + 1), 1)
    _settle()
    core.handle(events, 1.0)
    return _cost(core, timed, queued)


def steady(policy: str, engines: int, queued: int, finished: int = 256) -> Cost:
    core, timed = new_core(policy, engines, tasks_capacity=2)
    running: dict[Any, Dispatch] = {}
    filled = 2 * engines
    first, each = 1, 64
    while filled + queued > (first - 1) * (WIDTH + 1):  # in parts, so that the queue never is longer than it need be
        for dispatch in dispatched(core.handle(programs(each, first), 1.0)):
            running[dispatch.task] = dispatch
        first += each
    _settle()
    timed.reset()
    oldest = list(running.values())
    step = max(1, len(oldest) // finished)
    now = 1.0
    for dispatch in oldest[::step][:finished]:
        now += 0.01
        finish(core, dispatch, now)
    return _cost(core, timed, 1)


def _settle() -> None:
    gc.collect()
    gc.freeze()


def _cost(core: ServeCore, timed: Timed, least: int) -> Cost:
    gc.unfreeze()
    assert not core.scheduler.describe_policy_errors(), core.scheduler.describe_policy_errors()
    assert timed.placed >= least, f"{timed.placed} of {least} tasks were placed"
    return Cost(timed.whole / timed.placed, timed.own / timed.whole)


def growth(costs: list[Cost], sizes: list[int]) -> str:
    """The exponent, in two digits; a dash for one size."""
    if sizes[0] == sizes[-1]:
        return "–"
    return f"{math.log(costs[-1].seconds / costs[0].seconds) / math.log(sizes[-1] / sizes[0]):.2f}"


def median(costs: list[Cost]) -> Cost:
    return Cost(statistics.median(c.seconds for c in costs), statistics.median(c.share for c in costs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default=",".join([*POLICIES, *VARIANTS]), help="of these only, with options")
    parser.add_argument("--engines", default="16,256,2048", help="numbers of engines (default: %(default)s)")
    parser.add_argument("--queued", type=int, default=2048, help="tasks that wait (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements a cell (default: %(default)s)")
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.engines.split(",")]
    names = arguments.policy.split(",")
    for name in names:
        try:
            parse_policy(name, GlobalSchedulerConfig())
        except ParrotError as error:
            sys.exit(f"benchmarks/policies.py: {error}")
    width = max(len(name) for name in [*names, "policy"])
    print(f"placements a second with {arguments.queued} queued tasks, by the number of engines (median of {arguments.repeats})")
    head = "".join(f"{size:>9,}" for size in sizes) + f"{'growth':>8}{'policy':>8}"
    print(f"{'':<{width}}  {'burst':<{len(head)}}  steady")
    print(f"{'policy':<{width}}  {head}  {head}")
    for name in names:
        line = f"{name:<{width}}"
        for measure in (burst, steady):
            costs = [median([measure(name, size, arguments.queued) for _ in range(arguments.repeats)]) for size in sizes]
            cells = "".join(f"{1 / cost.seconds:>9,.0f}" for cost in costs)
            line += f"  {cells}{growth(costs, sizes):>8}{costs[-1].share:>8.0%}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
