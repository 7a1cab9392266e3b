"""LangChain's client at a ServeCore over the CPU model: a map-reduce summary, streams, tools, and the example's command."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.clients.conftest import Cluster

openai = pytest.importorskip("openai", reason="the package openai is not installed")
langchain_openai = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed (make install has it)")
EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))


def test_a_map_reduce_summary_runs_and_its_prompts_share_their_beginning(cluster: Cluster) -> None:
    from langchain_map_reduce import model_at, paragraphs, summarise

    model = model_at(cluster.core, cluster.model, cluster.key, 12)
    text, usage = summarise(model, paragraphs()[:3])
    assert text.strip()
    (used,) = usage.usage_metadata.values()
    assert used["output_tokens"] <= 4 * 12
    assert used["input_token_details"]["cache_read"] > 0  # the system message, by all but the first


def test_an_answer_streams_and_ends_with_its_usage(cluster: Cluster) -> None:
    model = langchain_openai.ChatOpenAI(
        model=cluster.model, base_url=cluster.url, api_key=cluster.key, temperature=0, max_tokens=8, stream_usage=True
    )
    chunks = list(model.stream("Say hello."))
    assert len(chunks) > 3
    whole = model.invoke("Say hello.")
    assert "".join(str(chunk.content) for chunk in chunks) == whole.content
    usages = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata is not None]
    assert usages[-1]["output_tokens"] == whole.usage_metadata["output_tokens"] == 8


async def test_asynchronous_calls_work_as_well(cluster: Cluster) -> None:
    model = langchain_openai.ChatOpenAI(
        model=cluster.model, base_url=cluster.url, api_key=cluster.key, temperature=0, max_tokens=4
    )
    answers = await model.abatch(["One?", "Two?", "Three?"])
    assert [bool(answer.content) for answer in answers] == [True] * 3


def test_a_wrong_key_is_langchain_s_to_see(cluster: Cluster) -> None:
    model = langchain_openai.ChatOpenAI(model=cluster.model, base_url=cluster.url, api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="API key"):
        model.invoke("Hello")


def test_the_example_s_command_prints_its_summary_and_what_was_shared(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from langchain_map_reduce import main

    command = ["langchain_map_reduce.py", "--core", cluster.core, "--max-tokens", "6", "--parts", "2", "--api-key"]
    monkeypatch.setattr(sys, "argv", [*command, cluster.key])
    assert main() == 0
    told = capsys.readouterr().out
    assert told.startswith("summary\n")
    assert "of them shared" in told
    monkeypatch.setattr(sys, "argv", [*command, "wrong"])
    with pytest.raises(SystemExit, match="AuthenticationError"):
        main()
