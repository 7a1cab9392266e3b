"""Attention over pages and windows gives what the definition of causal attention gives, whatever came before."""

from __future__ import annotations

import random

import pytest

torch = pytest.importorskip("torch")

from parrot.engine.builtin.attention import load_attention  # noqa: E402
from parrot.engine.builtin.attention.base import AttentionRow  # noqa: E402
from parrot.engine.builtin.attention.windows import SMALLEST, window_size  # noqa: E402
from parrot.engine.builtin.kv_cache import KVCache  # noqa: E402
from parrot.engine.builtin.models.config import ModelConfig  # noqa: E402

CONFIG = ModelConfig(
    name="test", family="llama", vocab_size=8, hidden_size=32, intermediate_size=8, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=8, max_seq_len=1024,
)  # fmt: skip


def expected(queries: torch.Tensor, kv: torch.Tensor, start: int) -> torch.Tensor:
    """By the definition, in float64: queries [n, 4, 8] at positions start.., kv [start + n, 4, 8]."""
    out = torch.empty(queries.shape, dtype=torch.float64)
    for i in range(queries.shape[0]):
        seen = kv[: start + i + 1].double()
        for head in range(4):
            scores = seen[:, head // 2] @ queries[i, head].double() / 8**0.5
            out[i, head] = scores.softmax(0) @ seen[:, 2 + head // 2]
    return out.flatten(1)


@pytest.mark.parametrize("pages", [40, 400])
def test_any_mixture_of_rows_in_any_order_of_iterations_equals_the_definition(pages: int) -> None:
    """Few pages: the windows' budget is too small for all rows. Sequences cross the smallest window's size."""
    cache = KVCache(CONFIG, pages, 8, torch.float32, torch.device("cpu"))
    attention = load_attention("torch_sdpa", CONFIG, cache)
    draw = random.Random(pages)
    torch.manual_seed(pages)
    free = list(range(pages))
    draw.shuffle(free)
    lengths = [0, 0, 0, 0]
    stored = [torch.empty(2, 0, 4, 8) for _ in lengths]
    most = pages * 8 // 4
    tables = [[free.pop() for _ in range(pages // 4)] for _ in lengths]
    for _ in range(60):
        rows = []
        for i in draw.sample(range(4), draw.randint(1, 4)):
            count = min(draw.choice([1, 1, 1, 1, 2, 40]), most - lengths[i])
            if lengths[i] and draw.random() < 0.03:  # another sequence under a key that was gone for a while
                lengths[i], count = 0, 3
            if count:
                rows.append(AttentionRow(i, lengths[i], lengths[i] + count, tables[i]))
        if not rows:
            continue
        tokens = sum(row.stop - row.start for row in rows)
        plan = attention.plan(rows)
        for layer in range(2):
            heads = torch.randn(tokens, 8, 8)
            found = attention.attend(plan, layer, heads)
            first = 0
            for row in rows:
                new = heads[first : first + row.stop - row.start]
                kv = torch.cat((stored[row.key][layer, : row.start], new[:, 4:]))
                assert torch.allclose(
                    found[first : first + len(new)].double(), expected(new[:, :4], kv, row.start), atol=1e-5
                ), row
                if layer == 0:
                    grown = torch.empty(2, row.stop, 4, 8)
                    grown[:, : row.start] = stored[row.key][:, : row.start]
                    stored[row.key] = grown
                stored[row.key][layer] = kv
                first += len(new)
        for row in rows:
            lengths[row.key] = row.stop


def test_a_window_is_the_smallest_power_of_two_that_holds_the_row() -> None:
    assert [window_size(n) for n in (1, SMALLEST, SMALLEST + 1, 1000, 1024, 1025)] == [128, 128, 256, 1024, 1024, 2048]


def test_copied_pages_hold_what_their_sources_held_before_any_copy() -> None:
    cache = KVCache(CONFIG, 4, 2, torch.float32, torch.device("cpu"))
    for layer in cache.layers:
        layer.copy_(torch.arange(layer.numel()).view(layer.shape))
    before = [layer.clone() for layer in cache.layers]
    cache.copy_pages([(0, 1), (1, 3)])
    for was, now in zip(before, cache.layers, strict=True):
        assert torch.equal(now[2:4], was[0:2])
        assert torch.equal(now[6:8], was[2:4])
        assert torch.equal(now[:2], was[:2])
