"""Which virtual machine a call belongs to: the one of this context, else the only one that runs in the process."""

from __future__ import annotations

import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING

from parrot.protocol.errors import ParrotError

if TYPE_CHECKING:
    from parrot.frontend.pfunc.virtual_machine import VirtualMachine

_current: ContextVar[VirtualMachine | None] = ContextVar("parrot_virtual_machine", default=None)
_running: list[VirtualMachine] = []
_own: ContextVar[list[VirtualMachine] | None] = ContextVar("parrot_own_machines", default=None)
_lock = threading.Lock()


def isolate() -> None:
    """From here on this context knows its own machines only: several programs share the process."""
    _own.set([])


def enter(machine: VirtualMachine) -> VirtualMachine | None:
    """Makes `machine` the current one of this context; returns the one before."""
    before = _current.get()
    _current.set(machine)
    with _lock:
        _machines().append(machine)
    return before


def leave(machine: VirtualMachine, before: VirtualMachine | None) -> None:
    """Ends what `enter` began."""
    if _current.get() is machine:
        _current.set(before)
    with _lock:
        running = _machines()
        if machine in running:
            running.remove(machine)


def current() -> VirtualMachine | None:
    """The current machine, or None. A thread that a program started itself has no context of its own: it gets the one
    machine that runs. Raises `bad_request` where several do and nothing says which."""
    machine = _current.get()
    with _lock:
        if machine is not None and machine in _machines():
            return machine
        running = set(_machines())
    if len(running) > 1:
        raise ParrotError(
            "bad_request",
            f"{len(running)} virtual machines run in this process and this thread belongs to none; "
            "start it with contextvars.copy_context().run",
        )
    return next(iter(running), None)


def _machines() -> list[VirtualMachine]:
    """Those that run in the process, or in this context where it is isolated."""
    own = _own.get()
    return _running if own is None else own
