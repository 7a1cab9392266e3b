"""`clairvoyant`: `lookahead` with the true lengths of outputs (`SamplingConfig.output_length`): what knowing them would bring.

Only a simulation knows them, and engines that are told how long an output shall be: a server with other engines refuses this
policy. An output of which nothing is said is expected as under `lookahead`. (Greedy, so no strict bound: other policies may
beat it on some workload.)
"""

from __future__ import annotations

from typing import ClassVar

from mypy_extensions import mypyc_attr

from parrot.serve.graph import Task
from parrot.serve.policies.lookahead import Lookahead


@mypyc_attr(allow_interpreted_subclasses=True)
class Clairvoyant(Lookahead):
    """By rank and earliest finish time, both from what will be."""

    name: ClassVar[str] = "clairvoyant"
    clairvoyant: ClassVar[bool] = True

    def outputs(self, task: Task) -> float:
        length = task.sampling.output_length
        return super().outputs(task) if length is None else length
