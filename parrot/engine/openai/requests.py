"""What is sent to a remote endpoint for a job: its prompt as text or as the messages of a chat, its sampling values.

A value that the endpoint does not know is refused, never left out in silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from parrot.engine.config import OpenAIInstance
from parrot.engine.jobs import Turn
from parrot.protocol.api import SamplingConfig, refuse_chat_options
from parrot.protocol.errors import ParrotError


def messages_of(turns: Sequence[Turn]) -> list[dict[str, str]]:
    """The turns as messages; neighbours of one role are one message, their texts joined as they stand."""
    messages: list[dict[str, str]] = []
    for role, text in turns:
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += text
        else:
            messages.append({"role": role, "content": text})
    return messages


def prompt_of(turns: Sequence[Turn]) -> str:
    """The turns as one text."""
    return "".join([text for _, text in turns])


def sampling_of(sampling: SamplingConfig, instance: OpenAIInstance, max_tokens: int) -> dict[str, Any]:
    """The request's sampling values. Raises `bad_sampling` for one that the endpoint does not know.

    `instance.extended_sampling`: it knows what vLLM, SGLang and this project's own servers add to OpenAI's API.
    """
    found: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        instance.max_tokens_field: max_tokens,
    }
    for name, value, default in (
        ("seed", sampling.seed, None),
        ("presence_penalty", sampling.presence_penalty, 0.0),
        ("frequency_penalty", sampling.frequency_penalty, 0.0),
        ("logit_bias", sampling.logit_bias, None),
        ("stop", sampling.stop_str if isinstance(sampling.stop_str, str) else list(sampling.stops) or None, None),
    ):
        if value != default:
            found[name] = value
    if sampling.output_length is not None:
        raise ParrotError("bad_sampling", "sampling_config.output_length is for emulated and dummy-weight engines alone")
    if sampling.logprobs is not None:
        raise ParrotError("bad_sampling", "sampling_config.logprobs: this engine does not pass them on", field="logprobs")
    if sampling.chat_options:
        if instance.api_endpoint != "chat":
            refuse_chat_options(sampling)
        found.update(sampling.chat_options)
    extended = _extended(sampling)
    if extended and not instance.extended_sampling:
        raise ParrotError(
            "bad_sampling",
            f"sampling_config.{next(iter(extended))} means nothing to this endpoint; leave it at its default, or set "
            "instance.extended_sampling where the server knows it (vLLM, SGLang, this project's engines)",
        )
    if extended:
        found["extra_body"] = {_WIRE.get(name, name): value for name, value in extended.items()}
    return found


#: Names that those servers use where they differ from ours.
_WIRE = {"ignore_tokenizer_eos": "ignore_eos"}


def _extended(sampling: SamplingConfig) -> dict[str, Any]:
    values: tuple[tuple[str, Any, Any], ...] = (
        ("top_k", sampling.top_k, -1),
        ("stop_token_ids", list(sampling.stop_token_ids), []),
        ("repetition_penalty", sampling.repetition_penalty, None),
        ("ignore_tokenizer_eos", sampling.ignore_tokenizer_eos, False),
    )
    return {name: value for name, value, default in values if value != default}
