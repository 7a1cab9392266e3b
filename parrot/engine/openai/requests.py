"""What is sent to a remote endpoint for a job: its prompt as text or as the messages of a chat, its sampling values.

A value that the endpoint does not know is refused, never left out in silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from parrot.engine.config import OpenAIInstance
from parrot.engine.jobs import Turn
from parrot.protocol.api import SamplingConfig, refuse_chat_options
from parrot.protocol.engine import CONTINUED, WHOLE_MESSAGE, TokenLogprob
from parrot.protocol.errors import ParrotError
from parrot.tokenizer import Tokenizer


def messages_of(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The turns as messages. Neighbours of one role are one message, their texts joined as they stand, unless a message begins
    with the second."""
    messages: list[dict[str, Any]] = []
    closed = True  # whether nothing can be added to the last message
    for role, text, begins in turns:
        if role == WHOLE_MESSAGE:
            messages.append(msgspec.json.decode(text))
            closed = True
        elif not closed and not begins and role in (CONTINUED, messages[-1]["role"]):
            messages[-1]["content"] += text
        else:
            messages.append({"role": "user" if role == CONTINUED else role, "content": text})
            closed = False
    return messages


def is_chat(turns: Sequence[Turn]) -> bool:
    """Whether the turns are the messages of a chat, and not a text in parts."""
    return any(turn.begins for turn in turns)


def prompt_of(turns: Sequence[Turn], tokenizer: Tokenizer) -> str:
    """The turns as one text; a chat's by the model's chat template. Raises `bad_request` when that is not known."""
    if not is_chat(turns):
        return "".join([turn.text for turn in turns])
    if tokenizer.chat_template is None:
        raise ParrotError(
            "bad_request",
            "this engine completes texts, and the model's chat template is not known: set instance.api_endpoint to 'chat', or "
            "name the model's 'tokenizer'",
        )
    return tokenizer.apply_chat_template(messages_of(turns))


def logprobs_of(found: Any) -> tuple[TokenLogprob, ...]:
    """What a chunk of the official client tells of its tokens, in either of its two forms; () for nothing."""
    if found is None:
        return ()
    content = getattr(found, "content", None)
    if content is not None:
        return tuple(
            [TokenLogprob(t.token, t.logprob, tuple([(top.token, top.logprob) for top in t.top_logprobs])) for t in content]
        )
    tokens = getattr(found, "tokens", None) or ()
    values = found.token_logprobs or () if tokens else ()
    tops = found.top_logprobs or [None] * len(tokens) if tokens else ()
    return tuple(
        [
            TokenLogprob(token, value, tuple((top or {}).items()))
            for token, value, top in zip(tokens, values, tops, strict=False)
            if value is not None
        ]
    )


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
        ("seed", sampling.seed if _sends_seed(instance) else None, None),
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
        if instance.api_endpoint == "chat":
            found.update(logprobs=True, top_logprobs=sampling.logprobs)
        else:
            found["logprobs"] = sampling.logprobs
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


#: The first version of Azure's API that has `seed`. An earlier one answers 400 to every request that has it, and the core draws
#: a seed for each call whose client gave none.
_FIRST_WITH_SEED = "2023-12-01"


def _sends_seed(instance: OpenAIInstance) -> bool:
    if instance.send_seed is not None or not instance.is_azure:
        return instance.send_seed is not False
    return (instance.azure_api_version or "")[: len(_FIRST_WITH_SEED)] >= _FIRST_WITH_SEED  # versions are dates


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
