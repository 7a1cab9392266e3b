"""From a device's data sheet and a model's dimensions to a latency profile: the physics of DESIGN.md's latency model.

    fixed     weights / (bandwidth × weights efficiency) + what the attention function takes before it reads any KV
              + the engine's own time for an iteration and for each row, in steps of the batch size
    per token 2 × parameters / (arithmetic × efficiency), above the ridge: below it, a chunk rides free on the weights
    per pair  4 × layers × width / (arithmetic × efficiency): scores and values of attention
    per KV    4 × layers × KV width bytes (keys and values of two bytes) / (bandwidth × KV efficiency)

Nothing here is fitted; `fitting` finds the efficiencies.
"""

from __future__ import annotations

import msgspec

from parrot.configuration import read_json
from parrot.engine.derived import SHAPES
from parrot.latency import FixedCost, Hinge, LatencyProfile

#: batch sizes up to which the fixed cost is that of the middle of the step
STEPS = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)


class Device(msgspec.Struct, frozen=True):
    """Peak rates: bytes per second, and fp16 operations per second of dense tensor cores. `source`: where they stand."""

    name: str
    bandwidth: float
    arithmetic: float
    source: str


A100 = Device("A100-80G", 2039e9, 312e12, "NVIDIA A100 80GB SXM data sheet: 2,039 GB/s, 312 TFLOPS (fp16/bf16, dense)")
A6000 = Device(
    "RTX A6000", 768e9, 154.8e12, "NVIDIA RTX A6000 data sheet and GA102 white paper: 768 GB/s, 154.8 TFLOPS (fp16, dense)"
)


class Model(msgspec.Struct, frozen=True):
    """A decoder without grouped queries. `parameters`: those that every token is multiplied with."""

    name: str
    parameters: float
    layers: int
    width: int

    @property
    def kv_bytes(self) -> float:
        """Keys and values of one token, two bytes each."""
        return 2.0 * 2.0 * self.layers * self.width


def model_of(name: str) -> Model:
    """A model whose dimensions are shipped with the engine."""
    shape = read_json(SHAPES / f"{name.replace('/', '--')}.json")
    width, layers = shape["hidden_size"], shape["num_hidden_layers"]
    block = 4 * width * width + 3 * width * shape["intermediate_size"]
    return Model(name, layers * block + shape["vocab_size"] * width, layers, width)


class Efficiency(msgspec.Struct, frozen=True):
    """What is fitted. The first three are parts of the device's peak, the others seconds of the engine's own processor.

    weights: of bandwidth, in reading the weights (all that every iteration pays is in it); kv: of bandwidth, in reading KV;
    arithmetic: of arithmetic, in linear layers and prefill attention. attention_s: of the attention function, for an
    iteration; iteration_s, row_s: the engine's own time for an iteration and for each of its rows. Of these, only
    attention_s is the device's, and goes with its bandwidth.
    """

    weights: float
    kv: float
    arithmetic: float
    attention_s: float = 0.0
    iteration_s: float = 0.0
    row_s: float = 0.0


def profile_of(
    name: str,
    model: Model,
    device: Device,
    attention: str,
    efficiency: Efficiency,
    *,
    shared_kv_once: bool = False,
    notes: str = "",
) -> LatencyProfile:
    """The profile that these efficiencies give. Its device is none that an engine's file can name by accident."""
    weights_s = 2.0 * model.parameters / (device.bandwidth * efficiency.weights)
    token_s = 2.0 * model.parameters / (device.arithmetic * efficiency.arithmetic)
    fixed_s = weights_s + efficiency.attention_s + efficiency.iteration_s
    steps = zip((0, *STEPS), STEPS, strict=False)
    return LatencyProfile(
        name=name,
        model=model.name,
        device=f"cuda ({device.name})",
        attn_func=attention,
        fixed=tuple(FixedCost(most, fixed_s + efficiency.row_s * (below + 1 + most) / 2) for below, most in steps),
        hinges=(Hinge(weights_s / token_s, token_s),),
        pair_s=4.0 * model.layers * model.width / (device.arithmetic * efficiency.arithmetic),
        kv_s=model.kv_bytes / (device.bandwidth * efficiency.kv),
        shared_kv_once=shared_kv_once,
        trace="measured.csv",
        notes=notes,
    )


def on(device: Device, efficiency: Efficiency, measured_on: Device) -> Efficiency:
    """The same efficiencies on another device: parts of its own peaks, the attention's fixed time by the ratio of bandwidths,
    and the engine's own processor as it was."""
    return msgspec.structs.replace(efficiency, attention_s=efficiency.attention_s * measured_on.bandwidth / device.bandwidth)


def own_time_of(profile: LatencyProfile) -> tuple[float, float]:
    """iteration_s and row_s that gave `profile`, whose attention function has no fixed time."""
    first, last = profile.fixed[0], profile.fixed[-1]
    row_s = (last.seconds - first.seconds) / ((STEPS[-2] + 1 + STEPS[-1]) / 2 - 1)
    (ridge,) = profile.hinges
    return first.seconds - row_s - ridge.knot * ridge.slope, row_s
