"""Round trips: given, measured, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from parrot.configuration import ConfigurationError
from sim.network import open_network, stream


def test_a_constant_round_trip() -> None:
    assert open_network("0", 1).is_local
    network = open_network("250", 1)
    assert not network.is_local
    assert network.round_trip_s() == 0.25


@pytest.mark.parametrize(
    "form", [[10, 20.5], {"samples": [10, 20.5]}, {"client_round_trip_ms": {"samples": [10, 20.5]}, "x": 1}]
)
def test_measured_round_trips_are_drawn_from_the_file_and_the_seed_alone(tmp_path: Path, form: object) -> None:
    file = tmp_path / "rtt.json"
    file.write_text(json.dumps(form))
    first, second, other = (open_network(str(file), seed) for seed in (3, 3, 4))
    drawn = [first.round_trip_s() for _ in range(3000)]
    assert set(drawn) == {0.010, 0.0205}
    assert drawn == [second.round_trip_s() for _ in range(3000)]
    assert drawn != [other.round_trip_s() for _ in range(3000)]


@pytest.mark.parametrize("content", ["[]", "{}", '{"samples": []}', '[1, "2"]', "[-1]", "[true]", "7"])
def test_a_file_that_holds_no_round_trips_is_refused_by_name(tmp_path: Path, content: str) -> None:
    file = tmp_path / "rtt.json"
    file.write_text(content)
    with pytest.raises(ConfigurationError, match=r"rtt\.json"):
        open_network(str(file), 0)


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "no-such-file.json"])
def test_a_round_trip_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(ConfigurationError):
        open_network(value, 0)


def test_streams_of_different_names_or_seeds_differ() -> None:
    draws = {tuple(stream(seed, name).random(3)) for seed in (0, 1) for name in ("network", "arrivals")}
    assert len(draws) == 4
