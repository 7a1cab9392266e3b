"""Applications' own code as a workload: a program written with `P`, unmodified, many instances of it, on every backend.

Turns a run of a specification that names a program into what `simulated` (virtual time) and `real` (real time) need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from parrot.configuration import ConfigurationError
from sim.configs import core_config_of, engine_models_of
from sim.network import open_network
from sim.programs.instances import check_source, starts_at
from sim.programs.outputs import open_outputs
from sim.programs.source import Arguments, Source, read_inputs
from sim.spec import Run

if TYPE_CHECKING:
    from sim.recorder import Recorder

__all__ = ["check_program", "play_programs", "simulate_programs"]


def check_program(run: Run) -> None:
    """Raises ConfigurationError for what of the run's program, its inputs and its outputs would stop it."""
    source = _source_of(run)
    with source.importable():
        check_source(source, read_inputs(run.inputs))
    starts_at(run.rate, run.seed, run.arrivals)
    if run.backend == "sim":
        open_outputs(run.outputs, run.seed)
    elif run.outputs is not None:
        raise ConfigurationError(f"--outputs {run.outputs}: the engines of backend {run.backend} say what they say")


def simulate_programs(run: Run, rows: bool, expect: Callable[[int], None], ended: Callable[[], None]) -> tuple[Recorder, int]:
    """Carries out the run in virtual time; returns what it measured and the number of engines.

    rows: whether the recorder keeps them. expect: told the number of instances. ended: called as each ends. Raises
    ConfigurationError, and StuckError for a run that cannot end.
    """
    from sim.programs.simulated import simulate_instances

    engines = engine_models_of(run)
    inputs = read_inputs(run.inputs)
    count = count_of(run, inputs)
    expect(count)
    recorder = simulate_instances(
        _source_of(run),
        inputs,
        count,
        core_config_of(run),
        engines,
        outputs=open_outputs(run.outputs, run.seed),
        network=open_network(run.rtt_ms, run.seed),
        rate=run.rate,
        arrivals=run.arrivals,
        clients=run.clients,
        seed=run.seed,
        jump=run.jump,
        engine_delay_s=run.engine_delay_ms / 1000.0,
        tables=rows,
        on_ended=ended,
        strict=run.strict,
    )
    return recorder, len(engines)


async def play_programs(
    run: Run, url: str, recorder: Recorder, expect: Callable[[int], None], ended: Callable[[], None]
) -> None:
    """Carries out the run on the cluster at `url`, in real time. Raises ConfigurationError."""
    from sim.programs.real import play_instances

    inputs = read_inputs(run.inputs)
    count = count_of(run, inputs)
    expect(count)
    await play_instances(
        url,
        _source_of(run),
        inputs,
        count,
        recorder,
        network=open_network(run.rtt_ms, run.seed),
        rate=run.rate,
        arrivals=run.arrivals,
        clients=run.clients,
        seed=run.seed,
        on_ended=ended,
    )


def count_of(run: Run, inputs: list[Arguments]) -> int:
    """How many instances: the run's, else one an input."""
    return run.count if run.count is not None else len(inputs)


def _source_of(run: Run) -> Source:
    assert run.program is not None
    return Source(run.program)
