"""What each metric means, on reports made by hand."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from parrot.protocol.api import CallReport, SessionReport, TaskReport
from parrot.protocol.errors import ErrorInfo
from sim.clients import Mode, new_player
from sim.metrics import distribution, read_tables, write_tables
from sim.recorder import Recorder
from tests.sim.programs import one_call

WHICH = {
    "policy": "p",
    "rate": None,
    "seed": 0,
    "workload": "w",
    "client": "semantic",
    "backend": "sim",
    "engines": 1,
    "rtt_ms": 0.0,
    "settings": {},
}


def task(var: str, ready: float, first: float, finished: float, tokens: int, engine: str = "e0") -> TaskReport:
    return TaskReport(
        var_id=var,
        state="finished",
        attempts=1,
        engine=engine,
        ready_s=ready,
        dispatched_s=ready,
        started_s=ready,
        first_token_s=first,
        finished_s=finished,
        prompt_tokens=100,
        output_tokens=tokens,
        decode_s=finished - first,
        max_gap_s=0.5,
    )


def session(*calls: CallReport) -> SessionReport:
    return SessionReport(1, "open", {}, {}, 0.0, 0.0, calls)


TWO_OUTPUTS = session(CallReport(0, "f", "finished", 1.0, (task("a", 2.0, 3.0, 7.0, 5), task("b", 7.0, 7.5, 8.0, 1))))


@pytest.mark.parametrize(("mode", "since"), [(Mode.SEMANTIC, 2.0), (Mode.REQUEST, 1.0)])
def test_a_calls_latencies_count_from_when_it_was_ready_or_in_request_mode_submitted(mode: Mode, since: float) -> None:
    recorder = Recorder(mode)
    recorder.session_ended(4, TWO_OUTPUTS, {"a": (3, 0), "b": (3, 1)})
    (call,) = recorder.calls
    assert (call.program, call.call, call.name) == (4, 3, "f")
    assert call.ttft_s == 3.0 - since
    assert call.latency_s == 8.0 - since
    assert call.normalized_latency_s == (8.0 - since) / 6
    assert [(t.output, t.tpot_s) for t in recorder.tasks] == [(0, 4.0 / 4), (1, None)]  # one token has no time per token


def test_what_did_not_finish_is_counted_and_has_no_latency() -> None:
    recorder = Recorder(Mode.SEMANTIC)
    player = new_player(one_call(), Mode.SEMANTIC, serial=0, max_gen_length=8, preallocate=False)
    (opening,) = player.start(1.0)
    player.fail(opening, ErrorInfo("too_many_sessions", "no room"), 3.0)
    recorder.program_ended(player)
    failed = TaskReport(var_id="a", state="failed", attempts=8, ready_s=1.0)
    recorder.session_ended(0, session(CallReport(0, "f", "failed", 1.0, (failed,))), {"a": (0, 0)})
    summary = recorder.summary(**WHICH)
    assert (summary.programs, summary.finished, summary.failed, summary.errors) == (1, 0, 1, {"too_many_sessions": 1})
    assert (summary.calls, summary.calls_failed, summary.attempts) == (1, 1, 8)
    assert summary.jct_s.p99 is None
    assert summary.ttft_s.mean is None
    assert summary.simulated_s == 3.0


def test_percentiles_interpolate_between_ranks() -> None:
    found = distribution([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.mean, found.p50, found.p90, found.p99) == (3.0, 3.0, pytest.approx(4.6), pytest.approx(4.96))


def test_tables_come_back_as_they_were_written_and_empty_ones_keep_their_columns(tmp_path: Path) -> None:
    recorder = Recorder(Mode.SEMANTIC)
    recorder.session_ended(0, TWO_OUTPUTS, {"a": (0, 0), "b": (0, 1)})
    write_tables(recorder.tables(), tmp_path)
    back = read_tables(tmp_path)
    assert list(back) == ["calls", "gets", "programs", "tasks"]
    for name, table in recorder.tables().items():
        pd.testing.assert_frame_equal(back[name], table)
    assert "jct_s" in back["programs"].columns
    assert len(back["programs"]) == 0


def test_without_tables_the_summary_is_the_same() -> None:
    summaries = []
    for tables in (True, False):
        recorder = Recorder(Mode.SEMANTIC, tables)
        recorder.session_ended(0, TWO_OUTPUTS, {"a": (0, 0), "b": (0, 1)})
        summaries.append(recorder.summary(**WHICH))
    assert summaries[0] == summaries[1]
