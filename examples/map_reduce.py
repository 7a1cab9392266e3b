"""Map-reduce summary: every paragraph of an article is summarised on its own, then the summaries are joined into one.

The whole graph is submitted before the first get, so that the core sees the maps as one task group which only has to be
ready together, and the final call as the one that somebody waits for.
Run: python examples/map_reduce.py --core http://localhost:9000
"""

from __future__ import annotations

from pathlib import Path

from parrot import P

ARTICLE = Path(__file__).parent / "data" / "harbour.txt"
SYSTEM = "You are an editor. You write short and faithful summaries of texts, in plain sentences, and add nothing of your own."
EDITOR = P.chatml_template.with_system(SYSTEM)
MAP_SAMPLING = P.SamplingConfig(temperature=0.0, max_gen_length=32)
REDUCE_SAMPLING = P.SamplingConfig(temperature=0.0, max_gen_length=64)


@P.semantic_function(conversation_template=EDITOR, formatter=P.allowing_newline)
def summarise(paragraph: P.Input, summary: P.Output(MAP_SAMPLING)):
    """Summarise this paragraph in one sentence.

    {{paragraph}}
    {{summary}}
    """


def join_function(vm: P.VirtualMachine, parts: int) -> P.SemanticFunction:
    """A function that reads `parts` summaries and writes one."""
    names = [f"part{number}" for number in range(parts)]
    body = "\n".join(
        ["Write one short summary of an article from these notes on its parts.", *(f"- {{{{{n}}}}}" for n in names)]
    )
    params = [P.Parameter(name, P.ParamType.INPUT_LOC) for name in names]
    params.append(P.Parameter("summary", P.ParamType.OUTPUT_LOC, REDUCE_SAMPLING))
    return vm.define_function("join", body + "\n{{summary}}", params, conversation_template=EDITOR)


def paragraphs(path: Path = ARTICLE) -> list[str]:
    """The paragraphs of an article, without its title."""
    _title, *rest = path.read_text(encoding="utf-8").strip().split("\n\n")
    return rest


def main(vm: P.VirtualMachine, parts: int | None = None) -> dict[str, str]:
    """The program; `vm` runs already. `parts`: how many paragraphs (all). Returns texts by title."""
    texts = paragraphs()[:parts]
    notes = [summarise(text) for text in texts]
    inputs = {f"part{number}": note for number, note in enumerate(notes)}
    summary = join_function(vm, len(notes))(**inputs)
    return {"summary": summary.get(P.PerformanceCriteria.LATENCY)}


if __name__ == "__main__":
    from command import run

    run(main, __doc__)
