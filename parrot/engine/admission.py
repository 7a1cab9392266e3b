"""Which tasks an engine can take at all, and what a waiting one would need to run. It changes nothing but to drop the unused
output of an earlier attempt."""

from __future__ import annotations

from mypy_extensions import mypyc_attr

from parrot.engine.batches import EngineLimits, Link, Refused
from parrot.engine.contexts import Context, ContextTree
from parrot.engine.running import Task


@mypyc_attr(acyclic=True)
class Need:
    """What a waiting task needs to run: the contexts that it finds, and room beyond them."""

    __slots__ = ("blocks", "found", "gen", "reclaimed", "start", "tokens")

    def __init__(self, found: list[Context], gen: Context | None, blocks: int, reclaimed: int, tokens: int, start: int) -> None:
        self.found = found
        self.gen = gen
        self.blocks = blocks
        self.reclaimed = reclaimed  # retained blocks that it uses itself
        self.tokens = tokens
        self.start = start  # the first position to compute


def need_of(task: Task, contexts: ContextTree) -> Need:
    """What a waiting task would take. Raises Refused when it can no longer run."""
    block_size = contexts.pool.block_size
    found = found_of(task.links, contexts, task.given)
    gen = task.gen if task.gen is not None and contexts.get(task.gen.id) is task.gen else None
    existing = [*found, gen] if gen is not None else found
    blocks = reclaimed = tokens = end = 0
    start: int | None = None
    last: Context | None = None  # with tokens
    for context in existing:
        blocks += contexts.growth(context)
        tokens += context.tokens - context.size
        if not context.users:
            reclaimed += context.owned
            tokens += context.size
        if start is None and context.computed < context.tokens:
            start = context.start + context.computed
        if context.tokens:
            last = context
        end = context.end
    if end < task.target:
        tokens += task.target - end
        blocks += -(-task.target // block_size) - -(-end // block_size)
        blocks += end % block_size > 0 and last is not None and last.lends
    first = end if start is None else start
    return Need(found, gen, blocks, reclaimed, tokens, first if first < task.target else task.target - 1)


def given_links(parent_id: int, contexts: ContextTree) -> tuple[Link, ...]:
    """The chain down to the context that a task continues."""
    parent = contexts.get(parent_id)
    if parent is None:
        raise Refused("context_missing", f"parent context {parent_id} is not on this engine")
    if parent.generating:
        raise Refused("conflict", f"parent context {parent_id} is still being generated")
    return tuple(Link(context.id, context.tokens) for context in parent.path())


def check_form(task: Task, limits: EngineLimits, largest: int) -> None:
    """Refuses what could never run here. `largest`: tokens of the largest task, `limits.largest_task`."""
    links, prompt = task.links, task.prompt
    negative = False
    for link in links:
        negative = negative or link.tokens < 0
    if prompt < 1 or negative:
        raise Refused("bad_request", f"task {task.key!r} has a prompt of {prompt} tokens; at least 1 is needed")
    if len(links) > 1 and len({link.context_id for link in links}) < len(links):
        raise Refused("conflict", f"task {task.key!r} names a context twice in its chain")
    if task.output_id is not None and not 0 <= task.forced < task.max_gen:
        raise Refused(
            "bad_request",
            f"task {task.key!r} has max_gen_length {task.max_gen} and {task.forced} forced tokens; "
            "at least one token must be left to generate",
        )
    output = task.max_gen if task.output_id is not None else 0
    if prompt + output > largest:
        raise Refused(
            "task_too_large",
            f"a prompt of {prompt} tokens and an output of up to {output} are more than this engine can ever hold: "
            f"max_seq_len {limits.max_seq_len}, max_total_tokens {limits.max_total_tokens}, "
            f"KV capacity {limits.num_blocks * limits.block_size}",
        )


def claim_output(output_id: int, links: tuple[Link, ...], outputs: set[int], contexts: ContextTree) -> None:
    """Refuses an output context that is something else; an unused one of an earlier attempt goes."""
    held = contexts.get(output_id)
    taken = output_id in outputs
    for link in links:
        taken = taken or link.context_id == output_id
    if taken:
        raise Refused("conflict", f"context {output_id} is the output or a part of another task")
    if held is not None:
        if held.users or held.children:
            raise Refused("conflict", f"context {output_id} exists already and is in use")
        contexts.free((output_id,))


def found_of(links: tuple[Link, ...], contexts: ContextTree, given: int = 0) -> list[Context]:
    """The leading contexts of a chain that are on this engine, found from its deep end. Raises Refused when one of
    them is not what the chain says, or when one of the first `given`, whose tokens the engine was never told, is gone."""
    path: list[Context] = []
    for place in range(len(links) - 1, -1, -1):
        deepest = contexts.get(links[place].context_id)
        if deepest is not None:
            path = deepest.path()
            break
    for place in range(min(len(path), len(links))):
        context, link = path[place], links[place]
        if context.id != link.context_id or context.tokens != link.tokens or context.generating:
            raise Refused(
                "conflict",
                f"context {link.context_id} of {link.tokens} tokens is, on this engine, context {context.id} of "
                f"{context.tokens} tokens{', still being generated' if context.generating else ''}",
            )
    if len(path) > len(links) or (path and path[-1].id != links[len(path) - 1].context_id):
        raise Refused("conflict", f"context {path[-1].id} lies deeper on this engine than in the chain")
    if len(path) < given:
        raise Refused("context_missing", f"context {links[given - 1].context_id} was evicted while a task waited")
    return path
