"""What a person sees of a sweep on stderr: a bar with the time left, and at the end a table of the cells.

Nothing here when stderr is no terminal; stdout is never touched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from sim import pool
from sim.cells import Cell, Estimate

DEFAULT_METRICS = ("jct_s.mean", "jct_s.p99", "ttft_s.mean", "ttft_s.p99", "tpot_s.mean", "throughput_tokens_per_s", "failed")
_WITH_OBJECTIVES = ("goodput_programs_per_s",)
NAME_LETTERS, GAP = 8, 2  #: of a column of names at the least; between two columns
_SPEED_OVER_S = 600.0  #: the time left is judged by the speed over this long


Columns = Mapping[str, Sequence[str]]  #: heading -> texts


class Display:
    """The bar. A run that is half done counts a half."""

    def __init__(self, console: Console, runs: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self._progress = Progress(
            *columns, *times, console=console, redirect_stdout=False, disable=not console.is_terminal,
            speed_estimate_period=_SPEED_OVER_S,
        )  # fmt: skip
        self._runs = runs
        self._bar = self._progress.add_task("", total=float(runs))
        self._ended = 0
        self._kept = 0

    def __enter__(self) -> Display:
        self._progress.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.__exit__(kind, error, trace)

    def ended(self, kept: bool) -> None:
        """One run more is done, now or in an earlier start."""
        self._ended += 1
        self._kept += kept
        if self._ended == self._runs:
            self._progress.update(self._bar, completed=self._runs, description=f"{self._runs}/{self._runs} runs")

    def show(self, progress: Sequence[pool.Progress]) -> None:
        """How far the runs are that are carried out."""
        counts = [far.read() for far in progress]
        share = sum(done / total for done, total in counts if total)
        programs = sum(done for done, _ in counts)
        text = f"{self._ended}/{self._runs} runs, {programs:,} programs"
        self._progress.update(self._bar, completed=self._kept + share, description=text)


def table_of(cells: Sequence[Cell], metrics: Sequence[str], width: int | None = None) -> Table:
    """A row a cell: what tells it from the others, and `metrics` with half the width of their confidence intervals.

    width: letters in a line of the terminal. Where they are too few, names and intervals go on in the next line; a number is
    cut only where even that does not do.
    """
    chosen = list(metrics)
    if not chosen:
        promised = any(cell.metrics["goodput_programs_per_s"].mean is not None for cell in cells)
        chosen = [*DEFAULT_METRICS, *(_WITH_OBJECTIVES if promised else ())]
    names = ["policy", *(name for name in _KEYS if len({_key(cell, name) for cell in cells}) > 1)]
    settings = sorted({key for cell in cells for key in cell.settings if len({str(c.settings.get(key)) for c in cells}) > 1})
    columns = {name: [_key(cell, name) for cell in cells] for name in names}
    columns |= {key: [str(cell.settings.get(key)) for cell in cells] for key in settings}
    numbers = {metric: [_number(cell.metrics[metric]) for cell in cells] for metric in chosen}
    caption = None if any(cell.over for cell in cells) else "one seed: no confidence intervals (--seed takes a list)"
    table = Table(box=None, header_style="bold", pad_edge=False, caption=caption, caption_justify="left")
    for name, letters in zip([*columns, *numbers], _widths(columns, numbers, width), strict=True):
        table.add_column(name, justify="right" if name in numbers else "left", overflow="fold", width=letters)
    for row in zip(*columns.values(), *numbers.values(), strict=True):
        table.add_row(*row)
    return table


def _widths(names: Columns, numbers: Columns, width: int | None) -> list[int]:
    """Letters for each column: all that it has to show; where that is more than fits, the columns that can best do with less
    get less, of numbers no less than the longest, of names no less than `NAME_LETTERS`."""
    wanted = [max(map(len, (name, *texts))) for name, texts in (*names.items(), *numbers.items())]
    least = [min(NAME_LETTERS, letters) for letters in wanted[: len(names)]]
    least += [max((len(word) for text in texts for word in text.split()), default=1) for texts in numbers.values()]
    room = None if width is None else width - GAP * (len(wanted) - 1)
    while room is not None and sum(wanted) > room:
        spare = [letters - fewest for letters, fewest in zip(wanted, least, strict=True)]
        if max(spare) <= 0:
            break
        wanted[spare.index(max(spare))] -= 1
    return wanted


_KEYS = ("workload", "cluster", "rate", "clients")


def _key(cell: Cell, name: str) -> str:
    value = getattr(cell, name)
    if name == "cluster":
        return " ".join(Path(engines).name.replace(".json:", " ×") for engines in value)
    return "–" if value is None else str(value)


def _number(estimate: Estimate) -> str:
    """The mean with as many digits as its interval gives reason for: two of half the interval's width, else four."""
    if estimate.mean is None:
        return "–"
    low, high = estimate.confidence_interval or (estimate.mean, estimate.mean)
    half = (high - low) / 2
    decimals = _decimals(half, 2) if half > 0 else _decimals(estimate.mean, 4)
    text = f"{estimate.mean:,.{decimals}f}"
    if half > 0:
        text += f" ±{half:,.{decimals}f}"
    if estimate.prediction_interval is not None:
        low, high = estimate.prediction_interval
        text += f" [{low:,.{decimals}f}, {high:,.{decimals}f}]"
    return text


def _decimals(value: float, digits: int) -> int:
    """Behind the point, for `value` to show so many digits."""
    if value == 0.0 or value == int(value):
        return 0
    return max(0, digits - 1 - math.floor(math.log10(abs(value))))
