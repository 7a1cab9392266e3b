"""`lookahead`: of a program, the task on the longest expected path first; on the engine where it is expected to end first.

HEFT (Topcuoglu et al., IEEE TPDS 2002) with the latency models of the engines; prefix reuse is counted, as FATE (arXiv
2605.07238) asks of a scheduler of LLM workflows; of FATE's planner over the whole frontier nothing is taken.

- Rank of a task: the seconds that it and the longest path of tasks behind it are expected to take, on an engine of its lane
  that runs nothing else, its prompt computed whole; an output is as long as those of its function were (`Service`). The path
  is followed through the calls that are known, over `horizon` tasks at most; what its depth says lies behind them, up to a
  fetched output, counts as so many of the last one. A rank is made when a task is queued.
- Of a program, the task with the highest rank goes first. HEFT knows one program. Of several, `shortest` takes the one whose
  longest path is the shortest, so that the mean completion is early; `together` ranks all as if they were one. A second that
  a task has waited counts as `ageing` seconds of path, so that no program waits for ever.
- Engine: earliest finish time. The prompts that are still to be computed there, then what the engine does not hold of this
  one, then the output, an iteration a token, in a batch with all that is in flight there.
- Looked at are, of each latency profile, the `candidates` least loaded engines, and those that hold the longest prefix (of
  many, the least loaded): at equal profile, what is more loaded ends later. Where few engines have room, just these. So
  O(log E), times the number of profiles.

An engine without a profile is taken for one like `expected.ASSUMED`. A task that finds no room holds back those behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
from mypy_extensions import mypyc_attr

from parrot.serve.engine_index import Load
from parrot.serve.engines import Engine, Lane, by_load
from parrot.serve.events import Constant
from parrot.serve.graph import Task
from parrot.serve.policies.base import FEW_OPEN, MOST_CANDIDATES, Cluster, Placement, Terms, best_of, counted_tokens, length_of
from parrot.serve.policies.expected import ExpectedTimes, decode_s, fill_s
from parrot.serve.policies.parameters import Parameter
from parrot.serve.policies.share import ByShare
from parrot.serve.queue import Owner, TaskQueue

MOST_SEEN = 256  #: tasks that one rank looks at
MOST_HOLDERS = 16  #: engines holding a prefix that are all looked at; of more, the least loaded
_KIND_BITS = 88  #: above a load


@mypyc_attr(allow_interpreted_subclasses=True)
class Lookahead(ByShare):
    """Tasks by rank, engines by earliest finish time."""

    name: ClassVar[str] = "lookahead"
    share_by: ClassVar[str] = "program"
    uses_service: bool = True
    parameters: ClassVar[dict[str, Parameter]] = {
        "horizon": Parameter(int, 32, "tasks behind one that are looked at one by one", at_least=0, at_most=MOST_SEEN),
        "programs": Parameter(str, "shortest", "which program goes first", choices=("shortest", "together")),
        "ageing": Parameter(float, 0.1, "seconds of path that a second of waiting counts as", at_least=0.001),
        "candidates": Parameter(int, 4, "least loaded engines of a profile that are compared", at_least=1),
    }

    def __init__(self, parameters: dict[str, Any], generator: np.random.Generator) -> None:
        super().__init__(parameters, generator)
        self._horizon = int(parameters["horizon"])
        self._candidates = int(parameters["candidates"])
        self._sign = 1.0 if parameters["programs"] == "shortest" else -1.0
        self._ageing = float(parameters["ageing"])
        self._changed: dict[Owner, None] = {}  # programs that have another first task than before
        self._times = ExpectedTimes()
        self._by_kind = self.by_kind  # one object, since it names an index of the lane

    def attach(self, cluster: Cluster) -> None:
        self._service = cluster.service

    def outputs(self, task: Task) -> float:
        """Tokens that the task is expected to generate."""
        return self._service.expected_output(task)

    # ------------------------------------------------------------------------------------------- which task

    def order(self, task: Task) -> Any:
        super().order(task)
        self._changed[task.program_sequence] = None
        return -self.rank(task)

    def counter(self, owner: Owner, head: Task | None) -> float:
        if head is None or not isinstance(head.order, float):
            return 0.0
        ready = head.ready_s if head.ready_s is not None else 0.0
        return self._ageing * ready - self._sign * head.order

    def lowered(self) -> Iterable[Owner] | None:
        changed, self._changed = self._changed, {}
        return changed or ()

    def rank(self, task: Task) -> float:
        """Seconds from its begin to the end of the longest path behind it."""
        found: dict[Task, float] = {}
        stack = [(task, 0, False)]
        while stack:
            at, distance, opened = stack.pop()
            if at in found:
                continue
            behind = [c for c in at.output.consumers or () if c.activated and not c.ended]
            if not opened and behind and distance < self._horizon and len(found) + len(stack) < MOST_SEEN:
                stack.append((at, distance, True))
                stack.extend([(consumer, distance + 1, False) for consumer in behind])
                continue
            own = self._alone_s(at)
            found[at] = own + (max(found.get(c, 0.0) for c in behind) if opened else own * at.depth)
        return found[task]

    def _alone_s(self, task: Task) -> float:
        """Seconds on an engine of its lane that runs nothing else."""
        engine = next(iter(task.call.lane.engines.values()), None)
        if engine is None:
            return 1.0  # no engine, no time: paths compare by their tasks
        model = self._times.model(engine)
        prompt, outputs = self._prompt(task, engine.description.tokenizer), self.outputs(task)
        return fill_s(model, prompt, 0, 0, 0) + decode_s(model, outputs, 1, round(prompt + outputs / 2))

    def _prompt(self, task: Task, tokenizer: str) -> int:
        """Tokens of its prompt, of inputs that are not there yet what their producers are expected to write."""
        counted = counted_tokens(task, tokenizer)
        if counted >= 0:
            return counted
        tokens = 0.0
        call = task.call
        for segment, variable in zip(call.segments[: task.end - 1], call.variables, strict=False):
            if type(segment) is Constant:
                tokens += length_of(segment.content.lengths, tokenizer)
            elif variable is not None and variable.content is not None:
                tokens += length_of(variable.content.lengths, tokenizer)
            elif variable is not None and variable.producer is not None:
                tokens += self.outputs(variable.producer)
        return round(tokens)

    # ------------------------------------------------------------------------------------------- which engine

    def choose(self, task: Task, queue: TaskQueue, cluster: Cluster) -> Iterable[Placement]:
        found = best_of(task, self._ranked(task, cluster), cluster)
        if found is None:
            return ()
        self._changed[task.program_sequence] = None
        found.rule = "earliest_finish" if found.terms and found.terms["cached_tokens"] == 0 else "earliest_finish_reusing"
        return (found,)

    def _ranked(self, task: Task, cluster: Cluster) -> Iterator[tuple[Engine, Terms]]:
        """The engines that are compared, the earliest end first; then all others, by load."""
        lane = task.call.lane
        few = None if len(lane.engines) <= FEW_OPEN else cluster.open_to(task)
        if few is not None:
            looked_at = {engine_id: lane.engines[engine_id] for engine_id in few}
        elif len(lane.engines) <= max(MOST_CANDIDATES, self._candidates):
            looked_at = dict(lane.engines)
        else:
            looked_at = {engine.id: engine for engine in self._least_loaded(lane)}
            looked_at.update(self._holders(task))
        outputs = self.outputs(task)
        ranked = [(self._finish(task, engine, outputs, cluster), engine_id) for engine_id, engine in looked_at.items()]
        ranked.sort(key=_finish_and_id)
        for terms, engine_id in ranked:
            yield looked_at[engine_id], terms
        if few is None and len(looked_at) < len(lane.engines):
            for engine in lane.ordered(by_load):
                if engine.id not in looked_at:
                    yield engine, self._finish(task, engine, outputs, cluster)

    def _finish(self, task: Task, engine: Engine, outputs: float, cluster: Cluster) -> Terms:
        """When the task would end there, in seconds from now, and what that is made of."""
        model = self._times.model(engine)
        cached = cluster.cached_tokens(task, engine)
        prompt = cluster.prompt_tokens(task, engine)
        rows, kv_tokens = engine.running, round(engine.prompt_tokens + self._service.expected_on(engine))
        waits = model.prefill_s(engine.prefill_tokens) if engine.prefill_tokens else 0.0
        fills = fill_s(model, max(prompt - cached, 0), cached, rows, kv_tokens)
        decodes = decode_s(model, outputs, rows + 1, round(kv_tokens + prompt + outputs / 2))
        return {
            "finish_s": waits + fills + decodes, "wait_s": waits, "fill_s": fills, "decode_s": decodes, "cached_tokens": cached
        }  # fmt: skip

    def by_kind(self, engine: Engine) -> Load:
        """By profile, then by load."""
        return (self._times.kind(engine) << _KIND_BITS) + by_load(engine)

    def _least_loaded(self, lane: Lane) -> Iterator[Engine]:
        index = lane.ordered(self._by_kind)
        position = 0
        while position < len(index):
            kind = self._times.kind(index.at(position))
            end = index.up_to(((kind + 1) << _KIND_BITS) - 1)
            for place in range(position, min(end, position + self._candidates)):
                yield index.at(place)
            position = end

    def _holders(self, task: Task) -> dict[int, Engine]:
        """Engines with the longest prefix of the task that any has."""
        lane = task.call.lane
        deepest = None
        for node in task.path or ():
            contexts = node.contexts
            if not contexts:
                break
            deepest = contexts
        if deepest is None:
            return {}
        if len(deepest) <= MOST_HOLDERS:
            return {engine_id: lane.engines[engine_id] for engine_id in deepest if engine_id in lane.engines}
        found: dict[int, Engine] = {}
        for engine in lane.ordered(by_load):
            if engine.id in deepest:
                found[engine.id] = engine
                if len(found) == self._candidates:
                    break
        return found


def _finish_and_id(item: tuple[Terms, int]) -> tuple[float, int]:
    return item[0]["finish_s"], item[1]
