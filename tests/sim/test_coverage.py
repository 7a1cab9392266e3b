"""What a simulation says when its iterations leave the range that the latency profile was fitted in."""

from __future__ import annotations

import msgspec
import pytest

from parrot.latency import BatchShape, Coverage, OutOfRange
from parrot.serve.config import ServeCoreConfig
from sim.engine_models import EngineModel
from sim.network import Constant
from sim.population import simulate
from sim.recorder import Recorder
from sim.workloads import open_workload
from tests.sim.clusters import engine

SEEN = {"rows": (1.0, 4.0), "tokens": (1.0, 4096.0), "prefill_pairs": (0.0, 1e9), "decode_kv": (0.0, 2000.0)}


def model(seen: dict[str, tuple[float, float]]) -> EngineModel:
    made = engine()
    return made._replace(profile=msgspec.structs.replace(made.profile, seen=seen))


def run(of: EngineModel, strict: bool = False) -> Recorder:
    programs = open_workload("map_reduce", rate=5.0, count=10)
    return simulate(programs, ServeCoreConfig(), [of, of], network=Constant(0.0), strict=strict)


def test_a_run_inside_the_range_says_nothing() -> None:
    wide = dict.fromkeys(SEEN, (0.0, 1000000000000.0))
    assert run(model(wide), strict=True).outside == {}


def test_a_profile_without_a_range_is_not_judged() -> None:
    assert run(model({}), strict=True).outside == {}


def test_a_run_outside_says_how_far_it_went_once_a_profile() -> None:
    narrow = model(SEEN)
    outside = run(narrow).outside
    assert list(outside) == [narrow.profile.name]
    furthest, least, most = outside[narrow.profile.name]["rows"]
    assert (least, most) == SEEN["rows"]
    assert furthest > most


def test_strict_refuses_and_names_the_input_and_the_range() -> None:
    with pytest.raises(OutOfRange, match=r"with rows from 1 to 4; this run asks for [5-9]|decode_kv from 0 to 2000"):
        run(model(SEEN), strict=True)


def test_the_end_of_a_run_of_iterations_counts_too() -> None:
    coverage = Coverage(model(SEEN).profile)
    coverage.note(BatchShape(decode_rows=2, decode_kv=1000, decode_kv_unique=1000), later=499)
    assert coverage.outside == {}
    coverage.note(BatchShape(decode_rows=2, decode_kv=1000, decode_kv_unique=1000), later=600)
    assert coverage.outside == {"decode_kv": (2200.0, 0.0, 2000.0)}


def test_the_furthest_is_kept_on_either_side() -> None:
    coverage = Coverage(msgspec.structs.replace(model(SEEN).profile, seen={"tokens": (100.0, 200.0)}))
    for tokens in (150, 90, 230, 205, 60):
        coverage.note(BatchShape(prefill_rows=1, prefill_tokens=tokens))
    assert coverage.outside == {"tokens": (60.0, 100.0, 200.0)}
