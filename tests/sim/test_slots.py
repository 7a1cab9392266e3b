"""What is under way is found again by its slot, and a slot is given anew only when it is free."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sim.slots import Slots


@given(st.lists(st.booleans()), st.randoms(use_true_random=False))
def test_each_thing_keeps_its_slot_until_it_is_taken_and_there_are_no_more_slots_than_were_ever_needed(
    puts: list[bool], random: object
) -> None:
    slots = Slots()
    known: dict[int, object] = {}
    most = 0
    for put in puts:
        if put or not known:
            thing = object()
            slot = slots.put(thing)
            assert slot not in known
            known[slot] = thing
            most = max(most, len(known))
            assert slot < most
        else:
            slot = random.choice(sorted(known))  # type: ignore[attr-defined]
            assert slots.take(slot) is known.pop(slot)
            assert slots.take(slot) is None
        assert len(slots) == len(known)
        assert {id(thing) for thing in slots} == {id(thing) for thing in known.values()}
