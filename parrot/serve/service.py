"""What programs and tenants have been served, and how long outputs are likely to be.

Kept only for a policy that asks (`uses_service`); every change and every query is O(1). It is kept by the scheduler and is
read-only to policies. Of an earlier life of the core nothing is known.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parrot.serve.engines import Engine
    from parrot.serve.graph import Task
    from parrot.serve.sessions import Session

KEPT_FUNCTIONS = 4096  #: function names whose output lengths are remembered; clients can name any
KEPT_LOWERED = 64
WINDOW = 100  #: a mean follows a change within about so many outputs


class Account:
    """What a program or a tenant was given. `prompt_tokens`: computed for it, those of attempts in flight included (what an
    engine held already costs nothing). `output_tokens`: of its finished tasks; `expected_tokens`: of those in flight.
    `seconds`: in service, of its finished tasks; `waited_s`: that its tasks were ready and not placed. `longest_s`: the
    service along the longest path of finished tasks."""

    __slots__ = ("expected_tokens", "longest_s", "output_tokens", "prompt_tokens", "seconds", "waited_s")

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.expected_tokens = 0.0
        self.seconds = 0.0
        self.waited_s = 0.0
        self.longest_s = 0.0


class Flight:
    """What an attempt in flight was charged, and where it is."""

    __slots__ = ("engine_id", "expected", "prompt")

    def __init__(self, engine_id: int, prompt: int, expected: float) -> None:
        self.engine_id = engine_id
        self.prompt = prompt
        self.expected = expected


class Mean:
    """A running mean."""

    __slots__ = ("count", "value")

    def __init__(self) -> None:
        self.count = 0
        self.value = 0.0

    def add(self, value: float) -> None:
        self.count = min(self.count + 1, WINDOW)
        self.value += (value - self.value) / self.count


class Service:
    """The accounts, by program (its session's sequence number) and by tenant, and the lengths of outputs that were seen."""

    def __init__(self) -> None:
        self._programs: dict[int, Account] = {}
        self._tenants: dict[str, Account] = {}
        self._outputs: dict[int, float] = {}  # engine id -> tokens
        self._flights: dict[Task, Flight] = {}
        self._functions: OrderedDict[str, Mean] = OrderedDict()
        self._overall = Mean()
        self._lowered: deque[str] = deque(maxlen=KEPT_LOWERED)
        self.lowerings = 0  #: how often a tenant's account has gone down, as it does when a task ends sooner than expected

    # ---------------------------------------------------------------------------------------- queries

    def program(self, task: Task) -> Account:
        """The account of the task's program."""
        return self._programs.get(task.call.session.sequence, NOTHING)

    def tenant(self, name: str) -> Account:
        return self._tenants.get(name, NOTHING)

    def expected_on(self, engine: Engine) -> float:
        """Tokens that the tasks in flight there are expected to generate."""
        return self._outputs.get(engine.id, 0.0)

    def expected_output(self, task: Task) -> float:
        """Tokens: the mean of the outputs of its function, else of all, else its limit, which none of them exceeds."""
        mean = self._functions.get(task.call.func_name, self._overall)
        limit = task.sampling.max_gen_length
        return min(mean.value, limit) if mean.count else limit

    def lowered_since(self, lowerings: int) -> Collection[str] | None:
        """Tenants whose accounts have gone down since `lowerings` had that value; None when it is too long ago to say."""
        times = self.lowerings - lowerings
        return None if times > len(self._lowered) else dict.fromkeys(islice(reversed(self._lowered), times))

    # ---------------------------------------------------------------------------------------- for the scheduler alone

    def queued(self, task: Task) -> None:
        """The task is ready: `path_s` is, until it ends, the service along the longest path of tasks that led to it. One that
        no other of its program led to may be asked for because of what came before: then the longest path of its program."""
        longest, known = 0.0, False
        for variable in task.inputs():
            if variable.producer is not None:
                known = True
                longest = max(longest, variable.producer.path_s)
        task.path_s = longest if known else self.program(task).longest_s

    def placed(self, task: Task, engine: Engine, prompt: int, now: float) -> None:
        """An attempt begins. prompt: tokens that no context holds yet."""
        expected = self.expected_output(task)
        self._flights[task] = Flight(engine.id, prompt, expected)
        self._outputs[engine.id] = self._outputs.get(engine.id, 0.0) + expected
        session = task.call.session
        program = self._programs.get(session.sequence)
        if program is None:
            program = self._programs[session.sequence] = Account()
        tenant = self._tenants.get(session.tenant)
        if tenant is None:
            tenant = self._tenants[session.tenant] = Account()
        for account in (program, tenant):
            account.prompt_tokens += prompt
            account.expected_tokens += expected
        if task.attempt == 1 and task.ready_s is not None:
            program.waited_s += now - task.ready_s

    def finished(self, task: Task, output_tokens: int, now: float) -> None:
        flight = self._flights.pop(task, None)
        if flight is None:
            return
        started = task.started_s if task.started_s is not None else task.dispatched_s
        seconds = now - started if started is not None else 0.0
        for account in self._settle(task, flight, output_tokens):
            account.output_tokens += output_tokens
            account.seconds += seconds
        task.path_s += seconds
        program = self.program(task)
        program.longest_s = max(program.longest_s, task.path_s)
        mean = self._functions.pop(task.call.func_name, None) or Mean()
        self._functions[task.call.func_name] = mean  # the last one now
        if len(self._functions) > KEPT_FUNCTIONS:
            self._functions.popitem(last=False)
        mean.add(output_tokens)
        self._overall.add(output_tokens)

    def cancelled(self, task: Task) -> None:
        """Nobody wants it any more. It stays charged as expected: a tenant that cancels was served all the same."""
        flight = self._flights.pop(task, None)
        if flight is not None:
            for account in self._settle(task, flight, flight.expected):
                account.output_tokens += round(flight.expected)

    def left(self, task: Task) -> None:
        """The attempt is over; if nothing came of it, nobody pays."""
        flight = self._flights.pop(task, None)
        if flight is not None:
            for account in self._settle(task, flight, -1.0):
                account.prompt_tokens -= flight.prompt

    def _settle(self, task: Task, flight: Flight, output_tokens: float) -> list[Account]:
        """Takes an attempt off what is expected of its engine and for its owners."""
        left = self._outputs.pop(flight.engine_id, flight.expected) - flight.expected
        if left > 0.01:  # expectations are no whole numbers
            self._outputs[flight.engine_id] = left
        session = task.call.session
        if output_tokens < flight.expected:
            self.lowerings += 1
            self._lowered.append(session.tenant)
        accounts = [self._programs[session.sequence], self._tenants[session.tenant]]
        for account in accounts:
            account.expected_tokens -= flight.expected
        return accounts

    def ended(self, session: Session) -> None:
        """The session is over, and none of its tasks is in flight."""
        self._programs.pop(session.sequence, None)


NOTHING = Account()
