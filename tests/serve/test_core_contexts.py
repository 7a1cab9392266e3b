"""Contexts on engines: what is shared along a common prefix, and with whom; what is freed, and when."""

from __future__ import annotations

from parrot.serve import events as ev
from parrot.serve.effects import FreeContexts
from tests.serve.driver import Driver, out, text, value


def test_contexts_are_shared_along_a_common_prefix_and_reservations_count_only_what_is_new() -> None:
    d = Driver()
    engine = d.engine()
    session = d.open()
    d.fetched(session, text("system", 100), value("q", "one", 5), out("x"))
    (a,) = d.dispatches
    assert d.core.engines[engine].reserved == 121
    d.fetched(session, text("system", 100), value("q", "two", 5), out("x"))
    b = d.dispatches[1]
    assert d.core.engines[engine].reserved == 121 + 21
    assert a.chain[0].context_id == b.chain[0].context_id
    assert a.chain[1].context_id != b.chain[1].context_id
    assert b.parent == -1  # being filled by the other, not known to be complete
    d.first(a)
    d.fetched(session, text("system", 100), value("q", "one", 5), out("x"))
    c = d.dispatches[2]
    assert c.parent == a.chain[1].context_id
    assert c.cached_links == 2


def test_leading_constants_are_shared_across_sessions_and_nothing_else_is() -> None:
    d = Driver()
    d.engine()
    one, two, three = d.open(), d.open(), d.open()
    for session in (one, two):
        d.fetched(session, text("system"), text("more"), out("x"))
    (x,) = d.outputs(d.submit(three, text("system"), out("x"), cache_prefix=False))
    d.get(three, x)
    a, b, c = d.dispatches
    assert a.chain[0].context_id == b.chain[0].context_id
    assert a.chain[1].context_id != b.chain[1].context_id
    assert c.chain[0].context_id not in {a.chain[0].context_id, b.chain[0].context_id}


def test_a_value_behind_an_empty_constant_is_no_leading_constant() -> None:
    d = Driver()
    d.engine()
    for _ in range(2):
        d.fetched(d.open(), text("blank", 0), value("v", "secret", 30), out("x"))
    one, other = d.dispatches
    assert one.chain[0].context_id != other.chain[0].context_id


def test_sessions_of_one_tenant_share_contexts() -> None:
    d = Driver()
    d.engine()
    for tenant in ("t", "t", "other"):
        d.fetched(d.open(tenant=tenant), text("system"), value("v", "same"), out("x"))
    a, b, c = d.dispatches
    assert a.chain[1].context_id == b.chain[1].context_id
    assert c.chain[1].context_id != a.chain[1].context_id


def test_a_bos_counts_once_at_the_head() -> None:
    d = Driver()
    engine = d.engine(bos_tokens=1)
    session = d.open()
    d.fetched(session, text("a", 10), value("v", "b", 10), out("x"))
    assert [link.tokens for link in d.dispatches[0].chain] == [11, 10]
    assert d.core.engines[engine].reserved == 21 + 16


def test_a_sessions_contexts_are_freed_with_it_and_the_shared_head_outlives_it_for_its_lifetime() -> None:
    d = Driver(constant_prefix_var_timeout=50.0)
    engine = d.engine()
    session = d.open()
    d.fetched(session, text("system"), value("v", "mine"), out("x"))
    (dispatch,) = d.dispatches
    d.finish(dispatch)
    head, own = (link.context_id for link in dispatch.chain)
    d.now = 10.0
    before = len(d.effects)
    d.close(session)
    freed = [e for e in d.effects[before:] if isinstance(e, FreeContexts)]
    assert [(e.engine_id, set(e.context_ids)) for e in freed] == [(engine, {own, dispatch.generate_context_id})]
    assert d.core.next_deadline() == 50.0
    assert d.send(ev.Tick(), at=50.0) == [FreeContexts(engine, (head,))]
    assert d.core.engines[engine].contexts == {}


def test_an_evicted_context_is_computed_again() -> None:
    d = Driver()
    engine = d.engine()
    session = d.open()
    d.fetched(session, text("system"), out("x"))
    (a,) = d.dispatches
    d.finish(a)
    d.send(ev.ContextsEvicted(engine, (a.chain[0].context_id,)))
    d.fetched(session, text("system"), out("x"))
    (b,) = d.dispatches
    assert b.parent == -1
    assert b.chain[0].context_id != a.chain[0].context_id


def test_an_equal_output_on_the_same_prefix_is_freed_as_a_duplicate() -> None:
    d = Driver()
    engine = d.engine()
    session = d.open()
    for _ in range(2):
        d.fetched(session, text("t"), out("x"))
    a, b = d.dispatches
    d.finish(a, "same")
    assert d.finish(b, "same")[-1] == FreeContexts(engine, (b.generate_context_id,))
