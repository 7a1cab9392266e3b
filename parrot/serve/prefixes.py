"""Prefixes of prompts: a trie of content keys, the same for all engines.

A prefix is a chain of content keys from the head of a prompt up to a boundary of variables. Equal prefixes are the
same `PrefixNode`, so a prefix is compared by identity and the longest match over all engines is one walk down the
trie, a step a segment. Sharing domains are kept apart at the root; only a leading constant that may be shared with
everybody hangs below the common root, and what follows it is again its own domain's.

It says which prefixes are the same, and which engines hold one. It never decides that an engine keeps one or lets go of it
(`contexts.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parrot.serve.contexts import Context
    from parrot.serve.engines import Engine
    from parrot.serve.graph import Link, Task

COMMON = ""  #: the domain of leading constants that all sessions may share

NodeKey = str | tuple[str, ...]


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

    def contexts_below(self, engine: Engine) -> list[Context]:
        """The contexts that hold it on that engine or continue it there, the deepest first. (Whoever has one has all above it:
        a task uses its whole chain.)"""
        found: list[Context] = []
        stack: list[PrefixNode] = []
        at: PrefixNode | None = self
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


class PrefixTrie:
    """All prefixes that anything hangs on. Whoever takes the last thing off a node prunes it."""

    def __init__(self) -> None:
        self._roots: dict[str, PrefixNode] = {}

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
            self.prune(last)

    def below(self, parent: PrefixNode | None, key: str, domain: str) -> PrefixNode:
        """The prefix that continues `parent`, or stands at the head of a prompt, by one content; made where it is new."""
        return self._child(parent if parent is not None else self._root(domain), key, domain)

    def prune(self, node: PrefixNode) -> None:
        """Forgets the node, and those above it that nothing else needs, if nothing hangs on it any more."""
        while not node.needed:
            parent = node.parent
            if parent is None:
                self._roots.pop(node.domain, None)
                return
            if not parent.remove_child(node):
                return
            node = parent

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


def cached_links(path: list[PrefixNode], engine: Engine) -> int:
    """How many leading links of `path` that engine holds (or is computing for a task in flight)."""
    count = 0
    for node in path:
        if node.context_on(engine) is None:
            break
        count += 1
    return count


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
