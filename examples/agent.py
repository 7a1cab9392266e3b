"""An agent: the model says what to do next, a tool does it, and so on until the model says that it is done.

What comes next depends on what the model said, so that no graph of it can be sent before; each turn's prompt begins with all of
the turn before it. A model says what it wants: whatever is no command ends the conversation, and so do too many turns.
Run: python examples/agent.py --core http://localhost:9000
"""

from __future__ import annotations

import time

from parrot import P

STOCK = {"rope": 12, "lamp": 0, "anchor": 2}
TASK = "Are there enough lamps in the store for three boats? Each boat needs one."
RULES = (
    "You look after a harbour's store. Say `LOOK <thing>` to have its shelf looked at, `COUNT` to have all shelves counted, "
    "or `DONE <answer>` when you know the answer. Say one command in a line, and nothing else."
)
MOST_TURNS = 6
WALK_S = 2.0  # to a shelf and back
SAMPLING = P.SamplingConfig(temperature=0.0, max_gen_length=24, stop_str="\n")


@P.semantic_function(formatter=P.allowing_newline)
def step(rules: P.Input, task: P.Input, notes: P.Input, command: P.Output(SAMPLING)):
    """{{rules}}

    Question: {{task}}
    {{notes}}Command: {{command}}"""


def use_tool(command: str) -> str:
    """What the tool finds; it takes its time."""
    word, _, thing = command.partition(" ")
    shelves = list(STOCK) if word == "COUNT" else [thing.strip().lower()]
    time.sleep(WALK_S * len(shelves))
    return ", ".join(f"{shelf}: {STOCK.get(shelf, 'no such shelf')}" for shelf in shelves)


def main(vm: P.VirtualMachine, task: str = TASK, turns: int = MOST_TURNS) -> dict[str, str]:
    """The program; `vm` runs already. Returns what was done in each turn, and the answer."""
    said: dict[str, str] = {}
    notes = ""
    for turn in range(turns):
        command = step(RULES, task, notes).get(P.PerformanceCriteria.LATENCY).strip()
        if not command.startswith(("LOOK ", "COUNT")):
            said["answer"] = command.removeprefix("DONE").strip()
            return said
        found = use_tool(command)
        said[f"turn {turn + 1}"] = f"{command} -> {found}"
        notes += f"Command: {command}\nFound: {found}\n"
    said["answer"] = "(none after all turns)"
    return said


if __name__ == "__main__":
    from command import run

    run(main, __doc__)
