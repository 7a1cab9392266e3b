"""The frontend, as programs import it: `from parrot import P`."""

from parrot.frontend.pfunc.conversation import (
    ChatTemplate,
    Conversation,
    ConversationTemplate,
    SeperatorStyle,
    TokenizerTemplate,
    chatml_template,
    vicuna_template,
)
from parrot.frontend.pfunc.formatters import (
    CollapseSpaces,
    RemoveIndentation,
    Sequential,
    SquashIntoOneLine,
    allowing_newline,
    standard_formatter,
)
from parrot.frontend.pfunc.function import Call, NativeFunction, SemanticFunction, native_function, semantic_function
from parrot.frontend.pfunc.parameters import Input, Output, Parameter, ParamType
from parrot.frontend.pfunc.timing import CallTiming, timing_table, timings
from parrot.frontend.pfunc.variable import Variable, variable
from parrot.frontend.pfunc.virtual_machine import VirtualMachine
from parrot.frontend.wire import RetryPolicy
from parrot.protocol.api import Criteria as PerformanceCriteria
from parrot.protocol.api import SamplingConfig
from parrot.protocol.errors import ParrotError

__all__ = [
    "Call",
    "CallTiming",
    "ChatTemplate",
    "CollapseSpaces",
    "Conversation",
    "ConversationTemplate",
    "Input",
    "NativeFunction",
    "Output",
    "ParamType",
    "Parameter",
    "ParrotError",
    "PerformanceCriteria",
    "RemoveIndentation",
    "RetryPolicy",
    "SamplingConfig",
    "SemanticFunction",
    "SeperatorStyle",
    "Sequential",
    "SquashIntoOneLine",
    "TokenizerTemplate",
    "Variable",
    "VirtualMachine",
    "allowing_newline",
    "chatml_template",
    "native_function",
    "semantic_function",
    "standard_formatter",
    "timing_table",
    "timings",
    "variable",
    "vicuna_template",
]
