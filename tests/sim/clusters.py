"""Small simulated clusters for tests: a made-up latency profile, and the files of a core and an engine."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from parrot.engine.core import EngineLimits
from parrot.latency import FixedCost, Hinge, LatencyProfile
from parrot.protocol.engine import EngineDescription
from sim.engine_models import EngineModel

PROFILE = LatencyProfile(
    name="made-up",
    model="test/model",
    device="cpu",
    attn_func="torch_sdpa",
    fixed=(FixedCost(1, 0.010), FixedCost(64, 0.012)),
    hinges=(Hinge(0, 1e-4), Hinge(64, 3e-4)),
    pair_s=1e-7,
    kv_s=1e-6,
    task_overhead_s=0.001,
)


def engine(name: str = "e0", *, kv_tokens: int = 4096, batch: int = 8, jump_depth: int = 0, **fields: object) -> EngineModel:
    limits = EngineLimits(
        num_blocks=kv_tokens // 16,
        block_size=16,
        max_batch_size=batch,
        max_num_batched_tokens=256,
        max_total_tokens=kv_tokens,
        tasks_capacity=64,
        max_seq_len=4096,
        fill_chunk_size=64,
        pipeline_depth=jump_depth,
    )
    description = EngineDescription(
        engine_name=name,
        model="test/model",
        tokenizer="test/tokenizer",
        host="h",
        port=sum(name.encode()),
        engine_type="builtin",
        tasks_capacity=64,
        tokens_capacity=kv_tokens,
        max_seq_len=4096,
        accepts_output_length=True,
    )
    return EngineModel(msgspec.structs.replace(description, **fields), limits, PROFILE)


def write_files(folder: Path, **engine_fields: object) -> tuple[str, str]:
    """A core's file and an engine's, whose latency profile is named in it."""
    core, engine_file = folder / "core.json", folder / "engine.json"
    core.write_text(json.dumps({"port": 9000, "global_scheduler": {"max_queue_size": 64}}) + " // comments are accepted")
    (folder / "profile.json").write_bytes(msgspec.json.encode(PROFILE))
    config = {
        "model": "test/model",
        "engine_type": "emulated",
        "latency_profile": "profile.json",
        "instance": {"num_kv_cache_blocks": 256, "block_size": 16},
        "scheduler": {"max_batch_size": 8, "max_num_batched_tokens": 256, "max_total_tokens": 4096},
        **engine_fields,
    }
    engine_file.write_text(json.dumps(config))
    return str(core), str(engine_file)


def processes_with(text: str) -> list[str]:
    """Command lines of live processes that mention `text`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if text in line:
            found.append(line)
    return found
