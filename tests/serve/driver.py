"""A ServeCore with nothing around it: one-line events, a clock that the test moves, engines that the test plays."""

from __future__ import annotations

from typing import Any

from parrot.protocol.api import CallAnswer, Criteria, SamplingConfig
from parrot.protocol.engine import EngineDescription
from parrot.protocol.errors import ErrorInfo
from parrot.serve import events as ev
from parrot.serve.config import GlobalSchedulerConfig, ServeCoreConfig
from parrot.serve.core import ServeCore
from parrot.serve.effects import AnyEffect, Dispatch, Reply
from parrot.serve.events import Constant, Content, Input, Output
from parrot.serve.fault import Fault

TOKENIZER = "synthetic"


def content(key: str, tokens: int) -> Content:
    return Content(key, {TOKENIZER: tokens})


def text(key: str, tokens: int = 10) -> Constant:
    return Constant(content(key, tokens))


def read(name: str, var_id: str) -> Input:
    return Input(name, var_id=var_id)


def value(name: str, key: str, tokens: int = 10) -> Input:
    return Input(name, value=content(key, tokens))


def out(name: str, var_id: str | None = None, max_gen_length: int = 16) -> Output:
    return Output(name, SamplingConfig(max_gen_length=max_gen_length), var_id=var_id)


def described(name: str = "e", **fields: Any) -> EngineDescription:
    defaults: dict[str, Any] = {
        "engine_name": name,
        "model": "m",
        "tokenizer": TOKENIZER,
        "host": "localhost",
        "port": 1,
        "engine_type": "emulated",
        "tasks_capacity": 64,
        "tokens_capacity": 100_000,
        "max_seq_len": 8192,
    }
    return EngineDescription(**(defaults | fields))


class Driver:
    """Sends one event an instant and keeps the effects apart: `replies` by request, `dispatches` not yet ended."""

    def __init__(self, policy: str = "least_loaded", scheduler: dict[str, Any] | None = None, **config: Any) -> None:
        section = GlobalSchedulerConfig(policy=policy, **(scheduler or {}))
        self.core = ServeCore(ServeCoreConfig(global_scheduler=section, **config))
        self.now = 0.0
        self.request = 0
        self.replies: dict[int, Reply] = {}
        self.dispatches: list[Dispatch] = []
        self.effects: list[AnyEffect] = []
        self.auths: dict[int, str] = {}
        self.faults: list[Fault] = []

    def send(self, *events: Any, at: float | None = None) -> list[AnyEffect]:
        self.now = self.now if at is None else at
        effects = self.core.handle(events, self.now)
        self.faults += self.core.take_faults()
        for effect in effects:
            if isinstance(effect, Reply):
                assert effect.request not in self.replies, "a request was answered twice"
                self.replies[effect.request] = effect
            elif isinstance(effect, Dispatch):
                self.dispatches.append(effect)
        self.effects.extend(effects)
        return effects

    def ask(self, kind: type, *args: Any, **kwargs: Any) -> int:
        """Sends an event that has a request number; returns the number."""
        self.request += 1
        self.send(kind(self.request, *args, **kwargs))
        return self.request

    def payload(self, request: int) -> Any:
        reply = self.replies[request]
        assert reply.error is None, reply.error
        return reply.payload

    def error(self, request: int) -> ErrorInfo:
        error = self.replies[request].error
        assert error is not None, self.replies[request]
        return error

    def tick(self) -> float:
        """Lets time pass to the next deadline, as a shell does; how long that was, in seconds."""
        deadline = self.core.next_deadline()
        if deadline is None:
            return 0.0
        passed_s, self.now = deadline - self.now, deadline
        self.send(ev.Tick())
        return passed_s

    # -------------------------------------------------------------------------------------------- in one line

    def engine(self, name: str = "e", **fields: Any) -> int:
        return int(self.payload(self.ask(ev.RegisterEngine, described(name, **fields))).engine_id)

    def open(self, session_id: int | None = None, tenant: str = "") -> int:
        session_id = session_id if session_id is not None else 1000 + len(self.auths)
        self.auths[session_id] = f"auth{session_id}"
        return int(self.payload(self.ask(ev.OpenSession, session_id, self.auths[session_id], tenant)))

    def submit(self, session: int, *segments: Any, **fields: Any) -> CallAnswer:
        answer = self.payload(self.ask(ev.SubmitCall, session, self.auths[session], tuple(segments), **fields))
        assert isinstance(answer, CallAnswer)
        return answer

    def outputs(self, answer: CallAnswer) -> list[str]:
        return [info.var_id for info in answer.param_info if info.is_output]

    def get(self, session: int, var_id: str, criteria: Criteria | None = None, timeout: float | None = None) -> int:
        return self.ask(ev.GetVariable, session, self.auths[session], var_id, criteria, timeout)

    def fetched(self, session: int, *segments: Any) -> int:
        """Submits a call with one output and gets it; the get's request."""
        (x,) = self.outputs(self.submit(session, *segments))
        return self.get(session, x)

    def variable(self, session: int, name: str = "") -> str:
        return str(self.payload(self.ask(ev.CreateVariable, session, self.auths[session], name))["var_id"])

    def set(self, session: int, var_id: str, key: str, tokens: int = 10) -> int:
        return self.ask(ev.SetVariable, session, self.auths[session], var_id, content(key, tokens))

    def close(self, session: int) -> int:
        return self.ask(ev.CloseSession, session, self.auths[session])

    def start(self, dispatch: Dispatch) -> list[AnyEffect]:
        return self.send(ev.TaskStarted(dispatch.epoch, dispatch.task, dispatch.attempt))

    def first(self, dispatch: Dispatch) -> list[AnyEffect]:
        return self.send(ev.FirstToken(dispatch.epoch, dispatch.task, dispatch.attempt))

    def finish(self, dispatch: Dispatch, key: str | None = None, tokens: int = 5) -> list[AnyEffect]:
        if dispatch in self.dispatches:
            self.dispatches.remove(dispatch)
        key = key if key is not None else f"out:{dispatch.task.session_id}:{dispatch.output_var}"
        return self.send(ev.TaskFinished(dispatch.epoch, dispatch.task, dispatch.attempt, content(key, tokens), tokens))

    def fail(self, dispatch: Dispatch, retryable: bool = False, code: str = "generation_failed") -> list[AnyEffect]:
        self.dispatches.remove(dispatch)
        return self.send(ev.TaskFailed(dispatch.epoch, dispatch.task, dispatch.attempt, code, "it broke", retryable))

    def lose(self, engine_id: int) -> list[AnyEffect]:
        self.dispatches = [d for d in self.dispatches if d.engine_id != engine_id]
        return self.send(ev.EngineLost(engine_id, "test"))

    def report(self, session: int) -> Any:
        return self.core.session_report(session, self.now)
