"""One rank of a race: trains every variant of one model in turn, on one emulated cluster, at one rate after the other.

    mpirun ... python -m benchmarks.race.rank JOB.json

All variants live in this process, so that a round of turns goes over all of them within seconds to minutes, and slow drift of the
machine falls on all alike. A turn: all ranks meet, a step to warm caches that is not counted (where steps are short enough to
need it), then `steps_per_turn` timed ones. Links are unshaped while variants are built and take their first steps.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import espresso_ds.integrations.boot  # noqa: F401 - before DeepSpeed, which the variants import

from . import exposed
from .models import MODELS
from .results import OURS, REPLANNED
from .variants import PEERS, Training, free_gradients, make

PORT = 29619
BUILT_STEPS = 4
"""First steps of a variant, on unshaped links: memory is taken, PowerSGD begins to compress."""
LONG_S = 3.0
"""A variant with steps longer than this takes one timed step a turn and needs none to warm up."""
TIMED_S, MOST_TIMED = 1.5, 8
"""Shorter ones take as many as fill some time, so that a turn's median says more."""


@dataclass
class Measured:
    """What one variant did at one rate: seconds and CPU seconds of this rank by step, bytes that its host sent by step."""

    step_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)


class Race:
    """All variants of a job on this rank."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job, self.workload = job, MODELS[job["model"]]
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.trainings: dict[str, Training] = {}
        self.steps: dict[str, int] = {}

    def build(self, name: str, plan: str | None) -> None:
        """Make a variant and take its first steps."""
        self.trainings[name] = make(name, self.workload, self.job["seed"], Path(plan) if plan else None)
        self.steps[name] = 0
        self.train(name, BUILT_STEPS)
        free_gradients(self.trainings[name])

    def train(self, name: str, steps: int, measured: Measured | None = None) -> None:
        """Take steps; each is timed from the end of the one before."""
        training, start = self.trainings[name], time.perf_counter()
        cpu, sent = _cpu_s(), sent_bytes()
        for _ in range(steps):
            training.step(self.workload.batch(self.rank, self.steps[name], self.job["seed"]))
            self.steps[name] += 1
            end = time.perf_counter()
            if measured is not None:
                measured.step_s.append(end - start)
            start = end
        if measured is not None:
            dist.barrier()
            measured.cpu_s.append((_cpu_s() - cpu) / steps)
            measured.sent.append((sent_bytes() - sent) / steps)

    def at_rate(self, cell: dict[str, Any], say: Any) -> dict[str, Any]:
        """Race the peers and a cell's plans at its rate; the same result on every rank."""
        rate = cell["rate"]
        shape_links("none", self.rank)
        for name in [name for name in self.trainings if name not in PEERS]:
            self.trainings.pop(name).close()
        for name, plan in cell["plans"].items():
            self.build(name, plan)
        shape_links(rate, self.rank)
        if cell.get("scout_steps") and self.replanned(cell["scout_steps"], cell["replan"], say):
            shape_links("none", self.rank)
            self.build(REPLANNED, cell["replan"]["plan"])
            shape_links(rate, self.rank)
        measured = {name: Measured() for name in self.trainings}
        expected = {}
        for name in measured:  # once, to learn how long steps are here
            dist.barrier()
            trial = Measured()
            self.train(name, 1, trial)
            expected[name] = slowest(trial.step_s)[0]
        turns = {name: self.turn(seconds) for name, seconds in expected.items()}
        round_s = sum(seconds * sum(turns[name]) for name, seconds in expected.items())
        rounds = max(self.job["least_rounds"], min(self.job["most_rounds"], int(self.job["budget_s"] / round_s)))
        for number in range(rounds):
            for name, (warm, timed) in turns.items():
                dist.barrier()
                self.train(name, warm)
                self.train(name, timed, measured[name])
                free_gradients(self.trainings[name])
            say(f"{rate}: round {number + 1} of {rounds}, {round_s:.0f} s each")
        found = {name: self.summary(name, each) for name, each in measured.items()}
        return {"rounds": rounds, "steps_per_turn": self.job["steps_per_turn"], "variants": found}

    def replanned(self, steps: int, how: dict[str, Any], say: Any) -> bool:
        """Take steps under the first plan, and make another from what all ranks recorded; whether there is one."""
        self.train(OURS, steps + 1)
        run = exposed.recorded(self.trainings[OURS].engine.espresso, self.rank, steps)
        run.save(Path(how["traces"].format(rank=self.rank)))
        dist.barrier()
        made = [False]
        if self.rank == 0:
            Path(how["plan"]).unlink(missing_ok=True)
            done = subprocess.run(how["command"], capture_output=True, text=True, timeout=600)
            made[0] = done.returncode == 0
            say((done.stdout if made[0] else f"not replanned: {done.stderr[-500:]}").strip())
        dist.broadcast_object_list(made)
        return made[0]

    def turn(self, step_s: float) -> tuple[int, int]:
        """Steps to warm up and timed ones of a turn, for steps that take about `step_s`."""
        return (0, 1) if step_s > LONG_S else (1, max(self.job["steps_per_turn"], min(MOST_TIMED, round(TIMED_S / step_s))))

    def summary(self, name: str, measured: Measured) -> dict[str, Any]:
        """What all ranks found of a variant: the slowest rank counts, CPU seconds add up."""
        engine = self.trainings[name].engine
        cpu = torch.tensor(measured.cpu_s, dtype=torch.float64)
        dist.all_reduce(cpu)
        result: dict[str, Any] = {
            "kind": PEERS.get(name) or ("ours" if name in self.job["ours"] else "crippled"),
            "step_s": slowest(measured.step_s),
            "cpu_s": cpu.tolist(),
            "sent_bytes": statistics.median(measured.sent),
        }
        if hasattr(engine, "espresso"):
            predicted = engine.espresso.plan.predicted
            run = exposed.recorded(engine.espresso, self.rank, len(measured.step_s))
            result |= {"predicted_s": predicted.planned_s, **exposed.of(run)}
        return result

    def losses(self, plans: dict[str, str], steps: int, seeds: list[int], say: Any) -> dict[str, Any]:
        """Held-out loss of every variant after equal steps from equal weights, on unshaped links."""
        shape_links("none", self.rank)
        found: dict[str, Any] = {}
        for name in (*self.job["loss_peers"], *plans):
            final = []
            for seed in seeds:
                training = make(name, self.workload, seed, Path(plans[name]) if name in plans else None)
                for step in range(steps):
                    training.step(self.workload.batch(self.rank, step, seed))
                final.append(self.workload.eval_loss(training.model))
                training.close()
            found[name] = {"steps": steps, "final": final}
            say(f"loss after {steps} steps, {name}: {', '.join(f'{loss:.4f}' for loss in final)}")
        return found


def slowest(seconds: list[float]) -> list[float]:
    """Of each step the slowest rank's time."""
    times = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return [round(each, 6) for each in times.tolist()]


def bind(rank: int, world: int) -> None:
    """Give the rank its share of the cores, or one with others where there are fewer cores than ranks.

    Left to the kernel, three ranks may share a core while the fourth has one to itself, for some steps at a time.
    """
    cores = sorted(os.sched_getaffinity(0))
    first, end = (each * len(cores) // world for each in (rank, rank + 1))
    os.sched_setaffinity(0, cores[first : max(end, first + 1)])


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def sent_bytes() -> int:
    """Bytes that have left this host, by its interface's counter."""
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


def shape_links(rate: str, rank: int) -> None:
    """Set the rate of all links, once nobody uses them."""
    dist.barrier()
    if rank == 0:
        subprocess.run([sys.executable, "launch/emulate_rate.py", rate], check=True, timeout=60)
    dist.barrier()


def main() -> None:
    """Run the job of the file named on the command line; rank 0 writes the results into its folder."""
    job = json.loads(Path(sys.argv[1]).read_text())
    rank, world = (int(os.environ[f"OMPI_COMM_WORLD_{key}"]) for key in ("RANK", "SIZE"))
    local = {f"LOCAL_{key}": os.environ[f"OMPI_COMM_WORLD_LOCAL_{key}"] for key in ("RANK", "SIZE")}
    os.environ |= local | {"RANK": str(rank), "WORLD_SIZE": str(world), "ESPRESSO_GUARD": "0"}
    os.environ |= {"MASTER_ADDR": job["master"], "MASTER_PORT": str(PORT)}
    bind(rank, world)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")

    def say(text: str) -> None:
        if rank == 0:
            print(f"{job['model']} {job['nodes']}x{job['ranks_per_node']}: {text}", flush=True)

    race = Race(job)
    if job["losses"]:
        found = race.losses(job["losses"]["plans"], job["losses"]["steps"], job["losses"]["seeds"], say)
        if rank == 0:
            Path(job["losses"]["out"]).write_text(json.dumps(found))
    for name in job["peers"] if job["cells"] else []:
        race.build(name, None)
        say(f"{name} built")
    for cell in job["cells"]:
        result = race.at_rate(cell, say)
        if rank == 0:
            Path(cell["out"]).write_text(json.dumps(result))
    for training in race.trainings.values():
        training.close()
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads of groups that DDP or DeepSpeed made may abort the interpreter's end


if __name__ == "__main__":
    main()
