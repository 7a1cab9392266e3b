"""The output of an emulated engine is a function of the prompt and the seed, as a model's is."""

from __future__ import annotations

from parrot.engine.emulated.output import SyntheticOutput
from parrot.protocol.api import SamplingConfig
from parrot.tokenizer import load_tokenizer

OUTPUT = SyntheticOutput(load_tokenizer("synthetic"))


def ids(prompt: list[list[int]], n_tokens: int = 8, **sampling: float) -> tuple[int, ...]:
    return OUTPUT.ids(OUTPUT.key(prompt, SamplingConfig(**sampling)), n_tokens)  # type: ignore[arg-type]


def test_the_same_prompt_and_seed_say_the_same_however_the_prompt_is_cut() -> None:
    assert ids([[1, 2], [3]], seed=7) == ids([[1], [2, 3]], seed=7)


def test_another_prompt_or_seed_says_something_else() -> None:
    said = {ids(prompt, seed=seed) for prompt in ([[1, 2]], [[12]], [[2, 1]], [[1], [2, 0]]) for seed in (1, 2)}
    assert len(said) == 8


def test_greedy_sampling_knows_no_seed() -> None:
    assert ids([[5]], temperature=0.0, seed=1) == ids([[5]], temperature=0.0, seed=2)


def test_a_longer_output_begins_as_a_shorter_one() -> None:
    assert ids([[5]], 9)[:4] == ids([[5]], 4)
