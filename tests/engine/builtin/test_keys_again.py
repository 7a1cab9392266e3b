"""A key that a task has had may be another's later: what the runner kept of the first is not taken for the second's."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from parrot.protocol.api import SamplingConfig  # noqa: E402
from tests.engine.builtin.conftest import VOCABULARY, make_model  # noqa: E402
from tests.engine.builtin.driving import Drive, limits  # noqa: E402
from tests.engine.builtin.test_gpu_engine import Recording, engine  # noqa: E402


def outputs(runner: Recording, key: str, prompt: list[int], most: int) -> tuple[int, ...]:
    drive = Drive(runner, limits(num_blocks=40))
    sampling = SamplingConfig(temperature=0.0, max_gen_length=most, ignore_tokenizer_eos=True)
    drive.submit(key, [(1, prompt)], 2, sampling)
    found = drive.run()[key]
    drive.close()
    return found


def test_a_task_that_begins_where_one_of_the_same_key_ended_reads_its_own_tokens(tmp_path: Path) -> None:
    make_model(tmp_path)
    runner = engine(tmp_path, "torch_sdpa", torch.float32, limits(num_blocks=40), device="cpu")
    draw = torch.Generator().manual_seed(7)
    for length in (45, 50, 55):
        first, second = (torch.randint(3, VOCABULARY, (n,), generator=draw).tolist() for n in (length, length + 19))
        alone = outputs(runner, f"another {length}", second, 12)
        outputs(runner, "same", first, 20)
        assert outputs(runner, "same", second, 12) == alone
