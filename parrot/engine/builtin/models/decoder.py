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

from parrot.engine.builtin.linear import Linear
from parrot.engine.builtin.models.config import ModelConfig, RopeConfig

#: (layer, heads [tokens, heads + 2 × kv_heads, head_dim], rotated) -> [tokens, heads × head_dim]
Attend = Callable[[int, Tensor], Tensor]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "relu": functional.relu,
    "gelu": functional.gelu,
}


@dataclass(frozen=True)
class Norm:
    """Of the last dimension: by its root mean square, or by mean and variance with a bias."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    kind: Literal["rms", "layer"]

    def __call__(self, x: Tensor) -> Tensor:
        if self.kind == "rms":
            return functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        return functional.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)


@dataclass
class Layer:
    """One transformer block. `up`: gate and up joined where the MLP is gated."""

    attention_norm: Norm
    qkv: Linear
    query_norm: Norm | None
    key_norm: Norm | None
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
        self._activation = ACTIVATIONS[config.activation]
        self._gated = config.kind.names.gate is not None
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
        turns = None if self.rope is None else self.rope.at(positions, self.embedding.dtype)
        for index, layer in enumerate(self.layers):
            heads = layer.qkv(layer.attention_norm(x)).view(-1, config.qkv_heads, config.head_dim)
            x = x + layer.output(attend(index, self._placed(layer, heads, turns)))
            inner = layer.up(layer.mlp_norm(x))
            if self._gated:
                gate, up = inner.chunk(2, dim=-1)
                x = x + layer.down(self._activation(gate) * up)
            else:
                x = x + layer.down(self._activation(inner))
        return self.head(self.norm(x.index_select(0, sampled))).float()

    def _placed(self, layer: Layer, heads: Tensor, turns: tuple[Tensor, Tensor] | None) -> Tensor:
        """Query and key heads normed and rotated, where the family does so; [tokens, qkv_heads, head_dim]."""
        queries, keys = self.config.num_heads, self.config.num_kv_heads
        if layer.query_norm is not None and layer.key_norm is not None:
            heads[:, :queries] = layer.query_norm(heads[:, :queries])
            heads[:, queries : queries + keys] = layer.key_norm(heads[:, queries : queries + keys])
        if turns is not None:
            rotate_(heads[:, : queries + keys], *turns)
        return heads


class Rope:
    """Rotary positions: cosines and sines of every position, made ready for `rotate_`."""

    def __init__(self, config: RopeConfig, head_dim: int, max_seq_len: int, device: torch.device) -> None:
        angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float32), _frequencies(config, head_dim))
        self._cos = torch.cat((angles.cos(), angles.cos()), dim=-1).to(device)
        self._sin = torch.cat((-angles.sin(), angles.sin()), dim=-1).to(device)

    def at(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[tokens, 1, head_dim] each."""
        cos, sin = (table.index_select(0, positions).unsqueeze(1) for table in (self._cos, self._sin))
        return cos.to(dtype), sin.to(dtype)


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotates heads [tokens, heads, head_dim] in place; the first half of a head is paired with the second."""
    tokens, count, dim = heads.shape
    swapped = heads.view(tokens, count, 2, dim // 2).flip(-2).view(tokens, count, dim)
    heads.mul_(cos).addcmul_(swapped, sin)


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
