"""The command `python -m sim.faults`: many seeds on a process pool, one table, and how to see a failing seed again.

Exit status 0: no invariant was violated (with --plant: the bug was found); 1: otherwise; 2: wrong usage. The table goes to
stdout and is the same for the same seeds; progress goes to stderr.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing
from functools import partial

from parrot import compiled
from parrot.protocol.errors import ParrotError
from parrot.serve.config import GlobalSchedulerConfig
from parrot.serve.policies import parse_policy
from sim.faults.plants import PLANTS, planted
from sim.faults.world import Result, run_seed

_CHUNK = 20  # seeds that one process runs at a time
_PROGRESS_S = 5.0

#: Rows of the table, and the counts that each is.
_ROWS = (
    ("instants of the core", "instants"),
    ("events handled", "events"),
    ("attempts", "attempts"),
    ("outputs checked", "outputs checked"),
    ("pieces of streams checked", "streams checked"),
    ("failures told", "failures told"),
    ("undisturbed engines compared", "engines compared"),
    ("commits", "commits"),
    ("core kills", "core kills"),
    ("core standstills", "core hangs"),
    ("engine kills", "engine kills"),
    ("engine standstills", "engine hangs"),
    ("messages lost", "lost"),
    ("messages doubled", "doubled"),
    ("messages delayed, reordered", "delayed"),
    ("connections cut", "cut"),
    ("events doubled in the core", "events doubled"),
    ("answers of nonsense", "nonsense"),
    ("full disks", "full disks"),
    ("commits that failed", "commits failed"),
)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m sim.faults",
        description="Runs the whole system from seeds, with everything going wrong, and checks what must hold all the same.",
        epilog="A failing seed fails again: --trace SEED shows it step by step. docs/faults.md says what is simulated.",
    )
    p.add_argument("--seeds", type=int, default=100, metavar="N", help="how many seeds (default: %(default)s)")
    p.add_argument("--first", type=int, default=0, metavar="S", help="the first of them (default: %(default)s)")
    p.add_argument("--jobs", type=int, default=None, metavar="J", help="processes (default: one for each core)")
    p.add_argument("--plant", choices=PLANTS, metavar="BUG", help=f"plant a bug that must be found: {', '.join(PLANTS)}")
    p.add_argument("--policy", metavar="NAME", help="under this policy, in the place of those that seeds draw")
    p.add_argument("--trace", type=int, metavar="SEED", help="run this seed alone and print all that happens in it")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; its exit status."""
    args = parser().parse_args(argv)
    if args.seeds < 1 or args.first < 0 or (args.jobs is not None and args.jobs < 1):
        parser().error("--seeds and --jobs are 1 or more, --first is 0 or more")
    if args.policy is not None:
        try:
            parse_policy(args.policy, GlobalSchedulerConfig())
        except ParrotError as error:
            print(f"sim.faults: {error}", file=sys.stderr)
            return 1
    if args.trace is not None:
        with planted(args.plant):
            result = run_seed(args.trace, print, args.policy)
        return _verdict([result], args.plant)
    results: list[Result] = []
    with closing(_results(range(args.first, args.first + args.seeds), args.jobs, args.plant, args.policy)) as found:
        for result in _with_progress(found, args.seeds):
            results.append(result)
            if result.violation is not None:
                break
    _print_table(results)
    return _verdict(results, args.plant)


def run_seeds(seeds: Sequence[int], plant: str | None = None, policy: str | None = None) -> list[Result]:
    """The runs of `seeds` in this process, up to the first that violates anything."""
    results = []
    with planted(plant):
        for seed in seeds:
            results.append(run_seed(seed, policy=policy))
            if results[-1].violation is not None:
                break
    gc.collect()
    return results


def _results(seeds: range, jobs: int | None, plant: str | None, policy: str | None = None) -> Generator[Result, None, None]:
    """In the order of the seeds, whoever ran them."""
    chunks = [seeds[at : at + _CHUNK] for at in range(0, len(seeds), _CHUNK)]
    if jobs == 1 or len(chunks) == 1:
        for chunk in chunks:
            yield from run_seeds(chunk, plant, policy)
        return
    with ExitStack() as stack:
        pool = ProcessPoolExecutor(jobs, initializer=gc.freeze)
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        for results in pool.map(partial(run_seeds, plant=plant, policy=policy), chunks):
            yield from results


def _with_progress(results: Iterable[Result], total: int) -> Iterator[Result]:
    began_s = told_s = time.monotonic()
    for number, result in enumerate(results, 1):
        yield result
        now_s = time.monotonic()
        if now_s - told_s > _PROGRESS_S:
            told_s = now_s
            left_s = (now_s - began_s) / number * (total - number)
            print(f"{number} of {total} seeds, {left_s:.0f} s to go", file=sys.stderr, flush=True)


def _print_table(results: Sequence[Result]) -> None:
    rows = [("seeds", len(results))]
    rows += [(label, sum(result.counts.get(name, 0) for result in results)) for label, name in _ROWS]
    rows.append(("violations", sum(result.violation is not None for result in results)))
    width = max(len(label) for label, _ in rows)
    for label, number in rows:
        print(f"{label:<{width}}  {number:>12,}")


def _verdict(results: Sequence[Result], plant: str | None) -> int:
    failed = next((result for result in results if result.violation is not None), None)
    if plant is not None:
        if failed is None:
            print(f"the planted bug {plant!r} was not found")
            return 1
        assert failed.violation is not None
        print(f"the planted bug {plant!r} was found at seed {failed.seed}: {failed.violation[0]}: {failed.violation[1]}")
        return 0
    if failed is None:
        return 0
    assert failed.violation is not None
    print(f"\nseed {failed.seed} violates {failed.violation[0]!r}: {failed.violation[1]}\nthe last events:")
    print("\n".join(f"  {line}" for line in failed.last))
    print(f"to see all of it: python -m sim.faults --trace {failed.seed}")
    return 1


if __name__ == "__main__":
    if compiled.in_use():  # who watches the core and who plants bugs replaces functions, which only the sources let happen
        command = [sys.executable, "-m", "sim.faults", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, compiled.PURE: "1"})
    sys.exit(main())
