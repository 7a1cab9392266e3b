"""`atlas`: least attained service along the critical path (Autellix, arXiv 2502.13965): `plas` where calls run in parallel.

A task is ranked by the service along the longest path of finished tasks that led to it, not by the sum over its program: the
branches of a program do not count against each other, and a branch that is behind is not punished for those that are ahead.
Where no task of the program led to it (a call whose inputs came from the client), by the longest such path of its program so
far, which the source takes for every call. Levels, starvation and engines are as in `plas`.
"""

from __future__ import annotations

from typing import ClassVar

from mypy_extensions import mypyc_attr

from parrot.serve.graph import Task
from parrot.serve.policies.plas import LeastAttained


@mypyc_attr(allow_interpreted_subclasses=True)
class Atlas(LeastAttained):
    """By the service along the longest path that led to the task."""

    name: ClassVar[str] = "atlas"

    def attained(self, task: Task) -> float:
        return task.path_s
