"""The text in front of an output, as the model reads it: from what was submitted, not from what is computed for it.

A chain leaves out what has no tokens (a line break between two inputs, under a tokenizer of words), which a text must not.
"""

from __future__ import annotations

from collections.abc import Callable

from parrot.protocol.api import CallAnswer
from parrot.serve import events as ev


def prompt_keys(
    event: ev.SubmitCall, answer: CallAnswer, place: int, content_of: Callable[[str], str | None]
) -> list[str | None]:
    """Content keys of all segments in front of the call's output `place`; None for a variable without a content.

    content_of: variable -> content key.
    """
    keys: list[str | None] = []
    parameters = iter(answer.param_info)
    outputs = 0
    for segment in event.segments:
        if isinstance(segment, ev.Constant):
            keys.append(segment.content.key)
            continue
        var_id = next(parameters).var_id
        if isinstance(segment, ev.Output):
            if outputs == place:
                break
            outputs += 1
        keys.append(content_of(var_id))
    return keys
