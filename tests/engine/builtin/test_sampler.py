"""Draws depend on seed and position only and follow the distribution that the configuration describes."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot.protocol.api import SamplingConfig
from parrot.protocol.errors import ParrotError

torch = pytest.importorskip("torch")

from parrot.engine.builtin import sampler  # noqa: E402
from parrot.engine.builtin.sampler import SamplingRow, check_sampling, uniform  # noqa: E402

PROBABILITIES = [0.4, 0.3, 0.15, 0.1, 0.05]


def logits(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows)


def sample(logits: torch.Tensor, rows: list[SamplingRow]) -> list[int]:
    chosen: list[int] = sampler.sample(logits, rows).tolist()
    return chosen


LOGITS = [math.log(p) for p in PROBABILITIES]


def drawn(sampling: SamplingConfig, n: int = 4000) -> Counter[int]:
    rows = [SamplingRow(sampling, seed) for seed in range(n)]
    return Counter(sample(logits(*[LOGITS] * n), rows))


def share(counts: Counter[int]) -> list[float]:
    return [counts[i] / counts.total() for i in range(5)]


def test_temperature_one_draws_the_models_distribution() -> None:
    assert share(drawn(SamplingConfig())) == pytest.approx(PROBABILITIES, abs=0.03)


def test_temperature_sharpens() -> None:
    squared = [p * p for p in PROBABILITIES]
    assert share(drawn(SamplingConfig(temperature=0.5))) == pytest.approx([p / sum(squared) for p in squared], abs=0.03)


def test_top_k_keeps_the_k_most_probable_in_their_proportions() -> None:
    assert share(drawn(SamplingConfig(top_k=2))) == pytest.approx([4 / 7, 3 / 7, 0, 0, 0], abs=0.03)


def test_top_p_keeps_the_fewest_tokens_that_have_that_mass() -> None:
    assert share(drawn(SamplingConfig(top_p=0.6))) == pytest.approx([4 / 7, 3 / 7, 0, 0, 0], abs=0.03)
    assert set(drawn(SamplingConfig(top_p=0.75))) == {0, 1, 2}


def test_top_p_is_a_part_of_what_top_k_left() -> None:
    assert set(drawn(SamplingConfig(top_k=2, top_p=0.5))) == {0}


def test_top_p_beyond_the_first_candidates_looks_at_more() -> None:
    flat = torch.zeros(2000, 3000)
    rows = [SamplingRow(SamplingConfig(top_p=0.999), seed) for seed in range(2000)]
    assert max(sample(flat, rows)) > 2500


def test_greedy_takes_the_most_probable_whatever_the_seed() -> None:
    for sampling in (SamplingConfig(temperature=0.0), SamplingConfig(top_k=1)):
        assert set(drawn(sampling, 50)) == {0}


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from([{}, {"top_p": 0.7}, {"top_k": 3}, {"temperature": 0.0}, {"presence_penalty": 1.0}]), min_size=2)
)
def test_a_row_draws_the_same_alone_and_in_any_batch(kinds: list[dict[str, float]]) -> None:
    def rows() -> list[SamplingRow]:
        made = [SamplingRow(SamplingConfig(**kind), seed, position=seed % 3) for seed, kind in enumerate(kinds)]
        for row in made:
            row.counts.update({1: 2})
        return made

    together = sample(logits(*[LOGITS] * len(kinds)), rows())
    alone = [sample(logits(LOGITS), [row])[0] for row in rows()]
    assert together == alone


def test_uniform_draws_depend_on_seed_and_position_and_fill_the_interval() -> None:
    draws = [uniform(seed, position) for seed in range(40) for position in range(40)]
    assert len(set(draws)) == len(draws)
    assert all(0 <= u < 1 for u in draws)
    assert sum(draws) / len(draws) == pytest.approx(0.5, abs=0.03)
    assert uniform(7, 3) == uniform(7, 3)


def test_penalties_and_bias_change_what_is_most_probable() -> None:
    def first(counts: dict[int, int], prompt: tuple[int, ...] = (), **fields: object) -> int:
        row = SamplingRow(SamplingConfig(temperature=0.0, **fields), 0, prompt, Counter(counts))  # type: ignore[arg-type]
        return sample(logits([2.0, 1.5, 1.0]), [row])[0]

    assert first({0: 1}, presence_penalty=0.6) == 1
    assert first({0: 3}, presence_penalty=0.4) == 0
    assert first({0: 3}, frequency_penalty=0.2) == 1
    assert first({}, prompt=(0,), repetition_penalty=1.5) == 1
    assert first({0: 1}, repetition_penalty=1.5) == 1
    assert first({}, logit_bias={"2": 5.0}) == 2


def test_penalties_and_biases_of_a_row_change_no_other() -> None:
    """Alone or among rows with others of their own: the logits are the same to the bit."""
    kinds = [{}, {"repetition_penalty": 1.3}, {"presence_penalty": 0.5, "frequency_penalty": 0.2, "logit_bias": {"1": -2.0}},
             {"logit_bias": {"0": 1.0, "4": 3.0}}, {"repetition_penalty": 0.7, "presence_penalty": -0.5}]  # fmt: skip
    rows = [SamplingRow(SamplingConfig(**kind), 0, (i, 4), Counter({1: i, 3: 2})) for i, kind in enumerate(kinds)]  # type: ignore[arg-type]
    together = torch.randn(5, 5, generator=torch.Generator().manual_seed(1))
    alone = together.clone()
    before = together.clone()
    sampler.sample(together, rows)
    for i, row in enumerate(rows):
        sampler.sample(alone[i : i + 1], [row])
    assert torch.equal(together, alone)
    assert [bool((a != b).any()) for a, b in zip(before, together, strict=True)] == [False, True, True, True, True]
    assert together[2].tolist() == pytest.approx(
        (before[2] - torch.tensor([0.0, 0.5 + 2 * 0.2 + 2.0, 0.0, 0.5 + 2 * 0.2, 0.0])).tolist()
    )


@pytest.mark.parametrize(
    ("sampling", "named"),
    [
        (SamplingConfig(output_length=5), "output_length"),
        (SamplingConfig(stop_token_ids=(500,)), "500"),
        (SamplingConfig(logit_bias={"x": 1.0}), "'x'"),
        (SamplingConfig(logit_bias={"100": 1.0}), "'100'"),
        (SamplingConfig(n=2), "n is 2"),
    ],
)
def test_what_cannot_be_honoured_is_refused_and_named(sampling: SamplingConfig, named: str) -> None:
    with pytest.raises(ParrotError, match="sampling_config") as caught:
        check_sampling(sampling, 100, dummy=False)
    assert caught.value.code == "bad_sampling"
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(temperature=1e-300),
        SamplingConfig(temperature=1e300),
        SamplingConfig(temperature=1e-300, top_p=0.5),
        SamplingConfig(repetition_penalty=1e-300),
        SamplingConfig(repetition_penalty=1e300),
        SamplingConfig(repetition_penalty=1e300, top_k=2**31 - 1),
        SamplingConfig(logit_bias={"0": 100.0, "1": -100.0}, top_p=1e-300),
    ],
)
def test_extreme_but_legal_values_draw_a_token_of_the_vocabulary(sampling: SamplingConfig) -> None:
    rows = [SamplingRow(sampling, seed, prompt=range(5)) for seed in range(50)]
    assert set(sample(logits(*[LOGITS] * 25, *[[-x for x in LOGITS]] * 25), rows)) <= set(range(5))


def test_a_repetition_penalty_folds_ids_of_the_synthetic_tokenizer_into_the_vocabulary() -> None:
    row = SamplingRow(SamplingConfig(temperature=0.0, repetition_penalty=2.0), 0, prompt=[5_000_000])
    assert sample(logits([2.0, 1.5, 0.0, 0.0, 0.0]), [row]) == [1]


def test_dummy_weights_honour_an_output_length() -> None:
    check_sampling(SamplingConfig(output_length=5), 100, dummy=True)
