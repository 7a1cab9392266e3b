"""Policies of installed packages: found by the entry point's name, checked, and never in the place of a shipped one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from parrot.protocol.errors import ParrotError
from parrot.serve.config import GlobalSchedulerConfig
from parrot.serve.policies import POLICIES, build_policy, find_policy, parse_policy, source_of_policy

SOURCE = """
from parrot.serve.policies.base import InOrder, first_fit
from parrot.serve.policies.parameters import Parameter

class Newest(InOrder):
    name = "newest"
    parameters = {"skip": Parameter(int, 0, "engines to leave out", at_least=0)}

    def choose(self, task, queue, cluster):
        found = first_fit(task, cluster.engines(task.call.lane)[::-1], cluster)
        return () if found is None else (found,)

class Nothing:
    pass
"""

ENTRY_POINTS = """
[parrot.policies]
newest = newest_policy:Newest
nothing = newest_policy:Nothing
gone = newest_policy:Gone
round_robin = newest_policy:Nothing
"""


@pytest.fixture(autouse=True)
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed package that offers policies."""
    (tmp_path / "newest_policy.py").write_text(SOURCE)
    info = tmp_path / "newest_policy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: newest-policy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    find_policy.cache_clear()


def test_an_installed_policy_has_the_name_of_its_entry_point_and_its_own_parameters(distribution: Path) -> None:
    section = parse_policy("newest:skip=2", GlobalSchedulerConfig())
    assert (section.policy, section.params) == ("newest", {"skip": 2})
    assert type(build_policy(section)).__name__ == "Newest"
    assert source_of_policy("newest:skip=2") == str(distribution / "newest_policy.py")


def test_an_unknown_name_is_told_the_installed_ones_too() -> None:
    with pytest.raises(ParrotError, match=r"'newer' is unknown; known are .*least_loaded, .*newest, nothing, .*module:Class"):
        find_policy("newer")


def test_an_entry_point_that_is_no_policy_or_not_there_says_so() -> None:
    with pytest.raises(ParrotError, match="'nothing' is no policy: it has no method place"):
        find_policy("nothing")
    with pytest.raises(ParrotError, match=r"'gone' cannot be loaded: AttributeError: .*Gone"):
        find_policy("gone")


def test_an_entry_point_takes_no_shipped_policys_name() -> None:
    assert find_policy("round_robin") is POLICIES["round_robin"]
    assert source_of_policy("round_robin") is None
