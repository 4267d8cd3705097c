"""Run a script as the rank that srun, mpirun or mpiexec made of this process: with torchrun's variables, which DeepSpeed reads.

    srun python -m espresso_ds.commands.as_rank train.py ARGS

RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set from what the launcher says, so that neither MPI nor mpi4py is
needed. Where rank 0 is: MASTER_ADDR, if it is set, else the first host of the Slurm step.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from ..core.errors import EspressoError, UnsupportedError
from ..profiler.mpi_world import launched, meeting_place


def rank_variables(env: Mapping[str, str]) -> dict[str, str]:
    """Torchrun's five variables for the rank that has this environment.

    Raises:
        UnsupportedError: no launcher started it, or nothing says where rank 0 or what the local rank is.
    """
    found = launched(env)
    if found is None:
        raise UnsupportedError(
            "no launcher started this process as a rank; put srun, mpirun or mpiexec before it: "
            "`srun python -m espresso_ds.commands.as_rank train.py`"
        )
    if found.local_rank is None:
        raise UnsupportedError(
            f"{found.by} does not say which rank of its host this is; export LOCAL_RANK, or use another launcher"
        )
    place = meeting_place(found, env)
    return {
        "RANK": str(found.rank),
        "WORLD_SIZE": str(found.size),
        "LOCAL_RANK": str(found.local_rank),
        "MASTER_ADDR": place.host,
        "MASTER_PORT": str(place.port),
    }


def main(argv: Sequence[str]) -> int:
    """Become the script; returns the exit status where that fails."""
    if not argv:
        print("espresso: which script? `python -m espresso_ds.commands.as_rank train.py ARGS`", file=sys.stderr)
        return 2
    try:
        env = {**os.environ, **rank_variables(os.environ)}
    except EspressoError as error:
        print(f"espresso: {error}", file=sys.stderr)
        return 1
    os.execve(sys.executable, [sys.executable, "-u", *argv], env)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
