"""`espresso bench`: formulas, checks of results, what is reported, and the commands end to end."""

import json
import re
import shutil
import signal
import subprocess
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from jobs import BIN, environment, run, torchrun
from ranks import Cluster, Ranks

from espresso_ds import cli
from espresso_ds.commands import bench as command
from espresso_ds.commands.job import JobError
from espresso_ds.compressors import backend
from espresso_ds.compressors.registry import CODECS, make
from espresso_ds.core.config import CompressorSettings
from espresso_ds.core.errors import EspressoError, FileError, UnsupportedError
from espresso_ds.core.option import Level, Option
from espresso_ds.profiler import bench_check, bench_codec, bench_net, bench_report, codec_speed
from espresso_ds.profiler.bench_report import BUS_FACTORS, DTYPES, P2P, NetReport, NetRow, NetSettings
from espresso_ds.profiler.bench_transport import World, teams, torch_calls, torch_gather, torch_ping_pong

ESPRESSO, PORT = BIN / "espresso", 29710
LOAD = {"load_average_1min": 0.0, "host": "h", "processor": "p", "gpus": "none", "cores": 2, "system": "s", "torch": "t"}


# Bandwidths ------------------------------------------------------------------------------------------------------------


class Wire:
    """Counts the elements that ranks send and receive in a routine that is carried out step by step."""

    def __init__(self, world):
        self.sent, self.received = [0] * world, [0] * world

    def move(self, source, target, row):
        if source != target:
            self.sent[source] += len(row)
            self.received[target] += len(row)
        return row.copy()

    def busiest(self):
        return max(*self.sent, *self.received)


def ring_allreduce(wire, rows):
    """Reduce-scatter and allgather around a ring (Patarasuk and Yuan 2009)."""
    world = len(rows)
    for step in range(world - 1):
        moved = [wire.move(rank, (rank + 1) % world, rows[rank][(rank - step) % world]) for rank in range(world)]
        for rank, row in enumerate(moved):
            rows[(rank + 1) % world][(rank - step) % world] += row
    for step in range(world - 1):
        moved = [wire.move(rank, (rank + 1) % world, rows[rank][(rank + 1 - step) % world]) for rank in range(world)]
        for rank, row in enumerate(moved):
            rows[(rank + 1) % world][(rank + 1 - step) % world] = row
    return rows


def pipeline(wire, rows, add):
    """Broadcast along a chain from rank 0, or a reduction towards its end."""
    for rank in range(len(rows) - 1):
        arrived = wire.move(rank, rank + 1, rows[rank])
        rows[rank + 1] = rows[rank + 1] + arrived if add else arrived
    return rows


@pytest.mark.parametrize("world", [2, 3, 5, 8])
def test_bus_factors_are_what_the_busiest_rank_moves(world):
    length = 6
    whole = np.arange(world * world * length, dtype=float).reshape(world, world, length)  # every rank's n rows
    size, moved = world * length, {}

    wire = Wire(world)
    assert np.array_equal(ring_allreduce(wire, whole.copy()), np.broadcast_to(whole.sum(0), whole.shape))
    moved["allreduce"] = wire.busiest()

    wire = Wire(world)
    received = [[wire.move(source, target, whole[source, target]) for source in range(world)] for target in range(world)]
    moved["alltoall"] = moved["reduce_scatter"] = wire.busiest()  # a reduce-scatter adds up what an alltoall brings
    assert np.array_equal(np.array(received), whole.transpose(1, 0, 2))

    wire = Wire(world)
    for source in range(world):
        wire.move(source, 0, whole[source, 0])
    moved["gather"] = wire.busiest()
    wire = Wire(world)
    for step in range(world - 1):  # every rank passes on what it got last
        for rank in range(world):
            wire.move(rank, (rank + 1) % world, whole[(rank - step) % world, 0])
    moved["allgather"] = wire.busiest()

    for name, add in (("broadcast", False), ("reduce", True)):
        wire = Wire(world)
        pipeline(wire, list(whole.reshape(world, -1)), add)
        moved[name] = wire.busiest()
    moved[P2P] = size
    assert {name: count / size for name, count in moved.items()} == pytest.approx({n: f(world) for n, f in BUS_FACTORS.items()})


def row(routine, nbytes, seconds, *, where="all ranks", level=Level.FLAT, ranks=4, groups=1, wrong=0):
    more = {"where": where, "level": level, "groups": groups, "in_a_row": 1, "slowest_rank": -1, "wrong": wrong}
    return NetRow.of(routine, nbytes, ranks, seconds, **more)


def report(*rows, hosts=("a", "b"), per_node=2):
    given = {"espresso": "0", "backend": "gloo", "library": "gloo", "dtype": "float32", "trials": 3, "machine": LOAD}
    return NetReport(hosts=hosts, ranks_per_node=per_node, rows=rows, **given)


def test_bandwidths_and_shares_of_the_link():
    link = [row(P2P, 1000, (1e-6,), level=Level.INTER, ranks=2), row(P2P, 10**6, (0.1,), level=Level.INTER, ranks=2)]
    flat = row("allreduce", 10**6, (0.4, 0.2, 0.3))
    shared = row("allgather", 10**6, (0.1,), level=Level.INTER, ranks=2, groups=2)
    inside = row("allreduce", 10**6, (0.1,), level=Level.INTRA, ranks=2)
    found = report(*link, flat, shared, inside).with_link_shares()
    assert (flat.median_s, flat.algorithm_bytes_per_s, flat.bus_bytes_per_s) == (0.3, 10**6 / 0.3, 1.5 * 10**6 / 0.3)
    shares = [each.link_share for each in found.rows]
    assert shares[1:4] == pytest.approx([1.0, 5e6 / 1e7, 2 * 5e6 / 1e7]), "the largest message has the link's rate"
    assert shares[4] is None, "no link inside hosts was measured"
    assert report(hosts=("a",)).link(Level.FLAT) is Level.INTRA
    assert report(hosts=("a", "b")).link(Level.FLAT) is Level.INTER


# Checks of results -----------------------------------------------------------------------------------------------------


def element(index, rank, world):
    """As the docstring of bench_check says, one by one."""
    turns = -(-world // 85)
    return ((index + 97 * rank) % 251) % 4 if (index + rank) % turns == 0 else 0


def by_hand(routine, numel, rank, world, root):
    """The result of `routine` of `numel` elements in all on `rank`, element by element; None where there is none."""
    row = numel // world
    if routine in ("allreduce", "reduce"):
        return (
            [sum(element(i, r, world) for r in range(world)) for i in range(numel)]
            if routine != "reduce" or rank == root
            else None
        )
    if routine == "reduce_scatter":
        return [sum(element(rank * row + i, r, world) for r in range(world)) for i in range(row)]
    if routine == "alltoall":
        return [element(rank * row + i, r, world) for r in range(world) for i in range(row)]
    if routine in ("allgather", "gather"):
        return [element(i, i // row, world) for i in range(numel)] if routine == "allgather" or rank == root else None
    return [element(i, root if routine == "broadcast" else 1 - rank, world) for i in range(numel)]


def result_of(routine, given, taken):
    return given if routine in ("allreduce", "reduce", "broadcast") else taken


@pytest.mark.parametrize("world", [2, 3, 100])
@pytest.mark.parametrize("routine", sorted(BUS_FACTORS))
def test_right_results_pass_and_any_wrong_one_does_not(routine, world):
    world = 2 if routine == P2P else world
    rank, root, dtype = 1, int(routine in ("reduce", "gather")), {2: "bfloat16", 3: "uint8", 100: "float32"}[world]
    itemsize = DTYPES[dtype]
    nbytes = bench_check.rounded(1500 * itemsize, world, itemsize)
    gives, takes = bench_check.numels(routine, nbytes, world, itemsize)
    given, taken = (torch.zeros(numel, dtype=getattr(torch, dtype)) for numel in (gives, takes))

    def wrong(change=lambda result: None):
        bench_check.prepare(routine, given, taken, rank, world)
        right = by_hand(routine, nbytes // itemsize, rank, world, root)
        result = result_of(routine, given, taken)
        result.copy_(torch.tensor(right))
        change(result)
        return bench_check.count_wrong(routine, given, taken, rank, world, root)

    assert wrong() == 0
    assert wrong(lambda result: result[3:4].add_(1)) == 1
    assert wrong(lambda result: result.copy_(result.roll(1))) > 0
    assert wrong(lambda result: result.copy_(result.roll(len(result) // 2))) > 0, "halves in the wrong order"
    assert wrong(lambda result: result[-1:].fill_(251)) == 1

    bench_check.prepare(routine, given, taken, rank, world)
    assert bench_check.count_wrong(routine, given, taken, rank, world, root) > 0, "nothing has arrived"


def test_results_that_are_undefined_are_not_checked():
    given, taken = torch.zeros(8), torch.zeros(4)
    assert (
        bench_check.count_wrong("reduce", given, taken, 0, 2, 1) == bench_check.count_wrong("gather", given, taken, 0, 2, 1) == 0
    )


def world_of(group, hosts=("a",), spoil=None, levels=()):
    """The world as a thread sees it through a gloo group of all ranks; `spoil` changes what routines leave."""
    rank, per_node = group.rank(), group.size() // len(hosts)

    def spoiled(name, call):
        def work(given, taken, root):
            call(given, taken, root)
            spoil(name, rank, result_of(name, given, taken))

        return work

    calls = torch_calls(group, 30.0)
    if spoil is not None:
        calls = {name: spoiled(name, call) for name, call in calls.items()}
    return World(
        backend="gloo",
        library="gloo",
        rank=rank,
        hosts=hosts,
        ranks_per_node=per_node,
        device=torch.device("cpu"),
        gather=torch_gather(group, torch.device("cpu"), 30.0),
        settle=lambda: None,
        teams=teams(hosts, per_node, rank, levels, {Level.FLAT: calls}, lambda pair: torch_ping_pong(group, pair)),
    )


def silent(share, what):
    pass


EVERYTHING = NetSettings(routines=tuple(BUS_FACTORS), sizes=(1, 5000), trials=2)


@pytest.fixture(scope="module")
def three():
    ranks = Ranks(3)
    yield ranks
    ranks.close()


@pytest.fixture(autouse=True)
def short_rows(monkeypatch):
    monkeypatch.setattr(bench_net, "_ROW_S", 1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
def test_every_routine_is_right_over_gloo(three, dtype):
    settings = EVERYTHING.model_copy(update={"dtype": dtype})
    found = three.run(lambda rank, group: bench_net.bench(world_of(group), settings, silent))
    assert [row.model_dump() for row in found[0].rows] == [row.model_dump() for row in found[2].rows], "alike on all ranks"
    itemsize = DTYPES[dtype]
    sizes = {name: [bench_check.rounded(n, 2 if name == P2P else 3, itemsize) for n in (1, 5000)] for name in BUS_FACTORS}
    assert {row.routine: [r.nbytes for r in found[0].rows if r.routine == row.routine] for row in found[0].rows} == sizes
    for row in found[0].rows:
        assert (row.wrong, len(row.seconds), row.ranks) == (0, 2, 2 if row.routine == P2P else 3)
        assert row.bus_bytes_per_s == pytest.approx(BUS_FACTORS[row.routine](row.ranks) * row.nbytes / np.median(row.seconds))
        assert row.link_share > 0


def test_a_rank_with_wrong_data_is_found(three):
    def spoil(name, rank, result):
        if name == "alltoall" and rank == 1 and len(result) > 100:
            result[7] += 1

    found = three.run(lambda rank, group: bench_net.bench(world_of(group, spoil=spoil), EVERYTHING, silent))
    wrong = {(row.routine, row.nbytes > 100): row.wrong for row in found[0].rows if row.wrong}
    assert wrong == {("alltoall", True): 1}
    assert [row.wrong for row in found[2].rows] == [row.wrong for row in found[0].rows]


def test_sizes_that_take_long_are_left_out_and_it_is_said(three):
    settings = NetSettings(routines=("broadcast",), sizes=(64, 128, 256), trials=1, longest_s=1e-9)
    found = three.run(lambda rank, group: bench_net.bench(world_of(group), settings, silent))[0]
    assert {row.nbytes for row in found.rows if row.routine == "broadcast"} == {72}
    assert any(re.match(r"broadcast, all ranks: .* and above, since .* took .* --longest", text) for text in found.left_out)


def test_too_large_sizes_are_refused_alike(three, monkeypatch):
    monkeypatch.setattr(bench_net.psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 20))
    settings = NetSettings(routines=("allreduce",), sizes=(1 << 20,))
    with pytest.raises(UnsupportedError, match="1 MiB need 12 MiB of memory on every host, and there are 1 MiB"):
        three.run(lambda rank, group: bench_net.bench(world_of(group), settings, silent))


def test_levels_of_two_hosts_of_two_ranks():
    cluster = Cluster(2, 2, [Option.parse("RS.intra AR.inter AG.intra"), Option.parse("AR.flat")])

    def work(groups):
        by_level = {level: group for (_, level), group in groups.by_lane.items()}
        flat, rank = by_level[Level.FLAT], groups.place.rank
        calls = {level: torch_calls(group, 30.0) for level, group in by_level.items()}
        made = teams(("a", "b"), 2, rank, (), calls, lambda pair: torch_ping_pong(flat, pair))
        world = world_of(flat, ("a", "b"))
        return bench_net.bench(
            World(**{**vars(world), "teams": made}), NetSettings(routines=("allreduce", "gather"), sizes=(512,), trials=2), silent
        )

    try:
        found = cluster.run(work)
    finally:
        cluster.close()
    rows = {(row.where, row.routine): (row.level, row.ranks, row.groups, row.wrong) for row in found[3].rows}
    assert rows == {
        ("rank 0 to 1, inside a host", P2P): (Level.INTRA, 2, 1, 0),
        ("rank 0 to 2, between hosts", P2P): (Level.INTER, 2, 1, 0),
        **{("all ranks", name): (Level.FLAT, 4, 1, 0) for name in ("allreduce", "gather")},
        **{("inside hosts", name): (Level.INTRA, 2, 1, 0) for name in ("allreduce", "gather")},
        **{("between hosts, one rank each", name): (Level.INTER, 2, 1, 0) for name in ("allreduce", "gather")},
        **{("between hosts, all ranks", name): (Level.INTER, 2, 2, 0) for name in ("allreduce", "gather")},
    }


def test_levels_that_do_not_exist_are_named():
    for hosts, per_node, fault in ((("a",), 2, "all ranks are on one host"), (("a", "b"), 1, "every host has one rank")):
        with pytest.raises(UnsupportedError, match=f"--level inter: {fault}.*--level flat"):
            teams(hosts, per_node, 0, (Level.INTER,), {Level.FLAT: {}}, lambda pair: {})
    with pytest.raises(UnsupportedError, match="one rank has nobody to talk to"):
        teams(("a",), 1, 0, (), {Level.FLAT: {}}, lambda pair: {})


@pytest.mark.parametrize(
    ("by_rank", "slowest"),
    [
        ([[1, 1, 1], [1, 1, 1], [2, 2, 2]], 2),
        ([[1, 1, 1], [1.02, 1.02, 1.02]], -1),
        ([[1, 1, 1], [9, 1, 1], [1, 1, 1]], -1),
        ([[0, 0, 0], [1, 1, 1], [3, 3, 3], [1, 1, 1]], 2),
    ],
    ids=["slow", "near", "once", "one stands by"],
)
def test_straggler(by_rank, slowest):
    assert bench_net.straggler(by_rank) == slowest


def test_the_report_arrives_among_other_lines(capsys):
    given = report(*[row("allreduce", 1 << power, (0.1 / 3, 0.2)) for power in range(10, 20)])
    bench_report.write_report(given)
    lines = [line + "\n" for line in capsys.readouterr().out.splitlines()]
    assert len(lines) > 5 and max(map(len, lines)) < 520
    assert bench_report.read_report([lines[0], "[1] a warning\n", *lines[1:]]) == given
    with pytest.raises(FileError, match="did not arrive whole"):
        bench_report.read_report(lines[:-1])


# The command line ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "step", "sizes"),
    [
        ("1KB..64KB", 4, (1024, 4096, 16384, 65536)),
        ("1k..5KiB", 4, (1024, 4096, 5120)),
        ("4b", 2, (4,)),
        ("1MB,4KB,1MB", 4, (4096, 1 << 20)),
        ("0.5GB", 4, (1 << 29,)),
        ("7..7", 2, (7,)),
    ],
)
def test_sizes(text, step, sizes):
    assert command.parse_sizes(text, step) == sizes


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("net --ranks 2 --sizes 0", "'0' is nothing to send.*smallest size is 1B"),
        ("net --ranks 2 --sizes 1MB..1KB", "wrong way round; write 1KB..1MB"),
        ("net --ranks 2 --sizes 1TB", "'1TB' is no size; write sizes such as 1KB..64MB"),
        ("net --ranks 2 --sizes 1KB..1MB --step 1", "--step 1: .*at least 2"),
        ("net --ranks 2 --routines allreduce,alltoal", "--routines .*'alltoal' is not known; did you mean 'alltoall'"),
        ("net --ranks 2 --level iner", "--level iner: .*did you mean 'inter'"),
        ("net --ranks 2 --dtype floot32", "--dtype floot32: no such type; did you mean 'float32'"),
        ("net --ranks 2 --dtype bfloat16 --backend mpi", "mpi cannot add up bfloat16; choose --dtype float32"),
        ("net --ranks 2 --trials 0", "--trials 0: give a number above 0"),
        ("net --ranks 1", "--ranks 1: it takes two ranks to talk"),
        ("net", "how many ranks.*--hostfile FILE or --ranks N"),
        ("net --ranks 2 --json /no/such/place.json", "its directory does not exist"),
        ("codec --compressor topk signsdg", "--compressor signsdg: unknown codec 'signsdg'; did you mean"),
        ("codec --compressor topk:densty=1", "unknown key 'densty'; did you mean 'density'"),
        ("codec --compressor topk:density=7", "--compressor topk:density=7: density is '7'"),
        ("codec --threads -1", "--threads -1: give a number above 0"),
        ("codec --sizes 4KB..x", "'x' is no size"),
    ],
)
def test_bad_arguments_are_named_before_anything_runs(words, fault, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(SystemExit, match=rf"^espresso: .*{fault}"):
        cli.main(["bench", *words.split()])


def test_wrong_results_end_in_an_error_after_the_table(monkeypatch, capsys):
    spoiled = report(row("allreduce", 4096, (0.1,), wrong=3), row("broadcast", 4096, (0.1,)))
    monkeypatch.setattr(command, "_with_ranks", lambda args, settings: spoiled)
    with pytest.raises(SystemExit, match="wrong results in 1 of 2 cases: 3 elements of allreduce, 4096 bytes, all ranks"):
        cli.main(["bench", "net", "--ranks", "2"])
    assert "broadcast" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["net --ranks 2", "codec"])
def test_help_names_every_default(text, capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", *text.split(), "--help"])
    assert "--sizes" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("how", ["gloo", "mpi", "torchrun"])
def test_net_end_to_end(tmp_path, how):
    options = ["--sizes", "1KB,64KB", "--trials", 2, "--routines", "allreduce,reduce_scatter,gather,reduce", "--json", "net.json"]
    if how == "torchrun":
        start = [*torchrun(2, PORT), "--no-python", ESPRESSO, "bench", "net"]
    else:
        start = [ESPRESSO, "bench", "net", "--ranks", 2, "--backend", how]
    done = run([*start, *options], cwd=tmp_path, COLUMNS="160")
    assert done.returncode == 0, done.stdout[-4000:]
    told = json.loads((tmp_path / "net.json").read_text())
    assert (told["backend"], len(told["hosts"]), told["ranks_per_node"]) == ("mpi" if how == "mpi" else "gloo", 1, 2)
    expected = [P2P, "allreduce", "reduce_scatter", "gather", "reduce"]
    assert [(row["routine"], row["nbytes"]) for row in told["rows"]] == [
        (name, size) for name in expected for size in (1024, 65536)
    ]
    assert all(row["wrong"] == 0 and len(row["seconds"]) == 2 and row["link_share"] > 0 for row in told["rows"])
    assert told["machine"]["cores"] == psutil.cpu_count() and told["machine"]["torch"] == torch.__version__
    assert done.stdout.count("link, rank 0 to 1, inside a host") == 1, "rank 0 alone speaks"
    assert ("Open MPI" if how == "mpi" else "gloo of torch") in done.stdout


@pytest.mark.parametrize("own", [True, False], ids=["known", "unknown"])
def test_what_stops_the_ranks_is_said_in_their_own_words(monkeypatch, own):
    """Without the launcher's chatter, and the log stays where it is all there is."""
    logs = []

    def fail(given, log, report, timeout_s):
        log.write_text(
            "[host] chatter\n" + ("espresso bench net: --level inter: one host\n" * 2 if own else "Segmentation fault\n")
        )
        logs.append(log)
        raise JobError(f"mpirun failed; the end of {log}: Segmentation fault")

    monkeypatch.setattr(command, "run_job", fail)
    with pytest.raises(SystemExit, match=r"^espresso: --level inter: one host$" if own else "Segmentation fault"):
        cli.main(["bench", "net", "--ranks", "2"])
    assert logs[0].exists() is not own
    shutil.rmtree(logs[0].parent, ignore_errors=True)


@pytest.mark.slow
def test_interrupted_it_leaves_no_ranks(tmp_path):
    child = subprocess.Popen(
        [ESPRESSO, "bench", "net", "--ranks", "2", "--sizes", "1KB", "--trials", "1000000"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        first = next(line for line in child.stdout if line.startswith("@progress"))  # the ranks have met
        ranks = [p for p in psutil.Process(child.pid).children(recursive=True) if "bench_net" in " ".join(p.cmdline())]
        child.send_signal(signal.SIGINT)
        said, _ = child.communicate(timeout=60)
    finally:
        child.kill()
    assert len(ranks) >= 2, first
    assert child.returncode != 0 and "interrupted" in said
    _, alive = psutil.wait_procs(ranks, timeout=20)
    assert not alive


# Codecs ----------------------------------------------------------------------------------------------------------------


def test_codecs_end_to_end(tmp_path, capsys):
    file, before = tmp_path / "codec.json", torch.get_num_threads()
    cli.main(["bench", "codec", "--sizes", "4KB,10KB", "--trials", "1", "--threads", "1", "--json", str(file)])
    told = json.loads(file.read_text())
    names = [re.split("[ ,]", each["codec"])[0] for each in told["codecs"]]
    assert names == list(CODECS) and torch.get_num_threads() == before
    assert [limit["nbytes"] for limit in told["limits"]] == [4096, 10240]
    assert len(told["rows"]) == 2 * len(CODECS) and told["threads"] == 1
    for row in told["rows"]:
        codec = make(CompressorSettings(name=re.split("[ ,]", row["codec"])[0]))
        assert row["payload_ratio"] == codec.payload_nbytes(row["nbytes"] // 4) / row["nbytes"]
        assert row["encode_bytes_per_s"] == pytest.approx(row["nbytes"] / np.median(row["encode_s"]))
        assert len(row["decode_s"]) == 1
    errors = {name: each["relative_error"] for name, each in zip(names, told["codecs"], strict=True)}
    assert errors["identity"] == 0 < errors["fp16"] < errors["quantize"] < errors["topk"] < 1
    said = capsys.readouterr().out
    assert "PLAIN TORCH" in said and "topk density=0.01" in said


def test_json_has_standard_output_for_itself(capsys):
    cli.main(["bench", "codec", "--compressor", "fp16", "--sizes", "4KB", "--trials", "1", "--threads", "1", "--json", "-"])
    assert json.loads(capsys.readouterr().out)["codecs"]


def kernels_of(*names):
    found = bench_codec.bench_codecs([CompressorSettings(name=name) for name in names], [64], "cpu", 1, 1, silent)
    return [set(each.kernels.values()) for each in found.codecs]


def test_which_kernels_worked_is_what_was_asked_for(monkeypatch):
    if backend.kernel("topk_encode", torch.zeros(1)) is not None:
        (fused, plain) = kernels_of("topk", "randomk")
        assert plain == {"plain torch"} and len(fused) == 1 and next(iter(fused)).startswith("native ")
    monkeypatch.setattr(backend, "_kernel", lambda *_: None)
    assert kernels_of("topk", "fp16") == [{"plain torch"}] * 2
    with backend.asked() as names:
        backend.kernel("some_encode", torch.zeros(1))
    assert names == {"some_encode": False}


def test_shares_are_medians_of_every_trials_own(monkeypatch):
    trials = iter([(1.0, 4.0, 2.0, 8.0), (3.0, 1.0, 3.0, 1.0), (9.0, 2.0, 1.0, 1.0)])  # limits, then encode and decode
    monkeypatch.setattr(
        bench_codec,
        "one_repeat",
        lambda cases, numel, clock: dict(zip(("r += g", "copy", "encode", "decode"), next(trials), strict=True)),
    )
    found = bench_codec.bench_codecs([CompressorSettings(name="fp16")], [400], "cpu", None, 3, silent)
    (only,), (limit,) = found.rows, found.limits
    assert (only.encode_share, only.decode_share) == (1.0, 1.0)
    assert (only.encode_bytes_per_s, only.decode_bytes_per_s) == (400 / 2, 400 / 1)
    assert (limit.add_bytes_per_s, limit.copy_bytes_per_s) == (400 / 3, 400 / 2)


def test_a_repeat_runs_every_case_in_turn_and_times_it_alone():
    now, order = [0.0], []

    def case(name, seconds):
        def run(i):
            order.append(name)
            now[0] += seconds

        return run

    found = codec_speed.one_repeat({"a": case("a", 1.0), "b": case("b", 3.0)}, 1 << 21, lambda: now[0])
    assert found == {"a": 1.0, "b": 3.0}
    assert order == ["a"] * 3 + ["b"] * 3, "one call to warm up, then 2^22 elements"


def test_no_cuda_and_too_little_memory_are_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedError, match=r"--device cuda: .*--device cpu"):
        bench_codec.bench_codecs([CompressorSettings()], [64], "cuda", None, 1, silent)
    monkeypatch.setattr(bench_codec.psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 30))
    with pytest.raises(EspressoError, match=r"--sizes: .* need about .* of memory"):
        bench_codec.bench_codecs([CompressorSettings()], [1 << 30], "cpu", None, 1, silent)
