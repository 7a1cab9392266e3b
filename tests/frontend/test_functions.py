"""Defining functions: docstrings, annotations, formatters, and what is refused at once."""

from __future__ import annotations

import subprocess
import sys

import pytest

from parrot import P

GREEDY = P.SamplingConfig(temperature=0.0, max_gen_length=7, stop_token_ids=[1, 2], logit_bias={5: 1.0})  # type: ignore[arg-type,dict-item]


@P.semantic_function(models=["m"], cache_prefix=False, output_criteria=P.PerformanceCriteria.TPOT)
def joke(topic: P.Input, style, joke: P.Output(GREEDY), why: P.Output):  # type: ignore[no-untyped-def,valid-type]
    """
    Tell a {{style}} joke
        about {{topic}}:   {{joke}}
    Explain it: {{why}}. Thanks
    """


def test_importing_parrot_alone_loads_no_frontend_and_no_http() -> None:
    code = "import parrot, sys; assert not {'aiohttp', 'msgspec', 'parrot.frontend'} & set(sys.modules); "
    code += (
        "from parrot import P; assert P.VirtualMachine and 'aiohttp' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_name_of_the_contract_is_there() -> None:
    names = "VirtualMachine Input Output semantic_function native_function variable Parameter ParamType standard_formatter "
    names += "allowing_newline vicuna_template PerformanceCriteria SamplingConfig Sequential ConversationTemplate"
    assert all(hasattr(P, name) for name in names.split())
    assert {c.name for c in P.PerformanceCriteria} == {"LATENCY", "THROUGHPUT", "TTFT", "TPOT"}
    assert {t.name for t in P.ParamType} == {"INPUT_LOC", "OUTPUT_LOC", "INPUT_PYOBJ"}


def test_docstring_and_annotations_make_the_function() -> None:
    assert joke.to_template_str() == "Tell a {{style}} joke about {{topic}}: {{joke}} Explain it: {{why}}. Thanks"
    assert [p.typ for p in joke.params] == [
        P.ParamType.INPUT_LOC,
        P.ParamType.INPUT_PYOBJ,
        P.ParamType.OUTPUT_LOC,
        P.ParamType.OUTPUT_LOC,
    ]
    sampling = joke.outputs[0].sampling_config
    assert sampling == P.SamplingConfig(temperature=0.0, max_gen_length=7, stop_token_ids=(1, 2), logit_bias={"5": 1.0})
    assert joke.outputs[1].sampling_config is None
    assert joke.metadata.models == ("m",)


def test_formatters_do_one_thing_each_and_compose() -> None:
    text = "\t\ta  b\n        c    d\te"
    assert P.RemoveIndentation()(text) == "a  b\nc    d\te"
    assert P.SquashIntoOneLine()("a\nb\r\nc") == "a b c"
    assert P.CollapseSpaces()("a   b \n  c") == "a b \n c"
    assert P.standard_formatter(text) == "a b c d\te"
    assert P.allowing_newline(text) == "a b\nc d\te"
    assert P.Sequential([str.upper, P.SquashIntoOneLine()])("a\nb") == "A B"


def test_without_a_formatter_the_docstring_is_taken_as_it_stands() -> None:
    @P.semantic_function(formatter=None)
    def f(x: P.Output):  # type: ignore[no-untyped-def]
        """a
        {{x}}"""

    assert f.to_template_str() == "a\n        {{x}}"


def define(body: str, *params: P.Parameter, **metadata: object) -> P.SemanticFunction:
    return P.SemanticFunction("f", params, body, **metadata)


INPUT = P.Parameter("a", P.ParamType.INPUT_LOC)
OUTPUT = P.Parameter("out", P.ParamType.OUTPUT_LOC)


def test_a_bad_template_is_refused_when_it_is_defined_naming_function_and_place() -> None:
    with pytest.raises(P.ParrotError, match=r"function 'f': placeholder \{\{b\}\} is no parameter") as caught:
        define("x {{a}} {{b}} {{out}}", INPUT, OUTPUT)
    assert caught.value.code == "bad_template"
    assert caught.value.info.details["offset"] == 8
    with pytest.raises(P.ParrotError, match="not used"):
        define("x {{out}}", INPUT, OUTPUT)


def test_a_function_without_docstring_is_refused() -> None:
    with pytest.raises(P.ParrotError, match="'f' has no docstring"):

        @P.semantic_function()
        def f(x: P.Output):  # type: ignore[no-untyped-def]
            pass


def test_variadic_parameters_and_unknown_annotations_are_refused() -> None:
    with pytest.raises(P.ParrotError, match="name each"):

        @P.semantic_function()
        def f(*x: P.Input):  # type: ignore[no-untyped-def]
            """{{x}}"""

    local_config = GREEDY
    with pytest.raises(P.ParrotError, match="cannot be evaluated"):

        @P.semantic_function()
        def g(x: P.Output(local_config)):  # type: ignore[no-untyped-def,valid-type]
            """hi {{x}}"""

    assert local_config is GREEDY


@pytest.mark.parametrize(
    ("metadata", "code", "says"),
    [
        ({"modles": []}, "bad_request", "modles"),
        ({"models": "m"}, "bad_request", "models"),
        ({"output_criteria": "speed"}, "bad_criteria", "latency, throughput, TTFT, TPOT"),
    ],
)
def test_bad_metadata_is_refused(metadata: dict[str, object], code: str, says: str) -> None:
    with pytest.raises(P.ParrotError, match=says) as caught:
        define("x {{out}}", OUTPUT, **metadata)
    assert caught.value.code == code


@pytest.mark.parametrize("config", [P.SamplingConfig(temperature=-1), P.SamplingConfig(n=2), P.SamplingConfig(seed="x"), 0.5])  # type: ignore[arg-type]
def test_bad_sampling_is_refused_naming_the_parameter(config: P.SamplingConfig) -> None:
    with pytest.raises(P.ParrotError, match="'out'") as caught:
        P.Parameter("out", P.ParamType.OUTPUT_LOC, config)
    assert caught.value.code == "bad_sampling"


def test_a_bad_parameter_name_and_a_sampled_input_are_refused() -> None:
    with pytest.raises(P.ParrotError, match="a-b"):
        P.Parameter("a-b", P.ParamType.INPUT_LOC)
    with pytest.raises(P.ParrotError, match="only an output is sampled"):
        P.Parameter("a", P.ParamType.INPUT_LOC, GREEDY)


def test_with_no_machine_running_a_call_returns_the_call_object() -> None:
    call = joke("cats", 7, why=P.variable("why"))
    assert isinstance(call, P.Call)
    assert call.func is joke
    assert call.inputs == {"topic": "cats", "style": "7"}
    assert repr(call) == "joke(topic='cats', style='7', why=<why new>)"


async def test_with_no_machine_running_ainvoke_returns_the_call_object() -> None:
    assert isinstance(await joke.ainvoke("cats", style="dry"), P.Call)


@pytest.mark.parametrize(
    ("args", "kwargs", "says"),
    [
        (("a", "b", "c"), {}, "takes 2 inputs"),
        (("a",), {}, "misses the input 'style'"),
        (("a",), {"topic": "b", "style": 1}, "two values for 'topic'"),
        (("a", "b"), {"tone": 1}, "no parameter 'tone'"),
    ],
)
def test_wrong_arguments_are_a_type_error(args: tuple[str, ...], kwargs: dict[str, object], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        joke(*args, **kwargs)


def test_an_output_takes_only_a_variable() -> None:
    with pytest.raises(P.ParrotError, match=r"an output takes a P\.variable"):
        joke("a", "b", why="because")


def test_an_input_may_have_a_default() -> None:
    @P.semantic_function()
    def f(a: P.Input = "cats", *, b="dogs", x: P.Output = None):  # type: ignore[no-untyped-def,assignment]
        """{{a}} and {{b}}: {{x}}"""

    assert f().inputs == {"a": "cats", "b": "dogs"}
    assert f("cows", b=3).inputs == {"a": "cows", "b": "3"}
