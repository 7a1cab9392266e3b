"""sim.calibrate finds the law of an endpoint in its request logs, says how well it does, and refuses what is no log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parrot.configuration import ConfigurationError
from parrot.engine.profiles import find_profile, find_remote_profile
from parrot.remote_latency import RemoteModel
from parrot.remote_profile import RemoteProfile
from sim.calibrate import fit_remote, hold_out_by_load, read_request_log, read_request_logs
from sim.calibrate.__main__ import main
from tests.sim.request_logs import HEADER, Law, requests, write_loads, write_log
from tests.sim.test_calibrate import loaded
from tests.sim.test_calibrate import write_log as write_iteration_log


def fitted(logs: list[str]) -> RemoteProfile:
    runs = read_request_logs(logs)
    split = hold_out_by_load(runs)
    return fit_remote(split.fitted, "p", held=split.held)


def test_a_log_without_noise_gives_back_the_law_that_made_it(tmp_path: Path) -> None:
    law = Law()
    profile = fitted(write_loads(tmp_path, law))
    assert profile.ttft_s == pytest.approx(law.fixed_s, rel=0.01)
    assert [(h.knot, h.slope) for h in profile.ttft_prompt] == [(0.0, pytest.approx(law.prompt_s, rel=0.01))]
    assert [(h.knot, h.slope) for h in profile.ttft_load] == [(0.0, pytest.approx(law.load_s, rel=0.01))]
    assert profile.tpot_s == pytest.approx(law.tpot_s, rel=0.01)
    assert [(h.knot, h.slope) for h in profile.tpot_load] == [(0.0, pytest.approx(law.tpot_load_s, rel=0.01))]
    assert profile.end_s == pytest.approx(law.end_s, rel=0.05)
    assert profile.task_overhead_s == pytest.approx(0.002)
    assert profile.error["runs"] == 1
    assert profile.error["ttft_mean"] < 0.01
    assert profile.error["decode_mean"] < 0.01
    assert profile.spread < 0.01
    assert profile.seen["load"] == (1.0, 24.0)


def test_requests_that_vary_give_the_law_of_their_mean_and_how_they_vary(tmp_path: Path) -> None:
    law = Law(ttft_spread=0.3, tpot_spread=0.15)
    profile = fitted(write_loads(tmp_path, law, count=300))
    model = RemoteModel(profile)
    for prompt, load in ((100, 1), (2000, 4), (3500, 20)):
        assert model.ttft(prompt, load) == pytest.approx(law.first(prompt, load), rel=0.06)
        assert model.tpot(load) == pytest.approx(law.tpot_s + law.tpot_load_s * load, rel=0.06)
    for residuals, spread in ((profile.ttft_residuals, 0.3), (profile.tpot_residuals, 0.15)):
        assert residuals[84] - residuals[16] == pytest.approx(2 * spread, rel=0.15)  # one standard deviation to each side
        assert residuals[50] == pytest.approx(-spread * spread / 2, abs=0.04)  # the median lies below the mean
    assert 0.15 < profile.error["ttft_mean"] < 0.4  # and it does not claim to know single requests
    assert abs(profile.error["total"]) < 0.05


def test_a_bend_in_the_law_is_found_where_it_is(tmp_path: Path) -> None:
    law = Law(ttft=lambda prompt, load: 0.1 + 0.0001 * prompt + 0.1 * max(0, load - 8), ttft_spread=0.05)
    profile = fitted(write_loads(tmp_path, law))
    model = RemoteModel(profile)
    for load in (2, 8, 22):
        assert model.ttft(1000, load) == pytest.approx(law.first(1000, load), rel=0.1)
    assert any(hinge.knot == 8.0 for hinge in profile.ttft_load)


def test_a_law_that_the_model_cannot_have_shows_in_the_error(tmp_path: Path) -> None:
    falling = Law(ttft=lambda prompt, load: 4.0 / load if load != 6 else 5.0)
    profile = fitted(write_loads(tmp_path, falling))
    good = fitted(write_loads(tmp_path, Law()))
    assert profile.error["ttft_mean"] > 0.5
    assert profile.error["ttft_mean"] > 50 * good.error["ttft_mean"]
    assert abs(profile.error["ttft_total"]) > 0.5
    assert profile.spread > 0.1


def test_a_held_out_run_moves_neither_law_nor_residuals(tmp_path: Path) -> None:
    split = hold_out_by_load(read_request_logs(write_loads(tmp_path, Law())))
    slow = read_request_log(write_log(tmp_path / "slow", requests(Law(fixed_s=3.0), 6, 150)))
    one, other = fit_remote(split.fitted, "p", held=split.held), fit_remote(split.fitted, "p", held=slow)
    assert (one.ttft_s, one.ttft_load, one.tpot_load) == (other.ttft_s, other.ttft_load, other.tpot_load)
    assert one.ttft_residuals == other.ttft_residuals
    assert other.error["ttft_mean"] > 10 * one.error["ttft_mean"]


def test_the_command_writes_a_profile_a_picture_and_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs, out = write_loads(tmp_path, Law(), count=60), tmp_path / "p.json"
    assert main([*logs, "--out", str(out), "--name", "mine", "--note", "A made-up endpoint."]) == 0
    profile = find_remote_profile(str(out))
    assert (profile.name, profile.model, profile.endpoint) == ("mine", "m", "http://there/v1")
    assert profile.notes.endswith("A made-up endpoint.")
    assert profile.trace.startswith("load1.jsonl, ")
    assert (tmp_path / "p.residuals.png").stat().st_size > 10_000
    err = capsys.readouterr().err
    assert "first token: 300.0 ms, per prompt token 200.00 µs" in err
    first = out.read_bytes()
    assert main([*logs, "--out", str(out), "--name", "mine", "--note", "A made-up endpoint."]) == 0
    assert out.read_bytes() == first
    with pytest.raises(ConfigurationError, match="requests to http://there/v1, for an engine behind a remote endpoint"):
        find_profile(str(out))


def test_one_load_alone_claims_no_held_out_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = write_log(tmp_path / "log", requests(Law(), 4, 200))
    assert main([str(log), "--out", str(tmp_path / "p.json")]) == 0
    assert "no run was held out: one load only" in capsys.readouterr().err
    profile = find_remote_profile(str(tmp_path / "p.json"))
    assert (profile.error["runs"], profile.error["requests"]) == (0, 40)
    assert "NO RUN WAS HELD OUT" in profile.notes
    assert profile.error["ttft_mean"] < 0.01


def test_requests_without_text_and_given_up_ones_are_not_fitted_but_count_as_load(tmp_path: Path) -> None:
    logs = []
    for load in (2, 6, 12):
        lines = requests(Law(), load, 140)
        for line in lines[::7]:  # what failed after a while was in flight all the same
            line |= {"ttft_s": None, "decode_s": 0.0, "reason": "engine_failed"}
        for line in lines[3::7]:
            line |= {"reason": "cancelled", "output_tokens": 1}
        logs.append(write_log(tmp_path / str(load), lines))
    profile = fit_remote(read_request_logs(logs), "p")
    assert profile.tpot_s == pytest.approx(0.02, rel=0.02)
    assert profile.tpot_load[0].slope == pytest.approx(0.003, rel=0.02)
    assert "Without a first token, and not fitted: 60 request(s)" in profile.notes


def test_an_older_log_without_totals_is_read(tmp_path: Path) -> None:
    lines = [{k: v for k, v in line.items() if k not in ("total_s", "limit_tokens")} for line in requests(Law(), 4, 200)]
    profile = fit_remote(read_request_log(write_log(tmp_path / "log", lines)), "p")
    assert RemoteModel(profile).tpot(4) == pytest.approx(0.032, rel=0.03)


# --------------------------------------------------------------------------------------------------------- rate limits


def test_configured_limits_are_the_profile_s_and_waits_under_them_are_no_overhead(tmp_path: Path) -> None:
    header = HEADER | {"requests_per_minute": 60, "tokens_per_minute": 9000}
    profile = fit_remote(read_request_log(write_log(tmp_path / "log", requests(Law(), 4, 100, overhead_s=5.0), header)), "p")
    assert (profile.requests_per_minute, profile.tokens_per_minute) == (60, 9000)
    assert profile.limits_from == "configuration"
    assert profile.task_overhead_s == 0.0


def refusing(limit: int, on_tokens: bool) -> list[dict[str, Any]]:
    """Lines of an endpoint that takes `limit` requests, or tokens, in any minute: a request a second comes for four minutes."""
    rng = np.random.default_rng(3)
    template = requests(Law(), 1, 1)[0]
    taken: list[tuple[float, int]] = []
    lines = []
    for second in range(240):
        size = int(rng.integers(100, 2000))
        used = sum(tokens if on_tokens else 1 for at, tokens in taken if at > second - 60.0)
        line = {**template, "t": float(second), "limit_tokens": size, "ttft_s": 0.3, "decode_s": 0.2, "total_s": 0.5}
        if used + (size if on_tokens else 1) > limit:
            line |= {"reason": "engine_rejected", "ttft_s": None, "decode_s": 0.0, "total_s": 0.05, "output_tokens": 0}
        else:
            taken.append((float(second), size))
        lines.append(line)
    return lines


@pytest.mark.parametrize("on_tokens", [False, True])
def test_limits_show_in_what_the_endpoint_refused(tmp_path: Path, on_tokens: bool) -> None:
    limit = 30_000 if on_tokens else 25
    profile = fit_remote(read_request_log(write_log(tmp_path / "log", refusing(limit, on_tokens))), "p")
    assert profile.limits_from == "refusals"
    assert (profile.tokens_per_minute if on_tokens else profile.requests_per_minute) == pytest.approx(limit, rel=0.05)
    assert (profile.requests_per_minute if on_tokens else profile.tokens_per_minute) is None
    assert f"taken for one on {'tokens' if on_tokens else 'requests'}" in profile.notes


# ------------------------------------------------------------------------------------------------------------ refusals


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 1
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ttft_s": -0.1}, "ttft_s is -0.1; it must be 0 or above"),
        ({"ttft_s": 0.0}, "ttft_s is 0; it must be above 0"),
        ({"decode_s": -1.0}, "decode_s is -1.0"),
        ({"t": -3.0}, "t is -3.0"),
        ({"wait_s": -3.0}, "wait_s is -3.0"),
        ({"running": 0}, "running is 0; a request that is sent is one itself"),
        ({"prompt_tokens": "many"}, "not a line of a request log: Expected `int`"),
        ({"total_s": -2.0}, "total_s is -2.0"),
    ],
)
def test_a_line_that_cannot_be_is_refused_with_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], says: str
) -> None:
    lines = requests(Law(), 2, 60)
    lines[4] |= change
    log = write_log(tmp_path / "log", lines)
    told = refusal(capsys, str(log), "--out", str(tmp_path / "p.json"))
    assert told.startswith(f"{log}:6: ")
    assert says in told
    assert not (tmp_path / "p.json").exists()


def test_a_log_that_was_cut_off_is_refused_unless_its_end_may_be_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, out = write_log(tmp_path / "log", requests(Law(), 4, 100)), str(tmp_path / "p.json")
    log.write_bytes(log.read_bytes()[:-20])
    assert "cut off inside this line" in refusal(capsys, str(log), "--out", out)
    assert main([str(log), "--out", out, "--allow-cut"]) == 0
    log.write_text("")
    assert "empty" in refusal(capsys, str(log), "--out", out)


def test_logs_that_do_not_belong_together_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, lines = str(tmp_path / "p.json"), requests(Law(), 4, 100)
    one = str(write_log(tmp_path / "one", lines))
    other = str(write_log(tmp_path / "other", lines, HEADER | {"endpoint": "http://elsewhere/v1"}))
    iterations = str(write_iteration_log(tmp_path / "iterations", loaded(3, 100)))
    assert "mixed logs: its endpoint is 'http://elsewhere/v1'" in refusal(capsys, one, other, "--out", out)
    assert "named twice" in refusal(capsys, one, one, "--out", out)
    assert f"{iterations}: mixed logs: it is of iterations, but {one} of requests" in refusal(
        capsys, one, iterations, "--out", out
    )
    assert "mixed logs: it is of requests" in refusal(capsys, iterations, "--hold-out", one, "--out", out)
    assert "--shared-kv-once says nothing" in refusal(capsys, one, "--shared-kv-once", "--out", out)
    Path(one).write_text(Path(one).read_text() + json.dumps(lines[0]) + "\n")
    assert "two engines wrote into one file" in refusal(capsys, one, "--out", out)
    few = str(write_log(tmp_path / "few", lines[:20]))
    assert "at least 40 of each are needed" in refusal(capsys, few, "--out", out)
    assert not Path(out).exists()


def test_an_output_that_cannot_be_written_or_holds_something_else_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = str(write_log(tmp_path / "log", requests(Law(), 4, 100)))
    assert "it is a folder; name a file" in refusal(capsys, log, "--out", str(tmp_path))
    assert "no such folder" in refusal(capsys, log, "--out", str(tmp_path / "none" / "p.json"))
    out = tmp_path / "p.json"
    assert main([str(write_iteration_log(tmp_path / "iterations", loaded(3, 100))), "--out", str(out)]) == 0
    before = out.read_bytes()
    told = refusal(capsys, log, "--out", str(out))
    assert "holds a profile of iterations; the logs make a profile of requests: name another file" in told
    assert out.read_bytes() == before
    out.unlink()
    assert main([log, "--out", str(out)]) == 0
    other = str(write_log(tmp_path / "log", requests(Law(), 4, 100), HEADER | {"model": "n"}))
    assert "holds a profile of another model, 'm'" in refusal(capsys, other, "--out", str(out))
