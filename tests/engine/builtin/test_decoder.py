"""The decoder's logits are those of transformers, for every family, whole and in chunks, over pages in any order."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.engine.builtin.conftest import VOCABULARY, make_model

torch = pytest.importorskip("torch")

from parrot.engine.builtin.attention import load_attention  # noqa: E402
from parrot.engine.builtin.attention.base import AttentionRow  # noqa: E402
from parrot.engine.builtin.kv_cache import KVCache  # noqa: E402
from parrot.engine.builtin.models.config import config_at, model_config  # noqa: E402
from parrot.engine.builtin.models.decoder import Decoder  # noqa: E402
from parrot.engine.builtin.weights import Checkpoint, load_decoder  # noqa: E402
from parrot.model_files import ModelFiles  # noqa: E402

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 16},
    "every head its own key": {"num_key_value_heads": 6},
    "llama3 positions": {"rope_parameters": LLAMA3},
    "linear positions": {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
    "mistral": {"family": "mistral", "sliding_window": None},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3", "head_dim": 16},
    "opt": {"family": "opt"},
    "opt without biases": {"family": "opt", "enable_bias": False, "activation_function": "gelu"},
}


def load(folder: Path) -> Decoder:
    config = model_config("tiny", config_at(ModelFiles(folder)))
    return load_decoder(config, Checkpoint("tiny", folder), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_those_of_transformers_over_shuffled_pages_and_uneven_chunks(name: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = dict(FAMILIES[name])
    reference = make_model(tmp_path, **changes)
    decoder = load(tmp_path)
    cache = KVCache(decoder.config, 64, 4, torch.float32, torch.device("cpu"))
    attention = load_attention("torch_sdpa", decoder.config, cache)
    draw = random.Random(3)
    pages = draw.sample(range(64), 64)
    sequences = [[draw.randrange(VOCABULARY) for _ in range(n)] for n in (37, 5, 70)]
    tables = [pages[:16], pages[16:32], pages[32:50]]
    cuts = [[0, 10, 11, 12, 37], [0, 1, 2, 3, 5], [0, 30, 60, 61, 70]]
    for step in range(4):
        rows = [AttentionRow(i, cut[step], cut[step + 1], tables[i]) for i, cut in enumerate(cuts)]
        plan = attention.plan(rows)
        ids = [token for row in rows for token in sequences[row.key][row.start : row.stop]]
        positions = [p for row in rows for p in range(row.start, row.stop)]
        logits = decoder.forward(
            torch.tensor(ids),
            torch.tensor(positions),
            lambda layer, heads, plan=plan: attention.attend(plan, layer, heads),
            torch.arange(len(ids)),
        )
        first = 0
        for row in rows:
            with torch.inference_mode():
                expected = reference(torch.tensor([sequences[row.key][: row.stop]])).logits[0, row.start :]
            found = logits[first : first + row.stop - row.start]
            assert torch.allclose(found, expected, atol=1e-4), (name, step, row)
            first += row.stop - row.start
