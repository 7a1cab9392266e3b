"""On a GPU: logits of every family and attention function against float32, whatever way the tokens are computed.

python -m pytest -m gpu tests
"""

from __future__ import annotations

import copy
import random
from collections.abc import Hashable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from parrot.engine.batches import EngineLimits  # noqa: E402
from parrot.engine.builtin.attention import load_attention, xformers_library  # noqa: E402
from parrot.engine.builtin.attention.xformers_paged import GRAPH_TOKENS  # noqa: E402
from parrot.engine.builtin.kv_cache import KVCache  # noqa: E402
from parrot.engine.builtin.models.config import config_at, model_config  # noqa: E402
from parrot.engine.builtin.runner import BuiltinRunner, Launched, Prepared  # noqa: E402
from parrot.engine.builtin.weights import Checkpoint, load_decoder  # noqa: E402
from parrot.model_files import ModelFiles  # noqa: E402
from parrot.protocol.api import SamplingConfig  # noqa: E402
from parrot.tokenizer import load_tokenizer  # noqa: E402
from tests.engine.builtin.conftest import VOCABULARY, make_model  # noqa: E402
from tests.engine.builtin.driving import Drive, limits  # noqa: E402

WIDER = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "initializer_range": 0.02,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": WIDER,
    "llama, every head its own key": {**WIDER, "num_key_value_heads": 8},
    "mistral": {**WIDER, "family": "mistral", "sliding_window": None},
    "qwen2": {**WIDER, "family": "qwen2"},
    "qwen3": {**WIDER, "family": "qwen3", "head_dim": 64},
    "opt": {"family": "opt", "hidden_size": 256, "word_embed_proj_dim": 256, "ffn_dim": 512, "num_attention_heads": 8,
            "init_std": 0.02},
}  # fmt: skip
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
FUNCTIONS = ["xformers_paged", "xformers_shared_prefix", "xformers_with_buffer", "torch_sdpa"]
#: A bias of nothing: the runner must then look at the logits, also where a graph has chosen already.
LOOKED_AT = SamplingConfig(temperature=0.0, max_gen_length=40, ignore_tokenizer_eos=True, logit_bias={"0": 0.0})


#: How far a vector of logits may be from the reference's, relative to its norm.
BARS = {"bfloat16": 1e-2, "float32": 1e-4}


class Anew(NamedTuple):
    """An iteration that no graph was there for. `cached`: how many of its fills begin behind cached tokens."""

    tokens: int
    decode_rows: int
    cached: int


class Recording(BuiltinRunner):
    """Keeps the logits of every row that is looked at, (task, tokens before it) -> [vocabulary], and the iterations that were
    launched kernel by kernel."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.seen: dict[tuple[Any, int], torch.Tensor] = {}
        self.anew: list[Anew] = []

    def launch(self, prepared: Prepared) -> Launched:
        if prepared.bucket is None:
            rows = [row.attention for row in prepared.rows]
            cached = sum(row.start > 0 for row in rows[prepared.decode_rows :])
            self.anew.append(Anew(sum(row.stop - row.start for row in rows), prepared.decode_rows, cached))
        return super().launch(prepared)

    def _choose(self, logits: torch.Tensor, launched: Launched, chosen: torch.Tensor) -> None:
        for row, output, end in zip(logits.float().cpu().clone(), launched.outputs, launched.ends, strict=True):
            self.seen[output.key, end] = row
        super()._choose(logits, launched, chosen)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("model")
    return folder, make_model(folder, **FAMILIES[request.param])


def engine(
    folder: Path, name: str, dtype: torch.dtype, given: EngineLimits, *, device: str = "cuda", rows: int = 16, most: int = 2048
) -> Recording:
    config = model_config("tiny", config_at(ModelFiles(folder)))
    place = torch.device(device)
    decoder = load_decoder(config, Checkpoint("tiny", folder), dtype, place)
    cache = KVCache(config, given.num_blocks, given.block_size, dtype, place, spare_page=True)
    attention = load_attention(name, config, cache, rows, most)
    graphs = device == "cuda" and bool(attention.buckets)
    return Recording(decoder, cache, attention, load_tokenizer("synthetic"), graphs=graphs)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_logits_are_those_of_a_float32_reference(
    model: tuple[Path, Any], name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill whole and in chunks, decode, a fork, shared and nested prefixes, and after preemption."""
    if name.startswith("xformers") and (reason := xformers_library.missing()):
        pytest.skip(reason)
    monkeypatch.setattr("parrot.engine.builtin.attention.xformers_shared_prefix.LEAST_SAVED_BYTES", 1)
    folder, reference = model
    kind = getattr(torch, dtype)
    given = limits(pipeline_depth=1, max_batch_size=16, num_blocks=52, fill_chunk_size=100)
    runner = engine(folder, name, kind, given)
    drive = Drive(runner, given)
    draw = random.Random(3)
    texts = [[draw.randrange(3, VOCABULARY) for _ in range(n)] for n in (200, 77, 64, 30, 1, 150, 9, 40, 33, 18)]
    chains = {}
    for i, text in enumerate(texts[2:]):
        nested = [(2, texts[1])] if i % 3 == 0 else []
        links = [(1, texts[0]), *nested, (10 + i, text)] if i < 6 else [(10 + i, text)]
        chains[i] = [token for _, ids in links for token in ids]
        drive.submit(i, links, 100 + i, LOOKED_AT)
    outputs = drive.run()
    assert drive.preempted, "the cache was meant to be too small"
    found, worst = relative_errors(runner, make_rounded(reference, kind), chains, outputs)
    print(f"\n{name} {dtype}: relative error {found:.2e}, of the worst position {worst:.2e}")
    assert found <= worst < BARS[dtype]


def relative_errors(
    runner: Recording, rounded: Any, prompts: dict[Any, list[int]], outputs: dict[Hashable, tuple[int, ...]]
) -> tuple[float, float]:
    """‖logits − reference‖ / ‖reference‖ of all sampled positions together, and of the worst one."""
    worst = error_squared = norm_squared = 0.0
    for key, prompt in prompts.items():
        ids = prompt + list(outputs[key])
        with torch.inference_mode():
            expected = rounded(torch.tensor([ids])).logits[0]
        for end in range(len(prompt), len(ids)):
            wanted = expected[end - 1]
            error, norm = float((runner.seen[key, end] - wanted).norm()), float(wanted.norm())
            worst = max(worst, error / norm)
            error_squared, norm_squared = error_squared + error**2, norm_squared + norm**2
    return float((error_squared / norm_squared) ** 0.5), worst


def make_rounded(reference: Any, kind: torch.dtype) -> Any:
    """The reference computes in float32 with the weights that the engine has. Rotary frequencies are no weights: they stay."""
    rounded = copy.deepcopy(reference)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.to(kind))
    return rounded


@pytest.fixture(scope="module", params=["llama", "llama, every head its own key", "qwen3", "opt"])
def long_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("model")
    return folder, make_model(folder, **{**FAMILIES[request.param], "max_position_embeddings": 8192})


@pytest.mark.parametrize("chunk", [-1, 3000])
@pytest.mark.parametrize("name", ["xformers_paged", "xformers_shared_prefix"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_logits_behind_prompts_too_long_for_graphs_are_those_of_a_float32_reference(
    long_model: tuple[Path, Any], name: str, dtype: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole and in chunks, from the beginning and behind a shared prefix, beside rows that decode behind that prefix."""
    if reason := xformers_library.missing():
        pytest.skip(reason)
    monkeypatch.setattr("parrot.engine.builtin.attention.xformers_shared_prefix.LEAST_SAVED_BYTES", 1)
    folder, reference = long_model
    kind = getattr(torch, dtype)
    given = limits(pipeline_depth=1, max_batch_size=16, num_blocks=2000, fill_chunk_size=chunk, max_num_batched_tokens=8192,
                   max_total_tokens=32000, max_seq_len=8192)  # fmt: skip
    runner = engine(folder, name, kind, given, most=8192)
    drive = Drive(runner, given)
    draw = random.Random(5)
    prefix = [draw.randrange(3, VOCABULARY) for _ in range(3100)]
    prompts: dict[Any, list[int]] = {}

    def submit(key: int, own: int, behind: bool) -> None:
        ids = [draw.randrange(3, VOCABULARY) for _ in range(own)]
        drive.submit(key, [*([(1, prefix)] if behind else []), (10 + key, ids)], 100 + key, LOOKED_AT)
        prompts[key] = [*prefix, *ids] if behind else ids

    submit(0, 20, behind=True)
    submit(1, 33, behind=True)
    while not any(key == 0 for key, _ in runner.seen):
        drive.step()
    submit(2, 2700, behind=True)
    submit(3, 4500, behind=False)
    submit(4, 5900, behind=False)
    outputs = drive.run()
    large = [one for one in runner.anew if one.tokens > GRAPH_TOKENS]
    assert large == runner.anew, "an iteration that fits into a graph was launched kernel by kernel"
    assert any(one.decode_rows and one.cached for one in large)
    assert sum(one.cached for one in large) >= (1 if chunk == -1 else 3)
    assert not drive.preempted
    found, worst = relative_errors(runner, make_rounded(reference, kind), prompts, outputs)
    print(f"\n{name} {dtype} {chunk}: relative error {found:.2e}, of the worst position {worst:.2e}; {large}")
    assert found <= worst < BARS[dtype]


@pytest.mark.parametrize("name", ["xformers_paged", "xformers_shared_prefix"])
def test_a_context_forked_a_thousand_times_costs_blocks_once(name: str, tmp_path: Path) -> None:
    if reason := xformers_library.missing():
        pytest.skip(reason)
    make_model(tmp_path, **WIDER)
    given = limits(pipeline_depth=1, max_batch_size=16, num_blocks=200, tasks_capacity=1000, max_total_tokens=3200)
    drive = Drive(engine(tmp_path, name, torch.bfloat16, given), given)
    prefix = [5 + i % 200 for i in range(1600)]
    sampling = SamplingConfig(temperature=0.0, max_gen_length=6, ignore_tokenizer_eos=True)
    for i in range(1000):
        drive.submit(i, [(1, prefix), (10 + i, [7])], 2000 + i, sampling)
    outputs = drive.run()
    assert len(set(outputs.values())) == 1
    assert not drive.preempted
    drive.core.free_contexts(drive.contexts)
    assert drive.core.pool.free == 200


def test_sampled_tokens_depend_on_seed_and_position_only(tmp_path: Path) -> None:
    """Alone or in a batch, one step behind or not, on the CPU or here: float32, so that no logit moves a draw."""
    make_model(tmp_path, **WIDER)
    sampling = [
        SamplingConfig(seed=3, max_gen_length=20, ignore_tokenizer_eos=True, **kind)
        for kind in ({}, {"temperature": 0.7, "top_k": 9}, {"top_p": 0.8}, {"presence_penalty": 0.6, "repetition_penalty": 1.2})
    ]
    found = []
    for depth, together in ((0, True), (1, True), (1, False)):
        given = limits(pipeline_depth=depth, max_batch_size=16)
        runner = engine(tmp_path, "torch_sdpa", torch.float32, given)
        drive = Drive(runner, given)
        for i, one in enumerate(sampling):
            drive.submit(i, [(10 + i, [5, 6, 7 + i])], 100 + i, one)
            if not together:
                drive.run()
        found.append(drive.run())
    assert found[0] == found[1] == found[2]
