"""The attention functions of GPUs: their plans on a CPU, over kernels in plain torch; the kernels themselves where Triton is.

On a machine without a GPU the kernels run in Triton's interpreter when TRITON_INTERPRET is 1 (numpy below 2.3 is needed).
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from parrot.engine.batches import Span  # noqa: E402
from parrot.engine.builtin.attention import load_attention  # noqa: E402
from parrot.engine.builtin.attention.prefix_groups import shared_prefixes  # noqa: E402
from parrot.engine.builtin.attention.work_items import Fill, Pace, cut  # noqa: E402
from parrot.engine.builtin.kv_cache import KVCache  # noqa: E402
from parrot.engine.builtin.load import LoadedRunner  # noqa: E402
from parrot.engine.builtin.models.config import ModelConfig  # noqa: E402
from parrot.engine.builtin.runner import BuiltinRunner  # noqa: E402
from tests.engine.builtin import emulation  # noqa: E402
from tests.engine.builtin.conftest import VOCABULARY  # noqa: E402
from tests.engine.builtin.driving import Drive, limits, load  # noqa: E402

FUNCTIONS = ["xformers_paged", "xformers_shared_prefix", "xformers_with_buffer"]


@pytest.fixture(scope="module")
def loaded(tiny: tuple[Path, Any]) -> LoadedRunner:
    return load(tiny[0], tokenizer="synthetic")


def runner_with(loaded: LoadedRunner, name: str, graph_tokens: int = 1024) -> BuiltinRunner:
    """The loaded model with another attention function, over a cache of its own."""
    decoder = loaded.runner.decoder
    cache = KVCache(decoder.config, 256, 16, torch.float32, torch.device("cpu"), spare_page=True)
    attention = load_attention(name, decoder.config, cache, 64, 2048, graph_tokens)
    return BuiltinRunner(decoder, cache, attention, loaded.tokenizer)


def prompts() -> list[list[int]]:
    draw = random.Random(7)
    return [[draw.randrange(3, VOCABULARY) for _ in range(n)] for n in (1, 20, 33, 150, 40, 64, 7)]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("depth", "graph_tokens"), [(0, 1024), (1, 1024), (1, 40)])
def test_shared_nested_chunked_and_preempted_tasks_get_what_torch_gives(
    loaded: LoadedRunner, name: str, depth: int, graph_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Iterations of more than `graph_tokens` are not padded, and fill by xformers."""
    emulation.install(monkeypatch)
    monkeypatch.setattr("parrot.engine.builtin.attention.xformers_shared_prefix.LEAST_SAVED_BYTES", 1)
    found = []
    for runner in (loaded.runner, runner_with(loaded, name, graph_tokens)):
        drive = Drive(runner, limits(pipeline_depth=depth, fill_chunk_size=48, num_blocks=60))
        roots = {1: prompts()[3], 2: prompts()[5]}
        for i, prompt in enumerate(prompts()):
            root = 1 + i % 2
            middle = [(10 + root, prompts()[4])] if i > 3 else []
            drive.submit(i, [(root, roots[root]), *middle, (100 + i, prompt)], 200 + i)
        outputs = drive.run()
        found.append((outputs, bool(drive.preempted)))
        drive.close()
    assert found[0] == found[1]


# ---------------------------------------------------------------------------------------------------------- the kernels


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def kernels() -> Any:
    pytest.importorskip("triton")
    if not torch.cuda.is_available() and not interpreted():
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
    from parrot.engine.builtin.attention import split_kv

    return split_kv


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 32), (6, 2, 8), (8, 1, 128), (5, 5, 80)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernels_compute_what_plain_torch_does(heads: int, kv_heads: int, dim: int, dtype: str) -> None:
    found = kernels()
    if interpreted() and dtype != "float32":
        pytest.skip("the interpreter has no bfloat16")
    device = torch.device("cpu" if interpreted() else "cuda")
    config = ModelConfig("t", "llama", 8, 32, 8, 1, heads, kv_heads, dim, 1024)
    cache = KVCache(config, 96, 16, getattr(torch, dtype), device, spare_page=True)
    torch.manual_seed(heads)
    cache.layers[0].copy_(torch.randn(cache.layers[0].shape))
    pages = random.Random(dim).sample(range(96), 96)
    spans = [[Span(1, 0, 200), Span(10 + i, 200, 201 + 30 * i)] for i in range(5)] + [[Span(20, 0, 70)]]
    tables = torch.tensor([pages[:12] + pages[12 + 9 * i : 21 + 9 * i] for i in range(6)], dtype=torch.int32)
    groups = shared_prefixes(spans, 16, 1)
    lengths = [spans[i][-1].stop for i in groups.order]
    fills = [Fill(90, 37), Fill(0, 9)]  # of the sequences behind them, which are given the pages of the first two
    tables = tables[[*groups.order, 0, 1]]
    items = cut(lengths, groups.segments, groups.own, fills, rows_per_item=4, pace=Pace(10, 10), most_partials=512)
    queries = torch.randn(53, heads + 3, dim, dtype=getattr(torch, dtype))[:, :heads]  # one of them is padding
    results = []
    for partial, merge, where in (
        (emulation.partial_attention, emulation.merge_partials, torch.device("cpu")),
        (found.partial_attention, found.merge_partials, device),
    ):
        real = where == device and partial is not emulation.partial_attention
        kind = getattr(torch, dtype) if real else torch.float32
        first = torch.tensor([*items.first.tolist(), items.first[-1]], dtype=torch.int32, device=where)
        out = torch.full((512, heads, dim), float("nan"), device=where)
        lse = torch.full((512, heads), float("nan"), device=where)
        given = queries.to(where, kind)
        kv = cache.layers[0].to(where, kind)
        for part, block_m, causal in ((items.wide, 64, True), (items.narrow, 16, False)):
            partial(
                given, kv, tables.to(where), torch.tensor(part, device=where),
                torch.tensor([len(part)], dtype=torch.int32, device=where), first, out, lse,
                kv_heads=kv_heads, page=16, scale=dim**-0.5, block_m=block_m, programs=3, causal=causal,
                options={"BLOCK_N": 64, "STAGES": 2, "num_warps": 4},
            )  # fmt: skip
        merged = torch.full((53, heads, dim), float("nan"), dtype=kind, device=where)
        merge(out, lse, first, merged)
        results.append(merged.float().cpu())
    expected, got = results
    expected = expected.nan_to_num()  # the padding row
    assert torch.isfinite(got).all()
    assert (got - expected).norm() / expected.norm() < (1e-5 if dtype == "float32" else 1e-2)
