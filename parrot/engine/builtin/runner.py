"""The Runner over a decoder, a paged cache and an attention function: token values in, tokens out.

EngineCore says which positions of which tasks are computed; this puts their ids together, runs the model once, samples,
and turns tokens into text. It decides nothing about who runs.

An iteration is launched before the one before is finished: a sampled token stays on the device, in its task's slot, where the
next iteration finds it; the host sees it one step behind. `prepare`, `launch` and `finish` may run at once, in three threads.
"""

from __future__ import annotations

import random
import threading
from collections import Counter, deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from parrot.engine.batches import Batch, EngineTask, Row
from parrot.engine.builtin.attention.base import Attention, AttentionRow
from parrot.engine.builtin.graphs import Bucket, Graphs
from parrot.engine.builtin.kv_cache import KVCache, to_device
from parrot.engine.builtin.logprobs import Logprobs
from parrot.engine.builtin.models.decoder import Decoder
from parrot.engine.builtin.outputs import ContextTokens, Output, TaskTokens
from parrot.engine.builtin.sampler import SamplingRow, check_sampling, sample
from parrot.engine.core import EngineCore
from parrot.engine.runner import TokenResult
from parrot.protocol.api import SamplingConfig
from parrot.protocol.errors import ParrotError
from parrot.tokenizer import SYNTHETIC, Tokenizer


class PreparedRow(NamedTuple):
    """A row of a batch with what it needs of the core. `ids` None: a decode row, whose token lies in its task's slot."""

    task: TaskTokens
    attention: AttentionRow
    ids: list[int] | None
    samples: bool


class Prepared(NamedTuple):
    """`rows`: decode rows first, `decode_rows` of them, as the attention function wants them. `bucket`: what they are padded
    to; None: they are computed as they are."""

    rows: list[PreparedRow]
    copies: tuple[tuple[int, int], ...]
    decode_rows: int
    bucket: Bucket | None


@dataclass
class Launched:
    """An iteration on its way. `tokens`: those of `outputs`, on the host once `ready` says so. `ends`: for each of them, the
    position behind the last that it computed."""

    outputs: list[Output]
    ends: list[int]
    tokens: Tensor | None = None
    ready: torch.cuda.Event | None = None
    logprobs: Logprobs | None = None  # of those outputs that want them
    results: list[TokenResult] | None = None  # once the tokens were taken


@dataclass
class _Slots:
    """Places for the tasks' last tokens. The last place is padding's."""

    tokens: Tensor
    free: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.free = list(range(self.tokens.shape[0] - 1))

    @property
    def spare(self) -> int:
        return self.tokens.shape[0] - 1


class BuiltinRunner:
    """See the module. `dummy`: the weights are made up, so that outputs of a given length can be honoured."""

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        attention: Attention,
        tokenizer: Tokenizer,
        *,
        slots: int = 1024,
        graphs: bool = False,
        dummy: bool = False,
        random_seed: int = 0,
    ) -> None:
        """`slots`: tasks whose last token is kept, all that may be in batches in flight or preempted. `graphs`: iterations are
        captured, for every bucket of the attention function."""
        self.decoder = decoder
        self._cache = cache
        self._attention = attention
        self._tokenizer = tokenizer
        self._dummy = dummy
        self._vocab = decoder.config.vocab_size
        self._eos = tuple(sorted({*tokenizer.eos_ids, *decoder.config.eos_ids}))
        self._device = decoder.embedding.device
        self._seeds = random.Random(random_seed)
        self._tasks: dict[Hashable, TaskTokens] = {}
        self._contexts: dict[int, ContextTokens] = {}
        self._slots = _Slots(torch.zeros(slots + 1, dtype=torch.int64, device=self._device))
        self._launched: deque[Launched] = deque()  # whose tokens were not taken yet, oldest first
        self._taking = threading.Lock()
        self._graphs = Graphs(decoder, attention, self._slots.tokens, graphs) if attention.buckets else None
        self._captures = graphs
        self._aside = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]
        if graphs:
            self._warm_up()

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """A GPU loads a kernel at its first use, which stops all rows for tens of milliseconds: what graphs do not hold of
        sampling and log-probabilities is used here once."""
        kinds: list[dict[str, Any]] = [{}, {"top_p": 0.5, "top_k": 9}, {"repetition_penalty": 1.1, "logit_bias": {"0": 0.0}}]
        for count in (1, 32):  # a library has kernels of its own for one row
            logits = torch.zeros((count, self._vocab), device=self._device)
            for kind in kinds:
                row = SamplingRow(SamplingConfig(**kind), 0, prompt=(0,), counts=Counter({0: 1}))
                chosen = sample(logits, [row] * count, [0] * count)
            Logprobs(logits, dict.fromkeys(range(count), 1)).send_home(chosen, self._aside)
        torch.cuda.synchronize(self._device)

    # ------------------------------------------------------------------------------------------- what the shell tells

    def add_task(
        self, task: EngineTask, link_ids: Sequence[Sequence[int]], sampling: SamplingConfig, forced_ids: Sequence[int]
    ) -> None:
        """See Runner. Raises ParrotError: bad_sampling; bad_request for ids that the model does not have."""
        for ids in (*link_ids, forced_ids):
            self._check_ids(ids)
        if task.generate_context_id is not None:
            check_sampling(sampling, self._vocab, self._dummy)
        end = self._contexts.get(task.parent_context_id) if task.parent_context_id is not None else None
        for link, ids in zip(task.links, link_ids, strict=True):
            known = self._contexts.get(link.context_id)
            if known is None or known.parent is not end or known.ids != list(ids):
                # Unknown, or what an attempt left here that was given up while it generated.
                known = self._contexts[link.context_id] = ContextTokens(end, list(ids))
            end = known
        if task.generate_context_id is None:
            if end is None:
                raise ParrotError("bad_request", "a task that only fills must have a chain to fill")
            self._tasks[task.key] = TaskTokens(task.key, end, generates=False)
            return
        output = ContextTokens(end, list(forced_ids))
        self._contexts[task.generate_context_id] = output
        seed = self._seeds.getrandbits(63) if sampling.seed is None else sampling.seed
        limit = task.max_gen_length or sampling.max_gen_length
        self._tasks[task.key] = Output(task.key, output, sampling, seed, limit, self._tokenizer, self._eos)

    def drop_task(self, key: Hashable) -> None:
        task = self._tasks.pop(key, None)
        if task is not None and task.slot >= 0:
            self._slots.free.append(task.slot)
            task.slot = -1

    def drop_contexts(self, context_ids: Iterable[int]) -> None:
        for context_id in context_ids:
            self._contexts.pop(context_id, None)

    @property
    def fill_graphs(self) -> tuple[int, ...]:
        """The numbers of tokens to which iterations with fills are padded, to replay a graph."""
        return tuple(self._attention.fill_buckets) if self._captures else ()

    @property
    def holds(self) -> tuple[int, int, int]:
        """Tasks, contexts and slots that it keeps: none when all were dropped."""
        return len(self._tasks), len(self._contexts), self._slots.spare - len(self._slots.free)

    def _check_ids(self, ids: Sequence[int]) -> None:
        # Synthetic ids are folded into the model's when they are computed.
        vocab = self._tokenizer.vocab_size if self._tokenizer.name == SYNTHETIC else self._vocab
        if ids and not 0 <= min(ids) <= max(ids) < vocab:
            wrong = next(i for i in ids if not 0 <= i < vocab)
            raise ParrotError("bad_request", f"token id {wrong} is none of the model's, which are 0 to {vocab - 1}")

    # ------------------------------------------------------------------------------------------------------ iterations

    def prepare(self, batch: Batch, core: EngineCore) -> Prepared:
        rows = [self._prepare_row(row, core) for row in batch.rows]
        if self._graphs is None:
            return Prepared(rows, batch.copies, 0, None)
        decode_rows = len(batch.decoders)
        order = self._attention.arrange([row.attention for row in rows[:decode_rows]])
        rows[:decode_rows] = [rows[i] for i in order]
        tokens = sum(row.attention.stop - row.attention.start for row in rows)
        return Prepared(rows, batch.copies, decode_rows, self._graphs.bucket(tokens, fills=decode_rows < len(rows)))

    def _prepare_row(self, row: Row, core: EngineCore) -> PreparedRow:
        task = self._tasks[row.key]
        chain = core.spans(row.context_id) if row.decode and self._attention.wants_chains else ()
        # whose it is says the task itself: its key may have been another's, which ended where this one begins
        attention = AttentionRow(task, row.start, row.stop, core.block_table(row.context_id), chain)
        return PreparedRow(task, attention, None if row.decode else task.ids(row.start, row.stop), row.samples)

    def replays(self, prepared: Prepared) -> bool:
        return self._captures and prepared.bucket is not None

    @torch.inference_mode()
    def launch(self, prepared: Prepared) -> Launched:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # kernels and events go to the thread's present device
        rows = prepared.rows
        sampling = [i for i, row in enumerate(rows) if row.samples and isinstance(row.task, Output)]
        launched = Launched([rows[i].task for i in sampling], [rows[i].attention.stop for i in sampling])  # type: ignore[misc]
        if any(output.sampling.penalised for output in launched.outputs):
            self._take_all()  # a penalty counts every token before
        for output in launched.outputs:
            if output.slot < 0:
                output.slot = self._slots.free.pop()
        self._cache.copy_pages(prepared.copies)
        if self._graphs is not None and prepared.bucket is not None:
            chosen = self._run_padded(self._graphs, prepared.bucket, prepared, sampling, launched)
        else:
            chosen = self._run(prepared, sampling, launched)
        self._send_home(chosen, launched)
        return launched

    def _run_padded(
        self, graphs: Graphs, bucket: Bucket, prepared: Prepared, sampling: Sequence[int], launched: Launched
    ) -> Tensor:
        """The chosen tokens of the rows `sampling`, by the bucket's graph where there are graphs."""
        inputs, rows, at = graphs.inputs(bucket), prepared.rows, prepared.decode_rows
        inputs.given[:at] = -1
        inputs.slots[:at] = [row.task.slot for row in rows[:at]]
        inputs.positions[:at] = [row.attention.start for row in rows[:at]]
        lasts = list(range(at))  # the packed token that each row ends with
        for row in rows[at:]:
            start, stop = row.attention.start, row.attention.stop
            end = at + stop - start
            inputs.given[at:end] = np.asarray(row.ids)
            inputs.positions[at:end] = np.arange(start, stop)
            lasts.append(end - 1)
            at = end
        inputs.given[prepared.decode_rows : at] %= self._vocab  # synthetic ids know no vocabulary
        count = len(sampling)
        inputs.sampled[:count] = [lasts[i] for i in sampling]
        inputs.targets[:count] = [output.slot for output in launched.outputs]
        plan = self._plan(prepared, bucket)
        logits, chosen = (found[:count] for found in graphs.run(bucket, plan, inputs))
        self._keep_logprobs(logits, launched)
        if any(not output.sampling.plain for output in launched.outputs):
            self._choose(logits, launched, chosen)
        return chosen

    def _plan(self, prepared: Prepared, bucket: Bucket | None = None) -> Any:
        rows = [row.attention for row in prepared.rows]
        if bucket is None:
            return self._attention.plan(rows, prepared.decode_rows)
        return self._attention.plan(rows, prepared.decode_rows, bucket.tokens, bucket.fills)

    def _run(self, prepared: Prepared, sampling: Sequence[int], launched: Launched) -> Tensor:
        """The chosen tokens of the rows `sampling`, of an iteration without a bucket."""
        rows, device, vocab = prepared.rows, self._device, self._vocab
        parts = []
        positions: list[int] = []
        given: list[int] = []
        lasts = []  # the packed token that each row ends with
        if taken := [row.task.slot for row in rows if row.ids is None]:
            parts.append(self._slots.tokens.index_select(0, to_device(taken, device)))
        for row in rows:  # those without ids come first
            given += row.ids or ()
            positions += range(row.attention.start, row.attention.stop)
            lasts.append(len(positions) - 1)
        if given:
            parts.append(to_device(np.asarray(given) % vocab, device))  # synthetic ids know no vocabulary
        plan = self._plan(prepared)
        logits = self.decoder.forward(
            torch.cat(parts),
            to_device(positions, device),
            lambda layer, heads: self._attention.attend(plan, layer, heads),
            to_device([lasts[i] for i in sampling], device),
        )
        chosen = torch.zeros(len(sampling), dtype=torch.int64, device=device)
        if sampling:
            self._keep_logprobs(logits, launched)
            self._choose(logits, launched, chosen)
        return chosen

    def _keep_logprobs(self, logits: Tensor, launched: Launched) -> None:
        """Those of the logits as they are, before sampling changes them."""
        wanted = ((row, output.sampling.sampling.logprobs) for row, output in enumerate(launched.outputs))
        counts = {row: count for row, count in wanted if count is not None}
        if counts:
            launched.logprobs = Logprobs(logits, counts)

    def _choose(self, logits: Tensor, launched: Launched, chosen: Tensor) -> None:
        """Samples into `chosen` and into the tasks' slots."""
        outputs = launched.outputs
        for output in outputs:
            output.ready()
        positions = [end - len(output.prompt) for output, end in zip(outputs, launched.ends, strict=True)]
        chosen.copy_(sample(logits, [output.sampling for output in outputs], positions))
        self._slots.tokens.index_copy_(0, to_device([output.slot for output in outputs], self._device), chosen)

    def _send_home(self, chosen: Tensor, launched: Launched) -> None:
        if launched.logprobs is not None:
            launched.logprobs.send_home(chosen, self._aside)
        if self._device.type == "cpu":
            launched.tokens = chosen
        else:
            launched.tokens = torch.empty(chosen.shape, dtype=chosen.dtype, pin_memory=True)
            launched.tokens.copy_(chosen, non_blocking=True)
            launched.ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            launched.ready.record()
        self._launched.append(launched)

    def finish(self, launched: Launched) -> list[TokenResult]:
        while launched.results is None:
            if not self._take_oldest() and launched.results is None:
                raise RuntimeError("the iteration's tokens are lost: whoever took them failed")
        return launched.results

    def _take_all(self) -> None:
        while self._take_oldest():
            pass

    def _take_oldest(self) -> bool:
        """Whether there was one."""
        with self._taking:
            if not self._launched:
                return False
            self._take(self._launched.popleft())
            return True

    def _take(self, launched: Launched) -> None:
        """The tokens are there: what they make of their outputs. An output that ended meanwhile had a surplus row."""
        if launched.ready is not None:
            launched.ready.synchronize()
        tokens = [] if launched.tokens is None else launched.tokens.tolist()
        told = {} if launched.logprobs is None else launched.logprobs.tokens(tokens, self._tokenizer)
        launched.results = [
            output.push(token_id)._replace(logprob=told[row]) if row in told else output.push(token_id)
            for row, (output, token_id) in enumerate(zip(launched.outputs, tokens, strict=True))
            if not output.ended
        ]
