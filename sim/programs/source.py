"""A program's own code: its file and function, a fresh module for each instance, and the inputs that instances are given.

Each instance gets a module of its own, as each run of an application is a process of its own: what the module keeps at its top
level (a virtual machine, a counter, a cache) is never another instance's. Modules that it imports are imported once.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import itertools
import sys
import types
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from parrot.configuration import ConfigurationError
from parrot.frontend.pfunc import VirtualMachine
from parrot.protocol.errors import ParrotError

_numbers = itertools.count()


class Arguments(NamedTuple):
    """What an instance's function is called with, besides the virtual machine. `where`: the line that they are of."""

    positional: tuple[Any, ...] = ()
    named: dict[str, Any] = {}  # noqa: RUF012  (never changed)
    where: str = ""


class Source:
    """The function of a program, `FILE.py:FUNCTION` or `MODULE:FUNCTION`. Raises ConfigurationError when it cannot be had."""

    def __init__(self, spec: str, flag: str = "--program") -> None:
        self.spec = spec
        self._flag = flag
        self.path, self.function = _located(spec, flag)
        try:
            text = self.path.read_bytes()
            self._code = compile(text, str(self.path), "exec", dont_inherit=True)
        except OSError as error:
            raise ConfigurationError(f"{flag} {spec}: {self.path} cannot be read: {error.strerror}") from None
        except (SyntaxError, ValueError) as error:
            line = getattr(error, "lineno", None)
            raise ConfigurationError(f"{flag} {spec}: {self.path}{f':{line}' if line else ''}: {error}") from None
        self.name = self.path.stem

    def load(self, name: str | None = None) -> Callable[..., Any]:
        """The function, of a new module, which stays in `sys.modules`. Raises what the module's code raises."""
        module = types.ModuleType(name or self._new_name())
        module.__file__ = str(self.path)
        sys.modules[module.__name__] = module  # dataclasses and annotations look it up there
        try:
            exec(self._code, module.__dict__)
            function = getattr(module, self.function, None)
            if not callable(function):
                defined = ", ".join(n for n, v in vars(module).items() if isinstance(v, types.FunctionType)) or "none"
                raise ConfigurationError(
                    f"{self._flag} {self.spec}: {self.path} has no function {self.function!r}; it has: {defined}"
                )
        except BaseException:
            sys.modules.pop(module.__name__, None)
            raise
        return function  # type: ignore[no-any-return]

    @contextmanager
    def loaded(self) -> Iterator[Callable[..., Any]]:
        """The function, of a module that is there for as long as the `with`. Raises what the module's code raises."""
        name = self._new_name()
        try:
            yield self.load(name)
        finally:
            sys.modules.pop(name, None)

    def _new_name(self) -> str:
        return f"{self.name}__{next(_numbers)}"

    @contextmanager
    def importable(self) -> Iterator[None]:
        """What lies beside the program's file can be imported, and `sys.argv` is the file alone, as when Python runs it."""
        folder, before = str(self.path.parent), sys.argv
        sys.path.insert(0, folder)
        sys.argv = [str(self.path)]
        try:
            yield
        finally:
            sys.argv = before
            sys.path.remove(folder)


def load_function(spec: str, flag: str) -> Callable[..., Any]:
    """A function that is no program, `FILE.py:FUNCTION` or `MODULE:FUNCTION`; its module stays. Raises ConfigurationError."""
    source = Source(spec, flag)
    try:
        with source.importable():
            return source.load()
    except ConfigurationError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigurationError(f"{flag} {spec}: {source.path} cannot be imported: {type(error).__name__}: {error}") from error


def _located(spec: str, flag: str) -> tuple[Path, str]:
    where, _, function = spec.rpartition(":")
    if not where or not function.isidentifier():
        raise ConfigurationError(f"{flag} {spec}: expected FILE.py:FUNCTION or MODULE:FUNCTION")
    if where.endswith(".py") or "/" in where:
        path = Path(where)
        if not path.is_file():
            raise ConfigurationError(f"{flag} {spec}: {where}: no such file")
        return path.resolve(), function
    try:
        found = importlib.util.find_spec(where)
    except (ImportError, ValueError) as error:
        raise ConfigurationError(f"{flag} {spec}: module {where!r} cannot be found: {error}") from None
    if found is None or found.origin is None or not found.origin.endswith(".py"):
        raise ConfigurationError(f"{flag} {spec}: module {where!r} cannot be found as a file of Python code")
    return Path(found.origin), function


# ------------------------------------------------------------------------------------------------------------- inputs


def read_inputs(path: str | None) -> list[Arguments]:
    """The inputs of `--inputs FILE`, one JSON value a line: a list is positional arguments, an object named ones, anything else
    the one argument. No file: one instance's, without any. Raises ConfigurationError."""
    if path is None:
        return [Arguments()]
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise ConfigurationError(f"--inputs {path}: cannot be read: {error.strerror}") from None
    inputs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = msgspec.json.decode(line)
        except msgspec.DecodeError as error:
            raise ConfigurationError(f"{path}:{number}: no JSON: {error}") from None
        where = f"{path}:{number}"
        if isinstance(value, dict):
            inputs.append(Arguments((), value, where))
        else:
            inputs.append(Arguments(tuple(value) if isinstance(value, list) else (value,), {}, where))
    if not inputs:
        raise ConfigurationError(f"--inputs {path}: it has no line")
    return inputs


def check_arguments(function: Callable[..., Any], inputs: Sequence[Arguments], spec: str) -> None:
    """Raises ConfigurationError for inputs that the function does not take, and for a function that calling does not run."""
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigurationError(f"--program {spec}: a call of a generator runs nothing: name a function without yield")
    try:
        signature = inspect.signature(function)
    except ValueError:
        return
    machine = (None,) if takes_machine(function) else ()
    for arguments in inputs:
        try:
            signature.bind(*machine, *arguments.positional, **arguments.named)
        except TypeError as error:
            where = arguments.where or f"--program {spec}"
            hint = "" if arguments.where else "; --inputs FILE.jsonl gives an instance its arguments"
            name = spec.rpartition(":")[2]
            raise ConfigurationError(f"{where}: {name}{signature} cannot be called: {error}{hint}") from None


def takes_machine(function: Callable[..., Any]) -> bool:
    """Whether its first parameter is the virtual machine: it is called `vm`, or annotated as one."""
    first = next(iter(inspect.signature(function).parameters.values()), None)
    return first is not None and (first.name == "vm" or "VirtualMachine" in str(first.annotation))


# ------------------------------------------------------------------------------------------------------------ playing


def play(function: Callable[..., Any], address: str, arguments: Arguments) -> None:
    """Runs one instance to its end, in a session of its own, with P as it is. Raises what it raises."""
    machine = VirtualMachine(address)
    given = (machine, *arguments.positional) if takes_machine(function) else arguments.positional
    if inspect.iscoroutinefunction(function):
        asyncio.run(_aplay(machine, function, given, arguments.named))
        return
    with machine.running_scope():
        result = function(*given, **arguments.named)
        if inspect.iscoroutine(result):  # an `async def` behind a decorator, or a class's __call__
            asyncio.run(_awaited(machine, result))


async def _awaited(machine: VirtualMachine, result: Coroutine[Any, Any, Any]) -> None:
    """Awaits what a function gave, and closes the session from this loop, whose connections close with it."""
    try:
        await result
    finally:
        if machine.session_registered:
            with suppress(ParrotError):  # the core has closed it, or will expire it
                await machine.aunregister_session()


async def _aplay(machine: VirtualMachine, function: Callable[..., Any], given: Sequence[Any], named: dict[str, Any]) -> None:
    async with machine.running_scope():
        await function(*given, **named)
