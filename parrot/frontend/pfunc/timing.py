"""What a session's report says of its calls in the terms of serving: TTFT, time per token, latency."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from parrot.protocol.api import SessionReport, TaskReport


class CallTiming(msgspec.Struct, frozen=True):
    """One finished output, by the core's clock. `ttft_s` and `latency_s` count from when its inputs were ready;
    `tpot_s` is null for one token."""

    func_name: str
    var_id: str
    ttft_s: float | None
    tpot_s: float | None
    latency_s: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


def timings(report: SessionReport) -> list[CallTiming]:
    """The finished outputs of a session, in the order of their calls."""
    found: list[CallTiming] = []
    for call in report.reports or ():
        found += [_timing(call.func_name, task) for task in call.tasks if task.finished_s is not None]
    return found


def timing_table(rows: Iterable[CallTiming], jct_s: float | None = None) -> str:
    """The rows as text, with the program's job completion time under them."""
    lines = [f"{'call':<24}{'prompt':>8}{'cached':>8}{'output':>8}{'TTFT s':>10}{'s/token':>10}{'latency s':>11}"]
    for row in rows:
        lines.append(
            f"{row.func_name[:23]:<24}{row.prompt_tokens:>8}{row.cached_tokens:>8}{row.output_tokens:>8}"
            f"{_seconds(row.ttft_s):>10}{_seconds(row.tpot_s):>10}{row.latency_s:>11.3f}"
        )
    if jct_s is not None:
        lines.append(f"job completion time {jct_s:.3f} s")
    return "\n".join(lines)


def _timing(func_name: str, task: TaskReport) -> CallTiming:
    ready = task.ready_s or 0.0
    return CallTiming(
        func_name=func_name,
        var_id=task.var_id,
        ttft_s=None if task.first_token_s is None else task.first_token_s - ready,
        tpot_s=task.decode_s / (task.output_tokens - 1) if task.output_tokens > 1 else None,
        latency_s=(task.finished_s or ready) - ready,
        prompt_tokens=task.prompt_tokens,
        cached_tokens=task.cached_tokens,
        output_tokens=task.output_tokens,
    )


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
