"""What an engine's shell needs of the thing that computes: the interface between EngineCore's batches and a model.

The shell owns the order: `EngineCore.next_batch` → `Runner.prepare` (same thread as the core, reads its block tables) →
`Runner.launch` and `Runner.finish` (a worker thread each; they touch no core) → `EngineCore.complete`. With `pipeline_depth`
above 0 the next iteration is launched while this one is waited for. A runner owns token values, sampling state and tensors; it
decides nothing about who runs.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from parrot.engine.core import Batch, EngineCore, EngineTask
from parrot.protocol.api import SamplingConfig
from parrot.protocol.engine import TokenLogprob


class TokenResult(NamedTuple):
    """What one task's sampling row gave. `text`: what may be shown now (a possible beginning of a stop string and an
    incomplete character are held back). `logprob`: where its sampling asks for it. When the task ended: `reason` (eos,
    stop_token, stop_str, length), the number of its tokens that are kept (cut at the stop), and the whole output's ids and
    text."""

    key: Hashable
    token_id: int
    text: str
    reason: str | None = None
    kept: int = 0
    ids: tuple[int, ...] = ()
    output: str = ""
    logprob: TokenLogprob | None = None


class Runner(Protocol):
    """Computes batches. One implementation a kind of device or library."""

    def add_task(
        self, task: EngineTask, link_ids: Sequence[Sequence[int]], sampling: SamplingConfig, forced_ids: Sequence[int]
    ) -> None:
        """Takes the token ids of the task's links, in order. Raises ParrotError `bad_sampling` for what it cannot honour."""

    def drop_task(self, key: Hashable) -> None:
        """The task ended or was aborted: its sampling state goes, its contexts stay. Unknown keys are ignored."""

    def drop_contexts(self, context_ids: Iterable[int]) -> None:
        """These contexts are gone from the core."""

    def prepare(self, batch: Batch, core: EngineCore) -> Any:
        """Captures all that `run` needs: block tables, positions, token sources."""

    def launch(self, prepared: Any) -> Any:
        """Begins to compute the iteration, on a GPU without waiting for it. Launches come in the order of issue."""

    def finish(self, launched: Any) -> list[TokenResult]:
        """Waits until the iteration is computed; one result for every row that samples."""

    def replays(self, prepared: Any) -> bool:
        """Whether the iteration is the replay of a captured graph (for the iteration log)."""
