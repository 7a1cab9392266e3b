"""Engine configuration files: what is accepted, what is refused, and how."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from parrot.configuration import ConfigurationError, read_json
from parrot.engine.config import OpenAIEngineConfig, load_engine_config, secret_of
from parrot.engine.derived import profile_of
from parrot.engine.profiles import find_profile, find_remote_profile, profile_for, shipped_profiles, shipped_remote_profiles

SEED = Path(__file__).parent / "seed"
SAMPLES = Path(__file__).parents[2] / "sample_configs" / "engine"


def write(path: Path, **keys: object) -> Path:
    path.write_text(json.dumps({"model": "m", **keys}))
    return path


@pytest.mark.parametrize("name", ["builtin", "openai"])
def test_the_launch_document_s_files_are_accepted_whole_comments_included(name: str) -> None:
    config = load_engine_config(SEED / f"{name}.json")
    assert config.engine_type == name
    assert config.port == 9001


@pytest.mark.parametrize("path", sorted(SAMPLES.glob("*.json")), ids=lambda p: p.stem)
def test_every_sample_is_accepted(path: Path) -> None:
    named = read_json(path).get("latency_profile")
    assert named is None or named in (*shipped_profiles(), *shipped_remote_profiles())
    load_engine_config(path)


@pytest.mark.parametrize("path", [SEED / "builtin.json", SEED / "openai.json", SAMPLES / "emulated-zero.json"], ids=str)
def test_a_configuration_written_as_json_loads_to_itself(path: Path, tmp_path: Path) -> None:
    config = load_engine_config(path)
    copy = tmp_path / "copy.json"
    copy.write_bytes(msgspec.json.encode(config))
    assert load_engine_config(copy) == config


def test_overrides_stand_above_the_file_and_make_missing_sections(tmp_path: Path) -> None:
    path = write(tmp_path / "e.json", port=1)
    config = load_engine_config(path, {"port": 2, "instance.device": "cpu", "engine_name": "n"})
    assert (config.port, config.device, config.name) == (2, "cpu", "n")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"moddel": "x"}, ["'moddel'", "model"]),
        ({"instance": {"num_blocks": 3}}, ["'instance.num_blocks'", "num_kv_cache_blocks"]),
        ({"scheduler": {"max_batch": 3}}, ["'scheduler.max_batch'", "max_batch_size"]),
        ({"instance": {"num_kv_cache_blocks": "many"}}, ["instance.num_kv_cache_blocks", "'many'", "int"]),
        ({"port": 70000}, ["port", "70000", "65535"]),
        ({"engine_type": "magic"}, ["engine_type", "'magic'", "builtin", "openai", "emulated"]),
        ({"fill_chunk_size": 0}, ["fill_chunk_size", "0", "-1"]),
        ({"instance": {"device": "tpu"}}, ["instance.device", "'tpu'"]),
        ({"instance": {"attn_func": "quick"}}, ["instance.attn_func", "'quick'", "torch_sdpa", "xformers_with_buffer"]),
        ({"scheduler": {"policy": "lifo"}}, ["scheduler.policy", "'lifo'", "fifo"]),
        ({"engine_type": "emulated", "instance": {"device": "cpu"}}, ["'instance.device'", "num_kv_cache_blocks"]),
        ({"engine_type": "openai", "instance": {"device": "cpu"}}, ["'instance.device'", "api_key"]),
        ({"latency_profile": "nowhere"}, ["'nowhere'", "zero"]),
        ({"instance": 3}, ["instance", "3", "object"]),
    ],
)
def test_a_wrong_key_is_refused_with_its_name_and_what_is_expected(
    tmp_path: Path, keys: dict[str, object], said: list[str]
) -> None:
    path = write(tmp_path / "e.json", **keys)
    with pytest.raises(ConfigurationError) as refused:
        load_engine_config(path)
    message = str(refused.value)
    assert "\n" not in message
    for part in [str(path), *said]:
        assert part in message


@pytest.mark.parametrize("text", ["", "{", "[]", '{"engine_name": "no model"}'])
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "e.json"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=r"e\.json"):
        load_engine_config(path)


def test_an_override_of_a_section_that_is_no_object_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="instance"):
        load_engine_config(write(tmp_path / "e.json", instance=3), {"instance.device": "cpu"})


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no-such-file"):
        load_engine_config("no-such-file.json")


def test_a_profile_file_is_found_beside_the_configuration(tmp_path: Path) -> None:
    profile = msgspec.structs.replace(find_profile("zero"), name="mine", pair_s=1.0)
    (tmp_path / "p.json").write_bytes(msgspec.json.encode(profile))
    config = load_engine_config(write(tmp_path / "e.json", engine_type="emulated", latency_profile="p.json"))
    assert profile_of(config) == profile


def test_shipped_profiles_are_found_by_name_and_by_model_and_device() -> None:
    assert find_profile("zero").name == "zero"
    for name in shipped_profiles():
        profile = find_profile(name)
        found = profile_for(profile.model, profile.device)
        assert found is not None
        assert found.model == profile.model
    assert profile_for("no such model", "cpu") is None
    for name in shipped_remote_profiles():
        assert find_remote_profile(name).name == name


def test_an_engine_s_file_names_a_profile_of_its_own_kind(tmp_path: Path) -> None:
    remote = {"engine_type": "openai", "instance": {"base_url": "http://x/v1"}}
    with pytest.raises(ConfigurationError, match=r"e.json: latency_profile 'zero' is of iterations .* needs one of requests"):
        load_engine_config(write(tmp_path / "e.json", **remote, latency_profile="zero"))
    with pytest.raises(ConfigurationError, match=r"e.json: latency_profile 'stand-in' is of requests to .* needs one of iter"):
        load_engine_config(write(tmp_path / "e.json", engine_type="builtin", latency_profile="stand-in"))
    with pytest.raises(ConfigurationError, match=r"latency_profile 'none'.* \(shipped: .*stand-in.*zero"):
        load_engine_config(write(tmp_path / "e.json", **remote, latency_profile="none"))


def test_a_cache_too_small_for_one_prompt_of_the_length_that_is_asked_for_is_refused(tmp_path: Path) -> None:
    for engine_type in ("builtin", "emulated"):
        instance = {"num_kv_cache_blocks": 6, "block_size": 16, "max_seq_len": 96}
        load_engine_config(write(tmp_path / "e.json", engine_type=engine_type, instance=instance))
        path = write(tmp_path / "e.json", engine_type=engine_type, instance={**instance, "max_seq_len": 97})
        with pytest.raises(ConfigurationError, match=r"e.json: key 'instance.max_seq_len' is 97, but .* holds 96 tokens"):
            load_engine_config(path)


def test_the_secret_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_engine_config(write(tmp_path / "e.json", serve_core={"engine_secret": "env:PARROT_TEST_SECRET"}))
    monkeypatch.delenv("PARROT_TEST_SECRET", raising=False)
    with pytest.raises(ConfigurationError, match="PARROT_TEST_SECRET"):
        secret_of(config)
    monkeypatch.setenv("PARROT_TEST_SECRET", "s")
    assert secret_of(config) == "s"


def test_openai_files_are_checked_even_though_no_such_engine_starts_yet() -> None:
    assert isinstance(load_engine_config(SAMPLES / "openai-example-config.json"), OpenAIEngineConfig)
