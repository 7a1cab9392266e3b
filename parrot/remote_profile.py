"""The latency profile of a remote endpoint as data: how long requests take, how much they vary, what limits their number.

The counterpart of `parrot.latency_profile`: a remote side shows requests, no iterations. `parrot.remote_latency` evaluates it.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from parrot.latency_profile import Hinge, NonNegative

PerMinute = Annotated[int, Meta(ge=1)]


class RemoteProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="remote", tag_field="kind"):
    """A fitted model of requests to one endpoint, and where it came from. Written as JSON by `sim.calibrate`.

    Seconds to the first token, of a request with `p` prompt tokens that is the `l`-th in flight:
    `ttft_s` + Σ ttft_prompt slope · max(0, p − knot) + Σ ttft_load slope · max(0, l − knot). Seconds a token after it, while
    `l` are in flight: `tpot_s` + Σ tpot_load slope · max(0, l − knot). `end_s`: from the last token to the end of the stream.

    `ttft_residuals`, `tpot_residuals`: quantiles of log(measured / predicted) of single requests at evenly spaced levels, the
    least first and the most last. `requests_per_minute`, `tokens_per_minute`: what the logs were recorded under; `limits_from`
    says how that is known.
    """

    name: str
    model: str
    endpoint: str
    ttft_s: NonNegative
    ttft_prompt: tuple[Hinge, ...]
    ttft_load: tuple[Hinge, ...]
    tpot_s: NonNegative
    tpot_load: tuple[Hinge, ...]
    end_s: NonNegative = 0.0
    api_endpoint: str = ""
    task_overhead_s: NonNegative = 0.0  #: of our own side, per task, before it can be sent
    ttft_residuals: tuple[float, ...] = ()
    tpot_residuals: tuple[float, ...] = ()
    requests_per_minute: PerMinute | None = None
    tokens_per_minute: PerMinute | None = None
    limits_from: Literal["", "configuration", "refusals"] = ""  #: the engine's file, or answers 429 of the endpoint
    versions: dict[str, str] = {}
    trace: str = ""
    seen: dict[str, tuple[float, float]] = {}  #: prompt_tokens, load, output_tokens -> least, most in the logs
    spread: NonNegative = 0.0  #: standard deviation of log(measured / predicted) of the total time of a whole held-out run
    #: on held-out requests: mean and p99 of |predicted / measured − 1| of the time to the first token and of the rest
    error: dict[str, float] = {}
    notes: str = ""
