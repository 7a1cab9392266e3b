"""Which runs of two folders are the same experiment, one real and one simulated, and what stands against comparing them.

A *cell* is everything that describes a run but its seed, its repeat and how it was carried out: policy, settings, rate,
engines, workload, client mode and so on. Cells are matched whatever their seeds and repeats. Where both sides ran a seed,
they ran the same programs, so a matched cell keeps only the seeds that both have; where they have none in common, all, and
says so. Nothing is computed here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import pandas as pd

from sim.outside import farthest
from sim.results import INPUTS, ResultFolder, ResultsError, RunResult, read_results

#: fields of a run that say how it was carried out and how often, not what was run
_NOT_OF_A_CELL = frozenset(
    {"name", "seed", "repeat", "draw", "tables", "trace", "explain"}
    | {"backend", "core_url", "jump", "strict", "engine_delay_ms", "objectives"}
)
#: settings that say where a process listens or what it writes down, and change nothing of what it does
_NOT_OF_A_RUN = frozenset({"host", "port", "journal_path", "engine.host", "engine.port", "engine.iteration_log"})
_FILES = ("core", "workload", "profiles", "engines", "rtt_ms", "program")  #: fields that may name files; folders do not count
_WHO = ("program", "id", "application", "calls")  #: columns of the table of programs that two runs of the same have alike
_OF_A_CHOICE = ("policy", "settings")  #: what one chooses between; the rest of a cell is the condition under which

Fields = dict[str, Any]
Key = tuple[tuple[str, str], ...]  #: a cell's fields and their values as JSON, in a fixed order


class CompareError(Exception):
    """Two folders that are not compared. The message says why, and what would be right."""


class Named(Protocol):
    """Whatever is of one cell."""

    @property
    def choice(self) -> str: ...
    @property
    def condition(self) -> str: ...


class Cell(NamedTuple):
    """What both sides ran. real, simulated: seed -> its runs, in order of their repeat. draws: the simulation's runs with
    durations drawn from the profile's spread. paired: both sides ran these seeds, and so the same programs. left_over: seeds of
    one side alone, which are not used. fields: what was run; choice and condition: the same in two parts, as labels."""

    fields: Fields
    choice: str
    condition: str
    real: dict[int, list[RunResult]]
    simulated: dict[int, list[RunResult]]
    draws: list[RunResult]
    paired: bool
    left_over: dict[str, list[int]]


class Unmatched(msgspec.Struct, frozen=True):
    """A cell that only one side has."""

    side: str
    cell: str
    runs: list[str]


class Matched(NamedTuple):
    """Cells in the order of the real folder, what only one side has, and what a reader should know of both."""

    real: ResultFolder
    simulated: ResultFolder
    cells: list[Cell]
    unmatched: list[Unmatched]
    warnings: list[str]


def match_folders(real: str | Path, simulated: str | Path, *, anyway: bool = False) -> Matched:
    """Reads both folders and matches their cells.

    Raises ResultsError for what is no folder of results, CompareError for two that should not be compared; with `anyway` the
    latter become warnings wherever there is something left to compare.
    """
    real_folder, simulated_folder = read_results(real), read_results(simulated)
    warnings: list[str] = []

    def doubt(message: str) -> None:
        if not anyway:
            raise CompareError(f"{message}; --anyway compares them all the same")
        warnings.append(message)

    _check_backends(real_folder, simulated_folder, doubt)
    for folder in (real_folder, simulated_folder):
        if folder.missing:
            more = f" and {len(folder.missing) - 1} more" if len(folder.missing) > 1 else ""
            doubt(f"{folder.path}: not finished: {folder.missing[0]}{more} (sim.run with the same --out goes on with it)")
    ignored = _unknown_of_a_running_cluster(real_folder, warnings)
    if all(result.run.backend == "real" for result in real_folder.runs):
        ignored |= {"profiles"}
    if all(result.run.backend != "sim" for result in real_folder.runs):
        ignored |= {"outputs"}  # of an application's own code: a cluster's engines say what they say
    ignored |= _disagreements(real_folder, simulated_folder, ignored, doubt)
    _check_inputs(real_folder, simulated_folder, doubt)
    _check_ignored((real_folder, simulated_folder), ignored)
    cells, unmatched = _match(real_folder, simulated_folder, ignored)
    cells = [_checked(cell, doubt) for cell in cells]
    for cell in cells:
        warnings += _doubts_of(cell)
    warnings += _extrapolations(cells)
    return Matched(real_folder, simulated_folder, cells, unmatched, warnings)


# ------------------------------------------------------------------------------------------------- what is refused


def _check_backends(real: ResultFolder, simulated: ResultFolder, doubt: Any) -> None:
    backends = [sorted({result.run.backend for result in folder.runs}) for folder in (real, simulated)]
    if backends[0] == ["sim"] and backends[1] != ["sim"]:
        raise CompareError(
            f"{real.path} is a simulation, {simulated.path} is {' and '.join(backends[1])}: REAL comes first, then SIM"
        )
    if "sim" in backends[0]:
        doubt(f"{real.path} and {simulated.path} are both simulations: REAL needs runs of --backend real or emulated")
    elif backends[1] != ["sim"]:
        doubt(f"{simulated.path} is {' and '.join(backends[1])}: SIM needs runs of --backend sim")


def _unknown_of_a_running_cluster(real: ResultFolder, warnings: list[str]) -> set[str]:
    """Fields of which a run on a cluster that was running already says nothing."""
    if not any(getattr(result.run, "core_url", None) for result in real.runs):
        return set()
    warnings.append(
        f"{real.path}: ran on a cluster that was running (core_url): its core's configuration and its engines are not known, "
        "and its policy is what the specification calls it"
    )
    return {"core", "engines", "profiles"}


def _disagreements(real: ResultFolder, simulated: ResultFolder, ignored: set[str], doubt: Any) -> set[str]:
    """Fields that are the same throughout each side and differ between them: such folders have no cell in common."""
    differing = set()
    sides = [[_fields(result, ignored) for result in folder.runs] for folder in (real, simulated)]
    for name in sides[0][0]:
        values = [{_json(fields.get(name)) for fields in side} for side in sides]
        if len(values[0]) == len(values[1]) == 1 and values[0] != values[1] and name not in (*_OF_A_CHOICE, "rate", "clients"):
            (ran,), (simulates,) = values
            doubt(f"{name} differs: {ran} in {real.path}, {simulates} in {simulated.path}")
            differing.add(name)
    return differing


def _check_ignored(folders: Sequence[ResultFolder], ignored: set[str]) -> None:
    """What is not held against the other side must not tell runs of one side apart either."""
    for folder in folders:
        for name in sorted(ignored):
            values = {_json(fields[name]) for result in folder.runs if name in (fields := _fields(result, set()))}
            if len(values) > 1:
                raise CompareError(
                    f"{folder.path} has runs with {name} {' and '.join(sorted(values))}, and the other side does not say which "
                    "of them it ran: give a folder with that alone"
                )


def _check_inputs(real: ResultFolder, simulated: ResultFolder, doubt: Any) -> None:
    """Files of one name must have had the same contents; what emulates and what simulates, the same latency profiles."""
    inputs = [_inputs(folder) for folder in (real, simulated)]
    for name in inputs[0]:
        if name in inputs[1] and inputs[0][name] != inputs[1][name]:
            doubt(f"{name} had other contents for {real.path} than for {simulated.path}")
    profiles = [{name for name in given if name.startswith("profile ")} for given in inputs]
    if all(profiles) and profiles[0] != profiles[1]:
        told = [", ".join(sorted(names)) for names in profiles]
        doubt(f"the latency profiles differ: {told[0]} in {real.path}, {told[1]} in {simulated.path}")


def _inputs(folder: ResultFolder) -> dict[str, str]:
    """The digest of each file that the folder's runs read, by the file's name; of each profile by `profile NAME`."""
    try:
        read = msgspec.json.decode((folder.path / INPUTS).read_bytes(), type=dict[str, str])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError) as error:
        raise ResultsError(f"{folder.path / INPUTS}: cannot be read: {error}") from None
    return {_portable(name): digest for name, digest in read.items()}


def _checked(cell: Cell, doubt: Any) -> Cell:
    """The cell; paired no more when a seed was not the same programs on both sides."""
    if not cell.paired:
        return cell
    for seed, results in cell.real.items():
        simulated = cell.simulated[seed][0]
        predicted = _who(simulated)
        for result in results:
            if (told := _difference(result, simulated, predicted)) is not None:
                doubt(f"{name_of(cell)}, seed {seed}: the programs are not the same: {told}")
                return cell._replace(paired=False)
    return cell


def _who(result: RunResult) -> pd.DataFrame | None:
    """What programs a run had; None without tables."""
    return table_of(result, "programs", _WHO) if result.run.tables else None


def table_of(result: RunResult, name: str, columns: Sequence[str]) -> pd.DataFrame:
    """Some columns of one table of a run that has tables. Raises ResultsError when it cannot be read."""
    path = result.folder / f"{name}.parquet"
    try:
        return pd.read_parquet(path, columns=list(columns))
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path}: cannot be read: {error}") from None


def _difference(real: RunResult, simulated: RunResult, predicted: pd.DataFrame | None) -> str | None:
    """What shows that two runs are of different programs. predicted: `_who` of the simulated one."""
    if real.summary.programs != simulated.summary.programs:
        return f"{real.summary.programs} in {real.folder}, {simulated.summary.programs} in {simulated.folder}"
    ran = _who(real)
    if ran is None or predicted is None or ran.equals(predicted):
        return None
    place = int((ran != predicted).any(axis=1).to_numpy().argmax())
    told = [" ".join(f"{name}={table.iloc[place][name]}" for name in _WHO) for table in (ran, predicted)]
    return f"{told[0]} in {real.folder}, {told[1]} in {simulated.folder}"


def _doubts_of(cell: Cell) -> list[str]:
    """What a reader of this cell's numbers must know."""
    warnings = []
    counts = [
        sum(result.summary.failed for results in side.values() for result in results) for side in (cell.real, cell.simulated)
    ]
    for failed, side in zip(counts, ("real", "simulated"), strict=True):
        if failed:
            warnings.append(f"{name_of(cell)}: {failed} {side} programs failed; percentiles are over those that finished")
    if not cell.paired:
        warnings.append(f"{name_of(cell)}: other programs on one side than on the other; errors include that difference")
        return warnings
    for name in ("output_tokens", "prompt_tokens"):
        for seed, results in cell.real.items():
            real, simulated = (getattr(side[0].summary, name) for side in (results, cell.simulated[seed]))
            if abs(real - simulated) > 0.01 * max(real, simulated):
                kind = name.replace("_", " ")
                warnings.append(f"{name_of(cell)}, seed {seed}: {real} {kind} in reality, {simulated} in simulation")
    return warnings


def _extrapolations(cells: Sequence[Cell]) -> list[str]:
    """Where the simulation's engines did what their latency profiles have not seen."""
    simulated = [result for cell in cells for results in cell.simulated.values() for result in results]
    return [
        f"profile {profile}: {feature} came to {value:g} in simulation, outside the {low:g} to {high:g} that it was fitted to"
        for profile, feature, (value, low, high) in farthest(result.summary.outside for result in simulated)
    ]


def name_of(cell: Named) -> str:
    """A cell in words."""
    return f"{cell.choice}, {cell.condition}" if cell.condition else cell.choice


# --------------------------------------------------------------------------------------------------------- matching


def _match(real: ResultFolder, simulated: ResultFolder, ignored: set[str]) -> tuple[list[Cell], list[Unmatched]]:
    groups = [_grouped(folder.runs, ignored) for folder in (real, simulated)]
    drawn = _grouped(simulated.draws, ignored)
    described: dict[Key, Fields] = {}
    for results in (*real.runs, *simulated.runs):
        fields = _fields(results, ignored)
        described[_key(fields)] = fields
    varying = _varying(described.values())
    common = [key for key in groups[0] if key in groups[1]]
    if not common:
        raise CompareError(f"{real.path} and {simulated.path} have no cell in common: {_what_differs(groups, described)}")
    cells = []
    for key in common:
        fields = described[key]
        sides = (groups[0][key], groups[1][key])
        shared = sorted(set(sides[0]) & set(sides[1]))
        left_over = {
            name: sorted(set(side) - set(shared)) for name, side in zip(("real", "simulated"), sides, strict=True) if shared
        }
        kept = [{seed: side[seed] for seed in (shared or sorted(side))} for side in sides]
        draws = [r for seed, results in drawn.get(key, {}).items() if not shared or seed in shared for r in results]
        choice, condition = _label(fields, varying, choice=True), _label(fields, varying, choice=False)
        spare = {name: seeds for name, seeds in left_over.items() if seeds}
        cells.append(Cell(fields, choice, condition, kept[0], kept[1], draws, bool(shared), spare))
    unmatched = [
        Unmatched(side, _whole_label(described[key], varying), [r.run.name for results in seeds.values() for r in results])
        for side, group in zip(("real", "simulated"), groups, strict=True)
        for key, seeds in group.items()
        if key not in common
    ]
    return cells, unmatched


def _grouped(results: Sequence[RunResult], ignored: set[str]) -> dict[Key, dict[int, list[RunResult]]]:
    groups: dict[Key, dict[int, list[RunResult]]] = {}
    for result in results:
        groups.setdefault(_key(_fields(result, ignored)), {}).setdefault(result.run.seed, []).append(result)
    for seeds in groups.values():
        for runs in seeds.values():
            runs.sort(key=lambda result: result.run.repeat)
    return groups


def _fields(result: RunResult, ignored: set[str]) -> Fields:
    fields = msgspec.to_builtins(result.run)
    fields["settings"] = {key: value for key, value in fields["settings"].items() if key not in _NOT_OF_A_RUN}
    return {
        name: _portable(value) if name in _FILES else value
        for name, value in fields.items()
        if name not in _NOT_OF_A_CELL and name not in ignored
    }


def _portable(value: Any) -> Any:
    """The value with the folders of files left out: where a file lay on the machine that ran it does not matter."""
    if isinstance(value, str):
        return re.sub(r"[^:=,]*/", "", value)
    if isinstance(value, list | tuple):
        return [_portable(item) for item in value]
    if isinstance(value, dict):
        return {name: _portable(item) for name, item in value.items()}
    return value


def _json(value: Any) -> str:
    return msgspec.json.encode(value, order="sorted").decode()


def _key(fields: Fields) -> Key:
    return tuple((name, _json(value)) for name, value in sorted(fields.items()))


def _varying(cells: Iterable[Fields]) -> list[str]:
    """The fields that have more than one value, a setting as `settings.KEY`."""
    values: dict[str, set[str]] = {}
    for fields in cells:
        for name, value in _flat(fields).items():
            values.setdefault(name, set()).add(_json(value))
    return [name for name, found in values.items() if len(found) > 1]


def _flat(fields: Fields) -> Fields:
    settings = {f"settings.{key}": value for key, value in fields.get("settings", {}).items()}
    return {**{name: value for name, value in fields.items() if name != "settings"}, **settings}


def _label(fields: Fields, varying: Sequence[str], *, choice: bool) -> str:
    """The varying fields of the choice (the policy in any case), or of the condition (the rate in any case)."""
    parts = [str(fields["policy"])] if choice else []
    for name, value in _flat(fields).items():
        setting = name.startswith("settings.")
        if name == "policy" or setting is not choice or (name not in varying and name != "rate"):
            continue
        if name == "rate":
            parts += [f"{value:g} programs/s"] if value is not None else ["as recorded"] if name in varying else []
        elif name == "engines":
            parts.append(" + ".join(f"{group['count']} {Path(group['file']).stem}" for group in value))
        elif name in ("workload", "client"):
            parts.append(str(value))
        else:
            parts.append(f"{name.removeprefix('settings.')}={value}")
    return ", ".join(parts)


def _whole_label(fields: Fields, varying: Sequence[str]) -> str:
    return ", ".join(filter(None, (_label(fields, varying, choice=choice) for choice in (True, False))))


def _what_differs(groups: Sequence[dict[Key, Any]], described: dict[Key, Fields]) -> str:
    """The fields whose values the two sides have not in common."""
    told = []
    sides = [[_flat(described[key]) for key in group] for group in groups]
    for name in dict.fromkeys(name for side in sides for fields in side for name in fields):
        values = [list(dict.fromkeys(_json(fields.get(name)) for fields in side)) for side in sides]
        if not set(values[0]) & set(values[1]):
            told.append(f"{name} is {' and '.join(values[0])} in the one, {' and '.join(values[1])} in the other")
    return "; ".join(told) or "no combination of their values occurs in both"
