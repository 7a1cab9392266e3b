"""One task's token values: its prompt, its output so far, the text of it, and why it ended. Knows no batch, no tensor."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from parrot.engine.builtin.sampler import SamplingRow
from parrot.engine.runner import TokenResult
from parrot.protocol.api import SamplingConfig
from parrot.tokenizer import Detokenizer, Tokenizer


@dataclass(eq=False)
class ContextTokens:
    """The ids that a context adds to its parent's. A context that is gone lives on here while a child or task needs it."""

    parent: ContextTokens | None
    ids: list[int]

    def path(self) -> list[ContextTokens]:
        """Root first."""
        found = [self]
        while found[-1].parent is not None:
            found.append(found[-1].parent)
        return found[::-1]


class TaskTokens:
    """A task's chain and its output. `end` None: it only fills."""

    def __init__(self, key: Hashable, end: ContextTokens, generates: bool) -> None:
        self.key = key
        self.end = end  # the output's context, or the last link's
        self.generates = generates
        self.slot = -1  # where the runner keeps its last sampled token on the device
        self._prompt: list[int] | None = None

    @property
    def prompt(self) -> list[int]:
        """All ids before the output. Looked at only when the task first runs: by then its chain is complete."""
        if self._prompt is None:
            links = self.end.path()
            before = links[:-1] if self.generates else links
            self._prompt = [token_id for context in before for token_id in context.ids]
        return self._prompt

    def ids(self, start: int, stop: int) -> list[int]:
        """The ids at positions [start, stop) of the chain, output included."""
        first = len(self.prompt)
        if stop <= first:
            return self.prompt[start:stop]
        output = self.end.ids
        return self.prompt[start:first] + output[max(0, start - first) : stop - first]


class Output(TaskTokens):
    """The task's output, token by token. `exact`: dummy weights were asked for a certain length, which nothing else ends."""

    def __init__(
        self,
        key: Hashable,
        end: ContextTokens,
        sampling: SamplingConfig,
        seed: int,
        max_gen_length: int,
        tokenizer: Tokenizer,
        eos_ids: Sequence[int],
    ) -> None:
        super().__init__(key, end, generates=True)
        exact = sampling.output_length is not None
        self.sampling = SamplingRow(sampling, seed)
        self.ended = False
        self._limit = min(max_gen_length, sampling.output_length or max_gen_length)
        self._eos = frozenset() if exact or sampling.ignore_tokenizer_eos else frozenset(eos_ids)
        self._stops = frozenset() if exact else frozenset(sampling.stop_token_ids)
        self._text = Detokenizer(tokenizer, () if exact else sampling.stops)
        for token_id in end.ids:  # known from an earlier attempt; what it showed is not shown again
            self.sampling.took(token_id)
            self._text.push(token_id)

    def ready(self) -> None:
        """About to be sampled: the prompt is complete."""
        if not self.sampling.prompt and self.sampling.penalised:
            self.sampling.prompt = self.prompt

    def push(self, token_id: int) -> TokenResult:
        """The next token was sampled."""
        ids = self.end.ids
        if len(ids) >= self._limit:  # an earlier attempt had come to the end
            return self._end(token_id, "length", self._text.finish().text)
        if token_id in self._eos or token_id in self._stops:
            reason = "eos" if token_id in self._eos else "stop_token"
            return self._end(token_id, reason, self._text.finish().text)
        self.sampling.took(token_id)
        ids.append(token_id)
        shown = self._text.push(token_id)
        if shown.stopped:
            return self._end(token_id, "stop_str", shown.text)
        if len(ids) >= self._limit:
            last = self._text.finish()
            return self._end(token_id, "stop_str" if last.stopped else "length", shown.text + last.text)
        return TokenResult(self.key, token_id, shown.text)

    def _end(self, token_id: int, reason: str, text: str) -> TokenResult:
        self.ended = True
        kept = min(self._text.kept(), len(self.end.ids))
        del self.end.ids[kept:]
        return TokenResult(self.key, token_id, text, reason, kept, tuple(self.end.ids), self._text.text)
