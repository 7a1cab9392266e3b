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
    """One prefix. `contexts`: engine id -> the context that holds it there. `queued`: tasks waiting for a placement
    whose prompt begins with it (kept only for policies that ask). `users`: tasks whose whole prompt it is."""

    __slots__ = ("_hash", "children", "contexts", "depth", "domain", "key", "parent", "queued", "users")

    def __init__(self, parent: PrefixNode | None, key: NodeKey, domain: str, depth: int) -> None:
        self.parent = parent
        self.key = key
        self.domain = domain
        self.depth = depth
        self.children: dict[NodeKey, PrefixNode] | None = None
        self.contexts: dict[int, Context] | None = None
        self.queued: dict[Task, None] | None = None
        self.users = 0
        self._hash: str | None = None

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
    `newer`: its neighbours among the shared ones that are retained, by their last use."""

    __slots__ = ("engine", "filled", "id", "last_use_s", "newer", "node", "older", "owner", "state", "tasks", "tokens")

    def __init__(self, id: int, engine: Engine, node: PrefixNode | None, tokens: int, owner: Session | None) -> None:
        self.id = id
        self.engine = engine
        self.node = node  # None while it is being generated
        self.tokens = tokens
        self.owner = owner
        self.state = "live"
        self.tasks = 1  # the one that it is made for
        self.filled = False
        self.last_use_s = 0.0
        self.older: Context | None = None
        self.newer: Context | None = None


class PrefixStore:
    """The trie of prefixes with everything that hangs on it. Whoever drops the last thing on a node prunes it."""

    def __init__(self, lifetime_s: float) -> None:
        self._lifetime_s = lifetime_s
        self._roots: dict[str, PrefixNode] = {}
        self._oldest: Context | None = None  # of the retained ones without an owner: unused for the longest time
        self._newest: Context | None = None

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
        if path:
            path[-1].users += 1
        return path

    def leave(self, path: list[PrefixNode]) -> None:
        """The task of that path no longer needs its nodes."""
        last = path[-1]
        last.users -= 1
        if not (last.users or last.contexts):
            self._prune(last)

    def _root(self, domain: str) -> PrefixNode:
        root = self._roots.get(domain)
        if root is None:
            root = self._roots[domain] = PrefixNode(None, "", domain, 0)
        return root

    def _child(self, node: PrefixNode, key: NodeKey, domain: str) -> PrefixNode:
        # Below a common node every domain has children of its own.
        edge: NodeKey = key if node.domain == domain else (domain, *((key,) if isinstance(key, str) else key))
        children = node.children
        if children is None:
            children = node.children = {}
        child = children.get(edge)
        if child is None:
            child = children[edge] = PrefixNode(node, edge, domain, node.depth + 1)
        return child

    def _prune(self, node: PrefixNode) -> None:
        while not (node.users or node.children or node.contexts or node.queued):
            parent = node.parent
            if parent is None:
                self._roots.pop(node.domain, None)
                return
            if parent.children is None or parent.children.get(node.key) is not node:
                return
            del parent.children[node.key]
            node = parent

    # ------------------------------------------------------------------------------------------------ contexts

    def add(self, context: Context) -> None:
        """Hangs a context with a node on the store."""
        node = context.node
        assert node is not None
        if node.contexts is None:
            node.contexts = {}
        node.contexts[context.engine.id] = context
        owner = context.owner
        if owner is not None:
            if owner.contexts is None:
                owner.contexts = {}
            owner.contexts[context] = None

    def attach_output(self, context: Context, parent: PrefixNode | None, key: str, domain: str) -> bool:
        """A generated context's content is known now: hangs it below its prompt's node. False when the engine holds
        that very prefix already (the context is a duplicate, to be freed)."""
        node = self._child(parent if parent is not None else self._root(domain), key, domain)
        if node.contexts is not None and context.engine.id in node.contexts:
            return False
        context.node = node
        self.add(context)
        return True

    def use(self, context: Context) -> None:
        """One more task in flight needs it."""
        if context.state == "retained":
            context.state = _USE[context.state]
            if context.owner is None:
                self._unlink(context)
        context.tasks += 1

    def release(self, context: Context, now: float) -> None:
        """One task fewer needs it; after the last one it is retained."""
        context.tasks -= 1
        if context.tasks == 0 and context.state == "live":
            context.state = _RELEASE[context.state]
            context.last_use_s = now
            if context.owner is None:
                self._link(context)

    def _link(self, context: Context) -> None:
        """It is the last used of the retained ones without an owner."""
        context.older = self._newest
        if self._newest is None:
            self._oldest = context
        else:
            self._newest.newer = context
        self._newest = context

    def _unlink(self, context: Context) -> None:
        """It is none of them any more."""
        older, newer = context.older, context.newer
        if older is None:
            self._oldest = newer
        else:
            older.newer = newer
        if newer is None:
            self._newest = older
        else:
            newer.older = older
        context.older = context.newer = None

    def drop(self, context: Context) -> list[Context]:
        """The context is gone, and with it all that continues it on that engine and is not in use. Returns them all."""
        node, engine = context.node, context.engine
        dropped = [context] if node is None or not node.children else self._below(node, engine.id)
        for gone in dropped:
            owner, node = gone.owner, gone.node
            engine.cached_tokens -= gone.tokens
            if owner is None:
                if gone.state == "retained":
                    self._unlink(gone)
            elif owner.contexts is not None and gone in owner.contexts:
                del owner.contexts[gone]
            if gone.id in engine.contexts:
                del engine.contexts[gone.id]
            gone.state = _DROP[gone.state]
            if node is not None and node.contexts is not None and node.contexts.get(engine.id) is gone:
                del node.contexts[engine.id]
                self._prune(node)
        return dropped

    @staticmethod
    def _below(node: PrefixNode, engine_id: int) -> list[Context]:
        """The contexts of an engine at `node` and below it, the deepest first. Contexts of tasks in flight below a
        dropped one cannot be: a task uses its whole chain."""
        found: list[Context] = []
        stack = [node]
        while stack:
            node = stack.pop()
            context = node.contexts.get(engine_id) if node.contexts else None
            if context is None:
                continue
            found.append(context)
            if node.children:
                stack.extend(node.children.values())
        found.reverse()
        return found

    def next_deadline(self) -> float | None:
        """When the lifetime of the longest unused shared context is over."""
        oldest = self._oldest
        return None if oldest is None else oldest.last_use_s + self._lifetime_s

    def expired(self, now: float) -> list[Context]:
        """Shared contexts whose lifetime is over. They stay until they are dropped."""
        found: list[Context] = []
        context = self._oldest
        while context is not None and context.last_use_s + self._lifetime_s <= now:
            found.append(context)
            context = context.newer
        return found

    # ------------------------------------------------------------------------------------------------ queries

    @staticmethod
    def cached_links(path: list[PrefixNode], engine_id: int) -> int:
        """How many leading links of `path` that engine holds (or is computing for a task in flight)."""
        count = 0
        for node in path:
            if node.contexts is None or engine_id not in node.contexts:
                break
            count += 1
        return count

    @staticmethod
    def longest_matches(path: list[PrefixNode]) -> Iterator[tuple[int, tuple[int, ...]]]:
        """(matched links, engine ids) with the longest match first: each engine once, at its longest match. Time is
        proportional to the links and to the engines that hold any of those that were asked for."""
        levels: list[dict[int, Context]] = []
        for node in path:
            if not node.contexts:
                break
            levels.append(node.contexts)
        seen: set[int] = set()
        for depth in range(len(levels), 0, -1):
            fresh = tuple([engine_id for engine_id in levels[depth - 1] if engine_id not in seen])
            if fresh:
                seen.update(fresh)
                yield depth, fresh
