"""What is said in the sessions of a run: the texts that were given, and what the model says to them, whose tokens say how long
it takes. It follows what the core has answered, and asks it for nothing but the calls of a session that is about to close.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from parrot.protocol.api import CallAnswer, SamplingConfig
from parrot.serve import events as ev
from parrot.serve.effects import Dispatch
from parrot.serve.graph import Call
from parrot.serve.texts import Piece, Texts, content_key, pack_ids
from parrot.serve.tokenization import Tokenization
from parrot.tokenizer import Tokenizer, find_stop
from sim.cluster import Cluster
from sim.engine_models import EngineModel
from sim.programs.accounts import Account
from sim.programs.outputs import Outputs, cut
from sim.programs.prompts import prompt_keys
from sim.programs.tokenizers import Counted


class _Session:
    """What is known of an open session. `contents`: variable -> content key."""

    def __init__(self) -> None:
        self.owner: Account | None = None
        self.number = 0
        self.calls: list[tuple[ev.SubmitCall, CallAnswer]] = []
        self.contents: dict[str, str] = {}
        self.said: dict[tuple[int, int], tuple[str, int]] = {}  # (call, output) -> text and tokens, for another attempt


class Sessions:
    """The open sessions of `cluster`, and what its engines generate in them. `closed` gets each session's calls as it closes,
    with the account that it belongs to."""

    def __init__(
        self,
        cluster: Cluster,
        engines: Sequence[EngineModel],
        tokenizers: dict[str, Tokenizer],
        outputs: Outputs,
        closed: Callable[[Account, Sequence[Call], Mapping[str, tuple[int, int]]], None],
    ) -> None:
        self.texts = Texts()
        self.tokenization = Tokenization(self.texts, lambda name: Counted(tokenizers[name]))
        self._cluster = cluster
        self._tokenizers = tokenizers
        self._tokenizer_of = {
            node.id: engine.description.tokenizer for node, engine in zip(cluster.engines, engines, strict=True)
        }
        self.tokenizer_names = list(dict.fromkeys(self._tokenizer_of.values()))
        self._outputs = outputs
        self._closed = closed
        self._open: dict[int, _Session] = {}
        cluster.generate = self._generate

    def __contains__(self, session_id: int) -> bool:
        return session_id in self._open

    def begin(self, session_id: int) -> None:
        """The session has been opened; whose it is, is not known yet."""
        self._open[session_id] = _Session()

    def belongs_to(self, session_id: int, account: Account) -> None:
        """The session belongs to that account."""
        session = self._open[session_id]
        session.owner, session.number = account, len(account.sessions) - 1

    def submitted(self, event: ev.SubmitCall, answer: CallAnswer) -> None:
        """The core has taken the call in."""
        session = self._open[event.session_id]
        if answer.request_id < len(session.calls):
            return  # a repeat
        session.calls.append((event, answer))
        given = [segment for segment in event.segments if not isinstance(segment, ev.Constant)]
        for segment, info in zip(given, answer.param_info, strict=True):
            if isinstance(segment, ev.Input) and segment.value is not None:
                session.contents[info.var_id] = segment.value.key

    def assigned(self, event: ev.SetVariable) -> None:
        """The variable has been given its content."""
        self._open[event.session_id].contents[event.var_id] = event.content.key

    def report(self, session_id: int) -> None:
        """The session is about to close: what the core knows of it is taken down."""
        session = self._open.get(session_id)
        if session is not None and session.owner is not None:
            self._closed(session.owner, self._cluster.calls(session_id), session.owner.outputs_of(session_id))

    def forget(self, session_id: int) -> None:
        """The session has closed."""
        self._open.pop(session_id, None)
        self.texts.end(session_id)

    # --------------------------------------------------------------------------------------------------- the outputs

    def _generate(self, effect: Dispatch) -> tuple[int, Callable[[int], ev.Content]]:
        """What an engine generates, as `sim.cluster.Generate` has it."""
        task, name = effect.task, self._tokenizer_of[effect.engine_id]
        session = self._open[task.session_id]
        found = session.said.get((task.call, task.output))
        if found is None:
            wanted = _Wanted(effect, session, self.texts, name)
            found = self._bounded(self._outputs(wanted), effect.sampling, name)
            session.said[task.call, task.output] = found
        text, tokens = found

        def content(generated: int) -> ev.Content:
            said = text if generated >= tokens else cut(text, generated, self._tokenizers[name])
            piece = self._piece(said)
            self.texts.hold(task.session_id, (piece,))
            session.said.pop((task.call, task.output), None)
            session.contents[effect.output_var] = piece.key
            return piece.content()

        return max(1, tokens), content

    def _bounded(self, text: str, sampling: SamplingConfig, name: str) -> tuple[str, int]:
        """The text as the engine would end it: at a stop string, or when it is long enough; and its tokens."""
        if sampling.stops:
            end = find_stop(text, sampling.stops)
            text = text if end < 0 else text[:end]
        tokens = len(self.tokenization.encode(name, text))
        if tokens > sampling.max_gen_length:
            text, tokens = cut(text, sampling.max_gen_length, self._tokenizers[name]), sampling.max_gen_length
        return text, tokens

    def _piece(self, text: str) -> Piece:
        """A generated text, with its length under every tokenizer."""
        key = content_key(text)
        piece = self.texts.find(key) or Piece(key, text)
        for name in self.tokenizer_names:
            if name not in piece.ids:
                piece.ids[name] = pack_ids(self.tokenization.encode(name, text))
        return piece


class _Wanted:
    """An output that is about to be written (`sim.programs.outputs.Wanted`)."""

    def __init__(self, effect: Dispatch, session: _Session, texts: Texts, tokenizer: str) -> None:
        self.sampling = effect.sampling
        self.tokenizer = tokenizer
        self.call, self.place = effect.task.call, effect.task.output
        self.session = session.number
        self.instance = session.owner.serial if session.owner is not None else 0
        self._session = session
        self._texts = texts
        self._event, self._answer = session.calls[self.call]

    @property
    def name(self) -> str:
        return self._event.func_name

    @property
    def output(self) -> str:
        return [info.parameter_name for info in self._answer.param_info if info.is_output][self.place]

    @property
    def prompt(self) -> str:
        keys = prompt_keys(self._event, self._answer, self.place, self._session.contents.get)
        return "".join([self._texts.text(key) for key in keys if key is not None])

    @property
    def inputs(self) -> dict[str, str]:
        contents = self._session.contents
        known = {info.parameter_name: contents.get(info.var_id) for info in self._answer.param_info}
        return {name: self._texts.text(key) for name, key in known.items() if key is not None}
