"""Profile the cluster: one process per rank measures links and routines with the backend that training uses (E 4.3).

    mpirun --hostfile hosts --bind-to none python -m espresso_ds.profiler.cluster -o cluster.json

or under torchrun, or any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Rank 0 prints lines
`@progress 0.42 allreduce 4 MiB` on stdout (share of the work done, what is being measured) and at last some lines for people.
Faults go to stderr, and the exit status is then 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..core.errors import EspressoError, FileError, SyncError
from ..core.hosts import ClusterKind
from ..core.option import Level, Task
from ..core.profile import ClusterProfile, HostSpeed, Link, PairRate, RoutineCost
from ..core.progress import print_progress
from ..runtime.routines import ROUTINES
from .fit import fit_line
from .handling import measure_handling
from .link_contention import measure_link_contention
from .measure import QUICK, THOROUGH, Effort, Progress, Timing, measure, part
from .pairs import ends_of
from .probes import Buffers, Scope, largest, link_pairs, link_probe, one_way, routine_probe, scopes
from .raw_mpi import measure_raw_mpi
from .remarks import remarks
from .rendezvous import Ranks, joined
from .stragglers import Abilities, measure_abilities

_TIMEOUT_S = 120.0


def profile_cluster(ranks: Ranks, effort: Effort, progress: Progress, threads: int | None = None) -> ClusterProfile:
    """Measure the routines at every level, links, hosts and MPI itself; called by all ranks together, which get the same profile.

    Raises:
        SyncError: an operation failed or ran past the deadline; other ranks then fail too.
    """
    begin = time.perf_counter()
    buffers = Buffers(ranks)
    pairs = link_pairs(ranks)
    cells = [(scope, task) for scope in scopes(ranks) for task in ROUTINES]
    probes = [routine_probe(task, scope, ranks, buffers) for scope, task in cells]
    probes += [link_probe(level, pair, ranks, buffers) for level, pair in pairs.items()]
    try:
        progress(0.0, "contention")
        contention = measure_link_contention(ranks, threads or torch.get_num_threads())
        handling_s = measure_handling(ranks, threads or torch.get_num_threads())
        measured = measure(probes, effort, lambda seconds: largest(ranks, list(seconds)), part(progress, 0.1, 0.8))
        routines = tuple(_routine(scope, task, times) for (scope, task), times in zip(cells, measured, strict=False))
        links = {level: _link(times) for level, times in zip(pairs, measured[len(cells) :], strict=True)}
        able = measure_abilities(ranks, links.get(Level.INTER), buffers, part(progress, 0.8, 0.9))
        mpi = measure_raw_mpi(ranks, part(progress, 0.9, 1.0))
        (took_s,) = largest(ranks, [time.perf_counter() - begin])
    except RuntimeError as error:  # torch's and MPI's one kind for everything that may go wrong between ranks
        raise SyncError(f"measuring failed: {error}") from error
    progress(1.0, "done")
    return ClusterProfile(
        backend=ranks.backend,
        hosts=ranks.hosts,
        ranks_per_node=ranks.ranks_per_node,
        contention=contention,
        handling_s=handling_s,
        links=links,
        routines=routines,
        facts=ranks.facts,
        speeds=_speeds(able, len(ranks.hosts)),
        pairs=tuple(PairRate(sender=a, receiver=b, bytes_per_s=rate) for (a, b), rate in sorted(able.rates.items())),
        mpi=mpi,
        remarks=tuple(remarks(ranks.hosts, able, links, ClusterKind.of(ranks.backend, ranks.facts) if ranks.facts else None)),
        took_s=took_s,
    )


def _routine(scope: Scope, task: Task, times: Mapping[int, Timing]) -> RoutineCost:
    seconds = [timing.seconds for timing in times.values()]
    return RoutineCost(
        routine=task,
        level=scope.level,
        ranks=scope.size,
        groups=scope.groups,
        nbytes=tuple(times),
        seconds=tuple(seconds),
        spread=tuple(timing.spread for timing in times.values()),
        **fit_line(list(times), seconds)._asdict(),
    )


def _link(times: Mapping[int, Timing]) -> Link:
    seconds = one_way({nbytes: timing.seconds for nbytes, timing in times.items()})
    return Link(
        nbytes=tuple(seconds),
        seconds=tuple(seconds.values()),
        spread=tuple(timing.spread for timing in times.values()),
        **fit_line(list(seconds), list(seconds.values()))._asdict(),
    )


def _speeds(able: Abilities, hosts: int) -> tuple[HostSpeed, ...]:
    ends = ends_of(able.rates, hosts) if able.rates else [None] * hosts
    return tuple(
        HostSpeed(up_bytes_per_s=end and end.up, down_bytes_per_s=end and end.down, products_per_s=products)
        for end, products in zip(ends, able.products_per_s, strict=True)
    )


def summary(profile: ClusterProfile) -> str:
    """One line for people: the ranks and the links."""
    links = [f"{level} {1e3 * link.alpha_s:.3g} ms + {_speed(link)}" for level, link in profile.links.items()]
    return f"{profile.nodes} hosts x {profile.ranks_per_node} ranks, {profile.backend}; links: {', '.join(links) or 'none'}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one rank; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m espresso_ds.profiler.cluster", description="Measure links and routines.")
    parser.add_argument("-o", "--output", type=Path, required=True, help="where rank 0 writes the cluster profile")
    parser.add_argument("--backend", choices=["gloo", "nccl"], help="default: nccl where there is CUDA, else gloo")
    parser.add_argument("--threads", type=int, help="compute threads of a rank in training (default: torch's number here)")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats")
    arguments = parser.parse_args(argv)
    try:
        with joined(arguments.backend, _TIMEOUT_S) as ranks:
            _check_output(arguments.output, ranks)
            progress = print_progress if ranks.rank == 0 else _no_progress
            profile = profile_cluster(ranks, QUICK if arguments.quick else THOROUGH, progress, arguments.threads)
            if ranks.rank == 0:
                profile.save(arguments.output)
                print(f"{arguments.output}: {summary(profile)}", *profile.remarks, sep="\n  ", flush=True)
    except EspressoError as error:
        print(f"espresso profile cluster: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def _check_output(path: Path, ranks: Ranks) -> None:
    """Stop all ranks before they measure what rank 0 could not write."""
    (missing,) = largest(ranks, [float(ranks.rank == 0 and not path.absolute().parent.is_dir())])
    if missing:
        raise FileError(f"{path}: its directory does not exist on {ranks.hosts[0]}; make it first")


def _speed(link: Link) -> str:
    return f"{1e-6 / link.beta_s_per_byte:.4g} MB/s" if link.beta_s_per_byte else "no measurable time per byte"


def _no_progress(share: float, what: str) -> None:
    pass


if __name__ == "__main__":
    sys.exit(main())
