"""Request logs of a made-up endpoint with a known law, for tests: token by token, as a server would send them."""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HEADER: dict[str, Any] = {
    "kind": "header", "iteration_log": 1, "engine": "e", "engine_type": "openai", "model": "m", "endpoint": "http://there/v1",
    "api_endpoint": "completion", "tokenizer": "estimated", "requests_per_minute": None, "tokens_per_minute": None,
    "tasks_capacity": 64, "versions": {"python": "3.11"}, "new_key": 1,
}  # fmt: skip


class Law(NamedTuple):
    """Seconds. Spreads are standard deviations of the logarithm; what deviates has the mean that the law says."""

    fixed_s: float = 0.3
    prompt_s: float = 0.0002
    load_s: float = 0.04
    tpot_s: float = 0.02
    tpot_load_s: float = 0.003
    end_s: float = 0.005
    ttft_spread: float = 0.0
    tpot_spread: float = 0.0
    ttft: Callable[[int, int], float] | None = None  # of prompt and load, in the place of the first three

    def first(self, prompt: int, load: int) -> float:
        return self.ttft(prompt, load) if self.ttft else self.fixed_s + self.prompt_s * prompt + self.load_s * load


def requests(law: Law, clients: int, count: int, seed: int = 0, overhead_s: float = 0.002) -> list[dict[str, Any]]:
    """The lines of `count` requests of a closed loop, in the order in which they end."""
    rng = np.random.default_rng([seed, clients])
    lines: list[dict[str, Any]] = []
    events: list[tuple[float, int, str, dict[str, Any]]] = []
    sent = in_flight = number = 0

    def push(at: float, what: str, request: dict[str, Any]) -> None:
        nonlocal number
        number += 1
        heapq.heappush(events, (at, number, what, request))

    for client in range(clients):
        push(0.01 * client, "send", {})
    while events:
        now, _, what, request = heapq.heappop(events)
        if what == "send" and sent < count:
            sent += 1
            in_flight += 1
            prompt = int(rng.integers(20, 4000))
            deviation = [float(np.exp(rng.normal(-s * s / 2, s))) for s in (law.ttft_spread, law.tpot_spread)]
            ttft_s = law.first(prompt, in_flight) * deviation[0]
            request = {"t": now, "running": in_flight, "prompt_tokens": prompt, "output_tokens": int(rng.integers(2, 120)),
                       "ttft_s": ttft_s, "left": 0, "deviation": deviation[1]}  # fmt: skip
            push(now + ttft_s, "first", request)
        elif what in ("first", "token"):
            request["left"] = request["output_tokens"] if what == "first" else request["left"]
            request["left"] -= 1
            tpot_s = (law.tpot_s + law.tpot_load_s * in_flight) * request["deviation"]
            push(now + (tpot_s if request["left"] else law.end_s), "token" if request["left"] else "end", request)
        elif what == "end":
            in_flight -= 1
            kept = {name: request[name] for name in ("t", "running", "prompt_tokens", "output_tokens", "ttft_s")}
            total_s = now - request["t"]
            lines.append({"kind": "request", **kept, "task": "1.0.0#1", "wait_s": overhead_s, "cached_tokens": 0,
                          "counted": True, "decode_s": total_s - request["ttft_s"], "max_gap_s": 0.1, "total_s": total_s,
                          "limit_tokens": request["prompt_tokens"] + 128, "tries": 1, "reason": "eos"})  # fmt: skip
            push(now, "send", {})
    return lines


def write_log(path: Path, lines: list[dict[str, Any]], header: dict[str, Any] = HEADER) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in (header, *lines)))
    return path


def write_loads(folder: Path, law: Law, loads: tuple[int, ...] = (1, 3, 6, 12, 24), count: int = 150) -> list[str]:
    """A log a load."""
    return [str(write_log(folder / f"load{load}.jsonl", requests(law, load, count))) for load in loads]
