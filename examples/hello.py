"""The first program: a semantic function of two outputs, and a second function that reads one of them.

Nothing is generated before somebody asks: both calls are submitted at once, and the core knows how they depend on each
other when the first `get` comes. Run: python examples/hello.py --core http://localhost:9000
"""

from __future__ import annotations

from parrot import P

SHORT = P.SamplingConfig(temperature=0.4, top_p=0.9, seed=7, max_gen_length=40)
ASSISTANT = P.chatml_template.with_system("You are a friendly assistant who answers in one or two sentences.")


@P.semantic_function(conversation_template=ASSISTANT)
def describe(animal: P.Input, description: P.Output(SHORT), reason: P.Output(SHORT)):
    """Describe the feathers and the beak of {{animal}}. {{description}} Why do people like to look at it? {{reason}}"""


@P.semantic_function(conversation_template=ASSISTANT)
def name(animal: P.Input, description: P.Input, pet_name: P.Output(SHORT)):
    """Somebody describes {{animal}}: "{{description}}" Suggest a name for it. {{pet_name}}"""


def main(vm: P.VirtualMachine) -> dict[str, str]:
    """The program; `vm` runs already. Returns texts by title."""
    description, reason = describe("a parrot")
    pet_name = name("a parrot", description)
    return {
        "name": pet_name.get(P.PerformanceCriteria.LATENCY),
        "description": description.get(),
        "reason": reason.get(),
    }


if __name__ == "__main__":
    from command import run

    run(main, __doc__)
