"""Chain summary: an article is read chunk by chunk, and each call revises the summary of what came before.

Every call reads the output of the call before it. The client submits the whole chain at once and fetches its end: no
round trip lies between two links. Run: python examples/chain_summary.py --core http://localhost:9000
"""

from __future__ import annotations

from pathlib import Path

from parrot import P

ARTICLE = Path(__file__).parent / "data" / "night_market.txt"
SYSTEM = (
    "You are an editor. You keep a running summary of a text that you are shown in pieces. "
    "It is never longer than three sentences."
)
EDITOR = P.chatml_template.with_system(SYSTEM)
SAMPLING = P.SamplingConfig(temperature=0.0, max_gen_length=48)


@P.semantic_function(conversation_template=EDITOR, formatter=P.allowing_newline)
def begin(chunk: P.Input, summary: P.Output(SAMPLING)):
    """Summarise the beginning of a text.

    {{chunk}}
    {{summary}}
    """


@P.semantic_function(conversation_template=EDITOR, formatter=P.allowing_newline)
def revise(before: P.Input, chunk: P.Input, summary: P.Output(SAMPLING)):
    """The summary so far: {{before}}

    The text goes on:
    {{chunk}}

    Write the summary of all of it.
    {{summary}}
    """


def chunks(path: Path = ARTICLE, paragraphs_each: int = 2) -> list[str]:
    """The article without its title, in chunks of whole paragraphs."""
    _title, *rest = path.read_text(encoding="utf-8").strip().split("\n\n")
    return ["\n\n".join(rest[at : at + paragraphs_each]) for at in range(0, len(rest), paragraphs_each)]


def main(vm: P.VirtualMachine, links: int | None = None) -> dict[str, str]:
    """The program; `vm` runs already. `links`: how many chunks (all). Returns texts by title."""
    first, *rest = chunks()[:links]
    summary = begin(first)
    for chunk in rest:
        summary = revise(summary, chunk)
    return {"summary": summary.get(P.PerformanceCriteria.LATENCY)}


if __name__ == "__main__":
    from command import run

    run(main, __doc__)
