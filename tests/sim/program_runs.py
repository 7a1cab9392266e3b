"""For the tests of programs' own code: runs a program that is given as text, and hears what it tells."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from itertools import count as counting
from pathlib import Path
from typing import Any

import msgspec
import pytest

from parrot.serve.config import ServeCoreConfig
from sim.engine_models import EngineModel
from sim.network import Constant
from sim.programs.outputs import Outputs, open_outputs
from sim.programs.simulated import simulate_instances
from sim.programs.source import Source, read_inputs
from sim.recorder import Recorder
from tests.sim.clusters import engine

told: list[Any] = []  #: programs append to it: `from tests.sim.program_runs import told`

HEAD = """
import asyncio
import time

from parrot import P
from tests.sim.program_runs import told


@P.semantic_function()
def ask(question: P.Input, answer: P.Output(P.SamplingConfig(max_gen_length=20))):
    '''Question {{question}} answer {{answer}}'''

"""


def engines(number: int = 1, **fields: Any) -> list[EngineModel]:
    """Engines that say one word a token."""
    made = [engine(f"e{i}", kv_tokens=16384, batch=32, **{"tokens_capacity": 16384, **fields}) for i in range(number)]
    return [m._replace(description=msgspec.structs.replace(m.description, tokenizer="synthetic")) for m in made]


class Runner:
    """Writes programs and runs them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = counting()

    def write(self, text: str, name: str | None = None, head: str = HEAD) -> Path:
        path = self._folder / (name or f"program{next(self._numbers)}.py")
        path.write_text(head + textwrap.dedent(text))
        return path

    def __call__(
        self,
        text: str,
        count: int = 1,
        *,
        outputs: Outputs | str | None = None,
        inputs: Sequence[str] | None = None,
        rtt_s: float = 0.0,
        config: ServeCoreConfig | None = None,
        function: str = "main",
        head: str = HEAD,
        seed: int = 0,
        **options: Any,
    ) -> Recorder:
        lines = None
        if inputs is not None:
            lines = self._folder / "inputs.jsonl"
            lines.write_text("\n".join(inputs))
        return simulate_instances(
            Source(f"{self.write(text, head=head)}:{function}"),
            read_inputs(str(lines) if lines else None),
            count,
            config or ServeCoreConfig(),
            options.pop("engines", None) or engines(),
            outputs=open_outputs(outputs, seed) if outputs is None or isinstance(outputs, str) else outputs,
            network=Constant(rtt_s),
            seed=seed,
            **options,
        )


@pytest.fixture
def run(tmp_path: Path) -> Runner:
    told.clear()
    return Runner(tmp_path)


def says(answer: Callable[..., str]) -> Outputs:
    """Outputs by name and prompt."""
    return lambda wanted: answer(wanted.name, wanted.prompt)
