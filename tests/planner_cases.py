"""Profiles for the planner's tests: by hand, at random, or from public traces and testbeds where those are present."""

import json
import random
from pathlib import Path

from espresso_ds.core.profile import ClusterProfile, CompressorProfile, ModelTrace

SHARED = Path(__file__).resolve().parents[2] / "shared"

# What a routine moves through the busiest link, over the bytes that one rank puts in; a node has one NIC for its G ranks.
TRAFFIC = {
    "AR": lambda world, node: 2 * (world - 1) / world,
    "RS": lambda world, node: (world - 1) / world,
    "AG": lambda world, node: world - 1,
    "A2A": lambda world, node: node * (world - 1) / world,
    "RD": lambda world, node: 1,
    "GA": lambda world, node: world - 1,
    "BC": lambda world, node: 1,
}


def trace_of(tensors, *, world=2, node=1, device="cpu", forward_s=0.0, backward_s=None, after_s=0.0, dtypes=None, **more):
    """A trace of (numel, ready_s) pairs, named t0, t1 …"""
    rows = [
        {"name": f"t{i}", "shape": (n,), "dtype": dtypes[i] if dtypes else "float32", "numel": n, "ready_s": ready}
        for i, (n, ready) in enumerate(tensors)
    ]
    fixed = {"model": "m", "threads": 1, "cores": 2, "steps": 5, "config": {"zero_stage": 0}, "wire_dtype": "float32"}
    return ModelTrace(
        **{**fixed, **more},
        device=device,
        world_size=world,
        ranks_per_node=node,
        forward_s=forward_s,
        backward_s=max(ready for _, ready in tensors) if backward_s is None else backward_s,
        after_s=after_s,
        tensors=rows,
    )


def cluster_of(*, world=2, node=1, alpha_s=0.0, bytes_per_s=4.0, traffic=TRAFFIC, sizes=(2**10, 2**16, 2**24), contention=0.0):
    """A cluster whose routines follow alpha + traffic * bytes / bandwidth exactly."""
    routines = []
    for name, factor in traffic.items():
        beta = factor(world, node) / bytes_per_s
        seconds = [alpha_s + beta * size for size in sizes]
        row = {"routine": name, "level": "flat", "ranks": world, "nbytes": sizes, "seconds": seconds}
        routines.append({**row, "alpha_s": alpha_s, "beta_s_per_byte": beta, "fit_error": 0.0})
    hosts = [f"host{i}" for i in range(world // node)]
    fixed = {"backend": "gloo", "links": {}, "contention": contention}
    return ClusterProfile(hosts=hosts, ranks_per_node=node, routines=routines, **fixed)


def codecs_of(
    *,
    device="cpu",
    encode=1e-9,
    decode=1e-9,
    fixed_s=0.0,
    share=1 / 16,
    contention=0.0,
    summable=False,
    sizes=(2**10, 2**16, 2**24),
):
    """Codec seconds per element plus a fixed part, and payloads of `share` of the raw bytes."""
    times = {
        "device": device,
        "numel": sizes,
        "payload_nbytes": [max(1, int(4 * n * share)) for n in sizes],
        "encode_s": [fixed_s + encode * n for n in sizes],
        "decode_s": [fixed_s + decode * n for n in sizes],
        "contention": contention,
    }
    return CompressorProfile(compressor={"name": "topk", "density": 0.01}, summable=summable, devices=[times])


def random_case(rng: random.Random, tensors=3, equal=False, device="cpu"):
    """A random trace, cluster and codec: links from 10 MB/s to 3 GB/s, 2 to 8 ranks, tensors of 2^12 to 2^22 elements."""
    world, alpha_s = rng.choice([2, 4, 8]), 10 ** rng.uniform(-4.5, -2.5)
    same, ready, rows = int(2 ** rng.uniform(14, 22)), 0.0, []
    for _ in range(tensors):
        ready += rng.uniform(0.001, 0.05)
        rows.append((same if equal else int(2 ** rng.uniform(12, 22)), ready))
    trace = trace_of(rows, world=world, device=device, forward_s=0.01, backward_s=ready + 0.001, after_s=0.001)
    skews = {name: rng.uniform(0.8, 1.2) for name in TRAFFIC}
    skew = {name: (lambda w, g, name=name: skews[name] * TRAFFIC[name](w, g)) for name in TRAFFIC}
    cluster = cluster_of(
        world=world, alpha_s=alpha_s, bytes_per_s=10 ** rng.uniform(7, 9.5), traffic=skew, contention=rng.choice([0.0, 0.2])
    )
    codecs = codecs_of(
        device="gpu" if device == "cuda" else "cpu",
        encode=10 ** rng.uniform(-10, -8),
        decode=10 ** rng.uniform(-10.5, -8.5),
        fixed_s=1e-5,
        contention=rng.choice([0.0, 0.5, 1.0, 1.7]),
    )
    return trace, cluster, codecs


def public_case(model, bed, codec, gpu_only=True):
    """One of the paper's models on one of its testbeds, all 64 GPUs in flat routines; None where the files are not there."""
    files = SHARED / "traces" / f"{model}.json", SHARED / "testbeds" / f"{bed}.json"
    if not all(file.exists() for file in files):
        return None
    traced, testbed = (json.loads(file.read_text()) for file in files)
    node, world = testbed["gpus_per_node"], testbed["nodes"] * testbed["gpus_per_node"]
    ready, rows = 0.0, []
    for tensor in traced["tensors"]:
        ready += tensor["gap_us"] * 1e-6
        rows.append((tensor["numel"], ready))
    trace = trace_of(rows, world=world, node=node, device="cuda", forward_s=ready / 2)
    nic = testbed["inter"]
    cluster = cluster_of(
        world=world, node=node, alpha_s=nic["latency_us"] * 1e-6, bytes_per_s=nic["gbit_per_s_per_node"] * 1e9 / 8
    )
    times = testbed["compress_us_at_2e20"][codec]
    share = 2 * times["density"] if "density" in times else times["bits"] / 32
    codecs = codecs_of(
        device="gpu",
        encode=times["encode"] * 1e-6 / 2**20,
        decode=times["decode"] * 1e-6 / 2**20 * (times.get("density", 0.1) * 10 if "density" in times else 1),
        fixed_s=1e-5,
        share=share,
    )
    return trace, cluster, codecs
