"""Starting our own ranks: launchers told apart, each one's command line, ranks already there, and MPIs that do not fit."""

import argparse
import os
import re
import sys
from pathlib import Path

import pytest

from espresso_ds.commands import launching
from espresso_ds.core.errors import FileError, UnsupportedError
from espresso_ds.profiler import mpi_find, mpi_launch, mpi_world

SAYS = {
    "openmpi": "mpirun (Open MPI) 5.0.11",
    "mpich": "HYDRA build details:\n    Version:  5.0.2",
    "impi": "Intel(R) MPI Library for Linux* OS, Version 2021.19.0",
    "srun": "slurm 24.05.3",
}
LAUNCHERS_VARIABLES = re.compile(r"SLURM|PMI_|OMPI_|MPI_LOCAL|MPI4PY|^RANK$|^WORLD_SIZE$|^LOCAL_RANK$|^MASTER_")
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29700"}


@pytest.fixture(autouse=True)
def no_launcher_around_us(monkeypatch):
    for name in filter(LAUNCHERS_VARIABLES.search, list(os.environ)):
        monkeypatch.delenv(name)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put programs on PATH that say to be of a kind; nothing else is there."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python" / "bin" / "python"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", "")

    def put(name, says, folder="usr/bin"):
        path = tmp_path / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\necho '{SAYS.get(says, says)}'\n")
        path.chmod(0o755)
        known = os.environ["PATH"].split(os.pathsep)
        if "python" not in folder and str(path.parent) not in known:
            monkeypatch.setenv("PATH", os.pathsep.join([*filter(None, known), str(path.parent)]))
        return str(path)

    return put


@pytest.fixture
def hosts(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("a slots=2\nb slots=2\n")
    return path


def test_the_mpirun_beside_python_comes_first_whatever_it_is(install):
    install("mpirun", "openmpi")
    beside = install("mpirun", "mpich", folder="python/bin")
    assert mpi_find.find_launcher() == mpi_find.Launcher("mpich", beside)


@pytest.mark.parametrize(
    ("kind", "name"), [("openmpi", "mpirun"), ("mpich", "mpiexec.hydra"), ("impi", "mpirun"), ("srun", "srun")]
)
def test_a_kind_is_found_past_those_of_another(install, kind, name):
    for other in SAYS.keys() - {kind}:
        install(name, other, folder=f"opt/{other}/bin")
    wanted = install(name, kind, folder="opt/wanted/bin")
    assert mpi_find.find_launcher(kind) == mpi_find.Launcher(kind, wanted)


def test_what_is_missing_is_said_with_its_cure(install):
    with pytest.raises(UnsupportedError, match=r"no mpirun found; .*pip install espresso-ds\[mpi\].*srun.*torchrun"):
        mpi_find.find_launcher()
    install("mpirun", "openmpi")
    with pytest.raises(UnsupportedError, match=r"no launcher of MPICH found \(.*mpirun is Open MPI\); .*pip install mpich"):
        mpi_find.find_launcher("mpich")


def test_an_unknown_mpi_is_not_guessed(install):
    install("mpirun", "Acme MPI 1.0")
    with pytest.raises(UnsupportedError, match=r"which MPI is this\? .*'Acme MPI 1.0'.*--mpi openmpi\|mpich"):
        mpi_find.find_launcher()


def test_mpich_takes_hosts_and_the_library_on_its_command_line(install, hosts, monkeypatch):
    mpiexec = install("mpiexec.hydra", "mpich", folder="opt/mpich/bin")
    library = Path(mpiexec).parents[1] / "lib" / "libmpi.so.12"
    library.parent.mkdir()
    library.touch()
    placed = ["-bind-to", "none", "-genvall"]
    command = mpi_launch.mpirun_command(hosts, 3, ["prog"], ["ONE"], "mpich")
    assert command == [mpiexec, "-hosts", "a:2,b:1", "-n", "3", *placed, "-genv", "MPI4PY_LIBMPI", str(library), "prog"]
    monkeypatch.setenv("MPI4PY_LIBMPI", "/mine")
    local = mpi_launch.mpirun_command(None, 2, ["prog"], ["MPI4PY_LIBMPI"], "mpich")
    assert local == [mpiexec, "-launcher", "fork", "-hosts", "localhost:2", "-n", "2", *placed, "prog"]


def test_open_mpi_is_told_of_the_library_too(install, hosts):
    mpirun = install("mpirun", "openmpi", folder="opt/openmpi/bin")
    library = Path(mpirun).parents[1] / "lib" / "libmpi.so.40"
    library.parent.mkdir()
    library.touch()
    command = mpi_launch.mpirun_command(hosts, None, ["prog"])
    assert command[-3:] == ["-x", f"MPI4PY_LIBMPI={library}", "prog"]


def test_intel_mpi_starts_even_hosts(install, hosts):
    mpiexec = install("mpiexec.hydra", "impi")
    env = ["env", "I_MPI_JOB_RESPECT_PROCESS_PLACEMENT=0"]
    command = mpi_launch.mpirun_command(hosts, None, ["prog"], mpi="impi")
    assert command == [*env, mpiexec, "-hosts", "a,b", "-ppn", "2", "-n", "4", "-genvall", "-genv", "I_MPI_PIN", "0", "prog"]
    with pytest.raises(UnsupportedError, match="Intel MPI starts the same number of ranks on every host, not a: 2, b: 1"):
        mpi_launch.mpirun_command(hosts, 3, ["prog"], mpi="impi")


def test_srun_takes_the_allocation_as_it_is(install, hosts, monkeypatch):
    srun = install("srun", "srun")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    always = [srun, "--distribution=block", "--cpu-bind=none", "--kill-on-bad-exit=1", "--export=ALL"]
    assert mpi_launch.mpirun_command(None, None, ["prog"]) == [*always, "prog"], "no hostfile, no ranks: srun"
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")
    assert mpi_launch.mpirun_command(None, 3, ["prog"], mpi="srun") == [*always, "--ntasks=3", "--cpus-per-task=8", "prog"]
    command = mpi_launch.mpirun_command(hosts, None, ["prog"], mpi="srun")
    placed = ["--nodelist=a,b", "--nodes=2", "--ntasks-per-node=2", "--ntasks=4"]
    assert command == [*always, *placed, "--cpus-per-task=8", "prog"]


def test_hosts_or_ranks_keep_mpirun_in_an_allocation(install, hosts, monkeypatch):
    mpirun = install("mpirun", "openmpi")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert mpi_launch.mpirun_command(hosts, None, ["prog"])[0] == mpirun
    assert mpi_launch.mpirun_command(None, 2, ["prog"])[0] == mpirun
    monkeypatch.delenv("SLURM_JOB_ID")
    with pytest.raises(UnsupportedError, match="not inside a Slurm allocation; get one by salloc or sbatch"):
        mpi_launch.mpirun_command(hosts, None, ["prog"], mpi="srun")
    with pytest.raises(UnsupportedError, match="how many ranks"):
        mpi_launch.mpirun_command(None, None, ["prog"])
    with pytest.raises(UnsupportedError, match="4 slots are too few for 5 ranks"):
        mpi_launch.mpirun_command(hosts, 5, ["prog"])
    hosts.write_text("a:2\n")
    with pytest.raises(FileError, match="launch/hostfile write"):
        mpi_launch.mpirun_command(hosts, None, ["prog"])


def arguments(**given):
    return argparse.Namespace(**{"hostfile": None, "ranks": None, "mpi": None, "launch": None, "launcher": None, **given})


def test_one_of_many_goes_on_in_place_and_starts_no_others(monkeypatch, capsys):
    assert launching.one_of_many(arguments(ranks=2)) is None
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert launching.one_of_many(arguments()).rank == 1
    with pytest.raises(UnsupportedError, match=r"rank 1 of 4, which torchrun started, .*leave out --ranks --mpi"):
        launching.one_of_many(arguments(ranks=2, mpi="openmpi"))
    for start in (launching.ranks_command, launching.script_command):
        with pytest.raises(UnsupportedError, match="rank 1 of 4, which torchrun started; run this command once"):
            start(arguments(ranks=2), "module")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launching.one_of_many(arguments(ranks=2)) is None
    became = []
    monkeypatch.setattr(os, "execve", lambda *call: became.append(call))
    launching.go_on_in_place(mpi_world.Launched("srun", 0, 4, 0), ["-m", "this"], {"MORE": "1"})
    assert became[0][:2] == (sys.executable, [sys.executable, "-m", "this"]) and became[0][2]["MORE"] == "1"
    assert "srun already started 4 ranks" in capsys.readouterr().err


def test_the_script_of_a_slurm_allocation_is_started_by_srun(install, monkeypatch):
    srun = install("srun", "srun")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    command = launching.script_command(arguments(), ["train.py", "--lr", "1"])
    assert command[0] == srun and command[-4:] == ["espresso_ds.commands.as_rank", "train.py", "--lr", "1"]


def test_deepspeeds_launcher_follows_the_mpi_that_is_there(install, hosts):
    install("mpirun", "mpich")
    more = {"hostfile": hosts, "master_port": 29703, "launcher_args": ""}
    command = launching.script_command(arguments(**more), ["train.py"])
    assert command[command.index("--launcher") + 1] == "mpich"
    command = launching.script_command(arguments(**more, launcher="pdsh"), ["train.py"])
    assert command[command.index("--launcher") + 1] == "pdsh"
