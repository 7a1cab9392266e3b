"""A weight matrix times packed rows, by the fastest way for their number. Measured in benchmarks/cpu_engine.py.

On a CPU a single row is bound by reading the weights, and torch's own product does that well; from two rows on,
oneDNN's blocked copy of the matrix is up to twice as fast. The copy costs the memory of the weights once more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

#: Rows for which the blocked copy is used. (Two: 67 µs for 1,536 × 576 on an AMD EPYC, 132 with torch's own product.)
PACKED_ROWS = range(2, 129)
#: The batch size that oneDNN chooses its blocks for.
_PACKED_FOR = 16


class Linear:
    """`x @ weight.T + bias` for x [rows, in]; weight [out, in]."""

    __slots__ = ("bias", "packed", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self.packed: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed is not None and x.shape[0] in PACKED_ROWS:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
            return product
        return functional.linear(x, self.weight, self.bias)

    def pack(self) -> None:
        """Makes the blocked copy."""
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, _PACKED_FOR)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, copies included."""
        held = [self.weight, self.bias, None if self.packed is None else self.weight]
        return sum(t.nbytes for t in held if t is not None)


def can_pack() -> bool:
    """Whether this torch has the blocked product and it computes what it should (its interface is torch's own affair)."""
    linear = Linear(torch.arange(12.0).view(3, 4), torch.ones(3))
    x = torch.ones(PACKED_ROWS.start, 4)
    try:
        linear.pack()
        return torch.allclose(linear(x), functional.linear(x, linear.weight, linear.bias))
    except (RuntimeError, AttributeError, TypeError, NotImplementedError):
        return False
