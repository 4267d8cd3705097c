"""Random small instances: a few tensors on two to eight nodes of two or four GPUs, from compute-bound to communication-bound."""

from __future__ import annotations

import random
from functools import cache
from typing import NamedTuple

from espresso_ds.core.option import Device, Option
from espresso_ds.core.profile import CompressorProfile, Link, ModelTrace
from espresso_ds.planner.cost import Costs, Shape
from espresso_ds.planner.menu import Catalogue, Choice, Menu
from espresso_ds.planner.routine_models import nominal_cluster
from espresso_ds.planner.tree import option_tree

NUMELS = tuple(2**power for power in range(8, 27, 2))
TREE = option_tree((Device.GPU, Device.CPU))
_SCHEMES = (
    "C.{0} AG.flat D.{0}",
    "RS.intra C.{0} AG.inter D.{0} AG.intra",
    "RS.intra C.{0} A2A.inter AG.inter D.{0} AG.intra",
    "RS.intra C.{0} A2A.inter D.{0} C.{0} AG.inter D.{0} AG.intra",
    "C.{0} A2A.intra D.{0} C.{0} AG.inter D.{0} C.{0} AG.intra D.{0}",
)
REDUCED = tuple(
    Option.parse(text)
    for text in ("AR.flat", "RS.intra AR.inter AG.intra", *(scheme.format(device) for scheme in _SCHEMES for device in Device))
)
"""Twelve options: both uncompressed ones of the systems compared with, and five schemes on either device."""


class Kind(NamedTuple):
    """What an instance is made of."""

    tensors: int
    options: tuple[Option, ...]


KINDS = {"3 tensors, full tree": Kind(3, TREE), "6 tensors, reduced tree": Kind(6, REDUCED)}


def random_case(kind: Kind, seed: int) -> tuple[ModelTrace, Menu]:
    """An instance. Backward takes 0.2 to 3 times as long as sending all uncompressed; forward takes half of it."""
    rng = random.Random(seed)
    nodes, gpus = rng.choice([2, 4, 8]), rng.choice([2, 4])
    cluster = nominal_cluster(nodes, gpus, _link(rng, 1e-5, 1e-4, 5e9, 1e11), _link(rng, 5e-5, 5e-4, 2e8, 1e10))
    costs = Costs(cluster, _codec(rng))
    menu = Menu(_catalogue(kind.options, costs.shape), costs)
    sizes = [int(2 ** rng.uniform(12, 24)) for _ in range(kind.tensors)]
    gaps = [rng.expovariate(1.0) for _ in range(kind.tensors)]
    plain = Option.parse("RS.intra AR.inter AG.intra")
    sent_s = sum(step.seconds for n in sizes for step in costs.walk(plain, n).steps)
    scale = sent_s * 0.2 * 15 ** rng.random() / sum(gaps)
    ready = [sum(gaps[: number + 1]) * scale for number in range(kind.tensors)]
    return _trace(sizes, ready, nodes, gpus), menu


@cache
def _catalogue(options: tuple[Option, ...], shape: Shape) -> Catalogue:
    return Catalogue([Choice(option) for option in options], shape)


def _link(rng: random.Random, least_s: float, most_s: float, slowest: float, fastest: float) -> Link:
    """Latency and bytes per second, both evenly on a logarithmic scale."""
    latency, rate = least_s * (most_s / least_s) ** rng.random(), slowest * (fastest / slowest) ** rng.random()
    return Link(alpha_s=latency, beta_s_per_byte=1 / rate, fit_error=0.0)


def _codec(rng: random.Random) -> CompressorProfile:
    """10 to 100 us a call and 3 to 100 GB/s on the GPU, a tenth to all of that on the CPU; payloads of 1/64 to 1/4."""
    share = 2 ** rng.uniform(-6, -2)
    fixed_s, encode, decode = 10 ** rng.uniform(-5, -4), 4 / 10 ** rng.uniform(9.5, 11), 4 / 10 ** rng.uniform(9.5, 11)
    slower = 10 ** rng.random()

    def device(name: str, factor: float, contention: float) -> dict:
        return {
            "device": name,
            "numel": NUMELS,
            "payload_nbytes": [max(8, int(4 * n * share)) for n in NUMELS],
            "encode_s": [fixed_s + encode * factor * n for n in NUMELS],
            "decode_s": [fixed_s + decode * factor * n for n in NUMELS],
            "contention": contention,
        }

    devices = [device("gpu", 1.0, 0.0), device("cpu", slower, rng.choice([0.0, 0.0, 0.5]))]
    codec = {"compressor": {"name": "topk"}, "summable": False, "relative_error": 0.5, "devices": devices}
    return CompressorProfile.read({"codecs": [codec]}, "random instance")


def _trace(sizes: list[int], ready: list[float], nodes: int, gpus: int) -> ModelTrace:
    tensors = [
        {"name": f"t{number}", "shape": (n,), "dtype": "float32", "numel": n, "ready_s": ready_s}
        for number, (n, ready_s) in enumerate(zip(sizes, ready, strict=True))
    ]
    return ModelTrace.read(
        {
            "model": "random",
            "device": "cuda",
            "world_size": nodes * gpus,
            "ranks_per_node": gpus,
            "threads": 1,
            "cores": 1,
            "steps": 1,
            "config": {},
            "wire_dtype": "float32",
            "forward_s": ready[-1] / 2,
            "backward_s": ready[-1],
            "after_s": 0.0,
            "tensors": tensors,
        },
        "random instance",
    )
