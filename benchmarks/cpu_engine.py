"""Tokens per second of the builtin engine on a CPU beside transformers' `generate`, alone and in a batch, in one run.

    python benchmarks/cpu_engine.py [--model NAME] [--batch 16] [--prompt-tokens 64] [--new-tokens 64]

Both run the same float32 weights, ids and number of tokens, greedily, in turns; the best of `--trials` counts. `cpu`
columns are by the process's CPU time, which says more than the wall clock on a machine that others use too.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from parrot.engine.builtin.load import load_runner
from parrot.engine.builtin.runner import BuiltinRunner
from parrot.engine.builtin.weights import as_directory
from parrot.engine.config import BuiltinEngineConfig, BuiltinInstance
from parrot.engine.core import EngineCore, EngineLimits, EngineTask, Link
from parrot.model_files import import_transformers, resolve_model
from parrot.protocol.api import SamplingConfig


class Rate(NamedTuple):
    """Generated tokens per second, by the wall clock and by CPU time."""

    wall: float
    cpu: float


def generate_here(runner: BuiltinRunner, limits: EngineLimits, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Any]:
    """The outputs' ids, by EngineCore and the builtin runner."""
    core = EngineCore(limits)
    sampling = SamplingConfig(temperature=0.0, max_gen_length=new_tokens, ignore_tokenizer_eos=True)
    for i, prompt in enumerate(prompts):
        task = EngineTask(i, (Link(2 * i, len(prompt)),), 2 * i + 1, new_tokens)
        runner.add_task(task, [prompt], sampling, ())
        core.submit(task, 0.0)
    outputs: dict[Any, tuple[int, ...]] = {}
    while (batch := core.next_batch(0.0)) is not None:
        ended = {}
        for result in runner.finish(runner.launch(runner.prepare(batch, core))):
            if result.reason is not None:
                ended[result.key] = result.kept
                outputs[result.key] = result.ids
        core.complete(batch, ended, 0.0)
    for i in range(len(prompts)):
        runner.drop_task(i)
    runner.drop_contexts(range(2 * len(prompts)))
    return [list(outputs[i]) for i in range(len(prompts))]


def generate_there(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Any]:
    """The same by transformers."""
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens, pad_token_id=0
        )
    found: list[Any] = out[:, ids.shape[1] :].tolist()
    return found


def measure(generate: Callable[[], list[Any]]) -> tuple[Rate, list[Any]]:
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    outputs = generate()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    tokens = sum(map(len, outputs))
    return Rate(tokens / wall, tokens / cpu), outputs


def best(rates: Sequence[Rate]) -> Rate:
    return Rate(max(r.wall for r in rates), max(r.cpu for r in rates))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="name or path of a model")
    parser.add_argument("--batch", type=int, default=16, help="requests in the batch")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="torch's threads, for both")
    parser.add_argument("--trials", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    config = BuiltinEngineConfig(model=args.model, instance=BuiltinInstance(device="cpu"))
    began = time.perf_counter()
    loaded = load_runner(config)
    print(f"{args.model} loaded in {time.perf_counter() - began:.1f} s, {args.threads} thread(s), torch {torch.__version__}")
    folder = as_directory(args.model, resolve_model(args.model)).directory
    model = import_transformers().AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    prompts = torch.randint(3, vocabulary, (args.batch, args.prompt_tokens), generator=generator).tolist()

    rates: dict[tuple[str, int], list[Rate]] = {}
    same = 0
    for _ in range(args.trials):
        for size in (1, args.batch):
            ours, mine = measure(partial(generate_here, loaded.runner, loaded.limits, prompts[:size], args.new_tokens))
            theirs, other = measure(partial(generate_there, model, prompts[:size], args.new_tokens))
            rates.setdefault(("builtin", size), []).append(ours)
            rates.setdefault(("transformers", size), []).append(theirs)
            same = sum(a == b for a, b in zip(mine, other, strict=True))
    table({key: best(found) for key, found in rates.items()}, args.batch)
    print(f"equal outputs in the last batch: {same} of {args.batch} (random prompts: near ties may fall either way)")


def table(rates: dict[tuple[str, int], Rate], batch: int) -> None:
    heads = ("batch 1", f"batch {batch}", "ratio", "cpu 1", f"cpu {batch}", "ratio")
    print(f"\n{'generated tokens/s':<22}" + "".join(f"{h:>{8 if h == 'ratio' else 12}}" for h in heads))
    for name in ("builtin", "transformers"):
        one, many = rates[name, 1], rates[name, batch]
        print(
            f"{name:<22}{one.wall:>12.1f}{many.wall:>12.1f}{many.wall / one.wall:>8.1f}"
            f"{one.cpu:>12.1f}{many.cpu:>12.1f}{many.cpu / one.cpu:>8.1f}"
        )
    ours, theirs = (tuple(rates[name, size] for size in (1, batch)) for name in ("builtin", "transformers"))
    ratios = [a / b for o, t in zip(ours, theirs, strict=True) for a, b in zip(o, t, strict=True)]
    print(f"{'builtin/transformers':<22}{ratios[0]:>12.2f}{ratios[2]:>12.2f}{'':>8}{ratios[1]:>12.2f}{ratios[3]:>12.2f}")


if __name__ == "__main__":
    main()
