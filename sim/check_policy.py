"""The command `python -m sim.check_policy NAME`: does a policy hold what any policy must?

It tries the policy under random programs, engines and faults, each example from one seed, and prints a table of checks.
Exit status: 0 all hold, 1 one does not or there is no such policy, 2 wrong usage. The same seeds print the same on stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from parrot import compiled
from parrot.protocol.errors import ParrotError
from parrot.serve.config import GlobalSchedulerConfig
from parrot.serve.policies import POLICIES, build_policy, find_policy, parse_policy
from parrot.serve.policies.base import Policy, claims_conservation
from parrot.serve.policies.registry import offered_policies
from sim.conformance.script import STEPS
from sim.conformance.suite import CHECKS, Outcome, run, shortest

EXAMPLES = 200
ACROSS_PROCESSES = 20  #: examples that are run again in another process
WHOLE_SYSTEM = 10  #: one run of the whole system with faults for so many examples
WIDTH = 18


class Row(NamedTuple):
    """A line of the table. `verdict`: pass, FAIL, or why it was not asked; `details`: what failed, and how to see it again."""

    check: str
    verdict: str
    details: tuple[str, ...] = ()


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m sim.check_policy",
        description="Try a global-scheduler policy under random programs, engines and faults, and print what it holds.",
        epilog="Example: python -m sim.check_policy examples.my_policy:LeastWork --param prompt_weight=2",
    )
    p.add_argument("policy", metavar="NAME", nargs="?", help="as for sim.run --policy: a name, or module:Class, with options")
    p.add_argument("--param", metavar="NAME=VALUE", action="append", default=[], help="a parameter of the policy")
    p.add_argument("--examples", type=int, default=EXAMPLES, metavar="N", help="how many (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, metavar="S", help="of the first; each further one is one more (0)")
    p.add_argument("--steps", type=int, default=STEPS, metavar="K", help="at most so many an example (default: %(default)s)")
    p.add_argument("--list", action="store_true", help="print the policies there are, or the parameters of NAME, and end")
    p.add_argument("--digests", action="store_true", help=argparse.SUPPRESS)  # for the other process
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = parser().parse_args(argv)
    if arguments.examples < 1 or arguments.seed < 0 or arguments.steps < 1:
        parser().error("--examples and --steps are 1 or more, --seed is 0 or more")
    if arguments.policy is None and not arguments.list:
        parser().error("NAME is needed (or --list)")
    try:
        if arguments.list:
            _list(arguments.policy)
            return 0
        name = _with_parameters(arguments.policy, arguments.param)
        section = parse_policy(name, GlobalSchedulerConfig())
    except ParrotError as error:
        print(f"sim.check_policy: {error}", file=sys.stderr)
        return 1
    seeds = range(arguments.seed, arguments.seed + arguments.examples)
    if arguments.digests:
        print(json.dumps([run(section, seed, arguments.steps).digest for seed in seeds]))
        return 0
    which = f"seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"seed {seeds[0]}"
    print(f"policy {name}: {len(seeds)} examples of at most {arguments.steps} steps, {which}", flush=True)
    rows = []
    for row in check(name, section, seeds, arguments.steps):
        rows.append(row)
        print(f"{row.check:<{WIDTH}} {row.verdict}", *row.details, sep="\n" + " " * (WIDTH + 1), flush=True)
    failed = [row.check for row in rows if row.verdict.startswith("FAIL")]
    print(f"{len(failed)} of {len(rows)} checks failed: {', '.join(failed)}" if failed else f"all {len(rows)} checks passed")
    return 1 if failed else 0


def _list(name: str | None) -> None:
    """The policies that a name alone finds, with the first line of what they do; or a policy's parameters."""
    if name is None:
        for known in sorted({*POLICIES, *offered_policies()}):
            try:
                print(f"{known:<{WIDTH}} {_first_sentence(find_policy(known))}")
            except ParrotError as error:  # an installed one may be none
                print(f"{known:<{WIDTH}} {error}")
        return
    policy = find_policy(name)
    print(f"{name}: {_first_sentence(policy)}")
    for parameter in policy.parameters:
        it = policy.parameters[parameter]
        default = "null" if it.default is None else json.dumps(it.default)
        print(f"  {parameter} = {default}: {it.meaning} ({it.expected()})")
    if not policy.parameters:
        print("  it has no parameters")


def _first_sentence(policy: type[Policy]) -> str:
    """What its file says in its first line (`name`: the rule), else what its class says."""
    said = (getattr(sys.modules.get(policy.__module__), "__doc__", None) or "").split("\n\n")[0]
    prefix = f"`{policy.name}`: "
    rule = said.removeprefix(prefix) if said.startswith(prefix) else policy.__doc__
    text = " ".join((rule or "it does not say what it does").split())
    return text.split(". ")[0].rstrip(".")


def _with_parameters(name: str, params: Sequence[str]) -> str:
    """`name` with the parameters as options: one way to say it, that a command which is printed can repeat."""
    if not params:
        return name
    try:
        find_policy(name)
        joint = ":"
    except ParrotError:
        joint = "+"  # it has options already, or will be refused as a whole
    return name + joint + "+".join(params)


def check(name: str, section: GlobalSchedulerConfig, seeds: range, steps: int = STEPS) -> Iterator[Row]:
    """The rows of the table, in the order of `CHECKS`, then those of other processes and of the whole system."""
    outcomes = []
    for seed in seeds:
        outcomes.append(run(section, seed, steps))
        _progress(len(outcomes), len(seeds))
    claims = claims_conservation(build_policy(section))
    for what in CHECKS:
        failed = [outcome for outcome in outcomes if outcome.check == what]
        if failed:
            yield _failure(name, section, what, failed, len(seeds))
        elif what == "work conservation" and not claims:
            yield Row(what, "not claimed")
        elif all(outcome.check is not None for outcome in outcomes):
            yield Row(what, "not reached: no example came to its end")
        else:
            yield Row(what, "pass", ())
    if any(outcome.check is not None for outcome in outcomes):
        return  # what fails already need not be looked for elsewhere
    yield _in_another_process(name, outcomes[:ACROSS_PROCESSES], steps)
    yield _whole_system(name, section, seeds)


def _failure(name: str, section: GlobalSchedulerConfig, what: str, failed: Sequence[Outcome], examples: int) -> Row:
    """With the shortest example that fails, and how to see it again."""
    least = shortest(section, min(failed, key=lambda outcome: outcome.steps))
    again = f"python -m sim.check_policy {name} --seed {least.seed} --examples 1 --steps {least.steps}"
    return Row(what, f"FAIL in {len(failed)} of {examples} examples; asked: {CHECKS[what]}", (least.message, again))


def _in_another_process(name: str, outcomes: Sequence[Outcome], steps: int) -> Row:
    """Whether a process with other hashes of strings decides alike."""
    what = "other processes"
    command = [sys.executable, "-m", "sim.check_policy", name, "--digests", "--seed", str(outcomes[0].seed)]
    command += ["--examples", str(len(outcomes)), "--steps", str(steps)]
    other = "1" if os.environ.get("PYTHONHASHSEED") == "0" else "0"
    environment = {**os.environ, "PYTHONHASHSEED": other, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return Row(what, "FAIL: the policy cannot be run there", tuple(done.stderr.strip().splitlines()[-1:]))
    for outcome, digest in zip(outcomes, json.loads(done.stdout), strict=True):
        if outcome.digest != digest:
            reason = "it depends on hashes (as the order of a set does), addresses, time, or randomness but its generator's"
            again = f"python -m sim.check_policy {name} --seed {outcome.seed} --examples 1"
            return Row(what, "FAIL: the same seed is decided otherwise there", (reason, again))
    return Row(what, "pass")


def _whole_system(name: str, section: GlobalSchedulerConfig, seeds: range) -> Row:
    """The server and engines as they are, with processes dying and networks losing (`sim.faults`)."""
    from sim.faults.world import run_seed

    what = "whole system"
    if find_policy(section.policy).clairvoyant:
        return Row(what, "not asked: a server refuses a clairvoyant policy")
    for seed in range(seeds[0], seeds[0] + max(1, len(seeds) // WHOLE_SYSTEM)):
        result = run_seed(seed, policy=name)
        if result.violation is not None:
            again = f"python -m sim.faults --policy {name} --trace {seed}"
            return Row(what, f"FAIL: {result.violation[0]}", (result.violation[1], again))
    return Row(what, "pass")


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty() and (done % 10 == 0 or done == total):
        print(f"\r{done} of {total} examples", end="\r" if done < total else "\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    if compiled.in_use():  # who watches the policy replaces it, which only the sources let happen
        command = [sys.executable, "-m", "sim.check_policy", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, compiled.PURE: "1"})
    sys.exit(main())
