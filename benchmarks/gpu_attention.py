"""Times the attention kernels of a decoding layer on a GPU, in CUDA graphs, beside the time that reading their KV takes.

    python -m benchmarks.gpu_attention [--heads 32] [--kv-heads 32] [--head-dim 128] [--variants]

`--variants` times launch options, which paged_rows.py has the best of. xformers' own paged kernel is timed beside ours.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Callable
from typing import Any

import torch

from parrot.engine.batches import Span
from parrot.engine.builtin.attention import paged_rows, xformers_library
from parrot.engine.builtin.attention.base import AttentionRow
from parrot.engine.builtin.attention.paged_rows import PagedRows
from parrot.engine.builtin.attention.prefix_groups import shared_prefixes
from parrot.engine.builtin.attention.varlen import VarlenAttention
from parrot.engine.builtin.kv_cache import KVCache
from parrot.engine.builtin.models.config import ModelConfig

PAGE = 16
LAYERS = 4  # rotated through, so that the cache of the GPU holds none of them


def timed_us(work: Callable[[int], Any], repeats: int = 10) -> float:
    """Microseconds of `work(layer)`, median of graph replays that go through all layers."""
    for layer in range(LAYERS):
        work(layer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(LAYERS):
            work(layer)
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / LAYERS)
    return sorted(times)[repeats // 2]


def copy_bandwidth() -> float:
    """Bytes a second of a large copy, read and written."""
    source = torch.empty(1 << 32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(8):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return 2 * source.nbytes / min(times)


class Case:
    """`rows` that share `shared` tokens and have `own` each."""

    def __init__(self, config: ModelConfig, rows: int, shared: int, own: int) -> None:
        self.name = f"{rows} × {own}" + (f" sharing {shared}" if shared else "")
        self.config, self.rows, self.shared, self.own = config, rows, shared, own
        prefix_pages = shared // PAGE
        own_pages = -(-(shared + own) // PAGE) - prefix_pages
        pages = prefix_pages + rows * own_pages
        self.cache = KVCache(config, pages, PAGE, torch.bfloat16, torch.device("cuda"), spare_page=True)
        for layer in self.cache.layers:
            layer.normal_()
        order = random.Random(0).sample(range(pages), pages)
        prefix, rest = order[:prefix_pages], order[prefix_pages:]
        self.table = [
            AttentionRow(
                i, shared + own - 1, shared + own, prefix + rest[i * own_pages : (i + 1) * own_pages],
                (Span(0, 0, shared), Span(1 + i, shared, shared + own)),
            )
            for i in range(rows)
        ]  # fmt: skip
        self.queries = torch.randn(rows, config.num_heads, config.head_dim, dtype=torch.bfloat16, device="cuda")

    def bytes(self, shared_once: bool) -> int:
        tokens = self.rows * self.own + self.shared * (1 if shared_once else self.rows)
        return tokens * 2 * self.config.num_kv_heads * self.config.head_dim * 2

    def ours_us(self, shares: bool) -> float:
        decode = PagedRows(self.config, self.cache, self.rows, self.shared + self.own, shares)
        if shares:
            groups = shared_prefixes([row.chain for row in self.table], PAGE, 1)
            decode.update(self.table, groups.segments, groups.own)
        else:
            decode.update(self.table)
        return timed_us(lambda layer: decode.attend(layer, self.queries))

    def fills_us(self, start: int) -> tuple[float, float]:
        """Of fills whose tokens before `start` are computed: ours, that read pages; xformers', that reads what is gathered."""
        rows = [row._replace(start=start) for row in self.table]
        tokens = sum(row.stop - row.start for row in rows)
        heads = torch.randn(
            tokens, self.config.qkv_heads, self.config.head_dim, dtype=torch.bfloat16, device="cuda"
        )  # as a layer has them
        ours = PagedRows(self.config, self.cache, self.rows, self.shared + self.own, max_tokens=tokens)
        ours.update([], fills=rows)
        theirs = VarlenAttention(self.config, self.cache)
        plan = theirs.plan(rows)
        return (
            timed_us(lambda layer: ours.attend(layer, heads[:, : self.config.num_heads], fills=True)),
            timed_us(lambda layer: theirs.attend(plan, layer, heads)),
        )

    def theirs_us(self) -> float:
        """xformers' paged kernel, over pages of 64."""
        from xformers.ops import fmha
        from xformers.ops.fmha.attn_bias import PagedBlockDiagonalPaddedKeysMask

        length = self.shared + self.own
        pages = -(-length // 64)
        total = self.cache.layers[0].shape[0] // 64
        generator = torch.Generator().manual_seed(0)
        tables = torch.randint(total, (self.rows, pages), dtype=torch.int32, generator=generator).cuda()
        bias = PagedBlockDiagonalPaddedKeysMask.from_seqlens(
            [1] * self.rows, [length] * self.rows, tables, 64, device=torch.device("cuda")
        )
        heads, kv_heads, dim = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        queries = self.queries.view(1, self.rows, kv_heads, heads // kv_heads, dim)

        def work(layer: int) -> None:
            kv = self.cache.layers[layer][: total * 64].view(1, total * 64, 2, kv_heads, 1, dim)
            keys, values = (kv[:, :, i].expand(-1, -1, -1, heads // kv_heads, -1) for i in (0, 1))
            fmha.memory_efficient_attention_forward(queries, keys, values, attn_bias=bias, op=fmha.triton_splitk.FwOp)

        return timed_us(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--variants", action="store_true", help="time launch options too")
    args = parser.parse_args()
    if reason := xformers_library.missing():
        parser.error(reason)
    config = ModelConfig("bench", "llama", 8, 8, 8, LAYERS, args.heads, args.kv_heads, args.head_dim, 1 << 20)
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copy {bandwidth / 1e12:.2f} TB/s; µs a layer")
    print(f"{'rows × own tokens':<28}{'floor':>8}{'paged':>8}{'xformers':>10}{'floor':>10}{'shared':>8}")
    sizes = [(1, 0, 512), (8, 0, 1000), (64, 0, 1500), (256, 0, 500), (64, 5107, 500), (4, 5107, 500), (16, 512, 500),
             (8, 128, 500), (4, 128, 500), (2, 512, 500), (16, 32, 500)]  # fmt: skip
    for rows, shared, own in sizes:
        case = Case(config, rows, shared, own)
        line = f"{case.name:<28}{case.bytes(False) / bandwidth * 1e6:>8.0f}{case.ours_us(False):>8.0f}{case.theirs_us():>10.0f}"
        if shared:
            line += f"{case.bytes(True) / bandwidth * 1e6:>10.0f}{case.ours_us(True):>8.0f}"
        print(line, flush=True)
        del case
        torch.cuda.empty_cache()
    print(f"\n{'rows × tokens filled':<36}{'Mpairs':>8}{'pages':>8}{'xformers':>10}")
    for rows, start, tokens in [(1, 0, 256), (4, 0, 256), (1, 0, 1024), (1, 0, 2048), (1, 4000, 128), (1, 4000, 1024)]:
        case = Case(config, rows, 0, start + tokens)
        pairs = rows * tokens * (2 * start + tokens + 1) / 2e6
        name = f"{rows} × {tokens}" + (f" behind {start}" if start else "")
        print(f"{name:<36}{pairs:>8.2f}" + "{:>8.0f}{:>10.0f}".format(*case.fills_us(start)), flush=True)
        del case
    if args.variants:
        compare_variants(config)


def compare_variants(config: ModelConfig) -> None:
    cases = [Case(config, 64, 0, 1500), Case(config, 256, 0, 500), Case(config, 1, 0, 512)]
    print("\nnarrow: " + ", ".join(case.name for case in cases))
    found = []
    for programs, blocks, stages, warps in itertools.product((4, 8, 16), (32, 64), (1, 2, 3), (2, 4)):
        paged_rows.NARROW_PROGRAMS = programs
        paged_rows.NARROW_OPTIONS = {"BLOCK_N": blocks, "STAGES": stages, "num_warps": warps}
        times = [case.ours_us(False) for case in cases]
        found.append((times, f"{programs} programs, block {blocks}, {stages} stages, {warps} warps"))
    for times, name in sorted(found, key=lambda entry: entry[0][0])[:12]:
        print("  " + " ".join(f"{t:8.1f}" for t in times), name)
    case = Case(config, 64, 5107, 4)
    print(f"wide: {case.name}")
    found = []
    for wide, programs, stages, warps in itertools.product((32, 64), (1, 2, 4), (1, 2, 3), (4, 8)):
        paged_rows.WIDE, paged_rows.WIDE_PROGRAMS = wide, programs
        paged_rows.WIDE_OPTIONS = {"BLOCK_N": 64, "STAGES": stages, "num_warps": warps}
        found.append(([case.ours_us(True)], f"{wide} queries, {programs} programs, {stages} stages, {warps} warps"))
    for times, name in sorted(found)[:12]:
        print("  " + " ".join(f"{t:8.1f}" for t in times), name)


if __name__ == "__main__":
    main()
