"""The paper's models on the paper's testbeds, from public traces and nominal figures.

Where the figures leave something open:

- The traces have backward only. Forward is half of it, as is usual; clipping and optimizer are 0. A model's `compute_s` is thus
  1.5 times its trace, whatever the GPU.
- Routines are those of `nominal_cluster`: bandwidth-optimal, at the nominal rate of the links, with the testbed's latency once.
- A codec takes on the GPU what it takes for 2^20 elements, however small the tensor (its kernels' launches rule there), and
  beyond that in proportion. Decoding is that of one payload.
- `cpu_gbit_per_s` is shared by the ranks of a host, which all compress at once. A call takes 20 us more. Encoding reads n
  elements; decoding handles as many as the payload holds: all n, or the n * density that are kept. Copies between GPU and host
  are not counted, and GPUs compute on undisturbed.
- A sparse payload has 8 bytes for each element that is kept: index and value. Payloads of one bit have no scales.
"""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from espresso_ds.core.option import Device
from espresso_ds.core.profile import ClusterProfile, CodecTimes, CompressorProfile, Link, ModelTrace
from espresso_ds.planner.cost import Costs, Shape
from espresso_ds.planner.menu import Catalogue, Choice, Menu
from espresso_ds.planner.routine_models import nominal_cluster
from espresso_ds.planner.tree import option_tree

SHARED = Path(__file__).resolve().parents[3] / "shared"
"""Holds `traces` and `testbeds`, beside the checkout."""

MODELS = ("vgg16", "resnet101", "bert", "gpt2")
TESTBEDS = ("v100-nvlink-100g", "v100-pcie-25g")
CODECS = ("randomk", "dgc", "efsignsgd", "onebit")

CPU_CALL_S = 20e-6
NUMELS = tuple(2**power for power in range(4, 31, 2))
MEASURED_NUMEL = 2**20


class Case(NamedTuple):
    """A model on a testbed with a codec."""

    model: str
    testbed: str
    codec: str

    def __str__(self) -> str:
        return f"{self.model} + {self.codec}, {self.testbed}"


ALL = tuple(Case(model, testbed, codec) for testbed in TESTBEDS for model in MODELS for codec in CODECS)


@cache
def load(kind: str, name: str) -> dict[str, Any]:
    """A file of the shared folder. Raises FileNotFoundError."""
    return json.loads((SHARED / kind / f"{name}.json").read_text())


def trace_of(model: str, testbed: str) -> ModelTrace:
    """The model's trace, taken as one of all GPUs of the testbed."""
    ready_s, tensors = 0.0, []
    for tensor in load("traces", model)["tensors"]:
        ready_s += tensor["gap_us"] * 1e-6
        tensors.append((tensor["name"], tensor["numel"], ready_s))
    return make_trace(model, tensors, load("testbeds", testbed))


def make_trace(model: str, tensors: list[tuple[str, int, float]], bed: dict[str, Any]) -> ModelTrace:
    """A trace of (name, numel, ready_s), in which backward ends with the last tensor and forward takes half as long."""
    backward_s = tensors[-1][2]
    return ModelTrace.read(
        {
            "model": model,
            "device": "cuda",
            "world_size": bed["nodes"] * bed["gpus_per_node"],
            "ranks_per_node": bed["gpus_per_node"],
            "threads": 1,
            "cores": 48,
            "steps": 100,
            "config": {},
            "wire_dtype": "float32",
            "forward_s": backward_s / 2,
            "backward_s": backward_s,
            "after_s": 0.0,
            "tensors": [
                {"name": name, "shape": (numel,), "dtype": "float32", "numel": numel, "ready_s": ready_s}
                for name, numel, ready_s in tensors
            ],
        },
        model,
    )


def cluster_of(testbed: str, inter_speed: float = 1.0) -> ClusterProfile:
    """The testbed's links as a profile, those between nodes at so many times the nominal rate."""
    bed = load("testbeds", testbed)
    intra, inter = bed["intra"], bed["inter"]
    return nominal_cluster(
        bed["nodes"],
        bed["gpus_per_node"],
        _link(intra["latency_us"], intra["gbit_per_s_per_gpu"]),
        _link(inter["latency_us"], inter["gbit_per_s_per_node"] * inter_speed),
    )


def compressors_of(testbed: str, codec: str, cpu_speed: float = 1.0) -> CompressorProfile:
    """The codec's times on the testbed's GPUs, and on its CPUs at so many times the nominal rate."""
    bed = load("testbeds", testbed)
    times = bed["compress_us_at_2e20"][codec]
    kept = times.get("density", 1.0)
    share = 2 * kept if "density" in times else times["bits"] / 32
    cpu_rate = cpu_speed * bed["cpu_gbit_per_s"] * 1e9 / 8 / bed["gpus_per_node"]
    scale = [max(1.0, n / MEASURED_NUMEL) * 1e-6 for n in NUMELS]
    payload = tuple(max(8, round(4 * n * share)) for n in NUMELS)

    def on(device: Device, encode: list[float], decode: list[float]) -> CodecTimes:
        return CodecTimes(
            device=device, numel=NUMELS, payload_nbytes=payload, encode_s=tuple(encode), decode_s=tuple(decode), contention=0.0
        )

    gpu = on(Device.GPU, [times["encode"] * s for s in scale], [times["decode"] * s for s in scale])
    encode, decode = ([CPU_CALL_S + 4 * n * part / cpu_rate for n in NUMELS] for part in (1.0, kept))
    compressor = {"name": codec, **{key: times[key] for key in ("density", "bits") if key in times}}
    profile = {"compressor": compressor, "summable": False, "relative_error": 1 - kept if kept < 1 else 0.36}
    return CompressorProfile.read({"codecs": [{**profile, "devices": [gpu, on(Device.CPU, encode, decode)]}]}, codec)


def menu_of(case: Case, inter_speed: float = 1.0, cpu_speed: float = 1.0) -> Menu:
    """All 4341 options with what they cost."""
    costs = Costs(cluster_of(case.testbed, inter_speed), compressors_of(case.testbed, case.codec, cpu_speed))
    return Menu(catalogue(costs.shape), costs)


@cache
def catalogue(shape: Shape) -> Catalogue:
    """The full tree with one codec."""
    return Catalogue([Choice(option) for option in option_tree((Device.GPU, Device.CPU))], shape)


def mixture_of_experts(tensors: int, testbed: str, layers: int = 24, seed: int = 0) -> ModelTrace:
    """A synthetic model of many tensors: per layer attention, norms, a router and experts of two weights and two biases each.

    Backward runs at 4 us for 2^16 elements and 30 us a tensor, give or take a third.
    """
    rng, width = random.Random(seed), 512
    experts = (tensors // layers - 9) // 4
    layer = (
        [width * width] * 4 + [width] * 4 + [width * experts] + [width * 4 * width, 4 * width, 4 * width * width, width] * experts
    )
    sizes = (layer * (tensors // len(layer) + 1))[:tensors]
    ready_s, rows = 0.0, []
    for number, numel in enumerate(sizes):
        ready_s += (30e-6 + 4e-6 * numel / 2**16) * rng.uniform(2 / 3, 4 / 3)
        rows.append((f"t{number}", numel, ready_s))
    return make_trace("mixture of experts", rows, load("testbeds", testbed))


def _link(latency_us: float, gbit_per_s: float) -> Link:
    return Link(alpha_s=latency_us * 1e-6, beta_s_per_byte=8e-9 / gbit_per_s, fit_error=0.0)
