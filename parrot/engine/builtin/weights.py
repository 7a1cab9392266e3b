"""Gets a decoder's weights: from a Hugging Face directory, from a GGUF file, or made up from a seed.

GGUF files are dequantised once by transformers and kept as safetensors (parrot.model_files.converted), so that the next
start takes a second. Names and shapes are checked before anything is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch
from torch import Tensor

from parrot.configuration import ConfigurationError
from parrot.engine.builtin.elementwise import HeadNorms
from parrot.engine.builtin.linear import Linear, can_pack
from parrot.engine.builtin.models.config import ModelConfig
from parrot.engine.builtin.models.decoder import Decoder, Layer, Norm
from parrot.model_files import ModelFiles, converted, import_transformers

#: Larger models keep one copy of their weights; smaller ones get blocked ones beside (linear.py).
PACK_LIMIT_BYTES = 2 << 30


class Source(Protocol):
    """Where tensors come from."""

    def fill(self, out: Tensor, name: str) -> None:
        """Writes the tensor `name` into `out`, whatever the types. Raises ConfigurationError when it is missing or differs."""


def load_decoder(config: ModelConfig, source: Source, dtype: torch.dtype, device: torch.device) -> Decoder:
    """The decoder with its weights in memory, query, key and value joined, gate and up joined."""

    def joined(columns: int, parts: Sequence[tuple[str, int]], bias: bool) -> Linear:
        rows = sum(n for _, n in parts)
        weight = torch.empty((rows, columns), dtype=dtype, device=device)
        offsets = torch.empty((rows,), dtype=dtype, device=device) if bias else None
        first = 0
        for name, n in parts:
            source.fill(weight[first : first + n], f"{name}.weight")
            if offsets is not None:
                source.fill(offsets[first : first + n], f"{name}.bias")
            first += n
        return Linear(weight, offsets)

    def vector(name: str, size: int) -> Tensor:
        out = torch.empty((size,), dtype=dtype, device=device)
        source.fill(out, name)
        return out

    def norm(name: str) -> Norm:
        size = config.hidden_size
        bias = vector(f"{name}.bias", size) if config.kind.norm == "layer" else None
        return Norm(vector(f"{name}.weight", size), bias, config.norm_eps, config.kind.norm)

    names = config.kind.names

    def head_norms(at: str) -> HeadNorms:
        query, key = (vector(f"{at}.{name}.weight", config.head_dim) for name in (names.query_norm, names.key_norm))
        return HeadNorms(query, key, config.norm_eps)

    def layer(index: int) -> Layer:
        at = f"{names.layers}.{index}"
        hidden, wide = config.hidden_size, config.intermediate_size
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        heads = [(f"{at}.{part}", n) for part, n in ((names.query, queries), (names.key, keys), (names.value, keys))]
        inner = [(f"{at}.{part}", wide) for part in (names.gate, names.up) if part is not None]
        return Layer(
            attention_norm=norm(f"{at}.{names.attention_norm}"),
            qkv=joined(hidden, heads, config.qkv_bias),
            head_norms=head_norms(at) if config.kind.head_norms else None,
            output=joined(queries, [(f"{at}.{names.output}", hidden)], config.output_bias),
            mlp_norm=norm(f"{at}.{names.mlp_norm}"),
            up=joined(hidden, inner, config.mlp_bias),
            down=joined(wide, [(f"{at}.{names.down}", hidden)], config.mlp_bias),
        )

    embedding = joined(config.hidden_size, [(names.embedding, config.vocab_size)], False)
    positions = None
    if names.positions is not None:
        rows = config.max_seq_len + (config.kind.position_offset or 0)
        positions = joined(config.hidden_size, [(names.positions, rows)], False).weight
    head = embedding if config.tied_embeddings else joined(config.hidden_size, [(names.head, config.vocab_size)], False)
    layers = [layer(i) for i in range(config.num_layers)]
    decoder = Decoder(config, embedding.weight, positions, layers, norm(names.norm), head)
    _pack(decoder, dtype, device)
    return decoder


def _pack(decoder: Decoder, dtype: torch.dtype, device: torch.device) -> None:
    small = sum(linear.nbytes for linear in decoder.linears) <= PACK_LIMIT_BYTES
    if small and dtype == torch.float32 and device.type == "cpu" and can_pack():
        for linear in decoder.linears:
            linear.pack()


# -------------------------------------------------------------------------------------------------------- checkpoints


class Checkpoint:
    """The tensors of a Hugging Face directory: safetensors, else pytorch_model*.bin."""

    def __init__(self, name: str, directory: Path) -> None:
        self._name = name
        self._readers: dict[str, Callable[[], Tensor]] = {}
        files = sorted(directory.glob("*.safetensors"))
        for file in files:
            self._open_safetensors(file)
        for file in [] if files else sorted(directory.glob("pytorch_model*.bin")):
            self._readers |= {key: _constantly(value) for key, value in _read_bin(name, file).items()}
        if not self._readers:
            raise ConfigurationError(f"model {name!r}: {directory} holds neither *.safetensors nor pytorch_model*.bin")

    def _open_safetensors(self, file: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            opened: Any = safe_open(str(file), framework="pt")
            keys = list(opened.keys())
        except (SafetensorError, OSError) as error:
            raise ConfigurationError(f"model {self._name!r}: {file} cannot be read: {error}") from error
        for key in keys:
            self._readers[key] = _reader(opened, key)

    def fill(self, out: Tensor, name: str) -> None:
        # Older OPT checkpoints leave out the first part of a name.
        reader = self._readers.get(name) or self._readers.get(name.removeprefix("model."))
        if reader is None:
            raise ConfigurationError(f"model {self._name!r}: its weights have no tensor {name!r}")
        tensor = reader()
        if tensor.shape != out.shape:
            raise ConfigurationError(
                f"model {self._name!r}: tensor {name!r} is {list(tensor.shape)} in the weights, "
                f"but the configuration says {list(out.shape)}"
            )
        out.copy_(tensor)


def _reader(opened: Any, key: str) -> Callable[[], Tensor]:
    return lambda: opened.get_tensor(key)


def _constantly(value: Tensor) -> Callable[[], Tensor]:
    return lambda: value


def _read_bin(name: str, file: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises all kinds for a file that is no checkpoint
        raise ConfigurationError(f"model {name!r}: {file} cannot be read: {str(error).splitlines()[0]}") from error
    return tensors


def as_directory(name: str, files: ModelFiles) -> ModelFiles:
    """`files` itself, or the directory that its GGUF file was converted to, now or earlier."""
    if files.gguf is None:
        return files

    def build(folder: Path) -> None:
        transformers = import_transformers()
        from safetensors.torch import save_file

        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                str(files.directory), gguf_file=files.gguf, dtype=torch.float32
            )
        except Exception as error:  # transformers and gguf raise all kinds for a file that they cannot read
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise ConfigurationError(f"model {name!r}: {files} cannot be loaded: {reason}") from error
        tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        tensors = {name: value.contiguous() for name, value in model.state_dict().items() if name not in tied}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        # The file says what the weights now are: no longer quantised.
        published = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
        (folder / "config.json").write_bytes(msgspec.json.encode(published, enc_hook=str))

    return ModelFiles(converted("models", files, build))


# -------------------------------------------------------------------------------------------------------------- dummy


class DummyWeights:
    """Random weights of the usual spread, the same for the same seed and model; norms are one, biases zero.

    A pool of draws is repeated at changing places: drawing billions would take minutes and prove nothing more.
    """

    _POOL = 4_000_037  # a prime: repetitions never line up with the rows of a matrix

    def __init__(self, config: ModelConfig, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._pool = torch.randn(self._POOL, generator=generator) * config.initializer_range
        self._at = 0

    def fill(self, out: Tensor, name: str) -> None:
        if out.dim() == 1:
            out.fill_(0.0 if name.endswith(".bias") else 1.0)
            return
        flat = out.view(-1)
        first = 0
        while first < flat.numel():
            n = min(flat.numel() - first, self._POOL - self._at)
            flat[first : first + n].copy_(self._pool[self._at : self._at + n])
            first += n
            self._at = (self._at + n) % self._POOL
