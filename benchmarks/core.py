"""The cost of ServeCore alone: a whole one-call life, OpenSession to CloseSession, in microseconds; and its memory.

    python benchmarks/core.py [--lives N] [--repeats N]

One life is eight events, each handed over in an instant of its own as the shells do at low load: OpenSession,
SubmitCall (a constant, an input value, an output), GetVariable, TaskStarted, FirstToken, TaskFinished, CloseSession,
and the Tick that a shell may send. It runs under `parrot` against 1, 16 and 256 engines, beside 0 and 10,000 sessions
that are open and idle. Figures are medians over the repeats; compare the columns of one run, not runs.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import tracemalloc

from parrot.protocol.api import Criteria, SamplingConfig
from parrot.protocol.engine import EngineDescription
from parrot.serve import events as ev
from parrot.serve.config import GlobalSchedulerConfig, ServeCoreConfig
from parrot.serve.core import ServeCore
from parrot.serve.effects import Dispatch
from parrot.serve.policies import parse_policy

SAMPLING = SamplingConfig(max_gen_length=64)


def new_core(policy: str, engines: int) -> ServeCore:
    section = parse_policy(policy, GlobalSchedulerConfig())
    core = ServeCore(ServeCoreConfig(max_sessions_num=1 << 20, global_scheduler=section))
    for number in range(engines):
        description = EngineDescription(
            f"e{number}", "m", "t", "localhost", 1, "emulated", tasks_capacity=256, tokens_capacity=100_000, max_seq_len=8192
        )
        core.handle([ev.RegisterEngine(number, description)], 0.0)
    return core


def live(core: ServeCore, number: int, now: float, close: bool = True) -> None:
    """One session with one call, whose prompt is a constant that all share and a value of its own."""
    auth = "0" * 64
    core.handle([ev.OpenSession(1, number, auth)], now)
    segments = (
        ev.Constant(ev.Content("system", {"t": 100})),
        ev.Input("question", value=ev.Content(f"question{number}", {"t": 30})),
        ev.Output("answer", SAMPLING),
    )
    core.handle([ev.SubmitCall(2, number, auth, segments, "ask")], now)
    effects = core.handle([ev.GetVariable(3, number, auth, "v1", Criteria.LATENCY)], now)
    dispatch = effects[-1]
    assert isinstance(dispatch, Dispatch)
    task, attempt = dispatch.task, dispatch.attempt
    core.handle([ev.TaskStarted(0, task, attempt, 100)], now)
    core.handle([ev.FirstToken(0, task, attempt)], now)
    content = ev.Content(f"answer{number}", {"t": 40})
    effects = core.handle([ev.TaskFinished(0, task, attempt, content, 40, 130, 100, 0.5, 0.01)], now)
    if close:
        core.handle([ev.CloseSession(4, number, auth)], now)


def microseconds_a_life(policy: str, engines: int, sessions: int, lives: int) -> float:
    core = new_core(policy, engines)
    for number in range(sessions):
        live(core, number, 0.0, close=False)
    gc.collect()
    gc.freeze()
    start = time.perf_counter()
    for number in range(lives):
        live(core, 1_000_000 + number, 1.0)
    elapsed = time.perf_counter() - start
    gc.unfreeze()
    return elapsed / lives * 1e6


def bytes_an_idle_session(sessions: int = 5000) -> float:
    """Memory that a session holds after it has run one call with two variables."""
    core = new_core("parrot:all", 16)
    live(core, 0, 0.0, close=False)
    gc.collect()
    tracemalloc.start()
    for number in range(1, sessions + 1):
        live(core, number, 0.0, close=False)
    gc.collect()
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return used / sessions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lives", type=int, default=5000, help="lives a measurement")
    parser.add_argument("--repeats", type=int, default=5, help="measurements a cell")
    arguments = parser.parse_args()
    print("microseconds for a one-call life (median)")
    print(f"{'policy':<14}{'engines':>8}{'idle sessions: 0':>18}{'10,000':>10}{'ratio':>8}")
    for policy in ("parrot", "parrot:all", "least_loaded"):
        for engines in (1, 16, 256):
            empty, full = [], []
            for _ in range(arguments.repeats):
                empty.append(microseconds_a_life(policy, engines, 0, arguments.lives))
                full.append(microseconds_a_life(policy, engines, 10_000, arguments.lives))
            a, b = statistics.median(empty), statistics.median(full)
            print(f"{policy:<14}{engines:>8}{a:>18.1f}{b:>10.1f}{b / a:>8.2f}", flush=True)
    print(f"\nmemory of an idle session that ran one call of two variables: {bytes_an_idle_session() / 1024:.1f} KiB")


if __name__ == "__main__":
    main()
