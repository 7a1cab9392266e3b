"""The contexts that engines hold, by the core's own count: made for a task, kept for those that come after it, given up.

It decides when the core lets go of one: at once when nobody has filled it, with the session that owns it, or when a shared one
has been unused for its lifetime. It knows no queue and no policy, and asks no engine: what one has evicted it is told, and
what is to be freed there it says once an instant.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from parrot.serve.effects import AnyEffect, FreeContexts
from parrot.serve.prefixes import PrefixNode, PrefixTrie
from parrot.serve.states import CONTEXT

if TYPE_CHECKING:
    from parrot.serve.engines import Engine, Engines
    from parrot.serve.sessions import Session

# By names of this module's own that never change: the compiled module need not look them up.
_FREE_CONTEXTS: Final = FreeContexts
_USE: Final = CONTEXT.of("use")
_RELEASE: Final = CONTEXT.of("release")
_DROP: Final = CONTEXT.of("drop")


class Context:
    """A prefix on an engine. `tasks` counts tasks in flight that use it or a child of it; `filled`: a task has said
    that the engine holds it complete. `owner`: the session whose end frees it (None: shared, with a lifetime). `older` and
    `newer`: its neighbours in the line that it stands in (`Line`): with an owner the owner's, else, while it is retained, that
    of the shared ones, by their last use."""

    __slots__ = ("engine", "filled", "id", "last_use_s", "newer", "node", "older", "owner", "state", "tasks", "tokens")

    def __init__(self, id: int, engine: Engine, node: PrefixNode | None, tokens: int, owner: Session | None) -> None:
        self.filled = False
        self.state = "live"
        self.tasks = 1  # the one that it is made for
        self.tokens = tokens
        self.owner = owner
        self.node = node  # None while it is being generated
        self.engine = engine
        self.id = id
        self.last_use_s = 0.0
        self.older: Context | None = None
        self.newer: Context | None = None


class Line:
    """Contexts one behind the other. Each stands in one line at most, and is taken out before it is forgotten."""

    __slots__ = ("newest", "oldest")

    def __init__(self) -> None:
        self.oldest: Context | None = None
        self.newest: Context | None = None

    def __iter__(self) -> Iterator[Context]:
        """From the oldest to the newest, as they stand now."""
        found: list[Context] = []
        context = self.oldest
        while context is not None:
            found.append(context)
            context = context.newer
        return iter(found)

    def add(self, context: Context) -> None:
        """As the newest."""
        newest = self.newest
        context.older = newest
        if newest is None:
            self.oldest = context
        else:
            newest.newer = context
        self.newest = context

    def remove(self, context: Context) -> None:
        older, newer = context.older, context.newer
        if older is None:
            self.oldest = newer
        else:
            older.newer = newer
        if newer is None:
            self.newest = older
        else:
            newer.older = older
        context.older = context.newer = None


class Contexts:
    """All contexts on `engines`, on the prefixes of `prefixes`. `lifetime_s`: how long a shared one stays that nobody uses."""

    def __init__(self, engines: Engines, prefixes: PrefixTrie, lifetime_s: float) -> None:
        self._engines = engines
        self._prefixes = prefixes
        self._lifetime_s = lifetime_s
        self._shared = Line()  # the retained ones without an owner, first what has been unused for the longest time
        self.freed: dict[Engine, list[int]] = {}  #: ids that the engines have not been told of yet

    # ------------------------------------------------------------------------------------- for a task in flight

    def make(self, engine: Engine, node: PrefixNode | None, tokens: int, owner: Session | None) -> Context:
        """One that the task is about to fill: for the prefix `node`, which that engine does not hold; None: for its output,
        whose content nobody knows."""
        context = Context(engine.new_context_id(), engine, node, tokens, owner)
        engine.contexts[context.id] = context
        engine.cached_tokens += tokens
        if node is not None:
            self._hang(context, node)
        return context

    def use(self, context: Context) -> None:
        """One more task in flight needs it."""
        if context.state == "retained":
            context.state = _USE[context.state]
            if context.owner is None:
                self._shared.remove(context)
        context.tasks += 1

    @staticmethod
    def fill(contexts: tuple[Context, ...]) -> None:
        """Their engine has computed them: they are there for others to continue."""
        for context in contexts:
            context.filled = True

    def attach_output(self, generated: Context, parent: Context | None, tokens: int, key: str, domain: str) -> None:
        """What a task has generated is known now: the context continues the prefix of `parent`, its prompt's. It is freed when
        nothing came, and when the engine holds that very prefix already."""
        engine = generated.engine
        generated.tokens = tokens
        engine.cached_tokens += tokens
        if tokens:
            node = self._prefixes.below(parent.node if parent is not None else None, key, domain)
            if node.context_on(engine) is None:
                generated.node = node
                self._hang(generated, node)
                return
        self._free(generated)

    def release(self, contexts: tuple[Context, ...], now: float) -> None:
        """Those of a task that is in flight no longer: one user fewer each, and retained after the last one. What nobody filled
        goes with the task, but on a lost engine, where all go."""
        for context in reversed(contexts):
            if context.state == "gone":
                continue
            context.tasks -= 1
            if context.tasks:
                continue
            if context.state == "live":
                context.state = _RELEASE[context.state]
                context.last_use_s = now
                if context.owner is None:
                    self._shared.add(context)
            if (context.node is None or not context.filled) and context.engine.state != "lost":
                self._free(context)

    @staticmethod
    def _hang(context: Context, node: PrefixNode) -> None:
        """On its prefix, and on its owner."""
        node.add_context(context)
        owner = context.owner
        if owner is not None:
            if owner.contexts is None:
                owner.contexts = Line()
            owner.contexts.add(context)

    # ------------------------------------------------------------------------------------- given up

    def evict(self, engine: Engine, context_ids: tuple[int, ...]) -> None:
        """The engine gave them up. One that a task in flight uses is computed again with that task."""
        told = set(context_ids)
        for context_id in context_ids:
            context = engine.contexts.get(context_id)
            if context is None:
                continue
            if context.tasks:
                context.filled = False
                continue
            for gone in self._drop(context):
                if gone.id not in told:
                    self._will_free(gone)
        self._engines.load_changed(engine)

    def lose(self, engine: Engine) -> None:
        """The engine is lost, its tasks are released, and there is nobody left to be told."""
        self.freed.pop(engine, None)
        for context in list(engine.contexts.values()):
            if context.state != "gone":
                self._drop(context)

    def end_session(self, session: Session) -> None:
        """Frees what it owns; its tasks have ended."""
        if session.contexts:
            self._free_retained(list(session.contexts))

    def expire(self, now: float) -> None:
        """Frees shared ones whose lifetime is over."""
        due: list[Context] = []
        context = self._shared.oldest
        while context is not None and context.last_use_s + self._lifetime_s <= now:
            due.append(context)
            context = context.newer
        self._free_retained(due)

    def next_deadline(self) -> float | None:
        """When the lifetime of the longest unused shared one is over."""
        oldest = self._shared.oldest
        return None if oldest is None else oldest.last_use_s + self._lifetime_s

    def flush_freed(self, effects: list[AnyEffect]) -> None:
        """One effect an engine for all that was freed since the last time."""
        for engine, ids in self.freed.items():
            if engine.state != "lost":
                effects.append(_FREE_CONTEXTS(engine.id, tuple(ids)))
        self.freed.clear()

    def _free_retained(self, contexts: list[Context]) -> None:
        changed: Engine | None = None
        for context in contexts:
            if context.state == "retained":
                self._free(context)
                if context.engine is not changed:
                    changed = context.engine
                    self._engines.load_changed(changed)

    def _free(self, context: Context) -> None:
        """Drops it, and will tell its engine."""
        for gone in self._drop(context):
            self._will_free(gone)

    def _will_free(self, context: Context) -> None:
        ids = self.freed.get(context.engine)
        if ids is None:
            self.freed[context.engine] = [context.id]
        else:
            ids.append(context.id)

    def _drop(self, context: Context) -> list[Context]:
        """It is gone, and with it all that continues it on that engine: nothing below it is in use, for a task uses its whole
        chain. Returns them all, the deepest first."""
        node, engine = context.node, context.engine
        dropped = [context] if node is None else node.contexts_below(engine)
        for gone in dropped:
            owner, node = gone.owner, gone.node
            engine.cached_tokens -= gone.tokens
            if owner is None:
                if gone.state == "retained":
                    self._shared.remove(gone)
            elif node is not None and owner.contexts is not None:
                owner.contexts.remove(gone)
            del engine.contexts[gone.id]
            gone.state = _DROP[gone.state]
            if node is not None:
                node.remove_context(gone)
                self._prefixes.prune(node)
        return dropped
