"""A process a run: results come back, a process that dies is told and takes no other with it, none outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sim.pool import Died, on_processes, shared_progress


def test_every_result_comes_with_its_number_however_few_processes() -> None:
    work = [lambda n=n: (n, os.getpid()) for n in range(5)]
    results = dict(on_processes(work, 2))
    assert {number: result[0] for number, result in results.items()} == {n: n for n in range(5)}  # type: ignore[index]
    assert len({result[1] for result in results.values()}) == 5  # type: ignore[index,misc]


def test_a_process_that_dies_takes_no_other_with_it() -> None:
    work = [lambda: 1, lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: os._exit(3), lambda: 1 / 0, lambda: 2]
    results = dict(on_processes(work, 2))
    assert (results[0], results[4]) == (1, 2)
    told = {number: result.told for number, result in results.items() if isinstance(result, Died)}
    assert sorted(told) == [1, 2, 3]
    assert "killed by SIGKILL" in told[1]
    assert "status 3" in told[2]
    assert "ZeroDivisionError" in told[3]


def test_progress_is_seen_while_the_processes_work() -> None:
    progress = shared_progress(2)
    seen: list[list[tuple[int, int]]] = []

    def count(place: int) -> None:
        progress[place].expect(3)
        for _ in range(3):
            progress[place].advance()

    for _ in on_processes([lambda: count(0), lambda: count(1)], 2, lambda: seen.append([p.read() for p in progress])):
        pass
    assert seen[-1] == [(3, 3), (3, 3)]


def test_closing_the_iteration_ends_the_processes() -> None:
    results = on_processes([lambda: os.getpid(), lambda: time.sleep(600), lambda: time.sleep(600)], 3)
    next(results)
    results.close()  # type: ignore[attr-defined]
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_no_process_outlives_one_that_was_killed(tmp_path: Path) -> None:
    script = f"""
import os, time
from pathlib import Path
from sim.pool import on_processes
def work():
    Path({str(tmp_path)!r}, str(os.getpid())).touch()
    time.sleep(600)
list(on_processes([work, work], 2))
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    children = [int(path.name) for path in tmp_path.iterdir()]
    process.kill()
    process.wait()
    while any(map(_lives, children)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(children) == 2
    assert not any(map(_lives, children))


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_an_interrupt_in_the_middle_of_a_fork_is_not_lost() -> None:
    script = """
import os
from sim.pool import on_processes
os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), 2))
try:
    print(list(on_processes([lambda: None], 1)))
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert (done.stdout, done.stderr) == ("interrupted\n", "")
