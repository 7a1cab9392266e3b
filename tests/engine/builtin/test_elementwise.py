"""The steps between products: what torch computes is what their formulas say; what the kernels compute is what torch does.

On a machine without a GPU the kernels run in Triton's interpreter when TRITON_INTERPRET is 1 (numpy below 2.3 is needed).
"""

from __future__ import annotations

import os
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from parrot.engine.builtin.elementwise import (  # noqa: E402
    HeadNorms,
    Turns,
    add_rms_norm,
    gated_silu,
    place_heads_,
    scatter_rows,
)

EPS = 1e-5
#: relative error of one rounding at the end
EXACT = {"float32": 1e-6, "bfloat16": 3e-3, "float16": 5e-4}


def normed(x: Any, weight: Any) -> Any:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def close(found: Any, expected: Any, kind: str) -> bool:
    return float((found.double().cpu() - expected).norm() / expected.norm()) < EXACT[kind]


class Steps:
    """The steps by torch, or by the kernels."""

    def __init__(self, kernels: Any) -> None:
        self.kernels = kernels

    def add_norm(self, x: Any, delta: Any, weight: Any) -> tuple[Any, Any]:
        if self.kernels is None:
            return add_rms_norm(x, delta, weight, EPS)
        out = torch.full_like(x, float("nan"))
        self.kernels.add_norm(x, delta, weight, EPS, out)
        return x, out

    def place(self, heads: Any, queries: int, keys: int, norms: Any, turns: Any) -> None:
        if self.kernels is None:
            place_heads_(heads, queries, keys, norms, turns)
        else:
            self.kernels.place(heads, queries, queries + keys, norms, turns and (turns.positions, turns.cos, turns.sin))

    def gate(self, inner: Any) -> Any:
        if self.kernels is None:
            return gated_silu(inner)
        out = torch.full((inner.shape[0], inner.shape[1] // 2), float("nan"), dtype=inner.dtype, device=inner.device)
        self.kernels.gate(inner, out)
        return out

    def scatter(self, out: Any, slots: Any, rows: Any) -> None:
        if self.kernels is None:
            scatter_rows(out, slots, rows)
        else:
            self.kernels.scatter(rows, slots, out)


@pytest.fixture(params=["torch", "kernels"])
def steps(request: pytest.FixtureRequest) -> Steps:
    if request.param == "torch":
        return Steps(None)
    pytest.importorskip("triton")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
    from parrot.engine.builtin import elementwise_kernels

    return Steps(elementwise_kernels)


@pytest.fixture(params=["float32", "bfloat16", "float16"])
def kind(request: pytest.FixtureRequest, steps: Steps) -> str:
    if steps.kernels is not None and not torch.cuda.is_available() and request.param == "bfloat16":
        pytest.skip("the interpreter has no bfloat16")
    return str(request.param)


def draw(*shape: int, kind: str, seed: int) -> Any:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(getattr(torch, kind))
    return values.cuda() if torch.cuda.is_available() else values


@pytest.mark.parametrize("width", [8, 96, 576])
def test_residual_sum_and_its_norm(steps: Steps, kind: str, width: int) -> None:
    x, delta, weight = (draw(*shape, width, kind=kind, seed=i) for i, shape in enumerate([(5,), (5,), ()]))
    total, scale = (x.double() + delta.double()).cpu(), weight.double().cpu()
    lone = steps.add_norm(x.clone(), None, weight)
    assert torch.equal(lone[0], x)
    assert close(lone[1], normed(x.double().cpu(), scale), kind)
    found = steps.add_norm(x, delta, weight)
    assert close(found[0], total, kind)
    assert close(found[1], normed(total, scale), kind)


@pytest.mark.parametrize(("queries", "keys", "dim"), [(4, 2, 16), (20, 5, 80), (3, 3, 6)])
@pytest.mark.parametrize("what", ["norms", "turns", "both", "neither"])
def test_heads_are_normed_and_rotated_in_place(steps: Steps, kind: str, queries: int, keys: int, dim: int, what: str) -> None:
    heads = draw(7, queries + 2 * keys, dim, kind=kind, seed=3)
    norms = HeadNorms(draw(dim, kind=kind, seed=4), draw(dim, kind=kind, seed=5), EPS) if what in ("norms", "both") else None
    turns = None
    expected = heads.double().cpu()
    if norms is not None:
        expected[:, :queries] = normed(expected[:, :queries], norms.query.double().cpu())
        expected[:, queries : queries + keys] = normed(expected[:, queries : queries + keys], norms.key.double().cpu())
    if what in ("turns", "both"):
        angles = torch.outer(torch.arange(40.0), 10.0 ** -torch.arange(dim // 2))
        positions = torch.tensor([0, 1, 39, 7, 7, 20, 3])
        turns = Turns(*(t.to(heads.device) for t in (positions, angles.cos(), angles.sin())))
        pairs = torch.complex(expected[..., : dim // 2], expected[..., dim // 2 :])
        turned = pairs * torch.polar(torch.ones_like(angles.double()), angles.double())[positions].unsqueeze(1)
        whole = torch.cat((turned.real, turned.imag), -1)
        expected[:, : queries + keys] = whole[:, : queries + keys]
    values = heads[:, queries + keys :].clone()
    steps.place(heads, queries, keys, norms, turns)
    assert torch.equal(heads[:, queries + keys :], values)
    assert close(heads, expected, kind)


@pytest.mark.parametrize("width", [6, 1500])
def test_gated_activation(steps: Steps, kind: str, width: int) -> None:
    inner = draw(5, 2 * width, kind=kind, seed=6)
    gate, up = inner.double().cpu().chunk(2, -1)
    found = steps.gate(inner)
    expected = gate / (1 + (-gate).exp()) * up
    assert float((found.double().cpu() - expected).norm() / expected.norm()) < 2 * EXACT[kind]  # torch rounds in between


def test_rows_go_to_their_slots_and_nowhere_else(steps: Steps, kind: str) -> None:
    heads = draw(5, 9, 130, kind=kind, seed=7)  # the rows are a part of wider ones
    out = draw(12, 6, 130, kind=kind, seed=8)
    slots = torch.tensor([3, 11, 0, 7, 4])
    expected = out.clone()
    expected[slots.to(out.device)] = heads[:, 3:]
    steps.scatter(out, slots.to(out.device), heads[:, 3:])
    assert torch.equal(out, expected)
