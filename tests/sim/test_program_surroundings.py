"""What code may not do in virtual time is refused, who never ends is named, and the process is as before when a run is over."""

from __future__ import annotations

import signal
import sys
import threading
import time

import pytest

from sim.population import StuckError
from sim.programs import surroundings
from tests.sim.program_runs import Runner, run, says, told

__all__ = ["run"]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import threading; threading.Thread(target=print).start()", "starts a thread"),
        ("from concurrent.futures import ThreadPoolExecutor; ThreadPoolExecutor().submit(ask, 'x')", "starts a thread"),
        ("import socket; socket.create_connection(('127.0.0.1', 9))", "a host"),
        ("import subprocess; subprocess.run(['true'])", "starts a process"),
        ("input()", "asks a person"),
        ("import threading; threading.Event().wait(0.01)", "waits in real time for another thread"),
        ("import queue; queue.Queue().get(timeout=0.01)", "waits in real time for another thread"),
        ("import urllib.request; urllib.request.urlopen('http://127.0.0.1:9/')", "a host"),
        ("asyncio.run(asyncio.to_thread(print))", "in a thread"),
        ("asyncio.run(asyncio.open_connection('127.0.0.1', 9))", "opens a connection"),
        ("asyncio.SelectorEventLoop().run_until_complete(aask())", "event loop of its own making"),
    ],
)
def test_what_would_block_for_real_is_refused(code: str, said: str, run: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = run(
        f"""
        async def aask():
            async with P.VirtualMachine().running_scope():
                await ask.ainvoke("x")

        def main():
            {code}
        """
    )
    shown = capsys.readouterr().err
    assert recorder.counts["failed"] == 1, shown
    assert said in shown


def test_who_waits_for_nothing_that_comes_is_named_with_its_stack(run: Runner) -> None:
    with pytest.raises(StuckError, match=r"(?s)instance 1 waits here.*ask\(P.variable\(\"never\"\)\).get\(\)"):
        run('def main(n):\n    if n:\n        ask(P.variable("never")).get()\n', count=2, inputs=["[0]", "[1]"])


def test_an_endless_loop_is_stopped_with_its_stack(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings, "PATIENCE_S", 0.2)
    text = """
        def main():
            while True:
                try:
                    told.append(0)
                    told.pop()
                except Exception:
                    pass
    """
    with pytest.raises(StuckError, match=r"(?s)instance 0 neither waits nor ends.*program0.py\", line \d+, in main"):
        run(text)


def test_a_lock_held_across_a_sleep_is_found(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings, "PATIENCE_S", 0.2)
    text = """
        import threading

        if not told:
            told.append(threading.Lock())
        lock = told[0]

        def main():
            with lock:
                time.sleep(1)
    """
    with pytest.raises(StuckError, match=r"(?s)instance 1 neither waits nor ends.*with lock"):
        run(text, count=2)


def test_an_interrupt_ends_the_run_and_every_instance(run: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    text = """
        import os
        import signal

        async def main(n):
            try:
                await asyncio.gather(*[(await ask.ainvoke("x")).aget() for _ in range(3)])
                await asyncio.sleep(1)
                if n == 2:
                    os.kill(os.getpid(), signal.SIGINT)
                await asyncio.sleep(1)
            finally:
                told.append(n)
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs the tests may have it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            run(text, count=3, inputs=["[0]", "[1]", "[2]"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert sorted(told) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_who_only_looks_at_the_clock_is_told_that_it_stands(run: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = run("def main():\n    while time.time() < 2e9:\n        pass\n")
    assert recorder.counts["failed"] == 1
    shown = capsys.readouterr().err
    assert "never waits" in shown
    assert "During handling" not in shown, "P itself looks at the clock at its end"


def test_who_hears_of_an_ended_instance_finds_the_real_clock(run: Runner) -> None:
    heard: list[float] = []
    begun_s = time.monotonic()
    text = f"def main():\n    time.sleep(1e6)\n    [time.time() for _ in range({surroundings.MOST_LOOKS})]\n"
    run(text, on_ended=lambda: heard.append(time.monotonic()))
    assert begun_s <= heard[0] < begun_s + 1e6


def test_the_surroundings_are_as_before_when_a_run_has_ended(run: Runner) -> None:
    import asyncio
    import random

    random.seed(5)

    def now() -> list[object]:
        threads = threading.Thread.start, threading.Condition.wait
        return [time.sleep, time.time, time.monotonic, *threads, asyncio.get_event_loop_policy(), random.getstate(), *sys.argv]

    before = now()
    run("def main():\n    raise ValueError\n")
    with pytest.raises(ZeroDivisionError):
        run("def main():\n    ask('x').get()\n", outputs=says(lambda name, prompt: 1 / 0))  # type: ignore[arg-type,return-value]
    assert before == now()
