"""Profiles for the planner's tests: by hand, at random, or from public traces and testbeds where those are present."""

import json
import random
from dataclasses import replace
from pathlib import Path

from espresso_ds.core.config import Constraints
from espresso_ds.core.option import Level, Option
from espresso_ds.core.profile import ClusterProfile, CompressorProfile, ModelTrace
from espresso_ds.planner.build import make_menu
from espresso_ds.planner.cost import Costs
from espresso_ds.planner.menu import Choice, Menu
from espresso_ds.planner.tree import option_tree

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


def cluster_of(
    *,
    world=2,
    node=1,
    alpha_s=0.0,
    bytes_per_s=4.0,
    traffic=TRAFFIC,
    sizes=(2**10, 2**16, 2**24),
    contention=0.0,
    handling_s=0.0,
):
    """A cluster whose routines follow alpha + traffic * bytes / bandwidth exactly."""
    routines = []
    for name, factor in traffic.items():
        beta = factor(world, node) / bytes_per_s
        seconds = [alpha_s + beta * size for size in sizes]
        row = {"routine": name, "level": "flat", "ranks": world, "nbytes": sizes, "seconds": seconds}
        routines.append({**row, "alpha_s": alpha_s, "beta_s_per_byte": beta, "fit_error": 0.0})
    hosts = [f"host{i}" for i in range(world // node)]
    fixed = {"backend": "gloo", "links": {}, "contention": contention, "handling_s": handling_s}
    return ClusterProfile(hosts=hosts, ranks_per_node=node, routines=routines, **fixed)


# The same inside a group of p ranks that share no network card.
ALONE = {
    "AR": lambda p: 2 * (p - 1) / p,
    "RS": lambda p: (p - 1) / p,
    "AG": lambda p: p - 1,
    "A2A": lambda p: (p - 1) / p,
    "RD": lambda p: 1,
    "GA": lambda p: p - 1,
    "BC": lambda p: 1,
}


def nested_cluster_of(
    *,
    nodes=2,
    node=2,
    alpha_s=(0.0, 0.0),
    bytes_per_s=(4.0, 1.0),
    skew=lambda name, level: 1.0,
    sizes=(2**10, 2**16, 2**24),
    contention=0.0,
    handling_s=0.0,
):
    """Flat, intra and inter routines that follow alpha + traffic * bytes / bandwidth; alpha and bandwidth are (intra, inter).

    Groups between the nodes that run at once share each node's network card.
    """
    world, routines = nodes * node, []

    def add(name, level, ranks, groups, traffic, link):
        alpha, beta = alpha_s[link], skew(name, level) * traffic / bytes_per_s[link]
        row = {"routine": name, "level": level, "ranks": ranks, "groups": groups, "nbytes": sizes}
        seconds = [alpha + beta * size for size in sizes]
        routines.append({**row, "seconds": seconds, "alpha_s": alpha, "beta_s_per_byte": beta, "fit_error": 0.0})

    for name, alone in ALONE.items():
        add(name, "flat", world, 1, TRAFFIC[name](world, node), 1)
        add(name, "intra", node, 1, alone(node), 0)
        for groups in (1, node):
            add(name, "inter", nodes, groups, groups * alone(nodes), 1)
    hosts = [f"host{i}" for i in range(nodes)]
    fixed = {"backend": "gloo", "links": {}, "contention": contention, "handling_s": handling_s}
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
    codec = {"compressor": {"name": "topk", "density": 0.01}, "summable": summable, "relative_error": 0.5, "devices": [times]}
    return CompressorProfile(codecs=[codec])


def on_both(gpu, cpu):
    """One codec that was measured on the devices of both profiles."""
    (one,), (other,) = gpu.codecs, cpu.codecs
    return CompressorProfile(codecs=[one.model_copy(update={"devices": one.devices + other.devices})])


def several(*profiles, errors=None):
    """A profile of all codecs of the profiles, told apart by their densities, with these relative errors."""
    codecs = [codec for profile in profiles for codec in profile.codecs]
    named = [
        codec.model_copy(
            update={
                "compressor": codec.compressor.model_copy(update={"density": 1 / 2**place}),
                "relative_error": errors[place] if errors else codec.relative_error,
            }
        )
        for place, codec in enumerate(codecs)
    ]
    return CompressorProfile(codecs=named)


def random_rows(rng, tensors, equal=False):
    """(numel, ready_s) of tensors of 2^12 to 2^22 elements, up to 50 ms after each other."""
    same, ready, rows = int(2 ** rng.uniform(14, 22)), 0.0, []
    for _ in range(tensors):
        ready += rng.uniform(0.001, 0.05)
        rows.append((same if equal else int(2 ** rng.uniform(12, 22)), ready))
    return rows


def random_codecs(rng, device):
    """A codec from much faster to much slower than the links of the random cases; on both devices where the model has both."""
    contention = rng.choice([0.0, 0.5, 1.0, 1.7])

    def one(where):
        speed = {"encode": 10 ** rng.uniform(-10, -8), "decode": 10 ** rng.uniform(-10.5, -8.5)}
        return codecs_of(device=where, **speed, fixed_s=1e-5, contention=contention)

    return one("cpu") if device == "cpu" else on_both(one("gpu"), one("cpu"))


def random_case(rng: random.Random, tensors=3, equal=False, device="cpu"):
    """A random trace, cluster and codec: links from 10 MB/s to 3 GB/s, 2 to 8 ranks on as many hosts."""
    world, alpha_s = rng.choice([2, 4, 8]), 10 ** rng.uniform(-4.5, -2.5)
    rows = random_rows(rng, tensors, equal)
    trace = trace_of(rows, world=world, device=device, forward_s=0.01, backward_s=rows[-1][1] + 0.001, after_s=0.001)
    skews = {name: rng.uniform(0.8, 1.2) for name in TRAFFIC}
    skew = {name: (lambda w, g, name=name: skews[name] * TRAFFIC[name](w, g)) for name in TRAFFIC}
    cluster = cluster_of(
        world=world,
        alpha_s=alpha_s,
        bytes_per_s=10 ** rng.uniform(7, 9.5),
        traffic=skew,
        contention=rng.choice([0.0, 0.2]),
        handling_s=1e-3 if world == 4 else 0.0,
    )
    return trace, cluster, random_codecs(rng, device)


def random_nested_case(rng: random.Random, tensors=3, equal=False, device="cpu"):
    """The same on 2 to 4 nodes of 2 or 4 ranks, whose links inside the node are 1 to 100 times as fast as those between nodes."""
    nodes, node = rng.choice([2, 3, 4]), rng.choice([2, 4])
    rows = random_rows(rng, tensors, equal)
    trace = trace_of(
        rows, world=nodes * node, node=node, device=device, forward_s=0.01, backward_s=rows[-1][1] + 0.001, after_s=0.001
    )
    alpha_s, bytes_per_s = 10 ** rng.uniform(-4.5, -2.5), 10 ** rng.uniform(7, 9.5)
    skews = {(name, level): rng.uniform(0.8, 1.2) for name in ALONE for level in Level}
    cluster = nested_cluster_of(
        nodes=nodes,
        node=node,
        alpha_s=(alpha_s / 10 ** rng.uniform(0, 1), alpha_s),
        bytes_per_s=(bytes_per_s * 10 ** rng.uniform(0, 2), bytes_per_s),
        skew=lambda name, level: skews[name, Level(level)],
        contention=rng.choice([0.0, 0.2]),
        handling_s=1e-3 if nodes == 3 else 0.0,
    )
    return trace, cluster, random_codecs(rng, device)


def costs_of(trace, cluster, codecs):
    """What everything costs in the case."""
    return Costs(cluster, codecs, trace.wire_dtype)


def menu_of(trace, cluster, codecs, constraints=None):
    """All choices that the case has."""
    return make_menu(trace, costs_of(trace, cluster, codecs), constraints or Constraints())


def small_menu(trace, cluster, codecs, options):
    """Only these options, in their text form or not, with every codec."""
    parsed = [Option.parse(str(option)) for option in options]
    codec_of = {True: range(len(codecs.codecs)), False: range(1)}
    choices = [Choice(option, codec) for option in parsed for codec in codec_of[option.compresses]]
    return Menu(choices, costs_of(trace, cluster, codecs))


def flat_options(devices, summable=False):
    """The flat part of the option tree."""
    return [option for option in option_tree(tuple(devices), summable) if option.levels == {Level.FLAT}]


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


def chunked(units, chunk_numel, world_size):
    """What units travel as, if all that are compressed are cut into chunks of one size."""
    return [piece for unit in units for piece in replace(unit, chunk_numel=chunk_numel).pieces(world_size)]


def residual_bytes(unit, nodes, node):
    """Bytes of fp32 error feedback on the busiest rank: at each compression, of what divisions have left of the unit."""
    size = {"flat": nodes * node, "intra": node, "inter": nodes}
    share, total, open_ = 1.0, 0.0, []
    for word in str(unit.option).split():
        task, at = word.split(".")
        if task == "C":
            total += 4 * share * unit.numel
        elif task in ("RS", "A2A"):
            open_.append(at)
            share /= size[at]
        elif task == "AG" and open_[-1:] == [at]:
            open_.pop()
            share *= size[at]
    return total
