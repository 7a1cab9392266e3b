"""Whatever way a task's tokens are computed, its output is the same; and an output ends where it should."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from parrot.engine.builtin.load import LoadedRunner
from parrot.engine.builtin.runner import Launched
from parrot.protocol.api import SamplingConfig
from parrot.protocol.errors import ParrotError
from tests.engine.builtin.conftest import VOCABULARY
from tests.engine.builtin.driving import GREEDY, Drive, limits, load

torch = pytest.importorskip("torch")

SAMPLED = SamplingConfig(seed=11, max_gen_length=12, temperature=0.8, top_p=0.9, ignore_tokenizer_eos=True)


@pytest.fixture(scope="module")
def loaded(tiny: tuple[Path, Any]) -> LoadedRunner:
    return load(tiny[0], tokenizer="synthetic")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    draw = random.Random(5)
    return [[draw.randrange(3, VOCABULARY) for _ in range(draw.choice([1, 9, 16, 33, 150]))] for _ in range(12)]


def alone(loaded: LoadedRunner, prompt: list[int], sampling: SamplingConfig = GREEDY) -> tuple[int, ...]:
    known = (id(loaded), tuple(prompt), sampling)
    if known not in _alone:
        drive = Drive(loaded.runner, limits())
        drive.submit("t", [(1, prompt)], 2, sampling)
        _alone[known] = drive.run()["t"]
        drive.close()
    return _alone[known]


_alone: dict[tuple[Any, ...], tuple[int, ...]] = {}


def test_tokens_that_another_lost_are_missed_and_not_waited_for_for_ever(loaded: LoadedRunner) -> None:
    class Lost:
        def tolist(self) -> list[int]:
            raise RuntimeError("a device error")

    runner = loaded.runner
    first, second = Launched([], [], Lost()), Launched([], [])  # type: ignore[arg-type]
    runner._launched.extend([first, second])
    with pytest.raises(RuntimeError, match="a device error"):
        runner.finish(second)  # takes the older one first
    with pytest.raises(RuntimeError, match="lost"):
        runner.finish(first)
    assert runner.finish(second) == []


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"fill_chunk_size": 7}, {"max_batch_size": 3}, {"max_num_batched_tokens": 20}, {"pipeline_depth": 1}],
    ids=str,
)
def test_a_batch_gives_each_task_what_it_gets_alone(
    loaded: LoadedRunner, prompts: list[list[int]], sampling: SamplingConfig, changes: dict[str, int]
) -> None:
    drive = Drive(loaded.runner, limits(**changes))
    for i, prompt in enumerate(prompts):
        drive.submit(i, [(2 * i, prompt)], 2 * i + 1, sampling)
    found = drive.run()
    drive.close()
    assert found == {i: alone(loaded, prompt, sampling) for i, prompt in enumerate(prompts)}


@pytest.mark.parametrize("depth", [0, 1])
def test_preempted_tasks_go_on_where_they_were(loaded: LoadedRunner, prompts: list[list[int]], depth: int) -> None:
    sampling = SamplingConfig(seed=3, max_gen_length=40, presence_penalty=0.5, ignore_tokenizer_eos=True)
    drive = Drive(loaded.runner, limits(num_blocks=14, pipeline_depth=depth))
    chosen = [prompt for prompt in prompts if len(prompt) < 40][:6]
    for i, prompt in enumerate(chosen):
        drive.submit(i, [(2 * i, prompt)], 2 * i + 1, sampling)
    found = drive.run()
    drive.close()
    assert drive.preempted
    assert found == {i: alone(loaded, prompt, sampling) for i, prompt in enumerate(chosen)}


@pytest.mark.parametrize("depth", [0, 1])
def test_tasks_that_share_a_prefix_get_what_they_would_without(
    loaded: LoadedRunner, prompts: list[list[int]], depth: int
) -> None:
    prefix = prompts[3] + prompts[4]
    drive = Drive(loaded.runner, limits(pipeline_depth=depth))
    for i, prompt in enumerate(prompts):
        drive.submit(i, [(1000, prefix), (2 * i, prompt)], 2 * i + 1)
    found = drive.run()
    drive.close()
    assert found == {i: alone(loaded, prefix + prompt) for i, prompt in enumerate(prompts)}


def test_a_template_with_two_outputs_continues_the_first(loaded: LoadedRunner, prompts: list[list[int]]) -> None:
    drive = Drive(loaded.runner, limits())
    drive.submit("first", [(1, prompts[0])], 2)
    first = drive.run()["first"]
    drive.submit("second", [(1, prompts[0]), (2, first), (3, prompts[1])], 4)
    second = drive.run()["second"]
    drive.close()
    assert second == alone(loaded, [*prompts[0], *first, *prompts[1]])


def test_primitives_continue_a_context_by_its_id(loaded: LoadedRunner, prompts: list[list[int]]) -> None:
    drive = Drive(loaded.runner, limits())
    drive.submit("fill", [(1, prompts[0])], None)
    drive.run()
    drive.submit("generate", [], 2, parent=1)
    first = drive.run()["generate"]
    drive.submit("more", [(3, prompts[1])], 4, parent=2)
    second = drive.run()["more"]
    drive.close()
    assert drive.finished == ["fill", "generate", "more"]
    assert first == alone(loaded, prompts[0])
    assert second == alone(loaded, [*prompts[0], *first, *prompts[1]])


def test_a_second_attempt_goes_on_behind_the_forced_tokens(loaded: LoadedRunner, prompts: list[list[int]]) -> None:
    whole = alone(loaded, prompts[1], SAMPLED)
    for cut in (1, 5, 11):
        drive = Drive(loaded.runner, limits())
        drive.submit("again", [(1, prompts[1])], 2, SAMPLED, forced=whole[:cut])
        assert drive.run()["again"] == whole
        streamed = drive.streamed["again"]
        drive.close()
        assert drive.results["again"].output.endswith(streamed)
        assert len(streamed.split()) == 12 - cut


def test_what_an_abandoned_attempt_generated_is_not_taken_for_the_context_of_a_later_one(
    loaded: LoadedRunner, prompts: list[list[int]]
) -> None:
    drive = Drive(loaded.runner, limits())
    drive.submit("abandoned", [(1, prompts[0])], 2)
    for _ in range(4):
        drive.step()
    drive.core.abort("abandoned")
    drive.runner.drop_task("abandoned")
    drive.submit("next", [(1, prompts[0]), (2, prompts[1])], 3)  # generated elsewhere, with other tokens
    following = drive.run()["next"]
    drive.close()
    assert following == alone(loaded, prompts[0] + prompts[1])


def words(ids: tuple[int, ...]) -> str:
    return " ".join(f"w{i}" for i in ids)


def test_the_streamed_text_is_the_output(loaded: LoadedRunner, prompts: list[list[int]]) -> None:
    drive = Drive(loaded.runner, limits())
    drive.submit("t", [(1, prompts[0])], 2, SAMPLED)
    ids = drive.run()["t"]
    drive.close()
    result = drive.results["t"]
    assert (result.reason, result.kept) == ("length", 12)
    assert drive.streamed["t"] == result.output == words(ids)


@pytest.mark.parametrize("depth", [0, 1])
def test_an_output_ends_before_its_stop_and_its_context_can_be_continued(
    loaded: LoadedRunner, prompts: list[list[int]], depth: int
) -> None:
    whole = alone(loaded, prompts[2], SAMPLED)
    at = next(i for i in range(3, 12) if whole[i] not in whole[:i])
    stops = {
        "stop_token": SamplingConfig(**{**fields(SAMPLED), "stop_token_ids": (whole[at],)}),
        "stop_str": SamplingConfig(**{**fields(SAMPLED), "stop_str": f" w{whole[at]}"}),
    }
    for reason, sampling in stops.items():
        drive = Drive(loaded.runner, limits(pipeline_depth=depth))
        drive.submit("t", [(1, prompts[2])], 2, sampling)
        assert drive.run()["t"] == whole[:at]
        result = drive.results["t"]
        assert (result.reason, result.kept, result.output) == (reason, at, words(whole[:at]))
        assert drive.streamed["t"] == result.output
        drive.submit("next", [(3, prompts[0])], 4, parent=2)
        following = drive.run()["next"]
        drive.close()
        assert following == alone(loaded, [*prompts[2], *whole[:at], *prompts[0]])


def fields(sampling: SamplingConfig) -> dict[str, Any]:
    return {name: getattr(sampling, name) for name in sampling.__struct_fields__}


def test_the_models_end_token_ends_an_output_unless_it_is_ignored(loaded: LoadedRunner, prompts: list[list[int]]) -> None:
    ends = SamplingConfig(temperature=0.0, max_gen_length=4, logit_bias={"2": 1000.0})
    drive = Drive(loaded.runner, limits())
    drive.submit("ends", [(1, prompts[0])], 2, ends)
    drive.submit("ignores", [(3, prompts[0])], 4, SamplingConfig(**{**fields(ends), "ignore_tokenizer_eos": True}))
    assert drive.run() == {"ends": (), "ignores": (2, 2, 2, 2)}
    drive.close()
    assert (drive.results["ends"].reason, drive.results["ends"].kept) == ("eos", 0)
    assert drive.results["ignores"].reason == "length"


def test_what_cannot_be_run_is_refused_and_leaves_nothing_behind(loaded: LoadedRunner, tiny: tuple[Path, Any]) -> None:
    drive = Drive(loaded.runner, limits())
    with pytest.raises(ParrotError) as caught:
        drive.submit("t", [(1, [1, 2])], 2, SamplingConfig(output_length=3))
    assert caught.value.code == "bad_sampling"
    drive.submit("t", [(1, [1, 2])], 2)
    assert len(drive.run()["t"]) == 8
    drive.close()


def test_token_ids_that_the_model_does_not_have_are_refused_by_number() -> None:
    pytest.importorskip("tokenizers")
    loaded = load("HuggingFaceTB/SmolLM2-135M-Instruct", use_dummy_weights=True, model_config=SMALL, tokenizer="synthetic")
    drive = Drive(loaded.runner, limits())
    drive.submit("t", [(1, [10**6, 5])], 2, GREEDY)  # synthetic ids know no vocabulary
    assert len(drive.run()["t"]) == 8
    with pytest.raises(ParrotError, match=str(2**70)):  # but they are numbers of 31 bits
        drive.submit("u", [(3, [2**70])], 4, GREEDY)
    drive.close()


SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 128}  # fmt: skip


def test_dummy_weights_give_outputs_of_exactly_the_length_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    loaded = load("lmsys/vicuna-7b-v1.3", use_dummy_weights=True, model_config=SMALL, tokenizer="not/there")
    assert loaded.dummy
    assert loaded.tokenizer.name == "synthetic"
    assert "not/there" in loaded.notes[0]
    drive = Drive(loaded.runner, limits())
    exact = SamplingConfig(output_length=5, max_gen_length=20, logit_bias={"2": 1000.0}, stop_token_ids=(2,), stop_str="w2")
    drive.submit("t", [(1, [1, 2, 3])], 2, exact)
    assert drive.run() == {"t": (2, 2, 2, 2, 2)}
    drive.close()
    again = load("lmsys/vicuna-7b-v1.3", use_dummy_weights=True, model_config=SMALL, tokenizer="synthetic")
    assert alone(again, [5, 6, 7]) == alone(loaded, [5, 6, 7]), "the same seed makes the same weights"
    other = load("lmsys/vicuna-7b-v1.3", use_dummy_weights=True, model_config=SMALL, tokenizer="synthetic", random_seed=9)
    assert alone(other, [5, 6, 7]) != alone(loaded, [5, 6, 7])


def test_the_seed_draws_the_same_output_again_and_another_seed_another(loaded: LoadedRunner, prompts: list[list[int]]) -> None:
    outputs = {seed: alone(loaded, prompts[0], SamplingConfig(seed=seed, max_gen_length=12)) for seed in (1, 2, 3)}
    assert len(set(outputs.values())) == 3
    _alone.clear()
    assert alone(loaded, prompts[0], SamplingConfig(seed=2, max_gen_length=12)) == outputs[2]


def test_tokens_outside_the_vocabulary_of_a_real_tokenizer_are_refused(loaded: LoadedRunner) -> None:
    class Renamed:
        def __getattr__(self, name: str) -> Any:
            return "mine" if name == "name" else getattr(loaded.tokenizer, name)

    from parrot.engine.builtin.runner import BuiltinRunner

    runner = BuiltinRunner(loaded.runner.decoder, loaded.runner._cache, loaded.runner._attention, Renamed())  # type: ignore[arg-type]
    with pytest.raises(ParrotError, match=f"{VOCABULARY}"):
        Drive(runner, limits()).submit("t", [(1, [1, VOCABULARY])], 2)
