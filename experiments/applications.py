"""The demo's applications, run through HTTP as any user would run them, and what one run of each gave.

Call metrics are those of sim.metrics, from the core's report on the session; the rest is on the client's clock.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from parrot import P
from parrot.protocol.api import CallReport
from sim.clients import Mode
from sim.recorder import Recorder

#: the applications, as modules of examples/
APPLICATIONS = ("map_reduce", "chain_summary", "chat")
STAGGER_S = 0.5  #: between the starts of a round's applications, so that they come in the same order in every round
POLL_S = 0.1


class ProgramError(Exception):
    """An application failed."""


@dataclass(frozen=True)
class Outcome:
    """One run of an application. Times in seconds; `jct_s`, `began_s`, `ended_s` on the client's clock. TTFT and time per
    token (tpot) are means over its calls."""

    application: str
    session_id: int
    began_s: float
    ended_s: float
    jct_s: float
    ttft_s: float
    tpot_s: float
    texts: dict[str, str]
    reports: tuple[CallReport, ...]

    @property
    def calls(self) -> int:
        return len(self.reports)


@dataclass
class _Running:
    application: str
    url: str
    size: int | None
    outcome: Outcome | None = None
    error: BaseException | None = None
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        # A daemon: when the demo gives up, nobody waits for an answer that will not come.
        self.thread = threading.Thread(target=self._run, name=self.application, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.outcome = run_application(self.application, self.url, self.size)
        except BaseException as error:
            self.error = error


def run_together(url: str, check: Callable[[], None], size: int | None = None) -> list[Outcome]:
    """Runs all applications at once, each in a session of its own; `check` is called all the while and may raise.

    size: how many chunks or turns each of them has (None: all). Raises ProgramError when one fails.
    """
    running = []
    for application in APPLICATIONS:
        running.append(_Running(application, url, size))
        time.sleep(STAGGER_S)
    while any(one.thread.is_alive() for one in running) and not any(one.error for one in running):
        check()
        time.sleep(POLL_S)
    for one in running:
        if one.error is not None:
            check()  # an engine that died explains more than what its death did to a program
            raise ProgramError(f"{one.application} failed: {type(one.error).__name__}: {one.error}") from one.error
    return [one.outcome for one in running if one.outcome is not None]


def run_application(application: str, url: str, size: int | None = None) -> Outcome:
    """Runs examples/APPLICATION.py once, with `size` chunks or turns."""
    module = importlib.import_module(f"examples.{application}")
    machine = P.VirtualMachine(url)
    began_s = time.perf_counter()
    with machine.running_scope():
        texts: dict[str, str] = module.main(machine, size) if size is not None else module.main(machine)
        ended_s = time.perf_counter()
        report = machine.report()
        jct_s = machine.jct_s
    if jct_s is None:
        raise ProgramError("it fetched nothing")
    measured = Recorder(Mode.SEMANTIC)
    measured.session_ended(0, report, {})
    return Outcome(
        application=application,
        session_id=report.session_id,
        began_s=began_s,
        ended_s=ended_s,
        jct_s=jct_s,
        ttft_s=float(np.mean(measured.values["ttft_s"])),
        tpot_s=float(np.mean(measured.values["tpot_s"])),
        texts=texts,
        reports=report.reports or (),
    )
