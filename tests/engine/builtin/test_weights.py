"""What cannot be loaded is refused in one line that names the model and what is wrong, before weights are read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from parrot.configuration import ConfigurationError
from parrot.engine.builtin.models.config import model_config, published_config
from tests.engine.builtin.driving import engine_config, load

LLAMA = published_config("lmsys/vicuna-7b-v1.3")


def refusal(published: dict[str, Any], overrides: dict[str, Any] | None = None) -> str:
    with pytest.raises(ConfigurationError) as caught:
        model_config("the-model", published, overrides)
    assert "\n" not in str(caught.value)
    assert "the-model" in str(caught.value)
    return str(caught.value)


def test_shipped_shapes_are_those_of_the_models() -> None:
    vicuna = model_config("7b", LLAMA)
    assert (vicuna.num_layers, vicuna.hidden_size, vicuna.num_heads, vicuna.vocab_size) == (32, 4096, 32, 32000)
    large = model_config("13b", published_config("lmsys/vicuna-13b-v1.3"))
    assert (large.num_layers, large.hidden_size, large.intermediate_size) == (40, 5120, 13824)
    small = model_config("135m", published_config("HuggingFaceTB/SmolLM2-135M-Instruct"))
    assert (small.num_kv_heads, small.head_dim, small.tied_embeddings) == (3, 64, True)
    assert small.kv_bytes_per_token(4) == 30 * 2 * 3 * 64 * 4


def test_an_architecture_that_is_not_run_is_named_with_those_that_are() -> None:
    message = refusal({**LLAMA, "model_type": "bloom", "architectures": ["BloomForCausalLM"]})
    assert "BloomForCausalLM" in message
    assert "llama" in message


def test_overrides_change_the_shape_and_unknown_ones_are_named() -> None:
    assert model_config("m", LLAMA, {"num_hidden_layers": 2}).num_layers == 2
    assert "'num_layers'" in refusal(LLAMA, {"num_layers": 2})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
        ({"num_key_value_heads": 5}, "num_key_value_heads 5"),
        ({"num_hidden_layers": 0}, "num_layers is 0"),
        ({"hidden_size": "wide"}, "wide"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"model_type": "opt", "ffn_dim": 64, "do_layer_norm_before": False}, "do_layer_norm_before is False"),
        ({"model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 512}, "word_embed_proj_dim is 512"),
        ({"model_type": "mistral", "sliding_window": 1024}, "window of 1024"),
    ],
)
def test_shapes_that_make_no_sense_or_are_not_supported_are_refused(changes: dict[str, Any], named: str) -> None:
    assert named in refusal({**LLAMA, **changes})


def test_a_missing_key_is_named() -> None:
    assert "'vocab_size'" in refusal({k: v for k, v in LLAMA.items() if k != "vocab_size"})


def test_weights_that_do_not_fit_the_configuration_are_refused(tiny: tuple[Path, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"tensor 'model.embed_tokens.weight' is \[211, 48\]"):
        load(tiny[0], tokenizer="synthetic", model_config={"vocab_size": 300})
    with pytest.raises(ConfigurationError, match=r"no tensor 'model.layers.3.input_layernorm.weight'"):
        load(tiny[0], tokenizer="synthetic", model_config={"num_hidden_layers": 4})
    shutil.copy(tiny[0] / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigurationError, match=r"model.safetensors cannot be read"):
        load(tmp_path, tokenizer="synthetic")


def test_a_checkpoint_in_the_older_format_loads_too(tiny: tuple[Path, Any], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    shutil.copy(tiny[0] / "config.json", tmp_path)
    torch.save(tiny[1].state_dict(), tmp_path / "pytorch_model.bin")
    assert load(tmp_path, tokenizer="synthetic").model_bytes == load(tiny[0], tokenizer="synthetic").model_bytes


def test_a_model_with_its_tokenizer_missing_is_refused(tiny: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigurationError, match="tokenizer"):
        load(tiny[0])


def test_an_attention_function_that_is_not_there_is_named(tiny: tuple[Path, Any]) -> None:
    with pytest.raises(ConfigurationError, match="'xformers_with_buffer'"):
        load(tiny[0], tokenizer="synthetic", attn_func="xformers_with_buffer")


def test_a_model_that_does_not_fit_on_the_gpu_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from parrot.engine.builtin.load import affordable_kv_tokens

    shape = model_config("lmsys/vicuna-7b-v1.3", LLAMA)
    config = engine_config("lmsys/vicuna-7b-v1.3", device="cuda", use_dummy_weights=True)
    device = torch.device("cuda")
    for free_gib, tokens in ((16, None), (60, 200_000)):
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda _, g=free_gib: (g << 30, 80 << 30))
        wanted = engine_config("lmsys/vicuna-7b-v1.3", device="cuda", num_kv_cache_blocks=tokens)
        with pytest.raises(ConfigurationError, match=r"weights take 12.6 GiB.* of the \d+.0 GiB that are free") as refused:
            affordable_kv_tokens(wanted, shape, torch.float16, device)
        assert "\n" not in str(refused.value)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (139 << 30, 140 << 30))
    tokens_left = affordable_kv_tokens(config, shape, torch.float16, device)
    held = tokens_left * shape.kv_bytes_per_token(2) + 2 * shape.num_parameters
    assert 0.85 * (140 << 30) < held < 0.95 * (140 << 30)


def test_what_xformers_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from parrot.engine.builtin.attention import unavailable, xformers_library

    assert unavailable("torch_sdpa", "cuda") is None
    assert "instance.device is 'cpu'" in str(unavailable("xformers_paged", "cpu"))
    there = {"xformers", "triton"}
    monkeypatch.setattr(xformers_library.importlib.util, "find_spec", lambda name: object() if name in there else None)
    there.discard("xformers")
    assert "package xformers is not installed" in str(unavailable("xformers_paged", "cuda"))
    there.add("xformers")
    there.discard("triton")
    assert "package triton is not installed" in str(unavailable("xformers_shared_prefix", "cuda:0"))
    there.add("triton")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "torch finds none" in str(unavailable("xformers_with_buffer", "cuda"))


def test_a_compiled_part_that_does_not_load_is_told_with_the_package_that_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import ModuleType

    from parrot.engine.builtin.attention import xformers_library

    package, library, ops = ModuleType("xformers"), ModuleType("xformers._cpp_lib"), ModuleType("xformers.ops")
    package._cpp_lib, ops.fmha = library, ModuleType("fmha")  # type: ignore[attr-defined]
    failure = RuntimeError("a page of text")
    failure.__cause__ = OSError("libcudart.so.12: cannot open shared object file\nand more")
    library._cpp_library_load_exception = failure  # type: ignore[attr-defined]
    for module in (package, library, ops):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(xformers_library.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    for loaded, said in ((False, "nvidia-cuda-runtime-cu12"), (True, "cannot open shared object file")):
        monkeypatch.setattr(xformers_library, "_preload_runtime", lambda loaded=loaded: loaded)
        reason = str(xformers_library.missing())
        assert said in reason
        assert "\n" not in reason
