"""Functions of a program, and calls of them: the template, what its parameters are bound to, and what is sent.

A function is checked whole when it is defined, with the server's own rules. A call binds arguments without a word to the
core; the virtual machine that runs sends it, and where none runs the call object itself is returned.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from parrot.frontend.pfunc import environment
from parrot.frontend.pfunc.conversation import Conversation
from parrot.frontend.pfunc.formatters import Formatter, standard_formatter
from parrot.frontend.pfunc.parameters import Parameter, only, signature_of
from parrot.frontend.pfunc.variable import Variable
from parrot.frontend.session import Session
from parrot.protocol.api import CallAnswer, Criteria, ParameterSpec, SemanticCallRequest, parse_criteria
from parrot.protocol.errors import ParrotError
from parrot.protocol.template import Piece, Text, parse_template

F = TypeVar("F", bound="Function")
M = TypeVar("M")


class SemanticMetadata(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a semantic function says about how it is to be run; see COMPAT for each."""

    models: tuple[str, ...] = ()
    model_type: str = "token_id"
    remove_pure_fill: bool = True
    cache_prefix: bool = True
    output_criteria: Criteria | None = None
    fuse_fill: bool = False


class NativeMetadata(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a native function says about how it is to be run. `timeout` in seconds."""

    timeout: float = 1.0
    output_criteria: Criteria | None = None


class Function:
    """Base of semantic and native functions: a name, parameters, and the binding of arguments to them."""

    def __init__(self, name: str, params: Sequence[Parameter], defaults: dict[str, Any] | None = None) -> None:
        self.name = name
        self.params = tuple(params)
        self.inputs = only(self.params, outputs=False)
        self.outputs = only(self.params, outputs=True)
        self._defaults = dict(defaults or {})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The same as `invoke`."""
        return self.invoke(*args, **kwargs)

    def invoke(self, *args: Any, **kwargs: Any) -> Any:
        """Submits a call and returns its output variable, or a tuple of them; it does not wait for the model.

        Inputs are given by position or by name: a variable, or a plain value, of which `str()` is sent. An output may be
        given by name, with a variable. With no virtual machine running, the call object is returned.
        """
        call = self.bind(args, kwargs)
        machine = environment.current()
        return call if machine is None else machine.submit(call)

    async def ainvoke(self, *args: Any, **kwargs: Any) -> Any:
        """`invoke` in an async program."""
        call = self.bind(args, kwargs)
        machine = environment.current()
        return call if machine is None else await machine.asubmit(call)

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Call:
        """Arguments to parameters. Raises TypeError as a Python function does, `bad_request` for a bad output."""
        if len(args) > len(self.inputs):
            raise TypeError(f"{self.name}() takes {len(self.inputs)} inputs by position, got {len(args)}; outputs go by name")
        given: dict[str, Any] = {parameter.name: value for parameter, value in zip(self.inputs, args, strict=False)}
        known = {parameter.name for parameter in self.params}
        for name, value in kwargs.items():
            if name not in known:
                raise TypeError(f"{self.name}() has no parameter {name!r}; it has {', '.join(sorted(known))}")
            if name in given:
                raise TypeError(f"{self.name}() got two values for {name!r}")
            given[name] = value
        for parameter in self.inputs:
            if parameter.name not in given:
                if parameter.name not in self._defaults:
                    raise TypeError(f"{self.name}() misses the input {parameter.name!r}")
                given[parameter.name] = self._defaults[parameter.name]
        inputs = {p.name: given[p.name] if isinstance(given[p.name], Variable) else str(given[p.name]) for p in self.inputs}
        outputs = {p.name: _checked_output(self.name, p.name, given.get(p.name)) for p in self.outputs}
        return Call(self, inputs, outputs)

    def send(self, session: Session, specs: Sequence[ParameterSpec]) -> CallAnswer:
        """Submits a call with its bound parameters."""
        raise NotImplementedError

    async def asend(self, session: Session, specs: Sequence[ParameterSpec]) -> CallAnswer:
        raise NotImplementedError


class SemanticFunction(Function):
    """A prompt with holes. Raises `bad_template` (or `bad_sampling`) when its parts do not fit together."""

    def __init__(
        self,
        name: str,
        params: Sequence[Parameter],
        func_body: str,
        *,
        conversation_template: Conversation | None = None,
        defaults: dict[str, Any] | None = None,
        **metadata: Any,
    ) -> None:
        super().__init__(name, params, defaults)
        specs = [parameter.spec(value=None if parameter.is_output else "") for parameter in self.params]
        self.body: list[Piece] = parse_template(func_body, specs, func_name=name)
        if conversation_template is not None:
            self.body = parse_template(conversation_template.apply(self.body), specs, func_name=name)
        self.metadata = _metadata(name, SemanticMetadata, metadata)

    def __repr__(self) -> str:
        return f"SemanticFunction({self.name!r}, {self.to_template_str()!r})"

    def to_template_str(self) -> str:
        """The template as it is sent, after formatting and framing."""
        return "".join(p.text if isinstance(p, Text) else "{{" + p.name + "}}" for p in self.body)

    def request(self, session_id: int, auth: str, specs: Sequence[ParameterSpec]) -> SemanticCallRequest:
        """A call of this function on the wire."""
        metadata = self.metadata
        return SemanticCallRequest(
            session_id=session_id,
            session_auth=auth,
            template=self.to_template_str(),
            parameters=list(specs),
            func_name=self.name,
            models=list(metadata.models),
            model_type=metadata.model_type,
            remove_pure_fill=metadata.remove_pure_fill,
            cache_prefix=metadata.cache_prefix,
            output_criteria=metadata.output_criteria.value if metadata.output_criteria else None,
            fuse_fill=metadata.fuse_fill,
        )

    def send(self, session: Session, specs: Sequence[ParameterSpec]) -> CallAnswer:
        return session.submit(lambda session_id, auth: self.request(session_id, auth, specs))

    async def asend(self, session: Session, specs: Sequence[ParameterSpec]) -> CallAnswer:
        return await session.asubmit(lambda session_id, auth: self.request(session_id, auth, specs))


class NativeFunction(Function):
    """A Python function to be run by the core. A core that runs none refuses the call with `not_implemented`."""

    def __init__(self, function: Callable[..., Any], **metadata: Any) -> None:
        signature = signature_of(function)
        super().__init__(function.__name__, signature.parameters, signature.defaults)
        self._code = function.__code__
        self.metadata = _metadata(self.name, NativeMetadata, metadata)

    def send(self, session: Session, specs: Sequence[ParameterSpec]) -> CallAnswer:
        return session.submit_native(self.name, specs, self._code, **msgspec.to_builtins(self.metadata))

    async def asend(self, session: Session, specs: Sequence[ParameterSpec]) -> CallAnswer:
        return await session.asubmit_native(self.name, specs, self._code, **msgspec.to_builtins(self.metadata))


class Call:
    """A function with its arguments bound. `inputs` are variables or text; an output is a variable, or None: a new one."""

    def __init__(self, func: Function, inputs: dict[str, Variable | str], outputs: dict[str, Variable | None]) -> None:
        self.func = func
        self.inputs = inputs
        self.outputs = outputs

    def __repr__(self) -> str:
        bound = [f"{name}={_shown(value)}" for name, value in self.inputs.items()]
        bound += [f"{name}={_shown(value)}" for name, value in self.outputs.items() if value is not None]
        return f"{self.func.name}({', '.join(bound)})"

    def submit(self, session: Session) -> Variable | tuple[Variable, ...]:
        """Sends the call to `session`; returns its outputs."""
        for variable in self._to_register(session):
            variable.register(session)
        return self._accepted(session, self.func.send(session, self._specs(session)))

    async def asubmit(self, session: Session) -> Variable | tuple[Variable, ...]:
        for variable in self._to_register(session):
            await variable.aregister(session)
        return self._accepted(session, await self.func.asend(session, self._specs(session)))

    def _to_register(self, session: Session) -> list[Variable]:
        """Variables that must have an id before the call: empty inputs, and outputs given by name."""
        found: list[Variable] = []
        for name, value in (*self.inputs.items(), *self.outputs.items()):
            if not isinstance(value, Variable):
                continue
            if value.is_registered and not value.belongs_to(session) and not (value.is_ready and name in self.inputs):
                raise ParrotError(
                    "bad_request",
                    f"function {self.func.name!r}: variable {value.name!r} given for {name!r} belongs to another session",
                    parameter=name,
                )
            if not value.is_registered and (name in self.outputs or not value.is_ready):
                found.append(value)
        return found

    def _specs(self, session: Session) -> list[ParameterSpec]:
        specs: list[ParameterSpec] = []
        for parameter in self.func.params:
            bound = self.outputs[parameter.name] if parameter.is_output else self.inputs[parameter.name]
            if isinstance(bound, str):
                specs.append(parameter.spec(value=bound))
            elif bound is None:
                specs.append(parameter.spec())
            elif bound.belongs_to(session):
                specs.append(parameter.spec(var_id=bound.id))
            else:
                specs.append(parameter.spec(value=bound.content))
        return specs

    def _accepted(self, session: Session, answer: CallAnswer) -> Variable | tuple[Variable, ...]:
        """Takes over the ids that the core gave. A ready variable that was sent by value is one of the session from now on."""
        info = {item.parameter_name: item for item in answer.param_info}
        for name, value in self.inputs.items():
            if isinstance(value, Variable) and not value.is_registered and name in info:
                value.bind(session, info[name].var_id, info[name].var_name)
        results: list[Variable] = []
        for name, output in self.outputs.items():
            if output is None:
                if name not in info:
                    raise ParrotError("internal", f"the core's answer names no variable for the output {name!r}")
                output = Variable(info[name].var_name or name)
                output.bind(session, info[name].var_id)
            results.append(output)
        return results[0] if len(results) == 1 else tuple(results)


def semantic_function(
    formatter: Formatter | None = standard_formatter,
    conversation_template: Conversation | None = None,
    try_register: bool = True,
    **metadata: Any,
) -> Callable[[Callable[..., Any]], SemanticFunction]:
    """Makes a semantic function of a Python function: its docstring is the template, its body is never run.

    `metadata`: models, model_type, remove_pure_fill, cache_prefix, output_criteria, fuse_fill. Without a formatter the
    docstring is taken as it stands; with one, white space around it goes first.
    """

    def decorate(function: Callable[..., Any]) -> SemanticFunction:
        docstring = function.__doc__
        if docstring is None or not docstring.strip():
            raise ParrotError("bad_template", f"function {function.__name__!r} has no docstring; it is the template")
        signature = signature_of(function)
        made = SemanticFunction(
            function.__name__,
            signature.parameters,
            formatter(docstring.strip()) if formatter is not None else docstring,
            conversation_template=conversation_template,
            defaults=signature.defaults,
            **metadata,
        )
        functools.update_wrapper(made, function, updated=())
        return _registered(made, try_register)

    return decorate


def native_function(try_register: bool = True, **metadata: Any) -> Callable[[Callable[..., Any]], NativeFunction]:
    """Makes a native function, run by the core on the contents of its inputs; its outputs are written with `.set`.

    `metadata`: timeout (s), output_criteria.
    """

    def decorate(function: Callable[..., Any]) -> NativeFunction:
        made = NativeFunction(function, **metadata)
        functools.update_wrapper(made, function, updated=())
        return _registered(made, try_register)

    return decorate


def _registered(function: F, try_register: bool) -> F:
    machine = environment.current() if try_register else None
    if machine is not None:
        machine.register_function(function)
    return function


def _checked_output(func_name: str, name: str, value: Any) -> Variable | None:
    if value is None or isinstance(value, Variable):
        return value
    raise ParrotError(
        "bad_request",
        f"function {func_name!r}: output {name!r} was given {type(value).__name__} {value!r}; an output takes a P.variable()",
        parameter=name,
    )


def _metadata(name: str, kind: type[M], values: dict[str, Any]) -> M:
    """`values` as `kind`. Raises `bad_criteria`, or `bad_request` which names the field."""
    parse_criteria(values.get("output_criteria"))
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        known = ", ".join(field.name for field in msgspec.structs.fields(kind))  # type: ignore[arg-type]
        raise ParrotError("bad_request", f"function {name!r}: metadata: {error}; known are {known}") from None


def _shown(value: Variable | str) -> str:
    if isinstance(value, Variable):
        return f"<{value.name or 'variable'} {value.id or 'new'}>"
    return repr(value if len(value) <= 40 else value[:37] + "...")
