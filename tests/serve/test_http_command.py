"""The command: how it starts, refuses to start, and stops."""

from __future__ import annotations

import json
import re
import signal
import socket
import stat
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from parrot.configuration import load
from parrot.serve.config import ServeCoreConfig
from parrot.serve.http_server import _configuration, _parser, main
from parrot.serve.journal import read

CONFIGURATIONS = sorted((Path(__file__).parents[2] / "sample_configs" / "core").glob("*.json"))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default journal lies in the current directory: this test's own."""
    monkeypatch.chdir(tmp_path)


def _file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "core.json"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_the_sample_configurations_are_accepted(path: Path) -> None:
    load(path, ServeCoreConfig)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"prot": 9000}', "prot"),
        ('{"port": "high"}', "port"),
        ('{"port": 70000}', "port"),
        ('{"global_scheduler": {"max_queue_size": 0}}', "global_scheduler.max_queue_size"),
        ('{"global_scheduler": {"policy": "nobody_wrote_this"}}', "nobody_wrote_this"),
        ('{"global_scheduler": {"policy": "round_robin", "params": {"speed": 1}}}', "has no such parameter (it has: none)"),
        ('{"global_scheduler": {"params": {"ctx_weight": -1}}}', "params.ctx_weight is -1; expected float of at least 0"),
        ('{"global_scheduler": {"policy": "json:JSONDecoder"}}', "'json:JSONDecoder' is no policy: it has no method place"),
        ('{"global_scheduler": {"policy": "parrot:all"}}', "'parrot' alone is a shipped policy, whose switches and params are"),
        ('{"port": 0, "journal_path": "/proc/nowhere/journal.sqlite"}', "journal_path"),
        ('{"port": 0, "journal_path": "."}', "directory"),
        ('{"port": 0, "journal_mode": "everything"}', "journal_mode"),
        ('{"port": 0, "record_path": "record.jsonl"}', "record_path"),
        ('{"host": "no.such.host.invalid"}', "no.such.host.invalid"),
        ("{", "core.json"),
        ('{"engine_secret": "env:NO_SUCH_VARIABLE_HERE"}', "NO_SUCH_VARIABLE_HERE"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_one_line(
    text: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config_path", _file(tmp_path, text)]) == 1
    message = capsys.readouterr().err
    assert named in message
    assert "core.json" in message or "listen" in message
    assert message.count("\n") == 1


def test_a_missing_file_and_a_port_in_use_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config_path", str(tmp_path / "missing.json")]) == 1
    assert "missing.json" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["--config_path", _file(tmp_path, "{}"), "--host", "127.0.0.1", "--port", str(port)]) == 1
    message = capsys.readouterr().err
    assert str(port) in message
    assert message.count("\n") == 1


def test_help_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--config_path", "--host", "--port", "--log_dir", "--log_filename", "--release_mode"):
        assert flag in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_and_stops_cleanly(number: signal.Signals, tmp_path: Path) -> None:
    configuration = _file(tmp_path, '{"port": 1, "journal_path": "%s"} // overridden below' % (tmp_path / "journal.sqlite"))
    command = [sys.executable, "-m", "parrot.serve.http_server", "--config_path", configuration, "--port", "0"]
    command += ["--log_dir", str(tmp_path / "log"), "--log_filename", "my.log"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        first = process.stderr.readline()
        found = re.search(r"http://\S+?:\d+(?=,|$)", first.strip())
        assert found, first
        with urllib.request.urlopen(found[0] + "/health") as answer:
            assert json.load(answer) == {"status": "ok", "engines": 0}
        process.send_signal(number)
        assert process.wait(20) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()
    assert (tmp_path / "log" / "my.log").exists()
    with read(tmp_path / "journal.sqlite") as reading:
        assert [life.epoch for life in reading.lives] == [1]


def _journal_of(text: str, tmp_path: Path, *flags: str) -> object:
    """The journal_path that the command settles on."""
    return _configuration(_parser().parse_args(["--config_path", _file(tmp_path, text), *flags])).journal_path


def test_the_journal_lies_next_to_the_log_directory(tmp_path: Path) -> None:
    logs = str(tmp_path / "run" / "log")
    expected = tmp_path / "run" / "journal" / "core-7001.sqlite"
    assert _journal_of('{"port": 7001}', tmp_path, "--log_dir", logs) == str(expected)
    assert stat.S_IMODE(expected.parent.stat().st_mode) == 0o700
    assert _journal_of('{"port": 7001}', tmp_path, "--port", "7002") == str(tmp_path / "journal" / "core-7002.sqlite")


def test_no_journal_where_it_is_null_or_nobody_could_start_the_core_again(tmp_path: Path) -> None:
    assert _journal_of('{"port": 7001, "journal_path": null}', tmp_path) is None
    assert _journal_of('{"port": 7001}', tmp_path, "--port", "0") is None
    assert _journal_of('{"port": 7001, "journal_path": "mine"}', tmp_path) == "mine"
    assert not (tmp_path / "journal").exists()
