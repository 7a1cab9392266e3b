"""What a template may be, and what a refusal says."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parrot.protocol.api import ParameterSpec, SamplingConfig
from parrot.protocol.errors import ParrotError
from parrot.protocol.template import Placeholder, Text, parse_template, pieces_for

IN = ParameterSpec("a", value="x")
OUT = ParameterSpec("out", is_output=True)


def refusal(template: str, *parameters: ParameterSpec, code: str = "bad_template") -> ParrotError:
    with pytest.raises(ParrotError) as caught:
        parse_template(template, parameters)
    assert caught.value.code == code
    return caught.value


def test_pieces_keep_order_and_place() -> None:
    assert parse_template("Say {{a}}: {{out}} bye {{a}}", [IN, OUT]) == [
        Text("Say "),
        Placeholder("a", False, 4),
        Text(": "),
        Placeholder("out", True, 11),
        Text(" bye "),
        Placeholder("a", False, 23),
    ]


def test_adjacent_placeholders_have_no_text_between_and_an_input_counts_as_text() -> None:
    pieces = parse_template("{{a}}{{out}}", [IN, OUT])
    assert [type(p) for p in pieces] == [Placeholder, Placeholder]


def test_pure_fill_behind_the_last_output_is_dropped_or_kept() -> None:
    assert pieces_for("p {{out}} tail {{a}}", [IN, OUT])[-1] == Placeholder("out", True, 2)
    assert pieces_for("p {{out}} tail {{a}}", [IN, OUT], remove_pure_fill=False)[-1] == Placeholder("a", False, 15)


@given(
    st.lists(
        st.one_of(st.text(alphabet=st.characters(exclude_characters="{")).map(lambda t: (t, t)), st.just(("{{a}}", None))),
        min_size=1,
    )
)
def test_joining_the_pieces_gives_the_template_back(parts: list[tuple[str, str | None]]) -> None:
    template = "head {{a}}" + "".join(text for text, _ in parts) + "{{out}}"
    pieces = parse_template(template, [IN, OUT])
    assert "".join(p.text if isinstance(p, Text) else "{{" + p.name + "}}" for p in pieces) == template
    for piece in pieces:
        if isinstance(piece, Placeholder):
            assert template.startswith("{{" + piece.name + "}}", piece.position)


@given(st.text(), st.lists(st.sampled_from([IN, OUT, ParameterSpec("b", is_output=True)])))
def test_any_text_is_parsed_or_refused_never_worse(template: str, parameters: list[ParameterSpec]) -> None:
    with contextlib.suppress(ParrotError):
        pieces_for(template, parameters)


def test_single_and_closing_braces_are_text() -> None:
    template = 'As JSON: {"k": {"v": 1}} {{out}}'
    assert parse_template(template, [OUT])[0] == Text('As JSON: {"k": {"v": 1}} ')
    assert parse_template("{{{a}}} {{out}}", [IN, OUT])[:3] == [Text("{"), Placeholder("a", False, 1), Text("} ")]


@pytest.mark.parametrize("bad", ["{{", "{{a", "{{a}", "{{}}", "{{ a }}", "{{1a}}", "{{a-b}}", "{{{{a}}}}", "{{a}} {{"])
def test_a_brace_pair_that_opens_no_placeholder_is_refused_with_its_place(bad: str) -> None:
    error = refusal("one\ntwo " + bad + " {{out}}", IN, OUT)
    details = error.info.details
    assert details["line"] == 2
    assert details["column"] == details["offset"] - 3
    assert "opens no placeholder" in str(error)
    assert f"line 2, column {details['column']}" in str(error)


def test_an_unknown_placeholder_is_named_with_its_place_and_the_known_ones() -> None:
    error = refusal("Hi\n{{a}} {{nobody}} {{out}}", IN, OUT)
    assert error.info.details == {"parameter": "nobody", "offset": 9, "line": 2, "column": 7}
    assert "{{nobody}}" in str(error)
    assert "a, out" in str(error)


@pytest.mark.parametrize(
    ("template", "parameters", "says"),
    [
        ("p {{out}}", [IN, OUT], "'a' is not used"),
        ("p {{a}} {{out}}", [IN, IN, OUT], "'a' is given twice"),
        ("{{out}}", [OUT], "before any text"),
        ("p {{out}} {{out}}", [OUT], "used twice"),
        ("p {{out}}", [ParameterSpec("out", is_output=True, value="v")], "has a value"),
        ("p {{a}} {{out}}", [ParameterSpec("a"), OUT], "neither var_id nor value"),
        ("p {{a}} {{out}}", [ParameterSpec("a", var_id="1", value="v"), OUT], "both var_id and value"),
        (
            "p {{a}} {{out}}",
            [ParameterSpec("a", value="v", sampling_config=SamplingConfig()), OUT],
            "only an output is sampled",
        ),
        ("p {{a}}", [IN], "no output"),
        ("", [], "no output"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(template: str, parameters: list[ParameterSpec], says: str) -> None:
    assert says in str(refusal(template, *parameters))


def test_a_preallocated_output_and_an_empty_value_are_accepted() -> None:
    parse_template("p {{a}} {{out}}", [ParameterSpec("a", value=""), ParameterSpec("out", is_output=True, var_id="7")])


def test_a_sampling_configuration_without_meaning_is_refused_by_parameter() -> None:
    error = refusal("p {{out}}", ParameterSpec("out", is_output=True, sampling_config=SamplingConfig(n=2)), code="bad_sampling")
    assert error.info.details == {"field": "n", "parameter": "out"}


def test_the_function_is_named_when_it_is_known() -> None:
    with pytest.raises(ParrotError, match="function 'f'") as caught:
        parse_template("p {{x}}", [OUT], func_name="f")
    assert caught.value.info.details["func_name"] == "f"


def test_a_template_of_too_many_pieces_is_refused_before_it_costs_anything() -> None:
    assert "more than 8192" in str(refusal("a {{in}} " * 5000 + "{{out}}", ParameterSpec("in", value="v"), OUT))
