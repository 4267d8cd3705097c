"""From an emulated cluster to plans: the product's own commands, each result kept in a folder so that cells share them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from espresso_ds.core.config import EspressoBlock
from espresso_ds.core.plan import Plan, save_plan_file
from espresso_ds.core.profile import ClusterProfile, CompressorProfile, ModelTrace
from espresso_ds.core.record import write_json
from espresso_ds.planner.baselines import CRIPPLED
from espresso_ds.planner.build import make_plan
from espresso_ds.planner.search import best_plan

from .models import MODELS
from .variants import ds_config

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
TRACED_STEPS = 12


class Shape(NamedTuple):
    """Hosts and ranks of each."""

    nodes: int
    ranks_per_node: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """From `2x1`."""
        return cls(*map(int, text.split("x")))

    def __str__(self) -> str:
        return f"{self.nodes}x{self.ranks_per_node}"


class Workshop:
    """Profiles and plans in a folder; what is there already is not made again."""

    def __init__(self, folder: Path, codecs: Sequence[str], thrift: float) -> None:
        self.folder, self.codecs, self.thrift = folder, codecs, thrift
        folder.mkdir(parents=True, exist_ok=True)

    def cluster(self, shape: Shape, rate: str) -> Path:
        """The cluster's profile at a rate."""
        out = self.folder / f"cluster-{shape}-{rate}.json"
        return self._once(out, shape, rate, "espresso", "profile", "cluster", "--hostfile", "{hostfile}", "-o", str(out))

    def trace(self, model: str, shape: Shape) -> Path:
        """Ready times of a model's gradients, all ranks computing."""
        out = self.folder / f"trace-{model}-{shape}.json"
        script = ("benchmarks/race/train.py", "--model", model)
        where = ("--hostfile", "{hostfile}", "--steps", str(TRACED_STEPS), "-o", str(out))
        return self._once(out, shape, "none", "espresso", "trace", *where, *script)

    def compressors(self, shape: Shape) -> Path:
        """Seconds and bytes of the codecs."""
        out = self.folder / f"compressors-{shape}.json"
        first, *others = self.codecs
        chosen = ["--compressor", first, *(word for other in others for word in ("--alternative", other))]
        return self._once(
            out, shape, "none", "espresso", "profile", "compressors", "--hostfile", "{hostfile}", *chosen, "-o", str(out)
        )

    def plans(self, model: str, shape: Shape, rate: str, wanted: Sequence[str]) -> dict[str, str]:
        """plan.json of each wanted variant: `espresso`, or `espresso NAME` for a crippled search."""
        trace = ModelTrace.load(self.trace(model, shape))
        cluster = ClusterProfile.load(self.cluster(shape, rate))
        compressors = CompressorProfile.load(self.compressors(shape))
        found = {}
        for name in wanted:
            out = self.folder / f"plan-{model}-{shape}-{rate}-{name.replace(' ', '-')}.json"
            plan = self._plan(name, trace, cluster, compressors)
            save_plan_file(out, ds_config(MODELS[model]), EspressoBlock(thrift=self.thrift), plan)
            found[name] = str(out)
        return found

    def replanning(self, model: str, shape: Shape, made_for: str, plan: str, name: str) -> dict[str, Any]:
        """How `espresso replan` mends a plan from a run that is called `name`: traces by `{rank}`, command, new plan."""
        traces = str(self.folder / f"run-{name}-{{rank}}.json")
        runs = [traces.format(rank=rank) for rank in range(shape.nodes * shape.ranks_per_node)]
        out = str(self.folder / f"replanned-{name}.json")
        words = [sys.executable, "-m", "espresso_ds.cli", "replan", plan, "--run", *runs, "-o", out]
        words += ["--trace", str(self.trace(model, shape)), "--cluster", str(self.cluster(shape, made_for))]
        words += ["--compressors", str(self.compressors(shape))]
        return {"traces": traces, "command": words, "plan": out}

    def _plan(self, name: str, trace: ModelTrace, cluster: ClusterProfile, compressors: CompressorProfile) -> Plan:
        search = None
        if name in CRIPPLED_NAMES:
            way = CRIPPLED[CRIPPLED_NAMES[name]]
            search = partial(way.plan, search=best_plan)
        made_by = f"benchmarks.race, {name}"
        return make_plan(trace, cluster, compressors, made_by=made_by, thrift=self.thrift, search=search)

    def _once(self, out: Path, shape: Shape, rate: str, *command: str) -> Path:
        if not out.exists():
            emulate(shape, rate, *command)
        return out


CRIPPLED_NAMES = {
    "espresso all": "all compressed",
    "espresso myopic": "myopic",
    "espresso cpu only": "CPU only",
    "espresso inter allgather": "allgather between nodes",
}


def mpirun(shape: Shape, settings: Mapping[str, str] = MappingProxyType({})) -> tuple[str, ...]:
    """What starts a program on all ranks, with settings in its environment."""
    sets = [word for key, value in settings.items() for word in ("-x", f"{key}={value}")]
    ranks = str(shape.nodes * shape.ranks_per_node)
    return ("mpirun", "--hostfile", "{hostfile}", "-n", ranks, "--map-by", "slot", "--bind-to", "none", *sets)


def run_race(job: Path, model: str, shape: Shape, **wanted: object) -> None:
    """Run `rank.py` on all ranks of an emulated cluster with a job, which is written to a file first."""
    fixed = {"model": model, "nodes": shape.nodes, "ranks_per_node": shape.ranks_per_node, "master": "host0", "seed": 0}
    write_json(job, {**fixed, **wanted})
    emulate(shape, "none", *mpirun(shape), sys.executable, "-m", "benchmarks.race.rank", str(job), timeout_s=4 * 3600, show=True)


def emulate(shape: Shape, rate: str, *command: str, timeout_s: float = 3600.0, show: bool = False) -> None:
    """Run a command on host0 of an emulated cluster; its output is shown only if it fails, or where asked."""
    words = [sys.executable, "launch/emulate", "--hosts", str(shape.nodes), "--slots", str(shape.ranks_per_node)]
    words += ["--rate", rate, "--", *command]
    env = os.environ | SETTINGS | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        words, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=not show, text=True, timeout=timeout_s
    )
    if done.returncode:
        raise SystemExit(
            f"{' '.join(words)} ended with {done.returncode}\n{(done.stdout or '')[-4000:]}{(done.stderr or '')[-4000:]}"
        )
