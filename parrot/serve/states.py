"""The states of everything that a ServeCore keeps, and what moves them: tables, no scattered conditions.

Each table maps (state, move) to the next state: `thing.state = TABLE[thing.state, move]`. A move that a table does not list
is refused (`IllegalMove`) and changes nothing. Tests generate their state machines from these tables, so a move that is
added here is tested.
"""

from __future__ import annotations

from typing import Final

from mypy_extensions import mypyc_attr


class IllegalMove(Exception):
    """A move that the table does not have. It names both, and nothing was changed."""


class Table(dict[tuple[str, str], str]):
    """(state, move) -> the state after it. Raises IllegalMove."""

    def __missing__(self, key: tuple[str, str]) -> str:
        raise IllegalMove(f"no move {key[1]!r} from state {key[0]!r}")

    def of(self, move: str) -> Move:
        """That move alone: what is made for every task asks for it more cheaply so."""
        return Move(move, {state: after for (state, made), after in self.items() if made == move})


@mypyc_attr(native_class=False)  # compiled dictionaries have no attributes
class Move(dict[str, str]):
    """state -> the state after one move. Raises IllegalMove."""

    def __init__(self, move: str, after: dict[str, str]) -> None:
        super().__init__(after)
        self.move = move

    def __missing__(self, state: str) -> str:
        raise IllegalMove(f"no move {self.move!r} from state {state!r}")


SESSION: Final = Table(
    {
        ("open", "close"): "closed",
        ("open", "expire"): "expired",
    }
)

VARIABLE: Final = Table(
    {
        ("empty", "produce"): "pending",  # a submitted call writes it
        ("empty", "set"): "ready",
        ("pending", "finish"): "ready",
        ("pending", "fail"): "failed",
    }
)

TASK: Final = Table(
    {
        ("waiting", "enqueue"): "queued",  # activated, and all inputs are ready
        ("waiting", "fail"): "failed",  # an input failed
        ("waiting", "cancel"): "cancelled",
        ("queued", "place"): "dispatched",
        ("queued", "fail"): "failed",  # too large for every engine, or no engine came
        ("queued", "recall"): "finished",  # in an earlier life, says the journal
        ("queued", "cancel"): "cancelled",
        ("dispatched", "start"): "running",
        ("dispatched", "finish"): "finished",  # a start that was not heard of
        ("dispatched", "retry"): "queued",  # engine lost, rejected, or failed in a way that another attempt may mend
        ("dispatched", "fail"): "failed",
        ("dispatched", "cancel"): "cancelled",
        ("running", "finish"): "finished",
        ("running", "retry"): "queued",
        ("running", "fail"): "failed",
        ("running", "cancel"): "cancelled",
    }
)

CONTEXT: Final = Table(
    {
        ("live", "release"): "retained",  # its last task ended
        ("live", "drop"): "gone",  # its engine is lost, or its task failed before it was filled
        ("retained", "use"): "live",
        ("retained", "drop"): "gone",  # evicted, freed, lifetime over, engine lost
    }
)

ENGINE: Final = Table(
    {
        ("live", "suspect"): "suspect",  # an attempt failed there: nothing is placed on it until a pause is over
        ("live", "lose"): "lost",
        ("suspect", "trust"): "live",
        ("suspect", "lose"): "lost",
    }
)

#: Task states in which an engine works on it, and those that end it.
IN_FLIGHT: Final = frozenset({"dispatched", "running"})
ENDED: Final = frozenset({"finished", "failed", "cancelled"})
