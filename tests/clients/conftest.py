"""A cluster for clients of OpenAI's API that are not ours: a core with keys and an engine of the real SmolLM2 on the CPU, as
processes, started with the documented commands, once for all of these tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from experiments.cluster import free_port, running, wait_for_engines
from parrot.configuration import ConfigurationError, read_json
from parrot.model_files import resolve_model
from parrot.serve.keys import hash_of

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SAMPLES = Path(__file__).parents[2] / "sample_configs"


class Cluster(NamedTuple):
    """`url`: up to and with /v1."""

    core: str
    model: str
    key: str

    @property
    def url(self) -> str:
        return f"{self.core}/v1"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    pytest.importorskip("torch", reason="torch is not installed")
    try:
        resolve_model(MODEL)
    except ConfigurationError as error:
        pytest.skip(f"the model is not here: {error}")
    folder = tmp_path_factory.mktemp("clients")
    key = "a-key-of-acme-for-tests"
    sample = read_json(SAMPLES / "core" / "localhost_serve_core_all_switches.json")
    (folder / "core.json").write_text(json.dumps({**sample, "tenants": {"acme": {"api_keys": [hash_of(key)]}}}))
    port = free_port(0)
    core = ["parrot.serve.http_server", "--config_path", str(folder / "core.json"), "--host", "127.0.0.1", "--port", str(port)]
    engine = ["parrot.engine.http_server", "--config_path", str(SAMPLES / "engine" / "smollm2-135m-cpu.json"), "--port", "0"]
    engine += ["--host", "127.0.0.1", "--serve_core", f"127.0.0.1:{port}"]
    core += ["--log_dir", str(folder / "log")]
    with running(folder, [("core", core), ("engine", engine)]) as processes:
        wait_for_engines(f"http://127.0.0.1:{port}", 1, processes, 120.0)
        yield Cluster(f"http://127.0.0.1:{port}", MODEL, key)
