"""The builtin engine on a GPU: milliseconds of an iteration beside its floor, and many requests at once over HTTP.

    python -m benchmarks.gpu_engine [ENGINE.json] [--attn_func NAME]... [--azure CSV] [--log] [--logprobs]

The floor of decoding is the reading of the weights and of every KV token once, at the rate of a large copy; that of prefill is
its multiplications, at the rate of a large matrix product, or the reading of the weights. Both rates are measured here, on the
same GPU. `--log` times the same requests with an iteration log and without, in turn; `--logprobs`, with none, one and all of
them asking for log-probabilities.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from experiments.calibrate import at_once, azure_lengths
from experiments.engine_load import Load, Request, send
from parrot.engine.builtin.load import LoadedRunner, load_runner
from parrot.engine.builtin.models.config import ModelConfig
from parrot.engine.builtin.process import prepare_builtin, spare_what_is_loaded
from parrot.engine.config import BuiltinEngineConfig, load_engine_config
from parrot.engine.core import EngineCore, EngineTask, Link
from parrot.engine.derived import description_of
from parrot.engine.iteration_log import IterationLog, log_header
from parrot.engine.listening import bind
from parrot.engine.loop import BuiltinLoop
from parrot.engine.serving import serve
from parrot.protocol.api import SamplingConfig

#: name, rows, shared tokens, own tokens of each
DECODES = [("decode 1 × 512", 1, 0, 512), ("decode 64 × 1,500", 64, 0, 1500), ("decode 256 × 500", 256, 0, 500),
           ("decode 64 × 500 sharing 5,107", 64, 5107, 500)]  # fmt: skip
#: rows, tokens of each
PREFILLS = [(8, 1024), (1, 1024), (1, 256)]
ITERATIONS = 40


def rates() -> tuple[float, float]:
    """Bytes a second of a copy (read and written), multiplications and additions a second of a bfloat16 product."""
    source = torch.empty(1 << 32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_s = _best(lambda to=target, of=source: to.copy_(of))
    del source, target
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * (1 << 32) / copy_s, 2 * 8192**3 / _best(lambda: a @ b)


def _best(work: Any) -> float:
    times = []
    for _ in range(8):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return min(times)


class Engine:
    """EngineCore over a loaded runner, driven as the engine's loop drives it, one batch ahead."""

    def __init__(self, loaded: LoadedRunner) -> None:
        self.loaded = loaded
        self.core = EngineCore(loaded.limits)
        self.number = 0

    def submit(self, chain: Sequence[tuple[int, int]], output: int) -> None:
        self.number += 1
        key = self.number
        links = tuple(Link(context, tokens) for context, tokens in chain)
        ids = [random.Random(context).choices(range(3, 32000), k=tokens) for context, tokens in chain]
        task = EngineTask(key, links, 10**9 + key, output)
        self.loaded.runner.add_task(task, ids, SamplingConfig(temperature=0.0, max_gen_length=output, output_length=output), ())
        self.core.submit(task, 0.0)

    def run(self) -> list[tuple[float, Any]]:
        """(seconds, shape) of each iteration, from the end of the one before, until all tasks are done."""
        runner, core = self.loaded.runner, self.core
        issued: deque[Any] = deque()
        edges: list[tuple[float, Any]] = []
        before = time.perf_counter()
        while True:
            while (batch := core.next_batch(0.0)) is not None:
                issued.append((batch, runner.launch(runner.prepare(batch, core))))
            if not issued:
                return edges
            batch, launched = issued.popleft()
            results = runner.finish(launched)
            now = time.perf_counter()
            edges.append((now - before, batch.shape))
            before = now
            core.complete(batch, {r.key: r.kept for r in results if r.reason is not None}, 0.0)

    def close(self) -> None:
        contexts = [context.id for context in self.core.contexts]
        self.core.free_contexts(contexts)
        self.loaded.runner.drop_contexts(contexts)
        for key in range(self.number + 1):
            self.loaded.runner.drop_task(key)


def decode_s(loaded: LoadedRunner, rows: int, shared: int, own: int) -> float:
    """Median seconds of the iterations in which all rows decode, from `own` tokens each on."""
    engine = Engine(loaded)
    for i in range(rows):
        head = [(1, shared)] if shared else []
        engine.submit([*head, (10 + i, own)], ITERATIONS + 24)  # the first goes on decoding until the last is filled
    found = [seconds for seconds, shape in engine.run() if shape.decode_rows == rows and not shape.prefill_rows]
    engine.close()
    return statistics.median(found[2:ITERATIONS])


def prefill_s(loaded: LoadedRunner, rows: int, tokens: int) -> float:
    """Median seconds of an iteration that fills `rows` prompts of `tokens`."""
    times = []
    for _ in range(4):
        engine = Engine(loaded)
        for i in range(rows):
            engine.submit([(10 + i, tokens)], 1)
        times.append(sum(seconds for seconds, _ in engine.run()))
        engine.close()
    return statistics.median(times[1:])


async def http_s(config: BuiltinEngineConfig, loaded: LoadedRunner, load: Load, log: Path | None = None) -> float:
    """Seconds of a load that is sent over HTTP; with an iteration log in the file `log`."""
    description = description_of(config, loaded.limits, tokenizer=loaded.tokenizer.name, accepts_output_length=loaded.dummy)
    iteration_log = log and IterationLog(log, log_header(config, description, loaded.limits, loaded.runner.fill_graphs))
    loop = BuiltinLoop(
        EngineCore(loaded.limits), loaded.runner, pipeline_depth=loaded.limits.pipeline_depth, iteration_log=iteration_log
    )
    engine = await serve(config, description, loop, loaded.tokenizer, bind("127.0.0.1", 0), with_core=False)
    outcome = await asyncio.to_thread(send, load, engine.url)
    contexts = loop.context_ids()
    await engine.close()
    loaded.runner.drop_contexts(contexts)
    if outcome.failed:
        raise SystemExit(f"{len(outcome.failed)} requests failed; first: {outcome.failed[0]}")
    return outcome.total_s


def in_turn(works: Sequence[Callable[[], float]], repeats: int = 4) -> list[list[float]]:
    """What each of them gives, time after time, one after the other; after a first time that does not count."""
    works[0]()
    rounds = [[work() for work in works] for _ in range(repeats)]
    return [list(found) for found in zip(*rounds, strict=True)]


def spread(found: Sequence[float], digits: int) -> str:
    return f"{statistics.median(found):,.{digits}f} ({min(found):,.{digits}f} to {max(found):,.{digits}f})"


def log_cost(config: BuiltinEngineConfig, loaded: LoadedRunner, rows: int, output: int) -> str:
    """What an iteration log costs `rows` requests of 64 + `output` tokens at once, in one line."""
    load = at_once("log", [(64, output)] * rows)
    with TemporaryDirectory() as folder:
        names = (Path(folder) / f"{number}.jsonl" for number in itertools.count())
        without, logged = in_turn(
            [
                lambda: asyncio.run(http_s(config, loaded, load)),
                lambda: asyncio.run(http_s(config, loaded, load, next(names))),
            ]
        )
    more = statistics.median(logged) / statistics.median(without) - 1
    return f"iteration log, {rows} × {output} tokens: {spread(without, 3)} s without, {spread(logged, 3)} s with: {more:+.2%}"


def logprobs_cost(config: BuiltinEngineConfig, loaded: LoadedRunner, rows: int = 64, output: int = 256, top: int = 5) -> str:
    """Tokens a second of `rows` requests of 64 + `output` tokens at once, with none, one and all asking for the `top` most
    probable tokens, in one line."""

    def tokens_per_s(asking: int) -> float:
        wanted = [top if number < asking else None for number in range(rows)]
        requests = [Request(((1000 + i, 64),), output, logprobs=asked) for i, asked in enumerate(wanted)]
        return rows * output / asyncio.run(http_s(config, loaded, Load("logprobs", tuple(requests))))

    none, one, every = in_turn([lambda: tokens_per_s(0), lambda: tokens_per_s(1), lambda: tokens_per_s(rows)])
    plain = statistics.median(none)
    return (
        f"log-probabilities, {rows} × {output} tokens a second: {spread(none, 0)} with none asking, "
        f"{spread(one, 0)} with one: {statistics.median(one) / plain - 1:+.2%}, "
        f"{spread(every, 0)} with all: {statistics.median(every) / plain - 1:+.2%}"
    )


def decode_floor_s(shape: ModelConfig, tokens: int, bandwidth: float) -> float:
    weights = shape.num_parameters - shape.vocab_size * shape.hidden_size  # one embedding row a token is read, not the table
    return (2 * weights + tokens * shape.kv_bytes_per_token(2)) / bandwidth


def http_floor_s(shape: ModelConfig, lengths: Sequence[tuple[int, int]], rows: int, bandwidth: float, rate: float) -> float:
    """Every token multiplied once, every KV token read at each step of its sequence, the weights at each step of `rows`."""
    prompts, outputs = (sum(side) for side in zip(*lengths, strict=True))
    kv = sum(output * (prompt + output / 2) for prompt, output in lengths)
    multiplied = 2 * (shape.num_parameters - shape.vocab_size * shape.hidden_size) * prompts / rate
    return multiplied + (kv * shape.kv_bytes_per_token(2) + outputs / rows * 2 * shape.num_parameters) / bandwidth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", nargs="?", default="sample_configs/engine/vicuna-7b-h200.json")
    parser.add_argument("--attn_func", action="append", help="one or more; default: xformers_paged, xformers_shared_prefix")
    parser.add_argument("--azure", help="a public Azure trace: its first 500 requests are sent at once over HTTP")
    parser.add_argument("--log", action="store_true", help="what an iteration log costs")
    parser.add_argument("--logprobs", action="store_true", help="what log-probabilities cost")
    args = parser.parse_args()
    bandwidth, rate = rates()
    torch.cuda.empty_cache()
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}: copy {bandwidth / 1e12:.2f} TB/s, product {rate / 1e12:.0f} TFLOP/s")
    print(f"{'':<24}{'':<32}{'floor ms':>10}{'ms':>10}{'ratio':>8}")
    for function in args.attn_func or ["xformers_paged", "xformers_shared_prefix"]:
        wider = {"scheduler.max_num_batched_tokens": 8192, "fill_chunk_size": 8192}
        config = load_engine_config(Path(args.engine), {"instance.attn_func": function, **wider})
        assert isinstance(config, BuiltinEngineConfig)
        config = prepare_builtin(config)
        began = time.perf_counter()
        loaded = load_runner(config)
        spare_what_is_loaded()
        print(f"{function}: loaded and captured in {time.perf_counter() - began:.1f} s")
        shape = loaded.runner.decoder.config
        for what, rows, shared, own in DECODES:
            once = 1 if function == "xformers_shared_prefix" else rows
            floor = decode_floor_s(shape, rows * (own + ITERATIONS // 2) + shared * once, bandwidth)
            line(function, what, floor, decode_s(loaded, rows, shared, own))
        weights = shape.num_parameters - 2 * shape.vocab_size * shape.hidden_size
        for rows, tokens in PREFILLS:
            floor = max(2 * rows * tokens * weights / rate, 2 * weights / bandwidth)
            line(function, f"prefill {rows} × {tokens:,}", floor, prefill_s(loaded, rows, tokens))
        if args.azure:
            lengths = azure_lengths(args.azure, 500)
            floor = http_floor_s(shape, lengths, loaded.limits.max_batch_size, bandwidth, rate)
            line(function, "500 Azure requests, HTTP", floor, asyncio.run(http_s(config, loaded, at_once("azure", lengths))))
        if args.log:
            for rows, output in ((loaded.limits.max_batch_size, 128), (1, 400)):
                print(log_cost(config, loaded, rows, output), flush=True)
        if args.logprobs:
            print(logprobs_cost(config, loaded), flush=True)
        del loaded
        torch.cuda.empty_cache()


def line(function: str, what: str, floor_s: float, found_s: float) -> None:
    print(f"{function:<24}{what:<32}{floor_s * 1e3:>10.2f}{found_s * 1e3:>10.2f}{found_s / floor_s:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
