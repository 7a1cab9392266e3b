"""The command: how it starts, refuses to start, and stops."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from parrot.configuration import load
from parrot.serve.config import ServeCoreConfig
from parrot.serve.http_server import main

CONFIGURATIONS = sorted((Path(__file__).parents[2] / "sample_configs" / "core").glob("*.json"))


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
        ('{"port": 0, "record_path": "/proc/nowhere/record.jsonl"}', "record_path"),
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
    configuration = _file(tmp_path, '{"port": 1, "record_path": "%s"} // overridden below' % (tmp_path / "record.jsonl"))
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
    assert (tmp_path / "record.jsonl").read_text().startswith('{"record":1')
