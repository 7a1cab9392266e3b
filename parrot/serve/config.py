"""The configuration of a ServeCore, as its JSON file has it. Times are seconds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from parrot.configuration import masked

Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0)]


class GlobalSchedulerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Section `global_scheduler`. The four switches are parameters of the policy `parrot`. `explain_placements`: how many of
    the last placements keep their reasons (GET /v1/debug/placements); 0: none, which costs nothing. `patience`: how
    long the first task of a lane waits before an engine is kept free for it (docs/fairness.md); null: for ever."""

    app_fifo: bool = False
    graph_group: bool = False
    ctx_group: bool = False
    ctx_aware: bool = False
    max_queue_size: Positive = 1024
    engine_wait_timeout: Seconds = 120.0
    max_attempts: Positive = 8
    patience: Seconds | None = 30.0
    policy: str = "parrot"
    params: dict[str, Any] = {}
    random_seed: int = 0
    explain_placements: Annotated[int, Meta(ge=0)] = 1024


class TenantConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of `tenants` (docs/fairness.md). `weight`: its share beside others', for policies that ask. Limits are null for
    none; `max_tokens_in_flight` and `tokens_per_minute` count whole prompts, cached or not. `api_keys`: whoever shows one of
    them is this tenant (docs/security.md): SHA-256 in hex, or `env:NAME`."""

    weight: Annotated[float, Meta(gt=0, le=1e6)] = 1.0
    max_queued_tasks: Positive | None = None
    max_sessions: Positive | None = None
    max_tokens_in_flight: Positive | None = None
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    api_keys: tuple[str, ...] = ()


class ServeCoreConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file. `journal_path`: the journal (docs/journal.md); null: none; left out: the launch command chooses.
    `tenants`: by name; "*" stands for each of the others. What follows `max_body_bytes` is in docs/security.md."""

    host: str = "localhost"
    port: Annotated[int, Meta(ge=0, le=65535)] = 9000
    max_sessions_num: Positive = 2048
    max_engines_num: Positive = 2048
    session_life_span: Seconds = 600.0
    max_tasks_per_session: Positive = 4096
    engine_heartbeat_timeout: Seconds = 10.0
    engine_stall_timeout: Seconds = 120.0
    constant_prefix_var_timeout: Seconds = 600.0
    global_scheduler: GlobalSchedulerConfig = GlobalSchedulerConfig()
    tenants: dict[str, TenantConfig] = {}
    engine_secret: str | None = None
    journal_path: str | msgspec.UnsetType | None = msgspec.UNSET
    journal_mode: Literal["recover", "record"] = "recover"
    journal_sync: Literal["normal", "full"] = "normal"
    max_body_bytes: Positive = 16 * 1024 * 1024
    header_timeout: Seconds = 30.0
    body_timeout: Seconds = 120.0
    request_timeout: Seconds | None = None
    reader_timeout: Seconds = 60.0
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    engine_ca_file: str | None = None
    cors_origins: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return masked(self, "engine_secret")
