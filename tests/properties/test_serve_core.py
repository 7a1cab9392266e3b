"""ServeCore under random events and faults: invariants 1, 3, 4, 6, 7, 8 and 9 of the design, moves taken from its tables."""

from __future__ import annotations

import os

import msgspec
import pytest
from hypothesis import HealthCheck, settings

from parrot.serve import events as ev
from parrot.serve import states
from parrot.serve.core import ServeCore
from tests.properties.serve_laws import ServeCoreMachine


@pytest.mark.parametrize("table", [states.SESSION, states.VARIABLE, states.TASK, states.CONTEXT, states.ENGINE])
def test_a_move_that_a_table_does_not_list_is_refused(table: states.Table) -> None:
    known = {state for state, _ in table} | set(table.values())
    for state in known:
        for move in {move for _, move in table} | {"nonsense"}:
            if (state, move) in table:
                assert table[state, move] in known
            else:
                with pytest.raises(states.IllegalMove, match=f"{move}.*{state}"):
                    table[state, move]


class OneLife(ServeCoreMachine):
    """A core that lives from the first event to the last."""

    def teardown(self) -> None:
        """Determinism (invariant 4): the same events give a fresh core the same effects. And nothing is left behind."""
        if not hasattr(self, "core"):
            return
        fresh = ServeCore(self.config)
        encode = msgspec.json.encode
        decode = msgspec.json.Decoder(list[ev.AnyEvent])
        for (events, now), effects in zip(self.history, self.effects, strict=True):
            assert encode(fresh.handle(decode.decode(encode(events)), now)) == encode(effects)
        assert fresh.next_deadline() == self.core.next_deadline()
        self.close_everything()


OneLife.TestCase.settings = settings(
    max_examples=int(os.environ.get("PARROT_EXAMPLES", "100")),
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestServeCore = OneLife.TestCase
