"""One application on builtin engines, on remote ones whose endpoint is this project's own engine server, and simulated: the
same DAG, the same placements, and, greedy in float32 with the prompt sent as token ids, the same texts. On the real SmolLM2."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from parrot import P
from parrot.configuration import ConfigurationError
from parrot.engine.config import BuiltinEngineConfig, OpenAIEngineConfig, parse_engine_config
from parrot.engine.launch import start_builtin, start_openai
from parrot.engine.serving import RunningEngine
from parrot.model_files import resolve_model
from parrot.protocol.api import SessionReport
from parrot.serve.config import ServeCoreConfig
from parrot.serve.server import Server
from parrot.tokenizer import load_tokenizer
from sim.network import Constant
from sim.programs.outputs import open_outputs
from sim.programs.simulated import simulate_instances
from sim.programs.source import Source, read_inputs
from tests.serve.http_support import eventually
from tests.sim.clusters import engine as simulated_engine

pytest.importorskip("torch", reason="torch is not installed")
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
try:
    resolve_model(MODEL)
except ConfigurationError as error:
    pytest.skip(f"the model is not here: {error}", allow_module_level=True)

TEXTS = ["The sky is blue because air scatters blue light most — “Rayleigh” found it.", "Ants live in colonies; 蟻 is ant."]
#: Summaries of two texts and some noise at once, joined by a call with two outputs, the second of which reads the first.
PROGRAM = '''
from parrot import P
from tests.engine.openai.test_same_application import TEXTS, told

GREEDY = P.SamplingConfig(temperature=0.0, max_gen_length=10)
# The same token again and again: read as a text, these would be fewer and longer tokens.
ODD = P.SamplingConfig(temperature=0.0, max_gen_length=6, logit_bias={"81": 100.0})


@P.semantic_function(model_type=MODEL_TYPE)
def summarise(text: P.Input, summary: P.Output(GREEDY)):
    """<|im_start|>user
    Say in a few words: {{text}}<|im_end|>
    <|im_start|>assistant
    {{summary}}"""


@P.semantic_function(model_type=MODEL_TYPE)
def mumble(noise: P.Output(ODD)):
    """Mumble: {{noise}}"""


@P.semantic_function(model_type=MODEL_TYPE)
def join(first: P.Input, second: P.Input, third: P.Input, joined: P.Output(GREEDY), title: P.Output(GREEDY)):
    """<|im_start|>user
    Join: {{first}} and {{second}} and {{third}}<|im_end|>
    <|im_start|>assistant
    {{joined}}<|im_end|>
    <|im_start|>user
    Give it a title.<|im_end|>
    <|im_start|>assistant
    {{title}}"""


def main(vm):
    summaries = [*(summarise(text) for text in TEXTS), mumble()]
    joined, title = join(*summaries)
    texts = [title.get(P.PerformanceCriteria.LATENCY), *(v.get() for v in (joined, *summaries))]
    told.append((texts, vm.report()))
'''
told: list[tuple[list[str], SessionReport]] = []  #: what programs report of themselves


class Outcome(NamedTuple):
    """`dag`: each call's name and tasks; `placements`: the number of each task's engine; `tokens`: of prompts and outputs. (In
    simulation an output's tokens are those of its text.)"""

    texts: list[str]
    dag: list[Any]
    placements: list[str]
    tokens: list[tuple[int, int]]


def program(folder: Path, model_type: str) -> Path:
    path = folder / f"application_{model_type}.py"
    path.write_text(PROGRAM.replace("MODEL_TYPE", repr(model_type)))
    return path


def outcome() -> Outcome:
    """Texts, DAG and placements of the program that has just run."""
    texts, report = told.pop()
    assert not told
    assert report.reports is not None
    tasks = [task for call in report.reports for task in call.tasks]
    dag = [(call.func_name, [(t.var_id, t.state, t.criteria, t.depth) for t in call.tasks]) for call in report.reports]
    placements = [(task.engine or "").rpartition("-")[2] for task in tasks]
    return Outcome(texts, dag, placements, [(task.prompt_tokens, task.output_tokens) for task in tasks])


def played(path: Path, url: str) -> Outcome:
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    machine = P.VirtualMachine(url)
    machine.run(module.main, args=[machine])
    return outcome()


# ------------------------------------------------------------------------------------------------------ real clusters

SHARED = {"model": MODEL, "tokenizer": MODEL, "host": "127.0.0.1", "port": 0, "tokens_capacity": 2048}


@asynccontextmanager
async def core() -> AsyncIterator[tuple[Server, int]]:
    config = msgspec.convert({"host": "127.0.0.1", "port": 0, "global_scheduler": {"policy": "parrot"}}, ServeCoreConfig)
    server = Server(config, load=load_tokenizer)
    [(_, port)] = await server.start()
    try:
        yield server, port
    finally:
        await server.stop()


async def builtin(number: int, port: int) -> RunningEngine:
    config = parse_engine_config(
        {
            **SHARED,
            "engine_name": f"builtin-{number}",
            "serve_core": {"host": "127.0.0.1", "port": port},
            "instance": {"device": "cpu", "dtype": "float32", "num_kv_cache_blocks": 2048, "num_threads": 1},
            "scheduler": {"max_total_tokens": 2048},
        },
        "builtin.json",
    )
    assert isinstance(config, BuiltinEngineConfig)
    return await start_builtin(config)


async def remote(number: int, port: int, url: str) -> RunningEngine:
    instance = {"base_url": f"{url}/v1", "send_token_ids": True, "return_token_ids": True, "max_seq_len": 2048}
    config = parse_engine_config(
        {
            **SHARED,
            "engine_type": "openai",
            "engine_name": f"remote-{number}",
            "serve_core": {"host": "127.0.0.1", "port": port},
            "instance": instance,
        },
        "openai.json",
    )
    assert isinstance(config, OpenAIEngineConfig)
    return await start_openai(config)


ANSWERS = """
def answer(output, inputs):
    title, joined, *summaries, noise = SAID
    return {"title": title, "joined": joined, "noise": noise}.get(output) or summaries[TEXTS.index(inputs["text"])]
"""


def simulated(path: Path, texts: list[str]) -> Outcome:
    """The same with simulated engines, which say what the model said."""
    answers = path.with_name("answers.py")
    answers.write_text(f"SAID, TEXTS = {texts!r}, {TEXTS!r}\n{ANSWERS}")
    engines = [
        made._replace(description=msgspec.structs.replace(made.description, model=MODEL, tokenizer=MODEL))
        for made in (simulated_engine(f"simulated-{number}", kv_tokens=2048) for number in (0, 1))
    ]
    outputs = open_outputs(f"{answers}:answer", 0)
    source, inputs = Source(f"{path}:main"), read_inputs(None)
    simulate_instances(source, inputs, 1, ServeCoreConfig(), engines, outputs=outputs, network=Constant(0.001), seed=0)
    return outcome()


async def on_real_engines(near: Path, far: Path) -> tuple[Outcome, Outcome]:
    """What comes of `near` on two builtin engines, and of `far` on two remote ones, whose endpoints those are."""
    engines: list[RunningEngine] = []
    try:
        async with core() as (server, port):
            for number in (0, 1):
                engines.append(await builtin(number, port))
            await eventually(lambda: len(server.core.engines) == 2, 60.0)
            on_builtin = await asyncio.to_thread(played, near, f"http://127.0.0.1:{port}")
        async with core() as (server, port):
            remotes = [await remote(number, port, engine.url) for number, engine in enumerate(engines)]
            try:
                await eventually(lambda: len(server.core.engines) == 2, 60.0)
                return on_builtin, await asyncio.to_thread(played, far, f"http://127.0.0.1:{port}")
            finally:
                for each in remotes:
                    await each.close()
    finally:
        for each in engines:
            await each.close()


def test_an_application_is_the_same_on_builtin_engines_behind_openai_s_protocol_and_simulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    near = program(tmp_path, "token_id")
    on_builtin, on_remote = asyncio.run(on_real_engines(near, program(tmp_path, "text")))
    assert all(on_builtin.texts)
    assert on_remote.texts == on_builtin.texts
    in_simulation = simulated(near, on_builtin.texts)
    assert on_remote.tokens == on_builtin.tokens
    for name, other in {"remote": on_remote, "simulated": in_simulation}.items():
        assert other.dag == on_builtin.dag, name
        assert other.placements == on_builtin.placements, name
    assert set(on_builtin.placements) == {"0", "1"}
