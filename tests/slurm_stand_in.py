"""A stand-in for Slurm's srun on one machine: starts the tasks of a step here, with the variables that srun gives them.

Takes only options that srun has. The nodes are one machine under several names, each of which has its share of the tasks; the
"first node" is localhost, so that its name leads to rank 0.
"""

import argparse
import itertools
import os
import subprocess
import sys
from pathlib import Path

parser = argparse.ArgumentParser(prog="srun", allow_abbrev=False)
parser.add_argument("--version", action="version", version="slurm 99.stand-in")
parser.add_argument("-n", "--ntasks", type=int)
parser.add_argument("-N", "--nodes", type=int)
parser.add_argument("--ntasks-per-node", type=int)
parser.add_argument("-c", "--cpus-per-task", type=int)
parser.add_argument("-w", "--nodelist")
parser.add_argument("-m", "--distribution", choices=["block", "cyclic"])
parser.add_argument("--cpu-bind", choices=["none", "cores"])
parser.add_argument("-K", "--kill-on-bad-exit", choices=["0", "1"])
parser.add_argument("--export", choices=["ALL"])
parser.add_argument("command", nargs=argparse.REMAINDER)


def next_step() -> int:
    """Number of this step; a file for each in the folder of the job."""
    for step in itertools.count():
        try:
            (Path(os.environ["STAND_IN_JOB"]) / f"step-{step}").touch(exist_ok=False)
        except FileExistsError:
            continue
        return step


def main() -> int:
    given = parser.parse_args()
    if "SLURM_JOB_ID" not in os.environ:
        print("srun: error: no allocation", file=sys.stderr)
        return 1
    nodes = given.nodes or int(os.environ.get("SLURM_JOB_NUM_NODES", 1))
    per_node = given.ntasks_per_node or int(os.environ.get("SLURM_NTASKS_PER_NODE", 1))
    tasks = given.ntasks or int(os.environ.get("SLURM_NTASKS", nodes * per_node))
    step, share = next_step(), -(-tasks // nodes)
    nodelist = "localhost" + (f",other[2-{nodes}]" if nodes > 1 else "")
    (Path(os.environ["STAND_IN_JOB"]) / f"step-{step}").write_text(" ".join(sys.argv[1:]))
    started = []
    for rank in range(tasks):
        env = {
            **os.environ,
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank % share),
            "SLURM_NODEID": str(rank // share),
            "SLURM_STEP_ID": str(step),
            "SLURM_STEP_NUM_TASKS": str(tasks),
            "SLURM_STEP_NODELIST": nodelist,
        }
        started.append(subprocess.Popen(given.command, env=env))
    codes = []
    for process in started:
        codes.append(process.wait())
        if codes[-1] and given.kill_on_bad_exit == "1":
            for other in started:
                other.terminate()
    return max(map(abs, codes))


if __name__ == "__main__":
    sys.exit(main())
