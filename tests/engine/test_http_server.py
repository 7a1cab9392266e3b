"""The command `python3 -m parrot.engine.http_server`: what it refuses and how, how it starts, how it stops."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from parrot.configuration import read_json
from parrot.engine.http_server import main, parser

SEED = Path(__file__).parent / "seed"
SAMPLES = Path(__file__).parents[2] / "sample_configs" / "engine"
ZERO = str(SAMPLES / "emulated-zero.json")


def write(path: Path, data: Any) -> str:
    path.write_text(json.dumps(data))
    return str(path)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line with which the command ends instead of starting."""
    assert main(argv) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


@contextmanager
def started(*argv: str, engines: int = 1) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """The command as a process, and the URLs that it says it serves at."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "parrot.engine.http_server", *argv]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        urls = []
        for _ in range(engines):
            line = process.stdout.readline()
            assert " at " in line, process.communicate()[1]
            urls.append(line.rsplit(" at ", 1)[1].strip())
        yield process, urls
    finally:
        process.kill()
        process.communicate()


def post(url: str, body: Any) -> Any:
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=60) as answer:
        return json.loads(answer.read())


def test_help_explains_every_flag() -> None:
    for action in parser()._actions:
        assert action.help, action.option_strings
    text = parser().format_help()
    documented = "--config_path --host --port --engine_name --device --without_core --log_dir --log_filename --release_mode"
    for flag in documented.split():
        assert flag in text


@pytest.mark.parametrize(
    "argv", [[], ["--config_path"], ["--config_path", "x", "--port", "99999"], ["--config_path", "x", "--colour"]]
)
def test_wrong_usage_exits_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2


def test_files_that_cannot_be_used_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.json" in refused(capsys, "--config_path", "nowhere.json")
    unknown = write(tmp_path / "e.json", {"model": "m", "colour": "red"})
    message = refused(capsys, "--config_path", unknown)
    assert unknown in message
    assert "'colour'" in message
    for key, keys in (
        ("latency_profile", {}),
        ("latency_profile", {"latency_profile": "nowhere"}),
        ("engine_secret", {"latency_profile": "zero", "serve_core": {"engine_secret": "env:NO_SUCH_VARIABLE_HERE"}}),
    ):
        path = write(tmp_path / "f.json", {"model": "m", "engine_type": "emulated", **keys})
        message = refused(capsys, "--config_path", path, "--port", "0")
        assert path in message
        assert key in message


def test_a_port_in_use_is_refused_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for config, *more in ([ZERO], [str(SEED / "builtin.json"), "--device", "cpu"]):
            message = refused(capsys, "--config_path", config, "--port", str(port), "--without_core", *more)
            assert str(port) in message
            assert "in use" in message


def test_a_log_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert "--log_dir" in refused(capsys, "--config_path", ZERO, "--port", "0", "--log_dir", str(tmp_path / "file"))


def test_device_is_no_flag_of_an_emulated_engine(capsys: pytest.CaptureFixture[str]) -> None:
    assert "device" in refused(capsys, "--config_path", ZERO, "--device", "cpu")


def test_several_engines_in_one_process_must_be_emulated(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--count" in refused(capsys, "--config_path", str(SEED / "builtin.json"), "--count", "2")


def test_what_this_machine_lacks_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    seed = str(SEED / "builtin.json")
    if not torch.cuda.is_available():
        message = refused(capsys, "--config_path", seed, "--port", "0")
        assert "'cuda'" in message
        assert "GPU" in message
    message = refused(capsys, "--config_path", seed, "--port", "0", "--device", "cpu")
    assert "xformers" in message
    assert "attn_fallback" in message
    missing = write(tmp_path / "e.json", {"model": str(tmp_path / "no-model"), "instance": {"device": "cpu"}})
    assert "no-model" in refused(capsys, "--config_path", missing, "--port", "0")
    assert "cpu_affinity" in refused(capsys, "--config_path", missing, "--port", "0", "--cpu_affinity", "100000")


def test_an_emulated_engine_needs_no_torch() -> None:
    program = "import sys, parrot.engine.http_server, parrot.engine.launch, parrot.engine.emulated.loop\n"
    program += "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'simpy', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_engines_start_serve_and_stop_cleanly(number: signal.Signals, tmp_path: Path) -> None:
    flags = ["--config_path", ZERO, "--port", "0", "--count", "3", "--engine_name", "e", "--log_dir", str(tmp_path)]
    # Its core is not there: it serves all the same.
    with started(*flags, "--serve_core", "127.0.0.1:9", "--log_filename", "mine.log", engines=3) as (process, urls):
        assert len(set(urls)) == 3
        for url in urls:
            assert post(f"{url}/ping", {})["runtime_info"]["num_total_jobs"] == 0
        deadline = time.monotonic() + 60
        while "e-2: cannot register at http://127.0.0.1:9" not in (tmp_path / "mine.log").read_text():
            assert time.monotonic() < deadline, "it has not said that there is no core"
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
        assert (process.returncode, out, err) == (0, "", "")


def test_release_mode_logs_no_more_than_warnings(tmp_path: Path) -> None:
    flags = ["--config_path", ZERO, "--port", "0", "--without_core", "--log_dir", str(tmp_path), "--release_mode"]
    with started(*flags) as (process, _):
        process.terminate()
        process.communicate(timeout=20)
    assert "INFO" not in (tmp_path / "engine.log").read_text()


def test_the_launch_document_s_builtin_file_serves_with_dummy_weights_and_no_network(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    data = read_json(SEED / "builtin.json")
    data["instance"] |= {"use_dummy_weights": True, "attn_fallback": True, "model_config": {"num_hidden_layers": 1}}
    path = write(tmp_path / "engine.json", data)
    log = tmp_path / "iterations.jsonl"
    flags = ["--device", "cpu", "--port", "0", "--without_core", "--num_threads", "1", "--iteration_log", str(log)]
    with started("--config_path", path, *flags) as (process, (url,)):
        assert post(f"{url}/fill", {"context_id": 1, "text": "To be or not"})["filled_len"] >= 4
        sampling = {"temperature": 0, "max_gen_length": 8, "output_length": 3}
        answer = post(f"{url}/generate", {"context_id": 1, "sampling_config": sampling})
        assert len(answer["generated_ids"]) == 3
        assert answer["generated_text"]
        info = post(f"{url}/ping", {})["runtime_info"]
        assert info["model_mem"] > 2**30
        assert info["cache_mem"] > 0
        process.terminate()
        _, err = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "falling back to 'torch_sdpa'" in err
    header, *rest = [json.loads(line) for line in log.read_text().splitlines()]
    assert (header["kind"], header["device"], header["attn_func"]) == ("header", "cpu", "torch_sdpa")
    assert sum(line["kind"] == "iteration" for line in rest) == 4  # one fill, three tokens
