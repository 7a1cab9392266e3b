"""The decoder of every family over packed rows: tokens of many sequences in one tensor, wherever they stand.

It knows no batch and no cache: positions come with the tokens, and `attend` writes and reads the KV cache. Query, key
and value are one product, gate and up another. What differs between families is data (families.py): which norm, rotary
or learned positions, norms of single heads, a gated or a plain MLP.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as functional
from torch import Tensor

from parrot.engine.builtin.elementwise import HeadNorms, Turns, add_rms_norm, gated_silu, place_heads_
from parrot.engine.builtin.linear import Linear
from parrot.engine.builtin.models.config import ModelConfig, RopeConfig

#: (layer, heads [tokens, heads + 2 × kv_heads, head_dim], rotated) -> [tokens, heads × head_dim]
Attend = Callable[[int, Tensor], Tensor]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": functional.relu, "gelu": functional.gelu}
#: Of MLPs with a gate, which take [tokens, 2 × width].
GATED: dict[str, Callable[[Tensor], Tensor]] = {"silu": gated_silu}


@dataclass(frozen=True)
class Norm:
    """Of the last dimension: by its root mean square, or by mean and variance with a bias."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    kind: Literal["rms", "layer"]

    def __call__(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x + delta, which may take the place of x, and its norm."""
        if self.kind == "rms":
            return add_rms_norm(x, delta, self.weight, self.eps)
        if delta is not None:
            x = x + delta
        return x, functional.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)


@dataclass
class Layer:
    """One transformer block. `up`: gate and up joined where the MLP is gated."""

    attention_norm: Norm
    qkv: Linear
    head_norms: HeadNorms | None
    output: Linear
    mlp_norm: Norm
    up: Linear
    down: Linear

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (self.qkv, self.output, self.up, self.down)


class Decoder:
    """Weights and the forward pass. Activations are [tokens, hidden_size]."""

    def __init__(
        self,
        config: ModelConfig,
        embedding: Tensor,
        positions: Tensor | None,
        layers: list[Layer],
        norm: Norm,
        head: Linear,
    ) -> None:
        self.config = config
        self.embedding = embedding
        self.positions = positions
        self.layers = layers
        self.norm = norm
        self.head = head
        gated = config.kind.names.gate is not None
        self._activation = (GATED if gated else ACTIVATIONS)[config.activation]
        self._offset = config.kind.position_offset or 0
        self.rope: Rope | None = None
        if positions is None:
            self.rope = Rope(config.rope, config.head_dim, config.max_seq_len, embedding.device)

    @property
    def linears(self) -> list[Linear]:
        return [self.head, *(linear for layer in self.layers for linear in layer.linears)]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights; tied embeddings count once."""
        tied = self.head.weight.data_ptr() == self.embedding.data_ptr()
        learned = 0 if self.positions is None else self.positions.nbytes
        return sum(linear.nbytes for linear in self.linears) + learned + (0 if tied else self.embedding.nbytes)

    @torch.inference_mode()
    def forward(self, ids: Tensor, positions: Tensor, attend: Attend, sampled: Tensor) -> Tensor:
        """Logits [sampled, vocab_size], float32, of the tokens whose indices `sampled` holds.

        `ids`, `positions`: [tokens]. The KV of every token is computed, sampled or not.
        """
        config = self.config
        x = functional.embedding(ids, self.embedding)
        if self.positions is not None:
            x = x + functional.embedding(positions + self._offset, self.positions)
        turns = None if self.rope is None else self.rope.at(positions)
        delta: Tensor | None = None  # what the block before adds to x
        for index, layer in enumerate(self.layers):
            x, normed = layer.attention_norm(x, delta)
            heads = layer.qkv(normed).view(-1, config.qkv_heads, config.head_dim)
            place_heads_(heads, config.num_heads, config.num_kv_heads, layer.head_norms, turns)
            x, normed = layer.mlp_norm(x, layer.output(attend(index, heads)))
            delta = layer.down(self._activation(layer.up(normed)))
        assert delta is not None
        _, normed = self.norm(x.index_select(0, sampled), delta.index_select(0, sampled))
        return self.head(normed).float()


class Rope:
    """Rotary positions: cosines and sines of every position, [max_seq_len, head_dim / 2]."""

    def __init__(self, config: RopeConfig, head_dim: int, max_seq_len: int, device: torch.device) -> None:
        angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float32), _frequencies(config, head_dim))
        self._cos, self._sin = angles.cos().to(device), angles.sin().to(device)

    def at(self, positions: Tensor) -> Turns:
        return Turns(positions, self._cos, self._sin)


def _frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """Radians a position, [head_dim / 2]. The scaling `llama3` is that of the Llama 3.1 release: long waves are
    stretched by `factor`, short ones stay, those between are blended."""
    frequencies = 1.0 / config.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if config.kind == "linear":
        return frequencies / config.factor
    if config.kind == "llama3":
        turns = config.original_max_seq_len * frequencies / (2 * math.pi)
        blend = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
        blend = blend.clamp(0.0, 1.0)
        return (1 - blend) * frequencies / config.factor + blend * frequencies
    return frequencies
