"""asyncio in a strand: an event loop in virtual time, with no sockets, processes or threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, NoReturn

from sim.programs.strands import Strand, running_program


class Refused(RuntimeError):
    """A program does what has no meaning in virtual time. The message says what, and what to do instead."""


class _Idle:
    """What the loop asks for events of the outside world (a selector, of which BaseEventLoop wants no more): it waits."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            self._loop.strand.wait()
        elif timeout > 0:  # not now + timeout, which need not be the timer's own time
            self._loop.strand.wait(self._loop._scheduled[0].when())
        return []


class VirtualLoop(asyncio.BaseEventLoop):
    """The event loop of one strand. `inline`: what is meant for a thread is done at once, as for the core's own code."""

    _scheduled: list[asyncio.TimerHandle]

    def __init__(self, strand: Strand, inline: bool = False) -> None:
        super().__init__()
        self.strand = strand
        self._inline = inline
        self._selector = _Idle(self)

    def time(self) -> float:
        return self.strand.now

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not self.strand.dying:  # what is left undone at the end of a run is nobody's fault
            super().call_exception_handler(context)

    def _process_events(self, event_list: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        self.strand.wake()

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:  # type: ignore[override]
        if not self._inline:
            refuse("runs a function in a thread (run_in_executor, asyncio.to_thread)")
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future


#: What would reach out of the process, by what it does.
_OUTSIDE = {
    "opens a connection, or waits for a file descriptor, in asyncio": (
        "create_connection create_server create_datagram_endpoint create_unix_connection create_unix_server "
        "connect_accepted_socket sendfile start_tls connect_read_pipe connect_write_pipe add_reader add_writer "
        "sock_recv sock_recv_into sock_recvfrom sock_sendall sock_sendto sock_connect sock_accept getaddrinfo getnameinfo"
    ),
    "starts a process in asyncio": "subprocess_shell subprocess_exec",
}


def _refuser(what: str) -> Callable[..., NoReturn]:
    def refuser(self: VirtualLoop, *_: Any, **__: Any) -> NoReturn:
        refuse(what)

    return refuser


for _what, _names in _OUTSIDE.items():
    for _name in _names.split():
        setattr(VirtualLoop, _name, _refuser(_what))


def refuse(what: str) -> NoReturn:
    """Raises Refused for a program that does that."""
    raise Refused(
        f"the program {what}: in virtual time it may talk to the core through P, sleep, and compute, and nothing else; "
        "run it with --backend real"
    )


class VirtualPolicy(asyncio.DefaultEventLoopPolicy):
    """Gives a program's strand loops in virtual time, so that asyncio.run needs no change; everybody else, real ones."""

    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        strand = running_program()
        return super().new_event_loop() if strand is None else VirtualLoop(strand)

    def get_event_loop(self) -> asyncio.AbstractEventLoop:
        strand = running_program()
        if strand is None:
            return super().get_event_loop()
        if strand.loop is None:
            strand.loop = VirtualLoop(strand)
        return strand.loop

    def set_event_loop(self, loop: asyncio.AbstractEventLoop | None) -> None:
        strand = running_program()
        if strand is None:
            super().set_event_loop(loop)
        else:
            strand.loop = loop
