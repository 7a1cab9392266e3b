"""The model families that the decoder runs, as data: what their configurations leave unsaid, and the names of their tensors.

A new family that is built from the same parts is an entry here. Imports no torch and reads no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class TensorNames:
    """Names in a checkpoint; those from `attention_norm` to `down` follow `layers`.N. `gate` None: the MLP is plain."""

    embedding: str = "model.embed_tokens"
    positions: str | None = None
    layers: str = "model.layers"
    attention_norm: str = "input_layernorm"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    output: str = "self_attn.o_proj"
    mlp_norm: str = "post_attention_layernorm"
    gate: str | None = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    norm: str = "model.norm"
    head: str = "lm_head"


@dataclass(frozen=True)
class Family:
    """`defaults`: configuration keys that may be missing. `renamed`: our key -> the family's own. `position_offset`: rows of
    the table of learned positions before position 0; None: positions are rotary. `only`: values that the decoder needs."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    norm: Literal["rms", "layer"] = "rms"
    activations: tuple[str, ...] = ("silu",)
    head_norms: bool = False
    output_bias: bool = False  #: the output projection has a bias where the other three have one
    position_offset: int | None = None
    names: TensorNames = TensorNames()


OPT_NAMES = TensorNames(
    embedding="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    layers="model.decoder.layers",
    attention_norm="self_attn_layer_norm",
    output="self_attn.out_proj",
    mlp_norm="final_layer_norm",
    gate=None,
    up="fc1",
    down="fc2",
    norm="model.decoder.final_layer_norm",
)

#: model_type -> family
FAMILIES: dict[str, Family] = {
    "llama": Family(output_bias=True),
    "mistral": Family(defaults={"sliding_window": 4096}),
    "qwen2": Family(defaults={"attention_bias": True, "use_sliding_window": False}),
    "qwen3": Family(defaults={"use_sliding_window": False, "head_dim": 128}, output_bias=True, head_norms=True),
    "opt": Family(
        defaults={
            "enable_bias": True,
            "do_layer_norm_before": True,
            "layer_norm_elementwise_affine": True,
            "_remove_final_layer_norm": False,
            "activation_function": "relu",
            "init_std": 0.02,
            "tie_word_embeddings": True,
        },
        renamed={
            "intermediate_size": "ffn_dim",
            "hidden_act": "activation_function",
            "attention_bias": "enable_bias",
            "mlp_bias": "enable_bias",
            "initializer_range": "init_std",
        },
        only={
            "do_layer_norm_before": (True,),
            "layer_norm_elementwise_affine": (True,),
            "_remove_final_layer_norm": (False,),
        },
        norm="layer",
        activations=("relu", "gelu"),
        output_bias=True,
        position_offset=2,
        names=OPT_NAMES,
    ),
}
