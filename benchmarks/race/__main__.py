"""The race: step time, bytes and loss of plans against DeepSpeed and DDP, interleaved in one run of each model and cluster.

    python -m benchmarks.race --models gpt2-30m --clusters 2x1 --rates 100mbit,200mbit,1gbit,none
    python -m benchmarks.race report [--markdown] [--pictures docs]

in an environment with espresso_ds and MPI, on a machine with nothing else to do, as root or with user namespaces. Writes one file
for each cell (model x cluster x rate) into benchmarks/results/race; cells that are there already are taken again and replaced.
Profiles and plans stay in .race; remove it to profile again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..machine import machine
from . import report
from .prepare import CRIPPLED_NAMES, ROOT, Shape, Workshop, run_race
from .results import OURS, REPLANNED, CellResult
from .variants import PEERS

RESULTS = ROOT / "benchmarks/results/race"
CODECS = ("efsignsgd", "quantize:bits=4", "quantize:bits=8", "bf16:feedback=none")
FEWER = [name for name in PEERS if not name.endswith((" 2", "batched powersgd 4"))]
"""Peers where four ranks' models would not fit into memory otherwise."""
ALL_CRIPPLED = ",".join(CRIPPLED_NAMES)


def main() -> None:
    """Race, or report."""
    if sys.argv[1:2] == ["report"]:
        report.main(sys.argv[2:], RESULTS)
        return
    parser = argparse.ArgumentParser(prog="python -m benchmarks.race", description=__doc__.partition("\n")[0])
    parser.add_argument("--models", default="gpt2-5m,gpt2-30m,minilm,vgg")
    parser.add_argument("--clusters", default="2x1,4x1,2x2")
    parser.add_argument("--rates", default="100mbit,200mbit,1gbit,none")
    parser.add_argument("--peers", help="comma-separated; default: all (without some PowerSGD on four ranks)")
    parser.add_argument("--crippled", help=f"comma-separated; default: {ALL_CRIPPLED}; on four ranks: none")
    parser.add_argument("--codecs", default=",".join(CODECS), help="NAME[:KEY=VALUE]..., the first is the main one")
    parser.add_argument("--thrift", type=float, default=0.01)
    parser.add_argument("--budget-s", type=float, default=90.0, help="seconds of turns for each cell (default: %(default)s)")
    parser.add_argument("--least-rounds", type=int, default=3)
    parser.add_argument("--scout-steps", type=int, default=12, help="to plan again from, before a cell is raced; 0: none")
    parser.add_argument("--loss-steps", type=int, default=60, help="0: no losses")
    parser.add_argument("--loss-peers", help="comma-separated; default: all that race")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--work", type=Path, default=ROOT / ".race", help="profiles and plans (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    workshop = Workshop(given.work.resolve(), given.codecs.split(","), given.thrift)
    given.out.mkdir(parents=True, exist_ok=True)
    for model in given.models.split(","):
        for shape in map(Shape.parse, given.clusters.split(",")):
            race(model, shape, given, workshop)


def race(model: str, shape: Shape, given: argparse.Namespace, workshop: Workshop) -> None:
    """All rates of one model on one cluster."""
    crowded = shape.nodes * shape.ranks_per_node > 2
    peers = given.peers.split(",") if given.peers else FEWER if crowded else list(PEERS)
    wanted = ("" if crowded else ALL_CRIPPLED) if given.crippled is None else given.crippled
    crippled = [name for name in wanted.split(",") if name]
    rates = given.rates.split(",")
    plans = {rate: workshop.plans(model, shape, rate, ["espresso", *crippled]) for rate in rates}
    parts = {rate: workshop.folder / f"part-{model}-{shape}-{rate}.json" for rate in rates}
    losses = workshop.folder / f"losses-{model}-{shape}.json"
    wanted_losses = {
        "steps": given.loss_steps,
        "seeds": [int(seed) for seed in given.seeds.split(",")],
        "plans": {f"espresso {rate}": plans[rate]["espresso"] for rate in rates},
        "out": str(losses),
    }
    run_race(
        workshop.folder / f"job-{model}-{shape}.json",
        model,
        shape,
        peers=peers,
        ours=[OURS, REPLANNED],
        steps_per_turn=2,
        least_rounds=given.least_rounds,
        most_rounds=9,
        budget_s=given.budget_s,
        cells=[
            {
                "rate": rate,
                "plans": plans[rate],
                "scout_steps": given.scout_steps,
                "replan": workshop.replanning(model, shape, rate, plans[rate][OURS], f"{model}-{shape}-{rate}"),
                "out": str(parts[rate]),
            }
            for rate in rates
        ],
        losses=wanted_losses if given.loss_steps else None,
        loss_peers=[name for name in (given.loss_peers.split(",") if given.loss_peers else peers) if PEERS[name] != "bound"],
    )
    found = json.loads(losses.read_text()) if given.loss_steps else {}
    about = {"model": model, "nodes": shape.nodes, "ranks_per_node": shape.ranks_per_node, "machine": machine()}
    about["codecs"] = given.codecs.split(",")
    for rate in rates:
        ours = {"espresso": found[f"espresso {rate}"]} if found else {}
        peers_losses = {name: loss for name, loss in found.items() if name in PEERS}
        cell = {**about, "rate": rate, **json.loads(parts[rate].read_text()), "losses": {**ours, **peers_losses}}
        CellResult.model_validate(cell).save(given.out / f"{model}-{shape}-{rate}.json")


if __name__ == "__main__":
    main()
