"""Log-probabilities are those of the model's own distribution, of the tokens that were chosen, in order, stop or no stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from parrot.engine.builtin.attention import load_attention  # noqa: E402
from parrot.engine.builtin.kv_cache import KVCache  # noqa: E402
from parrot.engine.builtin.runner import BuiltinRunner  # noqa: E402
from parrot.protocol.api import SamplingConfig  # noqa: E402
from parrot.protocol.engine import TokenLogprob  # noqa: E402
from parrot.tokenizer import load_tokenizer  # noqa: E402
from tests.engine.builtin import emulation  # noqa: E402
from tests.engine.builtin.driving import Drive, limits, load  # noqa: E402

PROMPT = [3, 17, 42, 99, 5, 120, 64]


@pytest.fixture(params=["torch_sdpa", "xformers_paged"])
def runner(tiny: tuple[Path, Any], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of iterations as they are, and of iterations that are padded as for a graph, with the kernels in plain torch."""
    loaded = load(str(tiny[0]), tokenizer="synthetic", dtype="float32").runner
    if request.param == "torch_sdpa":
        return loaded
    emulation.install(monkeypatch)
    cache = KVCache(loaded.decoder.config, 256, 16, torch.float32, torch.device("cpu"), spare_page=True)
    attention = load_attention(request.param, loaded.decoder.config, cache, 16, 2048, 256)
    return BuiltinRunner(loaded.decoder, cache, attention, load_tokenizer("synthetic"))


def generated(runner: Any, sampling: SamplingConfig, depth: int = 0) -> tuple[tuple[int, ...], list[TokenLogprob]]:
    """The output's ids, and what was told of each chosen token."""
    drive = Drive(runner, limits(pipeline_depth=depth, max_batch_size=16))
    drive.submit("task", [(1, PROMPT)], 2, sampling)
    found = drive.run()["task"]
    drive.close()
    return found, drive.told.get("task", [])


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.0},
        {"temperature": 0.7, "top_k": 5, "seed": 3},
        {"temperature": 1.3, "top_p": 0.8, "seed": 4, "presence_penalty": 1.5, "logit_bias": {"7": 5.0}},
    ],
    ids=str,
)
def test_they_are_the_models_own_whatever_the_sampling_made_of_them(
    runner: Any, tiny: tuple[Path, Any], changes: dict[str, Any], depth: int
) -> None:
    sampling = SamplingConfig(max_gen_length=8, ignore_tokenizer_eos=True, logprobs=3, **changes)
    ids, told = generated(runner, sampling, depth)
    assert ids == generated(runner, SamplingConfig(max_gen_length=8, ignore_tokenizer_eos=True, **changes), depth)[0]
    with torch.inference_mode():
        logits = tiny[1](torch.tensor([[*PROMPT, *ids]])).logits[0].float()
    expected = logits.log_softmax(-1)[len(PROMPT) - 1 : -1]
    for place, (token_id, each) in enumerate(zip(ids, told, strict=True)):
        assert each.token == f"w{token_id}"
        assert each.logprob == pytest.approx(float(expected[place, token_id]), abs=1e-4)
        values, top_ids = expected[place].topk(3)
        assert [text for text, _ in each.top] == [f"w{i}" for i in top_ids.tolist()]
        assert [value for _, value in each.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_who_asks_for_none_is_told_none_beside_who_asks_for_them(runner: Any) -> None:
    drive = Drive(runner, limits(max_batch_size=16))
    drive.submit(
        "asks", [(1, PROMPT)], 2, SamplingConfig(temperature=0.0, max_gen_length=4, ignore_tokenizer_eos=True, logprobs=0)
    )
    drive.submit("plain", [(3, PROMPT)], 4, SamplingConfig(temperature=0.0, max_gen_length=4, ignore_tokenizer_eos=True))
    found = drive.run()
    asked, plain = drive.results["asks"], drive.results["plain"]
    drive.close()
    assert found["asks"] == found["plain"]
    assert plain.logprob is None
    assert asked.logprob is not None
    assert asked.logprob.top == ()
