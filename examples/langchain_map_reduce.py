"""Map-reduce summary with LangChain: every paragraph is summarised on its own, then the summaries are joined into one.

What `map_reduce.py` does with semantic variables, as a client that only knows OpenAI's API does it: it renders each prompt,
waits for all maps, and sends the last request then. With the base URL of a ServeCore and nothing else changed. The header
X-Parrot-Program tells the core that the requests belong to one program, whose prompts' common beginnings are then computed
once. Needs langchain-openai. Run: python examples/langchain_map_reduce.py --core http://localhost:9000
"""

from __future__ import annotations

import argparse
import os
import sys
import uuid
from pathlib import Path

import openai
from langchain_core.callbacks import UsageMetadataCallbackHandler
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

ARTICLE = Path(__file__).parent / "data" / "harbour.txt"
SYSTEM = "You are an editor. You write short and faithful summaries of texts, in plain sentences, and add nothing of your own."
MAP = ChatPromptTemplate.from_messages([("system", SYSTEM), ("user", "Summarise this paragraph in one sentence.\n\n{text}")])
REDUCE = ChatPromptTemplate.from_messages(
    [("system", SYSTEM), ("user", "Write one short summary of an article from these notes on its parts.\n{notes}")]
)


def paragraphs(path: Path = ARTICLE) -> list[str]:
    """The paragraphs of an article, without its title."""
    _title, *rest = path.read_text(encoding="utf-8").strip().split("\n\n")
    return rest


def model_at(core: str, name: str, api_key: str, max_tokens: int) -> ChatOpenAI:
    """The model `name` behind the core. Greedy, so that a run says what another one said."""
    return ChatOpenAI(
        model=name,
        base_url=f"{core.rstrip('/')}/v1",
        api_key=api_key,
        temperature=0,
        max_tokens=max_tokens,
        default_headers={"X-Parrot-Program": uuid.uuid4().hex},
    )


def summarise(model: ChatOpenAI, texts: list[str]) -> tuple[str, UsageMetadataCallbackHandler]:
    """One summary of all texts, and the tokens that it took."""
    usage = UsageMetadataCallbackHandler()
    to_text = StrOutputParser()
    notes = (MAP | model | to_text).batch([{"text": text} for text in texts], config={"callbacks": [usage]})
    joined = "\n".join(f"- {note.strip()}" for note in notes)
    return (REDUCE | model | to_text).invoke({"notes": joined}, config={"callbacks": [usage]}), usage


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--core", default="http://localhost:9000", help="address of the core (default: %(default)s)")
    add("--model", help="which model (default: the first that the core has)")
    add("--api-key", default=os.environ.get("OPENAI_API_KEY", "none"), help="the tenant's key, where the core asks for one")
    add("--max-tokens", type=int, default=48, help="tokens of each answer at most (default: %(default)s)")
    add("--parts", type=int, help="how many paragraphs (default: all)")
    flags = parser.parse_args()
    try:
        name = flags.model
        if name is None:
            with openai.OpenAI(base_url=f"{flags.core.rstrip('/')}/v1", api_key=flags.api_key) as client:
                names = [each.id for each in client.models.list()]
            if not names:
                sys.exit(f"{flags.core} has no model: is an engine registered?")
            name = names[0]
        text, usage = summarise(model_at(flags.core, name, flags.api_key, flags.max_tokens), paragraphs()[: flags.parts])
    except openai.OpenAIError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(f"summary\n    {text.strip()}\n")
    for used in usage.usage_metadata.values():
        cached = used.get("input_token_details", {}).get("cache_read", 0)
        print(f"{used['input_tokens']} prompt tokens, {cached} of them shared; {used['output_tokens']} generated")
    return 0


if __name__ == "__main__":
    sys.exit(main())
