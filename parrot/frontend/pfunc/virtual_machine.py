"""The virtual machine of a program: its session at one core, its functions, and the scope in which it runs."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import itertools
import logging
import statistics
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any

from parrot.frontend.link import Link
from parrot.frontend.pfunc import environment
from parrot.frontend.pfunc.conversation import Conversation
from parrot.frontend.pfunc.function import Call, Function, SemanticFunction
from parrot.frontend.pfunc.parameters import Parameter
from parrot.frontend.pfunc.variable import Variable
from parrot.frontend.session import Session
from parrot.frontend.wire import RetryPolicy, Stat
from parrot.protocol.api import SessionReport
from parrot.protocol.errors import ParrotError

_log = logging.getLogger("parrot.frontend")

Program = Callable[..., Any]


class VirtualMachine:
    """Runs programs against the core at `core_http_addr`. Mode "debug" prints each call to stderr.

    `api_key`: the tenant's, where the core asks for one. `ca_file`: a PEM file of those whose certificates are believed, of a
    core at https:// (None: the system's authorities). `stat` counts requests, retries and lost connections; `stat_run_time`
    is the last run's time in seconds.
    """

    def __init__(
        self,
        core_http_addr: str = "http://localhost:9000",
        mode: str = "release",
        *,
        api_key: str | None = None,
        ca_file: str | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        if mode not in ("release", "debug"):
            raise ParrotError("bad_request", f"mode {mode!r} is neither 'release' nor 'debug'")
        self._link = Link(core_http_addr, retry, ca_file)
        self.core_http_addr = self._link.address
        self.mode = mode
        self.functions: dict[str, Function] = {}
        self.stat_run_time = 0.0
        self._api_key = api_key
        self._session: Session | None = None
        self._before: list[VirtualMachine | None] = []
        self._names = itertools.count()

    @property
    def stat(self) -> Stat:
        return self._link.stat

    # ------------------------------------------------------------------------------------------ functions

    def define_function(
        self,
        func_name: str | None,
        func_body: str,
        params: Sequence[Parameter],
        try_register: bool = True,
        *,
        conversation_template: Conversation | None = None,
        **metadata: Any,
    ) -> SemanticFunction:
        """A semantic function from a template and its parameters; a name is made up where none is given."""
        name = func_name or f"anonymous_{next(self._names)}"
        function = SemanticFunction(name, params, func_body, conversation_template=conversation_template, **metadata)
        if try_register:
            self.register_function(function)
        return function

    def import_function(self, function_name: str, module_path: str) -> Function:
        """The function of that name in the module `module_path` (dotted, as for `import`)."""
        try:
            function = getattr(importlib.import_module(module_path), function_name)
        except ImportError as error:
            raise ParrotError("not_found", f"module {module_path!r} cannot be imported: {error}") from error
        except AttributeError as error:
            raise ParrotError("not_found", f"module {module_path!r} has no {function_name!r}") from error
        if not isinstance(function, Function):
            raise ParrotError("bad_request", f"{module_path}.{function_name} is no semantic or native function")
        self.register_function(function)
        return function

    def register_function(self, function: Function) -> None:
        """Lists a function under its name in `functions`; a later one of the same name takes its place."""
        self.functions[function.name] = function

    # ------------------------------------------------------------------------------------------- sessions

    @property
    def session(self) -> Session:
        """The registered session. Raises `bad_request` when there is none."""
        if self._session is None:
            raise ParrotError("bad_request", "no session is registered: call inside run or running_scope, or register_session")
        return self._session

    @property
    def session_registered(self) -> bool:
        return self._session is not None

    @property
    def session_id(self) -> int | None:
        return self._session.id if self._session else None

    def register_session(self) -> None:
        """Opens a session at the core."""
        self._check_no_session()
        self._session = Session.open(self._link, self._api_key)

    async def aregister_session(self) -> None:
        self._check_no_session()
        try:
            self._session = await Session.aopen(self._link, self._api_key)
        except BaseException:
            await self._link.aclose()
            raise

    def unregister_session(self) -> None:
        """Closes the session; the core cancels its running work."""
        session, self._session = self.session, None
        try:
            session.close()
        finally:
            self._link.close()

    async def aunregister_session(self) -> None:
        session, self._session = self.session, None
        try:
            await session.aclose()
        finally:
            await self._link.aclose()

    def report(self) -> SessionReport:
        """The core's account of the session: each call's tasks with the times of their lives."""
        return self.session.report()

    async def areport(self) -> SessionReport:
        return await self.session.areport()

    @property
    def jct_s(self) -> float | None:
        """Seconds, on this clock, from the session's first submission to its last answered get so far."""
        session = self._session
        if session is None or session.first_submit_s is None or session.last_get_s is None:
            return None
        return session.last_get_s - session.first_submit_s

    # ---------------------------------------------------------------------------------------------- calls

    def submit(self, call: Call) -> Variable | tuple[Variable, ...]:
        """Submits a bound call to the session."""
        outputs = call.submit(self.session)
        self._trace(call, outputs)
        return outputs

    async def asubmit(self, call: Call) -> Variable | tuple[Variable, ...]:
        outputs = await call.asubmit(self.session)
        self._trace(call, outputs)
        return outputs

    def _trace(self, call: Call, outputs: Variable | tuple[Variable, ...]) -> None:
        if self.mode == "debug":
            made = outputs if isinstance(outputs, tuple) else (outputs,)
            print(f"parrot: {call!r} -> {', '.join(f'<{v.name} {v.id}>' for v in made)}", file=sys.stderr)

    # --------------------------------------------------------------------------------------------- running

    def set_global_env(self) -> None:
        """Makes this the machine that calls of semantic functions go to."""
        self._before.append(environment.enter(self))

    def unset_global_env(self) -> None:
        """Takes back one `set_global_env`; without one it does nothing."""
        if self._before:
            environment.leave(self, self._before.pop())

    def running_scope(self, timeit: bool = False) -> RunningScope:
        """`with` (or `async with`): a session, and calls go to it. Exceptions come through; the session is closed.

        A session that was registered before is used, and left open. `timeit` prints the time to stderr.
        """
        return RunningScope(self, timeit)

    def run(self, program: Program | Coroutine[Any, Any, Any], timeit: bool = False, args: Sequence[Any] = ()) -> float:
        """Runs a program (a function, a coroutine function or a coroutine) in a session of its own; returns seconds.

        The time is the program's, without the opening and closing of its session. What it raises is raised here.
        """
        if inspect.iscoroutine(program):
            _check_no_loop(program)
            asyncio.run(self._run_coroutine(program, timeit))
        elif not callable(program):
            raise TypeError(f"a program is a function or a coroutine, not {type(program).__name__}")
        elif inspect.iscoroutinefunction(program):
            _check_no_loop()
            asyncio.run(self._run_coroutine(program(*args), timeit))
        else:
            with self.running_scope(timeit):
                program(*args)
        return self.stat_run_time

    def profile(self, program: Program, warmups: int = 3, trials: int = 20, args: Sequence[Any] = ()) -> float:
        """Runs a program `warmups` + `trials` times, prints the trials' times, and returns their mean in seconds."""
        if trials < 1 or warmups < 0:
            raise ValueError(f"trials {trials} must be 1 or more, warmups {warmups} 0 or more")
        for _ in range(warmups):
            self.run(program, args=args)
        times = [self.run(program, args=args) for _ in range(trials)]
        mean = statistics.fmean(times)
        print(
            f"parrot: {trials} runs: mean {mean:.3f} s, median {statistics.median(times):.3f} s, "
            f"min {min(times):.3f} s, max {max(times):.3f} s",
            file=sys.stderr,
        )
        return mean

    async def _run_coroutine(self, program: Coroutine[Any, Any, Any], timeit: bool) -> None:
        try:
            async with self.running_scope(timeit):
                await program
        finally:
            program.close()  # never started, when no session could be opened

    def _check_no_session(self) -> None:
        if self._session is not None:
            raise ParrotError("conflict", f"session {self._session.id} is registered already; unregister it first")


class RunningScope:
    """The scope of `VirtualMachine.running_scope`."""

    def __init__(self, machine: VirtualMachine, timeit: bool) -> None:
        self._machine = machine
        self._timeit = timeit
        self._owns_session = False
        self._start_s = 0.0

    def __enter__(self) -> VirtualMachine:
        if not self._machine.session_registered:
            self._machine.register_session()
            self._owns_session = True
        return self._begin()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()
        if self._owns_session and self._machine.session_registered:
            try:
                self._machine.unregister_session()
            except ParrotError as failure:
                self._not_closed(failure)

    async def __aenter__(self) -> VirtualMachine:
        if not self._machine.session_registered:
            await self._machine.aregister_session()
            self._owns_session = True
        return self._begin()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        if self._owns_session and self._machine.session_registered:
            try:
                await self._machine.aunregister_session()
            except ParrotError as failure:
                self._not_closed(failure)

    def _begin(self) -> VirtualMachine:
        self._machine.set_global_env()
        self._start_s = time.perf_counter()
        return self._machine

    def _end(self) -> None:
        self._machine.stat_run_time = time.perf_counter() - self._start_s
        self._machine.unset_global_env()
        if self._timeit:
            print(f"parrot: the program ran for {self._machine.stat_run_time:.3f} s", file=sys.stderr)

    def _not_closed(self, failure: ParrotError) -> None:
        """The program's results stand, and its own exception must come through: the core will expire the session."""
        _log.warning("the session could not be closed: %s", failure)


def _check_no_loop(program: Coroutine[Any, Any, Any] | None = None) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    if program is not None:
        program.close()
    raise RuntimeError(
        "run starts an event loop and one runs already: use `async with vm.running_scope()` and await the program"
    )
