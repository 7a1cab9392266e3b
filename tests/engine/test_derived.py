"""What follows from an engine's configuration: profile, limits, description, and the emulated engine that stands for it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from parrot.engine.config import (
    BuiltinEngineConfig,
    EmulatedEngineConfig,
    EngineConfig,
    load_engine_config,
    parse_engine_config,
)
from parrot.engine.derived import as_emulated, description_of, limits_of, rate_limits_of
from parrot.engine.profiles import find_remote_profile

BUILTIN = Path(__file__).parent / "seed" / "builtin.json"


def config_of(**keys: object) -> EngineConfig:
    return parse_engine_config({"model": "m", **keys}, "e.json")


def test_the_builtin_file_means_what_it_says() -> None:
    config = load_engine_config(BUILTIN)
    assert isinstance(config, BuiltinEngineConfig)
    limits = limits_of(config)
    assert limits.num_blocks * limits.block_size == 8000  # blocks of one token, whatever the pages are
    assert limits.max_num_batched_tokens == 2560
    assert limits.max_seq_len == 2048  # the model's
    assert limits.pipeline_depth == 1  # a GPU's
    description = description_of(config, limits)
    assert description.tokens_capacity == 8000  # min(KV capacity, max_total_tokens)
    assert description.tasks_capacity == 256
    assert description.tokenizer == "hf-internal-testing/llama-tokenizer"
    assert not description.accepts_output_length


def test_the_emulation_of_a_remote_engine_registers_as_one_and_keeps_its_limits() -> None:
    instance = {"base_url": "http://x/v1", "requests_per_minute": 90, "max_seq_len": 5000}
    config = config_of(engine_type="openai", instance=instance, latency_profile="stand-in", model="stand-in")
    emulated = as_emulated(config, "stand-in")
    assert limits_of(emulated) == limits_of(config)
    profile = find_remote_profile("stand-in")
    assert rate_limits_of(emulated, profile) == rate_limits_of(config, profile) == (90, None)
    for description in (description_of(config), description_of(emulated)):
        assert (description.engine_type, description.latency_profile) == ("openai", None)
    assert description_of(emulated).accepts_output_length


@pytest.mark.parametrize("capacity", [1, 5, 16, 17, 8000])
def test_the_cache_never_holds_more_than_the_file_says(capacity: int) -> None:
    limits = limits_of(config_of(engine_type="emulated", instance={"num_kv_cache_blocks": capacity}))
    assert 0 < limits.num_blocks * limits.block_size <= capacity
    assert capacity - limits.num_blocks * limits.block_size < limits.block_size


def test_the_shorter_of_the_file_s_and_the_model_s_length_counts() -> None:
    config = config_of(instance={"max_seq_len": 100, "device": "cpu"})
    assert limits_of(config).max_seq_len == 100
    assert limits_of(config, max_seq_len=50).max_seq_len == 50
    assert limits_of(config, max_seq_len=500).max_seq_len == 100


def test_an_emulated_twin_has_the_same_limits_and_capacities() -> None:
    config = load_engine_config(BUILTIN)
    twin = as_emulated(config, "zero")
    assert isinstance(twin, EmulatedEngineConfig)
    assert limits_of(twin) == limits_of(config)
    ours, theirs = description_of(twin), description_of(config)
    assert ours.tokens_capacity == theirs.tokens_capacity
    assert ours.accepts_output_length
    assert ours.tokenizer == "synthetic"
    assert parse_engine_config(msgspec.to_builtins(twin), "twin") == twin
