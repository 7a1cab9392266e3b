"""A line a request to a remote endpoint, for calibration: how long it waited, when its first token came, how the rest went."""

from __future__ import annotations

from typing import NamedTuple


class RequestLine(NamedTuple):
    """Times in seconds.

    `t`: when it was sent, on the engine's clock; `wait_s`: before that, for its turn and between tries; `running`: requests in
    flight when it was sent, itself included; `ttft_s`: from then to its first text; `decode_s`: from there to its end;
    `max_gap_s`: the longest wait between two pieces of text; `total_s`: from when it was sent to its end, however it ended;
    `tries`: how often it was sent; `reason`: how it ended, or the error's code (`cancelled`: it was given up); `counted`: the
    endpoint counted the tokens, else the engine did; `limit_tokens`: as a limit a minute counts them, with `max_gen_length`.
    """

    t: float
    task: str
    wait_s: float
    running: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    counted: bool
    ttft_s: float | None
    decode_s: float
    max_gap_s: float
    total_s: float
    limit_tokens: int
    tries: int
    reason: str
