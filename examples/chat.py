"""A chat of several turns with a system prompt that all chats share.

The prompt of a turn begins with all of the turn before it, answer included, so that its context is continued and not
computed again; and the system prompt is a prefix that sessions share. Answers are streamed: a reader wants the first
word soon, hence the criteria TTFT. Run: python examples/chat.py --core http://localhost:9000
"""

from __future__ import annotations

from parrot import P

SYSTEM = (
    "You are a friendly guide in a museum of the sea. Visitors ask you about boats, tides and fish. "
    "Answer in one or two short sentences, in everyday words. "
    "Explain one thing at a time, and never invent dates or names."
)
QUESTIONS = (
    "Why does the sea rise and fall every day?",
    "How can a mill use the tides to grind grain?",
    "What would a storm do to such a mill?",
    "Thank you. What should I look at next?",
)
SAMPLING = P.SamplingConfig(temperature=0.4, top_p=0.9, seed=7, max_gen_length=40)


def turn_function(vm: P.VirtualMachine, turn: int) -> P.SemanticFunction:
    """The function of turn `turn` (from 0): it reads all questions so far and all answers but its own."""
    messages = [("system", SYSTEM)]
    params: list[P.Parameter] = []
    for past in range(turn + 1):
        messages += [("user", f"{{{{question{past}}}}}"), ("assistant", f"{{{{answer{past}}}}}")]
        params.append(P.Parameter(f"question{past}", P.ParamType.INPUT_LOC))
        kind = P.ParamType.INPUT_LOC if past < turn else P.ParamType.OUTPUT_LOC
        params.append(P.Parameter(f"answer{past}", kind, SAMPLING if past == turn else None))
    return vm.define_function(f"turn{turn}", P.chatml_template.prompt(messages), params)


def main(vm: P.VirtualMachine, turns: int = len(QUESTIONS)) -> dict[str, str]:
    """The program; `vm` runs already. Returns answers by question. A user interface would show each piece as it comes."""
    said: dict[str, P.Variable] = {}
    spoken: dict[str, str] = {}
    for turn, question in enumerate(QUESTIONS[:turns]):
        said[f"question{turn}"] = P.variable(f"question{turn}", question)
        answer = turn_function(vm, turn)(**said)
        said[f"answer{turn}"] = answer
        spoken[question] = "".join(answer.stream(P.PerformanceCriteria.TTFT))
    return spoken


if __name__ == "__main__":
    from command import run

    run(main, __doc__)
