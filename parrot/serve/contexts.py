"""Contexts and the prefix store: which engine holds which prefix, and which queued tasks would share one.

A prefix is a chain of content keys from the head of a prompt up to a boundary of variables. Equal prefixes are the
same `PrefixNode` of a trie, so a prefix is compared by identity and the longest match over all engines is one walk
down the trie, a step a segment. Sharing domains are kept apart at the root; only a leading constant that may be
shared with everybody hangs below the common root, and what follows it is again its own domain's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

from parrot.serve.states import CONTEXT

if TYPE_CHECKING:
    from parrot.serve.engines import Engine
    from parrot.serve.graph import Link, Task
    from parrot.serve.sessions import Session

COMMON = ""  #: the domain of leading constants that all sessions may share

NodeKey = str | tuple[str, ...]

_USE: Final = CONTEXT.of("use")
_RELEASE: Final = CONTEXT.of("release")
_DROP: Final = CONTEXT.of("drop")


def prefix_hash(parent: str, keys: Iterable[str]) -> str:
    """The hash of the prefix with these content keys behind the one that `parent` is the hash of ("": nothing). It depends on
    the content keys and their order alone: not on domains, engines, or whether fills were fused."""
    for key in keys:
        parent = blake2b(f"{parent or '-'} {key}".encode(), digest_size=16).hexdigest()
    return parent


class PrefixNode:
    """One prefix. `contexts`: engine id -> the context that holds it there; to be read only. `queued`: tasks waiting for a
    placement whose prompt begins with it (kept only for policies that ask). `users`: queued tasks whose whole prompt it is.

    Most prefixes are one program's: one engine holds them, and one other continues them. So the only context and the only
    child stand for themselves, and a dict is made with the second one."""

    __slots__ = ("_child", "_children", "_context", "_contexts", "_hash", "depth", "domain", "key", "parent", "queued", "users")

    def __init__(self, parent: PrefixNode | None, key: NodeKey, domain: str, depth: int) -> None:
        self.parent = parent
        self.key = key
        self.domain = domain
        self.depth = depth
        self.users = 0
        self._context: Context | None = None  # the only one
        self._child: PrefixNode | None = None  # the only one
        self._contexts: dict[int, Context] | None = None  # all of them, where there have been two
        self._children: dict[NodeKey, PrefixNode] | None = None
        self.queued: dict[Task, None] | None = None
        self._hash: str | None = None

    @property
    def contexts(self) -> dict[int, Context] | None:
        if self._contexts is not None:
            return self._contexts
        context = self._context
        return None if context is None else {context.engine.id: context}

    @property
    def children(self) -> dict[NodeKey, PrefixNode] | None:
        """The prefixes that are longer by one link, by what they add; to be read only."""
        if self._children is not None:
            return self._children
        child = self._child
        return None if child is None else {child.key: child}

    @property
    def needed(self) -> bool:
        """Whether anything hangs on it."""
        if self.users or self._context is not None or self._child is not None:
            return True
        return bool(self._contexts or self._children or self.queued)

    def context_on(self, engine: Engine) -> Context | None:
        """The context that holds it on that engine."""
        if self._contexts is not None:
            return self._contexts.get(engine.id)
        context = self._context
        return context if context is not None and context.engine is engine else None

    def add_context(self, context: Context) -> None:
        """Its engine holds it now."""
        if self._contexts is not None:
            self._contexts[context.engine.id] = context
        elif self._context is None:
            self._context = context
        else:
            only, self._context = self._context, None
            self._contexts = {only.engine.id: only, context.engine.id: context}

    def remove_context(self, context: Context) -> None:
        """Its engine holds it no longer."""
        if context is self._context:
            self._context = None
        elif self._contexts is not None:
            del self._contexts[context.engine.id]

    def child(self, key: NodeKey) -> PrefixNode | None:
        """The prefix that continues it by `key`."""
        if self._children is not None:
            return self._children.get(key)
        child = self._child
        return child if child is not None and child.key == key else None

    def add_child(self, child: PrefixNode) -> None:
        if self._children is not None:
            self._children[child.key] = child
        elif self._child is None:
            self._child = child
        else:
            only, self._child = self._child, None
            self._children = {only.key: only, child.key: child}

    def remove_child(self, child: PrefixNode) -> bool:
        """Whether it was one."""
        if child is self._child:
            self._child = None
        elif self._children is not None and self._children.get(child.key) is child:
            del self._children[child.key]
        else:
            return False
        return True

    @property
    def static(self) -> bool:
        """Whether all sessions may share it: a call's leading constant. Everything else is its domain's own."""
        return self.domain == COMMON

    @property
    def prefix_hash(self) -> str:
        """Of its content, from the head of the prompt; computed when it is first asked for."""
        unknown: list[PrefixNode] = []
        node: PrefixNode | None = self
        while node is not None and node._hash is None:
            unknown.append(node)
            node = node.parent
        reached = "" if node is None else node._hash or ""
        for node in reversed(unknown):
            reached = node._hash = prefix_hash(reached, node._contents())
        return reached

    def _contents(self) -> tuple[str, ...]:
        """The content keys that it adds to its parent's."""
        if self.parent is None:
            return ()
        if isinstance(self.key, str):
            return (self.key,)
        return self.key if self.domain == self.parent.domain else self.key[1:]


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


class PrefixStore:
    """The trie of prefixes with everything that hangs on it. Whoever drops the last thing on a node prunes it."""

    def __init__(self, lifetime_s: float) -> None:
        self._lifetime_s = lifetime_s
        self._roots: dict[str, PrefixNode] = {}
        self._shared = Line()  # the retained ones without an owner, first what has been unused for the longest time

    # ------------------------------------------------------------------------------------------------ prefixes

    def path(self, links: list[Link], domain: str, common_head: bool) -> list[PrefixNode]:
        """The nodes of a chain, made where they are new. `common_head`: its first link may be shared by everybody.
        The last node counts one more user; `leave` gives it back."""
        wanted = COMMON if common_head else domain
        node = self._root(wanted)
        path: list[PrefixNode] = []
        for link in links:
            contents = link.contents
            key: NodeKey = contents[0].key if len(contents) == 1 else tuple([c.key for c in contents])
            node = self._child(node, key, wanted)
            wanted = domain
            path.append(node)
        return self.held(path)

    @staticmethod
    def held(path: list[PrefixNode]) -> list[PrefixNode]:
        """The path of a task that has one more use for it; `leave` gives it back."""
        if path:
            path[-1].users += 1
        return path

    def leave(self, path: list[PrefixNode]) -> None:
        """The task of that path no longer needs its nodes."""
        last = path[-1]
        last.users -= 1
        if not last.users:
            self._prune(last)

    def _root(self, domain: str) -> PrefixNode:
        root = self._roots.get(domain)
        if root is None:
            root = self._roots[domain] = PrefixNode(None, "", domain, 0)
        return root

    def _child(self, node: PrefixNode, key: NodeKey, domain: str) -> PrefixNode:
        # Below a common node every domain has children of its own.
        edge: NodeKey = key
        if node.domain != domain:
            edge = (domain, key) if isinstance(key, str) else (domain, *key)
        child = node.child(edge)
        if child is None:
            child = PrefixNode(node, edge, domain, node.depth + 1)
            node.add_child(child)
        return child

    def _prune(self, node: PrefixNode) -> None:
        while not node.needed:
            parent = node.parent
            if parent is None:
                self._roots.pop(node.domain, None)
                return
            if not parent.remove_child(node):
                return
            node = parent

    # ------------------------------------------------------------------------------------------------ contexts

    def add(self, context: Context) -> None:
        """Hangs a context with a node on the store."""
        node = context.node
        assert node is not None
        node.add_context(context)
        owner = context.owner
        if owner is not None:
            if owner.contexts is None:
                owner.contexts = Line()
            owner.contexts.add(context)

    def attach_output(self, context: Context, parent: PrefixNode | None, key: str, domain: str) -> bool:
        """A generated context's content is known now: hangs it below its prompt's node. False when the engine holds
        that very prefix already (the context is a duplicate, to be freed)."""
        node = self._child(parent if parent is not None else self._root(domain), key, domain)
        if node.context_on(context.engine) is not None:
            return False
        context.node = node
        self.add(context)
        return True

    def use(self, context: Context) -> None:
        """One more task in flight needs it."""
        if context.state == "retained":
            context.state = _USE[context.state]
            if context.owner is None:
                self._shared.remove(context)
        context.tasks += 1

    def release(self, context: Context, now: float) -> None:
        """One task fewer needs it; after the last one it is retained."""
        context.tasks -= 1
        if context.tasks == 0 and context.state == "live":
            context.state = _RELEASE[context.state]
            context.last_use_s = now
            if context.owner is None:
                self._shared.add(context)

    def drop(self, context: Context) -> list[Context]:
        """The context is gone, and with it all that continues it on that engine and is not in use. Returns them all."""
        node, engine = context.node, context.engine
        dropped = [context] if node is None else self._below(node, engine)
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
                self._prune(node)
        return dropped

    @staticmethod
    def _below(node: PrefixNode, engine: Engine) -> list[Context]:
        """The contexts of an engine at `node` and below it, the deepest first. Contexts of tasks in flight below a
        dropped one cannot be: a task uses its whole chain."""
        found: list[Context] = []
        stack: list[PrefixNode] = []
        at: PrefixNode | None = node
        while at is not None:
            context = at.context_on(engine)
            following: PrefixNode | None = None
            if context is not None:
                found.append(context)
                if at._children:
                    stack.extend(at._children.values())
                else:
                    following = at._child
            at = following if following is not None or not stack else stack.pop()
        if len(found) > 1:
            found.reverse()
        return found

    def next_deadline(self) -> float | None:
        """When the lifetime of the longest unused shared context is over."""
        oldest = self._shared.oldest
        return None if oldest is None else oldest.last_use_s + self._lifetime_s

    def expired(self, now: float) -> list[Context]:
        """Shared contexts whose lifetime is over. They stay until they are dropped."""
        found: list[Context] = []
        context = self._shared.oldest
        while context is not None and context.last_use_s + self._lifetime_s <= now:
            found.append(context)
            context = context.newer
        return found

    # ------------------------------------------------------------------------------------------------ queries

    @staticmethod
    def cached_links(path: list[PrefixNode], engine: Engine) -> int:
        """How many leading links of `path` that engine holds (or is computing for a task in flight)."""
        count = 0
        for node in path:
            if node.context_on(engine) is None:
                break
            count += 1
        return count

    @staticmethod
    def longest_matches(path: list[PrefixNode]) -> Iterator[tuple[int, tuple[int, ...]]]:
        """(matched links, engine ids) with the longest match first: each engine once, at its longest match. Time is
        proportional to the links and to the engines that hold any of those that were asked for."""
        levels: list[dict[int, Context]] = []
        for node in path:
            contexts = node.contexts
            if not contexts:
                break
            levels.append(contexts)
        seen: set[int] = set()
        for depth in range(len(levels), 0, -1):
            fresh = tuple([engine_id for engine_id in levels[depth - 1] if engine_id not in seen])
            if fresh:
                seen.update(fresh)
                yield depth, fresh
