"""LiteLLM at a ServeCore over the CPU model: chats, streams, completions, errors."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.clients.conftest import Cluster

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would ask the network for prices otherwise
litellm = pytest.importorskip("litellm", reason="litellm is not installed (make install has it)")

HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say hello."}]


def options(cluster: Cluster, **more: Any) -> dict[str, Any]:
    asked = {"model": f"openai/{cluster.model}", "messages": HELLO, "temperature": 0, "max_tokens": 8}
    return {**asked, "api_base": cluster.url, "api_key": cluster.key, "num_retries": 0, **more}


def test_a_chat_is_answered_and_streamed_alike(cluster: Cluster) -> None:
    whole = litellm.completion(**options(cluster))
    assert whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 8
    chunks = list(litellm.completion(**options(cluster, stream=True, stream_options={"include_usage": True})))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content


async def test_asynchronous_calls_and_the_extension_work(cluster: Cluster) -> None:
    answer = await litellm.acompletion(**options(cluster, extra_body={"parrot": {"criteria": "throughput"}}))
    assert answer.choices[0].message.content


def test_a_completion_is_answered(cluster: Cluster) -> None:
    asked = {"model": f"text-completion-openai/{cluster.model}", "prompt": "The sky is", "temperature": 0, "max_tokens": 4}
    answer = litellm.text_completion(**asked, api_base=cluster.url, api_key=cluster.key, num_retries=0)
    assert answer.choices[0].text


def test_errors_are_litellm_s_own(cluster: Cluster) -> None:
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**options(cluster, api_key="wrong"))
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**options(cluster, model="openai/no-such-model"))
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(**options(cluster, temperature=9))
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**options(cluster, messages=[{"role": "user", "content": "word " * 20_000}]))
