"""The decoder of the Llama family over packed rows: tokens of many sequences in one tensor, wherever they stand.

It knows no batch and no cache: positions come with the tokens, and `attend` writes and reads the KV cache. Query, key
and value are one product, gate and up another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

from parrot.engine.builtin.linear import Linear
from parrot.engine.builtin.models.config import ModelConfig, RopeConfig

#: (layer, heads [tokens, heads + 2 × kv_heads, head_dim], rotated) -> [tokens, heads × head_dim]
Attend = Callable[[int, Tensor], Tensor]


@dataclass
class Layer:
    """One transformer block."""

    attention_norm: Tensor
    qkv: Linear
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (self.qkv, self.output, self.gate_up, self.down)


class Decoder:
    """Weights and the forward pass. Activations are [tokens, hidden_size]."""

    def __init__(self, config: ModelConfig, embedding: Tensor, layers: list[Layer], norm: Tensor, head: Linear) -> None:
        self.config = config
        self.embedding = embedding
        self.layers = layers
        self.norm = norm
        self.head = head
        self.rope = Rope(config.rope, config.head_dim, config.max_seq_len, embedding.device)

    @property
    def linears(self) -> list[Linear]:
        return [self.head, *(linear for layer in self.layers for linear in layer.linears)]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights; tied embeddings count once."""
        tied = self.head.weight.data_ptr() == self.embedding.data_ptr()
        return sum(linear.nbytes for linear in self.linears) + (0 if tied else self.embedding.nbytes)

    @torch.inference_mode()
    def forward(self, ids: Tensor, positions: Tensor, attend: Attend, sampled: Tensor) -> Tensor:
        """Logits [sampled, vocab_size], float32, of the tokens whose indices `sampled` holds.

        `ids`, `positions`: [tokens]. The KV of every token is computed, sampled or not.
        """
        config = self.config
        rotated_heads = config.num_heads + config.num_kv_heads
        cos, sin = self.rope.at(positions, self.embedding.dtype)
        x = functional.embedding(ids, self.embedding)
        for index, layer in enumerate(self.layers):
            heads = layer.qkv(self._normed(x, layer.attention_norm)).view(-1, config.qkv_heads, config.head_dim)
            rotate_(heads[:, :rotated_heads], cos, sin)
            x = x + layer.output(attend(index, heads))
            gate, up = layer.gate_up(self._normed(x, layer.mlp_norm)).chunk(2, dim=-1)
            x = x + layer.down(functional.silu(gate) * up)
        return self.head(self._normed(x.index_select(0, sampled), self.norm)).float()

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), weight, self.config.norm_eps)


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
