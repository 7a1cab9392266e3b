"""Draws docs/images/analysis.svg and prints the table of docs/analysis.md: what a ServeCore deduces of one DAG.

python docs/images/analysis.py
"""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from parrot.protocol.api import Criteria, SamplingConfig
from parrot.serve import events as ev
from parrot.serve.config import ServeCoreConfig
from parrot.serve.core import ServeCore
from parrot.serve.graph import Task

#: call -> the calls whose outputs it reads
READS = {
    "plan": (),
    "part1": ("plan",),
    "part2": ("plan",),
    "part3": ("plan",),
    "merge": ("part1", "part2", "part3"),
    "answer": ("merge",),
    "tags": ("merge",),
    "index": ("tags",),
}
GETS = {"answer": Criteria.LATENCY, "index": Criteria.THROUGHPUT}
PLACES = {
    "plan": (0.0, 1.0),
    "part1": (1.0, 2.0),
    "part2": (1.0, 1.0),
    "part3": (1.0, 0.0),
    "merge": (2.0, 1.0),
    "answer": (3.0, 1.6),
    "tags": (3.0, 0.4),
    "index": (4.0, 0.4),
}


def analysed() -> dict[str, Task]:
    """The tasks of the DAG as a core has them after both gets."""
    core = ServeCore(ServeCoreConfig())
    core.handle([ev.OpenSession(0, 1, "auth")], 0.0)
    variables: dict[str, str] = {}
    for request, (name, reads) in enumerate(READS.items()):
        segments = [ev.Constant(ev.Content(name, {"words": 10}))]
        inputs = [ev.Input(read, var_id=variables[read]) for read in reads]
        event = ev.SubmitCall(request, 1, "auth", (*segments, *inputs, ev.Output("o", SamplingConfig())), name)
        (reply,) = core.handle([event], 0.0)
        variables[name] = reply.payload.param_info[-1].var_id  # type: ignore[union-attr]
    for request, (name, criteria) in enumerate(GETS.items(), start=100):
        core.handle([ev.GetVariable(request, 1, "auth", variables[name], criteria)], 0.0)
    return {call.func_name: call.tasks[0] for call in core.calls(1)}


def members(task: Task) -> str:
    return "–" if task.group is None else ", ".join(sorted(member.call.func_name for member in task.group.members))


def table(tasks: dict[str, Task]) -> str:
    """In Markdown, a row a task."""
    rows = ["| task | `criteria` | `depth` | `group` | `latency_sensitive` |", "|---|---|---|---|---|"]
    for name, task in tasks.items():
        criteria = task.criteria.value if task.criteria is not None else "–"
        rows.append(f"| {name} | {criteria} | {task.depth} | {members(task)} | {'yes' if task.latency_sensitive else 'no'} |")
    return "\n".join(rows)


def main() -> None:
    tasks = analysed()
    print(table(tasks))
    figure = Figure(figsize=(9.6, 3.9))
    axes = figure.subplots()
    stages = {task.group: None for task in tasks.values() if task.group is not None}
    for group in stages:
        places = [PLACES[member.call.func_name] for member in group.members]
        left, low, high = min(x for x, _ in places), min(y for _, y in places), max(y for _, y in places)
        axes.add_patch(
            FancyBboxPatch(
                (left - 0.42, low - 0.3), 0.84, high - low + 0.6, boxstyle="round,pad=0.04", fc="#f4f4f4", ec="#888888", ls="--"
            )
        )
        axes.text(left, high + 0.44, "task group", ha="center", va="center", fontsize=9, color="#555555")
    for name, reads in READS.items():
        for read in reads:
            (x0, y0), (x1, y1) = PLACES[read], PLACES[name]
            axes.annotate("", (x1 - 0.36, y1), (x0 + 0.36, y0), arrowprops={"arrowstyle": "->", "color": "#444444"})
    for name, task in tasks.items():
        x, y = PLACES[name]
        color = "#f6c9a8" if task.latency_sensitive else "#fdeee2" if task.criteria is Criteria.LATENCY else "#cfe0f3"
        axes.add_patch(FancyBboxPatch((x - 0.32, y - 0.2), 0.64, 0.4, boxstyle="round,pad=0.03", fc=color, ec="#444444"))
        axes.text(x, y + 0.07, name, ha="center", va="center", fontsize=10)
        axes.text(x, y - 0.11, f"depth {task.depth}", ha="center", va="center", fontsize=8, color="#444444")
    for name, criteria in GETS.items():
        x, y = PLACES[name]
        axes.text(x + 0.42, y, f"get: {criteria.value}", ha="left", va="center", fontsize=9, style="italic")
    for row, (color, label) in enumerate(
        [
            ("#f6c9a8", "latency: its own end counts"),
            ("#fdeee2", "latency: the group's end counts, members may batch"),
            ("#cfe0f3", "throughput"),
        ]
    ):
        axes.add_patch(FancyBboxPatch((3.2, 2.62 - 0.24 * row), 0.12, 0.1, boxstyle="round,pad=0.02", fc=color, ec="#444444"))
        axes.text(3.42, 2.67 - 0.24 * row, label, ha="left", va="center", fontsize=9)
    axes.set_xlim(-0.5, 5.3)
    axes.set_ylim(-0.45, 2.85)
    axes.axis("off")
    figure.tight_layout()
    with rc_context({"svg.hashsalt": "analysis", "svg.fonttype": "none"}):  # the same bytes each time, text as text
        figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
