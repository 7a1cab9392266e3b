"""The paper's measurements: rows of the file that the user names, grouped into runs, and which runs are fitted.

A run is what was executed once: figure, system and parameters; its rows are what was read off it. Runs are fitted or held
out whole.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

COLUMNS = ("figure", "workload", "system", "model", "gpu", "params", "metric", "value", "source")

PAGED, SHARED, THIRTEEN = "a100-80g-vicuna-7b", "a100-80g-vicuna-7b-shared-kernel", "a100-80g-vicuna-13b"
A6000_PAGED, A6000_SHARED = "a6000-vicuna-7b", "a6000-vicuna-7b-shared-kernel"


class MeasuredError(Exception):
    """A file that is not the paper's measurements. The message names file and line."""


class Experiment(NamedTuple):
    """A run of the paper, by what it ran."""

    figure: str
    workload: str
    system: str
    model: str
    gpu: str
    params: str

    @property
    def parameters(self) -> dict[str, str]:
        return dict(item.partition("=")[::2] for item in self.params.split(";"))

    @property
    def profile(self) -> str:
        """The profile that stands for the run's model, GPU and attention function."""
        if self.model == "vicuna-13b":
            return THIRTEEN
        if self.system == "shared_kernel" or (self.figure == "18" and self.system == "parrot"):
            return SHARED if "A100" in self.gpu else A6000_SHARED
        return PAGED if "A100" in self.gpu else A6000_PAGED

    @property
    def fitted(self) -> bool:
        """Whether a profile was fitted to this run. Whole runs, by a rule that knows no result: of figure 14 the least and the
        most at a time, of figure 15 the shortest and the longest outputs of 32 at a time, of figure 11 Parrot's own runs on
        the first five of ten articles."""
        if self.figure == "14":
            return self.parameters["closed_batch"] in ("8", "64")
        if self.figure == "15":
            return self.parameters["batch"] == "32" and self.parameters["output_tokens"] in ("200", "800")
        if self.figure == "11" and self.system == "parrot":
            return self.parameters["article"] in {f"article_{n}" for n in range(5)}
        return False


class Row(NamedTuple):
    """One measurement."""

    line: int
    experiment: Experiment
    metric: str
    value: float
    source: str


def read_measured(path: str | Path) -> list[Row]:
    """The rows of the file, in its order. Raises MeasuredError."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = set(COLUMNS) - set(reader.fieldnames or ())
            if missing:
                raise MeasuredError(f"{path}:1: not the paper's measurements: no column {', '.join(sorted(missing))}")
            return [_row(path, reader.line_num, line) for line in reader]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise MeasuredError(f"{path}: cannot be read: {reason}") from error


def _row(path: str | Path, number: int, line: dict[str, str | None]) -> Row:
    if any(line[name] is None for name in COLUMNS):
        raise MeasuredError(f"{path}:{number}: cut off: {sum(line[n] is not None for n in COLUMNS)} of {len(COLUMNS)} fields")
    try:
        value = float(line["value"] or "")
    except ValueError:
        raise MeasuredError(f"{path}:{number}: value {line['value']!r} is no number") from None
    experiment = Experiment(*(str(line[name]) for name in Experiment._fields))
    return Row(number, experiment, str(line["metric"]), value, str(line["source"]))


def experiments_of(rows: Sequence[Row]) -> list[Experiment]:
    """The runs, each once, in the file's order."""
    return list(dict.fromkeys(row.experiment for row in rows))
