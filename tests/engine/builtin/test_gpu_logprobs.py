"""On a GPU: log-probabilities are the reference's log-softmax, whatever the sampling made of them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from parrot.engine.builtin.attention import unavailable  # noqa: E402
from parrot.protocol.api import SamplingConfig  # noqa: E402
from parrot.protocol.engine import TokenLogprob  # noqa: E402
from tests.engine.builtin.conftest import VOCABULARY, make_model  # noqa: E402
from tests.engine.builtin.driving import Drive, limits  # noqa: E402
from tests.engine.builtin.test_gpu_engine import BARS, FUNCTIONS, WIDER, engine, make_rounded  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

TOP = 20
TOKENS = 24
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 5, "seed": 3},
    {"temperature": 1.3, "top_p": 0.8, "seed": 4},
    {"temperature": 0.0, "presence_penalty": 1.5, "repetition_penalty": 1.2, "logit_bias": {"7": 0.5}},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("model")
    return folder, make_model(folder, **WIDER)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_log_probabilities_are_those_of_a_float32_reference(model: tuple[Path, Any], name: str, dtype: str) -> None:
    """Of each sampling, one request that asks beside one that does not, behind a shared prefix, prefill in chunks."""
    if reason := unavailable(name, "cuda"):
        pytest.skip(reason)
    folder, reference = model
    kind = getattr(torch, dtype)
    given = limits(pipeline_depth=1, max_batch_size=16, fill_chunk_size=50)
    draw = random.Random(11)
    prefix = [draw.randrange(3, VOCABULARY) for _ in range(90)]
    own = [[draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, 130))] for _ in SAMPLINGS]

    def run(asking: dict[str, int]) -> tuple[dict[Any, tuple[int, ...]], dict[Any, list[TokenLogprob]]]:
        """Outputs, and what was told, of two requests of each sampling; those with even keys are `asking`."""
        drive = Drive(engine(folder, name, kind, given), given)
        for i, (sampling, ids) in enumerate(zip(SAMPLINGS, own, strict=True)):
            for key, more in ((2 * i, asking), (2 * i + 1, {})):
                config = SamplingConfig(max_gen_length=TOKENS, ignore_tokenizer_eos=True, **sampling, **more)
                drive.submit(key, [(1, prefix), (10 + key, ids)], 100 + key, config)
        return drive.run(), drive.told

    outputs, told = run({"logprobs": TOP})
    assert run({}) == (outputs, {}), "to be asked changes what is chosen"
    assert sorted(told) == [2 * i for i in range(len(SAMPLINGS))]
    rounded = make_rounded(reference, kind)
    errors = []
    for key, tokens in told.items():
        ids, prompt = outputs[key], [*prefix, *own[key // 2]]
        assert [each.token for each in tokens] == [f"w{i}" for i in ids]
        with torch.inference_mode():
            logits = rounded(torch.tensor([[*prompt, *ids]])).logits[0]
        expected = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        for place, each in enumerate(tokens):
            errors.append(_error(each, ids[place], expected[place]))
    print(f"\n{name} {dtype}: of the worst position {max(errors):.2e}, of the mean one {sum(errors) / len(errors):.2e}")
    assert max(errors) < BARS[dtype]


def _error(told: TokenLogprob, chosen: int, expected: Any) -> float:
    """‖told − expected‖ relative to how far the expected values, [vocabulary], are from their mean: by the tokens that are
    told, and by the most probable ones."""
    named = torch.tensor([chosen, *(int(text[1:]) for text, _ in told.top)])
    values = torch.tensor([told.logprob, *(value for _, value in told.top)])
    mean = expected.mean()
    found = []
    for got, wanted in ((values, expected[named]), (values[1:], expected.topk(TOP).values)):
        found.append(float((got - wanted).norm() / (wanted - mean).norm()))
    return max(found)
