"""How well the simulator predicts a cluster of real processes whose engines emulate the same profile.

    python benchmarks/emulated.py [--count N] [--rate R] [--workload NAME] [--policies A,B,C]

The same programs run twice with `python -m sim.run`: in simulation, and with `--backend emulated`, where a real core and
real engine servers speak HTTP in real time. What differs is everything but the scheduler and the latency model. The table
has the mean JCT of each policy in both, and at the end whether both put each pair of policies that differ by more than
5 % in the same order.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

# An engine of the speed of a small GPU model, so that a run takes a minute and every part of the model counts.
PROFILE = {
    "name": "benchmark",
    "model": "benchmark",
    "device": "none",
    "attn_func": "none",
    "fixed": [{"max_rows": 8, "seconds": 0.012}, {"max_rows": 64, "seconds": 0.016}],
    "hinges": [{"knot": 0, "slope": 2e-5}, {"knot": 128, "slope": 1e-4}],
    "pair_s": 1e-8,
    "kv_s": 1e-6,
    "task_overhead_s": 0.001,
    "notes": "made up for benchmarks/emulated.py",
}
ENGINE = {
    "engine_name": "emulated",
    "model": "benchmark",
    "engine_type": "emulated",
    "tokenizer": "synthetic",
    "fill_chunk_size": 256,
    "tasks_capacity": 32,
    "latency_profile": "profile.json",
    "instance": {"num_kv_cache_blocks": 2048, "block_size": 16, "max_seq_len": 8192},
    "scheduler": {"max_batch_size": 32, "max_num_batched_tokens": 512, "max_total_tokens": 32768},
}


def mean_jct(backend: str, folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Policy -> mean JCT in seconds. Raises SystemExit when a program did not finish."""
    command = [sys.executable, "-m", "sim.run", "--core", str(ROOT / "sample_configs/core/localhost_serve_core.json")]
    command += ["--engines", f"{folder / 'engine.json'}:2", "--workload", arguments.workload, "--count", str(arguments.count)]
    command += ["--rate", str(arguments.rate), "--policy", arguments.policies, "--backend", backend]
    command += ["--out", str(folder / backend), "--no-report"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    for run in runs:
        if run["finished"] != run["programs"]:
            done_of = f"{run['finished']} of {run['programs']}"
            raise SystemExit(f"{backend}, {run['policy']}: {done_of} programs finished: {run['errors']}")
    return {run["policy"]: run["jct_s"]["mean"] for run in runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=30, help="programs a run")
    parser.add_argument("--rate", type=float, default=3.0, help="programs per second")
    parser.add_argument("--workload", default="map_reduce")
    parser.add_argument("--policies", default="parrot:all,round_robin,least_loaded")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "profile.json").write_text(json.dumps(PROFILE))
        (folder / "engine.json").write_text(json.dumps(ENGINE))
        simulated = mean_jct("sim", folder, arguments)
        emulated = mean_jct("emulated", folder, arguments)
    print(f"mean JCT, {arguments.workload}, {arguments.count} programs at {arguments.rate:g}/s, 2 engines")
    print(f"{'policy':<24}{'simulated s':>12}{'emulated s':>12}{'simulated/emulated − 1':>26}")
    for policy, seconds in emulated.items():
        print(f"{policy:<24}{simulated[policy]:>12.3f}{seconds:>12.3f}{100 * (simulated[policy] / seconds - 1):>24.1f} %")
    for a, b in itertools.combinations(emulated, 2):
        if abs(emulated[a] / emulated[b] - 1) > 0.05:
            same = (emulated[a] < emulated[b]) == (simulated[a] < simulated[b])
            print(f"{a} and {b} differ by more than 5 %: {'the same order' if same else 'ANOTHER ORDER'} in simulation")


if __name__ == "__main__":
    main()
