"""What a function's parameters are: read from its annotations, or given as data. Nothing here knows of templates."""

from __future__ import annotations

import enum
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from parrot.protocol.api import PLACEHOLDER_NAME, ParameterSpec, SamplingConfig
from parrot.protocol.errors import ParrotError

_NAME = re.compile(PLACEHOLDER_NAME)


class ParamType(enum.Enum):
    """An input or output that is a semantic variable, or a Python object that is rendered with `str()`."""

    INPUT_LOC = "input"
    OUTPUT_LOC = "output"
    INPUT_PYOBJ = "python object"


class Input:
    """Annotation of a parameter that reads a semantic variable (or a plain value)."""


class Output:
    """Annotation of a parameter that the model writes: `P.Output`, or `P.Output(P.SamplingConfig(...))`."""

    def __init__(self, sampling_config: SamplingConfig | None = None) -> None:
        self.sampling_config = sampling_config


@dataclass(frozen=True)
class Parameter:
    """One parameter of a function. Raises `bad_template` or `bad_sampling` for one that no core would accept."""

    name: str
    typ: ParamType
    sampling_config: SamplingConfig | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ParrotError("bad_template", f"parameter name {self.name!r} is not of the form {PLACEHOLDER_NAME}")
        if self.sampling_config is None:
            return
        if not self.is_output:
            raise ParrotError("bad_template", f"input parameter {self.name!r} has a sampling_config; only an output is sampled")
        object.__setattr__(self, "sampling_config", _valid(self.sampling_config, self.name))

    @property
    def is_output(self) -> bool:
        return self.typ is ParamType.OUTPUT_LOC

    def spec(self, var_id: str | None = None, value: str | None = None) -> ParameterSpec:
        """This parameter on the wire, with what it is bound to."""
        return ParameterSpec(self.name, self.is_output, var_id, value, self.sampling_config)


def _valid(config: SamplingConfig, name: str) -> SamplingConfig:
    """`config` as the server would decode it: a Struct's constructor checks no types."""
    if not isinstance(config, SamplingConfig):
        raise ParrotError("bad_sampling", f"parameter {name!r}: {config!r} is no P.SamplingConfig", parameter=name)
    try:
        decoded = msgspec.convert(msgspec.to_builtins(config, str_keys=True), SamplingConfig)
        decoded.check()
    except msgspec.ValidationError as error:
        raise ParrotError("bad_sampling", f"parameter {name!r}: sampling_config: {error}", parameter=name) from None
    except ParrotError as error:
        raise ParrotError(error.code, f"parameter {name!r}: {error}", **error.info.details, parameter=name) from None
    return decoded


@dataclass(frozen=True)
class Signature:
    """Parameters in the order of their declaration, and the defaults of inputs that have one."""

    parameters: tuple[Parameter, ...]
    defaults: dict[str, Any]


def signature_of(function: Callable[..., Any]) -> Signature:
    """Reads a Python function's parameters and annotations, those that are strings too."""
    parameters: list[Parameter] = []
    defaults: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ParrotError(
                "bad_template", f"function {function.__name__!r}: *{parameter.name} cannot be a parameter; name each"
            )
        read = _read_annotation(function, parameter.name, parameter.annotation)
        parameters.append(read)
        if parameter.default is not parameter.empty and not read.is_output:
            defaults[read.name] = parameter.default
    return Signature(tuple(parameters), defaults)


def _read_annotation(function: Callable[..., Any], name: str, annotation: Any) -> Parameter:
    if isinstance(annotation, str):
        annotation = _evaluate(function, name, annotation)
    if annotation is Input or isinstance(annotation, Input):
        return Parameter(name, ParamType.INPUT_LOC)
    if annotation is Output:
        return Parameter(name, ParamType.OUTPUT_LOC)
    if isinstance(annotation, Output):
        return Parameter(name, ParamType.OUTPUT_LOC, annotation.sampling_config)
    return Parameter(name, ParamType.INPUT_PYOBJ)


def _evaluate(function: Callable[..., Any], name: str, annotation: str) -> Any:
    """A postponed annotation's value. One that cannot be had is a Python object's, unless it means an output or input."""
    closed_over = dict(inspect.getclosurevars(function).nonlocals)
    try:
        return eval(annotation, getattr(function, "__globals__", {}), closed_over)
    except ParrotError:
        raise
    except Exception as error:
        if re.search(r"\b(Input|Output)\b", annotation):
            raise ParrotError(
                "bad_template",
                f"function {function.__name__!r}: the annotation {annotation!r} of {name!r} cannot be evaluated: {error}; "
                "name only what is global in its module",
                parameter=name,
            ) from error
        return None


def only(parameters: Sequence[Parameter], *, outputs: bool) -> tuple[Parameter, ...]:
    """The outputs, or the inputs, in order."""
    return tuple(p for p in parameters if p.is_output is outputs)
