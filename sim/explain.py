"""The command `python -m sim.explain RESULT --task PROGRAM/CALL/OUTPUT`: why that task ran where it did, in words.

It reads what `sim.run --explain` wrote and decides nothing. Exit status: 0 told, 1 there is no such thing (stderr says what
there is), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pandas as pd

from sim.results import PLACEMENTS, ResultsError

MOST_NAMED = 8  #: tasks and runs that a line lists


class TaskName(NamedTuple):
    """A task as the tables name it."""

    program: int
    call: int
    output: int

    def __str__(self) -> str:
        return "/".join(map(str, self))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m sim.explain",
        description="Tell why a task of a run was placed where it was. The run was made with --explain.",
        epilog="Example: python -m sim.explain results/run --task 3/0/0",
    )
    p.add_argument("result", metavar="RESULT", help="folder of a sweep, or of one run in it")
    p.add_argument("--task", metavar="PROGRAM/CALL/OUTPUT", required=True, help="numbers, as in tasks.parquet; 3/0 is 3/0/0")
    p.add_argument("--run", metavar="NAME", help="which run of a sweep: the name of its folder")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = parser().parse_args(argv)
    try:
        task = _task_of(arguments.task)
        print(explain(run_folder(Path(arguments.result), arguments.run), task))
    except ResultsError as error:
        print(f"sim.explain: {error}", file=sys.stderr)
        return 1
    return 0


def _task_of(text: str) -> TaskName:
    parts = text.split("/")
    if len(parts) not in (2, 3) or not all(part.isdigit() for part in parts):
        raise ResultsError(f"--task {text}: expected PROGRAM/CALL/OUTPUT in numbers, as 3/0/0")
    numbers = [int(part) for part in parts]
    return TaskName(numbers[0], numbers[1], numbers[2] if len(numbers) == 3 else 0)


def run_folder(result: Path, name: str | None = None) -> Path:
    """The folder of one run with placements: `result` itself, or the run `name` in it; the only one, without a name.
    Raises ResultsError."""
    if (result / f"{PLACEMENTS}.parquet").is_file() and name is None:
        return result
    found = sorted(path.parent.name for path in result.glob(f"*/{PLACEMENTS}.parquet"))
    if not found:
        if not result.is_dir():
            raise ResultsError(f"{result}: no such folder")
        raise ResultsError(f"{result}: has no {PLACEMENTS}.parquet: run it again with sim.run --explain")
    if name is None and len(found) == 1:
        return result / found[0]
    if name not in found:
        what = "several runs have placements" if name is None else f"no run {name!r} with placements"
        raise ResultsError(f"{result}: {what}; name one with --run: {_some(found)}")
    return result / name


def explain(folder: Path, task: TaskName) -> str:
    """The text about a task of the run in `folder`. Raises ResultsError."""
    try:
        placements = pd.read_parquet(folder / f"{PLACEMENTS}.parquet")
    except (OSError, ValueError) as error:
        raise ResultsError(f"{folder}: {PLACEMENTS}.parquet cannot be read: {error}") from None
    mine = placements[_is(placements, task)]
    if mine.empty:
        raise ResultsError(f"{folder}: {_what_there_is(placements, task)}")
    parts = [_heading(folder, task)]
    chosen = placements[placements["chosen"]]
    parts += [_attempt(rows, chosen) for _, rows in mine.groupby("placement", sort=True)]
    return "\n\n".join(parts)


def _is(table: pd.DataFrame, task: TaskName) -> Any:
    return (table["program"] == task.program) & (table["call"] == task.call) & (table["output"] == task.output)


def _what_there_is(placements: pd.DataFrame, task: TaskName) -> str:
    """For a task that was not found."""
    programs = sorted(int(program) for program in placements["program"].unique() if program >= 0)
    if not programs:
        return "no task was placed"
    if task.program not in programs:
        which = f"programs {programs[0]} to {programs[-1]}" if len(programs) > 1 else f"program {programs[0]}"
        return f"no task of a program {task.program} was placed; of {which} there are"
    own = placements[placements["program"] == task.program].sort_values(["call", "output"], kind="stable")
    names = dict.fromkeys(str(TaskName(*row)) for row in own[["program", "call", "output"]].itertuples(index=False))
    return f"no task {task} was placed; of program {task.program} there are {_some(list(names))}"


def _heading(folder: Path, task: TaskName) -> str:
    """What the other tables say of the task, where there are any."""
    text = f"task {task}"
    calls, tasks = _table(folder, "calls"), _table(folder, "tasks")
    if calls is not None and len(row := calls[(calls["program"] == task.program) & (calls["call"] == task.call)]):
        text += f", call {row.iloc[0]['name']!r}"
    programs = _table(folder, "programs")
    if programs is not None and len(row := programs[programs["program"] == task.program]):
        text += f" of program {row.iloc[0]['id']!r}"
    if tasks is not None and len(row := tasks[_is(tasks, task)]):
        end = row.iloc[0]
        text += f": {end['state']}"
        if pd.notna(end["finished_s"]):
            text += f" at {end['finished_s']:.3f} s"
        text += f", prompt {end['prompt_tokens']} tokens ({end['cached_tokens']} cached), output {end['output_tokens']}"
    return text


def _table(folder: Path, name: str) -> pd.DataFrame | None:
    path = folder / f"{name}.parquet"
    return pd.read_parquet(path) if path.is_file() else None


def _attempt(rows: pd.DataFrame, chosen: pd.DataFrame) -> str:
    """One placement: how long it waited and behind what, the engines that were weighed, what decided."""
    rows = rows.sort_values("rank", kind="stable")
    first = rows.iloc[0]
    ready_s = first["time_s"] - first["waited_s"]
    lines = [
        f"attempt {first['attempt']}, placed at {first['time_s']:.3f} s",
        f"  ready      {ready_s:.3f} s",
        f"  waited     {_waited(first, chosen)}",
        f"  queue      {_queue(first['queued'])}",
        f"  decided    {_decided(rows)}",
        "",
    ]
    return "\n".join(lines + [f"  {line}".rstrip() for line in _candidates(rows)] + ["", f"  {_second(rows)}"])


def _waited(first: pd.Series, chosen: pd.DataFrame) -> str:
    if first["waited_s"] <= 0.0:
        return "not at all"
    ready_s = first["time_s"] - first["waited_s"]
    before = chosen[(chosen["placement"] < first["placement"]) & (chosen["time_s"] >= ready_s)]
    names = [str(TaskName(*row)) for row in before[["program", "call", "output"]].itertuples(index=False)]
    behind = f"behind {len(names)} placements: {_some(names[::-1])}" if names else "no other was placed meanwhile"
    return f"{first['waited_s']:.3f} s, {behind}{' (the last of them first)' if len(names) > 1 else ''}"


def _queue(queued: int) -> str:
    return "it was the only one" if queued == 1 else f"{queued} tasks, itself included"


def _decided(rows: pd.DataFrame) -> str:
    first = rows.iloc[0]
    if first["fallback"]:
        return f"{first['policy']}, because the run's policy failed on it"
    return f"policy {first['policy']}" + (f", rule {first['rule']!r}" if first["rule"] else "")


def _candidates(rows: pd.DataFrame) -> list[str]:
    """The engines in the order in which the policy weighed them; the chosen one is marked."""
    terms = [msgspec.json.decode(text) for text in rows["terms"]]
    names = list(dict.fromkeys(name for one in terms for name in one))
    table = [["", "engine", "room", *names]]
    for row, values in zip(rows.itertuples(index=False), terms, strict=True):
        numbers = [_number(values[name]) if name in values else "" for name in names]
        table.append(["->" if row.chosen else "", str(row.engine), "yes" if row.fits else "no", *numbers])
    widths = [max(len(line[place]) for line in table) for place in range(len(table[0]))]
    return [
        "  ".join(
            cell.rjust(width) if place > 2 else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in table
    ]


def _second(rows: pd.DataFrame) -> str:
    """Why not another: what stood before the chosen engine, and what would have come next."""
    place = int(rows["chosen"].to_numpy().argmax())
    if len(rows) == 1:
        return "No other engine was weighed."
    full = [str(name) for name in rows["engine"].iloc[:place]]
    why = f"{rows['engine'].iloc[place]} was the best"
    if full:
        why += f" with room; {_some(full)} stood before it and had none"
    rest = rows.iloc[place + 1 :]
    others = [str(name) for name in rest["engine"][rest["fits"]]]
    return f"{why}. " + (f"Second: {others[0]}." if others else "No other that was weighed had room.")


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.6g}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


if __name__ == "__main__":
    sys.exit(main())
