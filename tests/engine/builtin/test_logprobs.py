"""Log-probabilities are those of the model's own distribution, of the tokens that were chosen, in order, stop or no stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from parrot.protocol.api import SamplingConfig
from parrot.protocol.engine import TokenLogprob
from tests.engine.builtin.driving import Drive, limits, load

torch = pytest.importorskip("torch")

PROMPT = [3, 17, 42, 99, 5, 120, 64]


@pytest.fixture(scope="module")
def runner(tiny: tuple[Path, Any]) -> Any:
    return load(str(tiny[0]), tokenizer="synthetic", dtype="float32").runner


def generated(runner: Any, sampling: SamplingConfig, depth: int = 0) -> tuple[list[int], list[TokenLogprob | None]]:
    """The output's ids, and what was told of each chosen token."""
    told: list[TokenLogprob | None] = []
    finish = runner.finish

    def watching(launched: Any) -> Any:
        results = finish(launched)
        told.extend(result.logprob for result in results)
        return results

    runner.finish = watching
    try:
        drive = Drive(runner, limits(pipeline_depth=depth))
        drive.submit("task", [(1, PROMPT)], 2, sampling)
        found = drive.run()["task"]
        drive.close()
    finally:
        del runner.finish
    return found, told


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
    assert len(told) >= len(ids)
    for place, (token_id, each) in enumerate(zip(ids, told, strict=False)):
        assert each is not None
        assert each.token == f"w{token_id}"
        assert each.logprob == pytest.approx(float(expected[place, token_id]), abs=1e-4)
        values, top_ids = expected[place].topk(3)
        assert [text for text, _ in each.top] == [f"w{i}" for i in top_ids.tolist()]
        assert [value for _, value in each.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_who_asks_for_none_is_told_none_beside_who_asks_for_them(runner: Any) -> None:
    drive = Drive(runner, limits())
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
