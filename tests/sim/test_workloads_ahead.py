"""Workloads read to their end before they are used: the same programs in their order, however many and wherever they wait."""

from __future__ import annotations

import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot.protocol.api import Criteria
from sim.workloads import WorkloadError
from sim.workloads.ahead import read_ahead
from sim.workloads.program import After, Program
from tests.sim.programs import chain, chat, map_reduce, one_call
from tests.sim.programs import programs as any_programs


def never() -> Iterator[Program]:
    raise AssertionError("the workload was begun anew")


class Anew:
    """A workload that can be begun anew, and how often it was."""

    def __init__(self, programs: list[Program]) -> None:
        self.programs = programs
        self.begun = 0

    def __call__(self) -> Iterator[Program]:
        self.begun += 1
        return iter(self.programs)

    def read(self, kept: int = 0) -> None:
        """Reads it ahead, which takes a second reading."""
        count, read = read_ahead(iter(self.programs), self, kept)
        assert self.begun == 1
        assert (count, list(read)) == (len(self.programs), self.programs)


def some(count: int) -> list[Program]:
    kinds: list[Callable[[str], Program]] = [one_call, lambda name: chain(3, name), lambda name: map_reduce(4, name)]
    return [kinds[n % 3](f"p{n}") for n in range(count)]


def files_made(monkeypatch: pytest.MonkeyPatch) -> list[IO[bytes]]:
    """The temporary files that are made from now on."""
    made: list[IO[bytes]] = []

    def counted() -> IO[bytes]:
        made.append(tempfile.TemporaryFile())  # noqa: SIM115  it is closed by whom the test is about
        return made[-1]

    monkeypatch.setattr("sim.workloads.ahead.TemporaryFile", counted)
    return made


@settings(max_examples=40)
@given(st.lists(any_programs(), max_size=20), st.integers(0, 20))
def test_programs_come_back_equal_and_in_order_whether_they_waited_in_memory_or_in_a_file(
    programs: list[Program], kept: int
) -> None:
    count, read = read_ahead(iter(programs), never, kept)
    assert (count, list(read)) == (len(programs), programs)


def test_every_field_of_a_program_comes_back() -> None:
    full = chat(3, name="täglich ☂")
    (first, *others), gets = full.calls, full.gets
    first = msgspec.structs.replace(first, models=("a", "b"), cache_prefix=False, model_type="text", after=(After(None, 1.5),))
    last = msgspec.structs.replace(gets[-1], criteria=Criteria.THROUGHPUT, deadline_s=0.1)
    program = msgspec.structs.replace(full, calls=(first, *others), gets=(*gets[:-1], last), tenant="t", arrival_s=1e-7 / 3)
    _, read = read_ahead(iter([program]), never, 0)
    (back,) = read
    assert back == program
    assert repr(back) == repr(program)


def test_a_small_workload_makes_no_file_and_a_large_one_makes_one_that_is_gone_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = files_made(monkeypatch)
    programs = some(300)
    assert list(read_ahead(iter(programs), never)[1]) == programs
    assert made == []
    _, read = read_ahead(iter(programs), never, 10)
    (file,) = made
    assert isinstance(file.name, int)  # no name: it goes with the process too
    assert list(read) == programs
    assert file.closed


def test_wherever_the_disk_has_no_more_room_the_workload_is_read_again() -> None:
    programs = some(60)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for room in range(0, len(msgspec.msgpack.encode(programs)), 400):  # between two writes too, and at the very end
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
            Anew(programs).read()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_without_a_folder_for_temporary_files_the_workload_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    Anew(some(50)).read()


@pytest.mark.parametrize("odd", [one_call("name of a file \udcff"), one_call("large", output=1 << 70)], ids=["text", "number"])
def test_what_has_no_form_in_a_file_is_read_again(odd: Program) -> None:
    Anew([*some(5), odd, *some(5)]).read(2)


def test_what_reading_refuses_goes_through_and_leaves_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    made = files_made(monkeypatch)

    def broken() -> Iterator[Program]:
        yield from some(50)
        raise WorkloadError("line 51: not a program")

    with pytest.raises(WorkloadError, match="line 51"):
        read_ahead(broken(), never, 10)
    assert [file.closed for file in made] == [True]
