"""Conversation templates frame a function's text as the model was trained to read it."""

from __future__ import annotations

from typing import Any

import pytest

from parrot import P

VICUNA_HEAD = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def framed(body: str, template: P.Conversation, outputs: str = "x") -> str:
    params = [P.Parameter(name, P.ParamType.OUTPUT_LOC) for name in outputs]
    params += [P.Parameter("q", P.ParamType.INPUT_LOC)] if "{{q}}" in body else []
    return P.SemanticFunction("f", params, body, conversation_template=template).to_template_str()


def test_vicuna_frames_what_stands_before_an_output_as_the_user_and_the_output_as_the_assistant() -> None:
    assert (
        framed("Answer {{q}} now. {{x}}", P.vicuna_template)
        == f"{VICUNA_HEAD} USER: Answer {{{{q}}}} now. ASSISTANT:{{{{x}}}}</s>"
    )


def test_several_outputs_are_several_turns() -> None:
    assert framed("{{q}} {{x}} And why? {{y}}", P.vicuna_template, "xy") == (
        f"{VICUNA_HEAD} USER: {{{{q}}}} ASSISTANT:{{{{x}}}}</s>USER: And why? ASSISTANT:{{{{y}}}}</s>"
    )


def test_one_separator_style_uses_it_everywhere() -> None:
    template = P.ConversationTemplate("Be kind.", ("H", "A"), system_template="<{system_message}>", sep="#")
    assert framed("hi {{x}}", template) == "<Be kind.>#H: hi#A:{{x}}#"


def test_chatml_has_no_system_message_unless_it_is_given_one() -> None:
    user = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n{{x}}<|im_end|>\n"
    assert framed("hi {{x}}", P.chatml_template) == user
    assert framed("hi {{x}}", P.chatml_template.with_system("Be kind.")) == f"<|im_start|>system\nBe kind.<|im_end|>\n{user}"


def test_prompt_frames_a_history_that_the_program_lists() -> None:
    text = P.chatml_template.prompt([("user", "{{u0}}"), ("assistant", "{{a0}}")])
    assert text == "<|im_start|>user\n{{u0}}<|im_end|>\n<|im_start|>assistant\n{{a0}}<|im_end|>\n"
    with pytest.raises(P.ParrotError, match="role 'tool'"):
        P.chatml_template.prompt([("tool", "x")])


class FakeTokenizer:
    """As transformers' tokenizers behave: a template that opens with BOS."""

    chat_template = "a template"
    bos_token = "<s>"
    bos_token_id = 1

    def encode(self, text: str) -> list[int]:
        return [1, 5]

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        assert options == {"tokenize": False, "add_generation_prompt": False}
        if messages[0]["role"] == "system":
            raise ValueError("no system messages")
        return "<s>" + "".join(f"[{m['role']}]{m['content']}" for m in messages)


def test_a_models_own_template_frames_it_and_leaves_the_bos_to_the_engine() -> None:
    assert framed("hi {{q}} {{x}}", P.TokenizerTemplate(FakeTokenizer())) == "[user]hi {{q}}[assistant]{{x}}"


def test_what_a_models_own_template_refuses_is_a_bad_template() -> None:
    with pytest.raises(P.ParrotError, match="no system messages"):
        framed("hi {{x}}", P.TokenizerTemplate(FakeTokenizer(), system_message="Be kind."))
    with pytest.raises(P.ParrotError, match="no chat template"):
        P.TokenizerTemplate(object())


def test_bad_conversation_templates_are_refused() -> None:
    with pytest.raises(P.ParrotError, match="needs sep2"):
        P.ConversationTemplate("s", ("U", "A"), seperator_style=P.SeperatorStyle.ADD_COLON_TWO)
    with pytest.raises(P.ParrotError, match="not two"):
        P.ConversationTemplate("s", ("U",))
    with pytest.raises(P.ParrotError, match="has no"):
        P.ConversationTemplate("s", ("U", "A"), system_template="x")
