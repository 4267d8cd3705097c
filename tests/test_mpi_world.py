"""Ranks that find out who started them, and meet: by their variables, and real ones under MPICH, Open MPI and a stand-in srun."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jobs
import pytest

from espresso_ds.commands.as_rank import rank_variables
from espresso_ds.core.errors import UnsupportedError
from espresso_ds.core.profile import ClusterProfile
from espresso_ds.profiler import mpi_find, mpi_launch, mpi_world

LAUNCHERS_VARIABLES = re.compile(r"SLURM|PMI_|OMPI_|MPI_LOCAL|MPI4PY|^RANK$|^WORLD_SIZE$|^LOCAL_RANK$|^MASTER_")
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29700"}
OPENMPI = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"}
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


@pytest.fixture(autouse=True)
def no_launcher_around_us(monkeypatch):
    for name in filter(LAUNCHERS_VARIABLES.search, list(os.environ)):
        monkeypatch.delenv(name)


BATCH = {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        (TORCHRUN, (mpi_world.TORCHRUN, 1, 4, 1)),
        ({"RANK": "0", "WORLD_SIZE": "2"}, None),  # some clouds set these two
        (OPENMPI, (mpi_world.OPENMPI, 2, 4, 0)),
        (HYDRA, (mpi_world.HYDRA, 3, 4, 1)),
        (SRUN, (mpi_world.SRUN, 3, 4, 1)),
        (BATCH, None),
        ({**SRUN, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),  # salloc's shell
        ({**SRUN, **TORCHRUN}, (mpi_world.TORCHRUN, 1, 4, 1)),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", **OPENMPI}, (mpi_world.OPENMPI, 2, 4, 0)),  # prted by srun
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", **HYDRA}, (mpi_world.HYDRA, 3, 4, 1)),  # Hydra by srun
        ({**SRUN, **HYDRA}, (mpi_world.SRUN, 3, 4, 1)),  # Slurm's PMI-2
    ],
)
def test_who_started_this_rank(env, expected):
    found = mpi_world.launched(env)
    assert (found and (found.by, found.rank, found.size, found.local_rank)) == expected


def test_a_rank_that_is_no_number_is_named():
    with pytest.raises(UnsupportedError, match="SLURM_PROCID=x"):
        mpi_world.launched({**SRUN, "SLURM_PROCID": "x"})


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("a", "a"),
        ("a,b[1-2]", "a"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("rack[0-1]n[010-200].x", "rack0n010.x"),
        ("n[3]", "n3"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_slurm_list_has_rank_0(text, host):
    assert mpi_world.first_host(text) == host


def test_srun_needs_no_mpi_and_steps_have_ports_of_their_own():
    place = mpi_world.place_without_mpi(SRUN)
    assert (place.host, place.rank, place.size) == ("gpu07", 3, 4)
    assert 20000 <= place.port < 30000
    others = [mpi_world.place_without_mpi({**SRUN, **more}).port for more in ({"SLURM_STEP_ID": "3"}, {"SLURM_JOB_ID": "78"})]
    assert len({place.port, *others}) == 3
    named = mpi_world.place_without_mpi({**SRUN, "MASTER_ADDR": "b", "MASTER_PORT": "29701"})
    assert (named.host, named.port) == ("b", 29701)
    assert mpi_world.place_without_mpi({**OPENMPI, "MASTER_ADDR": "b"}) is None, "mpi4py is here"


def test_without_mpi4py_the_first_host_must_be_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert mpi_world.place_without_mpi({**OPENMPI, "MASTER_ADDR": "b"}) == mpi_world.Place("b", 29500, 2, 4)
    assert mpi_world.place_without_mpi(OPENMPI) is None
    with pytest.raises(UnsupportedError, match=r"no MPI here.*pip install espresso-ds\[mpi\].*MASTER_ADDR"):
        mpi_world.communicator()


def test_scripts_get_torchruns_variables():
    expected = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu07"}
    found = rank_variables(SRUN)
    assert {name: found[name] for name in expected} == expected and found.keys() - expected.keys() == {"MASTER_PORT"}
    assert rank_variables({**HYDRA, "MASTER_ADDR": "b", "MASTER_PORT": "29702"})["MASTER_PORT"] == "29702"
    with pytest.raises(UnsupportedError, match="MASTER_ADDR"):
        rank_variables(HYDRA)
    with pytest.raises(UnsupportedError, match="no launcher"):
        rank_variables(BATCH)


@pytest.mark.parametrize(
    ("env", "library", "fits"),
    [
        (OPENMPI, "Open MPI v5.0.11", True),
        (OPENMPI, "MPICH Version: 5.0.2", False),
        (HYDRA, "Intel(R) MPI Library 2021.19", True),
        (HYDRA, "Open MPI v5.0.11", False),
        (TORCHRUN, "Open MPI v5.0.11", True),
    ],
)
def test_library_and_launcher_must_be_of_one_kind(env, library, fits):
    found = mpi_world.launched(env)
    if fits:
        return mpi_world.check_library(found, library)
    with pytest.raises(UnsupportedError) as error:
        mpi_world.check_library(found, library)
    assert found.by in str(error.value) and library in str(error.value) and "MPI4PY_LIBMPI" in str(error.value)


def mpich() -> Path:
    """The bin directory of an MPICH, with its library beside it; skips where there is none."""
    given = os.environ.get("ESPRESSO_TEST_MPICH")
    found = shutil.which("mpiexec.hydra", path=str(Path(given) / "bin") if given else None)
    if found is None:
        pytest.skip("no MPICH here: set ESPRESSO_TEST_MPICH to a directory with bin/mpiexec.hydra")
    launcher = mpi_find.Launcher("mpich", found)
    if launcher.library is None:
        pytest.skip(f"{found}: no libmpi.so.12 beside it")
    return Path(found).parent


RANK = [sys.executable, "-m", "espresso_ds.profiler.cluster", "-o", "cluster.json", "--quick", "--backend", "gloo"]


@pytest.mark.slow
def test_mpich_profiles_two_emulated_hosts(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{mpich()}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "hosts").write_text("host0 slots=1\nhost1 slots=1\n")
    command = mpi_launch.mpirun_command(tmp_path / "hosts", None, RANK, mpi="mpich")
    emulate = [sys.executable, jobs.ROOT / "launch" / "emulate", "--hosts", 2, "--rate", "500mbit", "--"]
    done = jobs.run([*emulate, *command], cwd=tmp_path, PYTHONPATH=str(jobs.ROOT))
    if done.returncode == 3:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout[-4000:]
    profile = ClusterProfile.load(tmp_path / "cluster.json")
    assert (profile.hosts, profile.ranks_per_node) == (("host0", "host1"), 1)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["mpich", "openmpi"])
def test_an_mpi_of_another_launcher_stops_every_rank_with_both_names(tmp_path, launcher):
    """MPICH's mpiexec with mpi4py on Open MPI, which would leave every rank alone, and the other way round, which would abort."""
    folder = mpich()
    other = {"MPI4PY_LIBMPI": str(folder.parent / "lib" / "libmpi.so.12")} if launcher == "openmpi" else {}
    program = folder / "mpiexec.hydra" if launcher == "mpich" else jobs.BIN / "mpirun"
    if not program.exists():
        pytest.skip("no Open MPI here")
    more = [] if launcher == "mpich" else ["--host", "localhost:2"]
    lingering = ["sh", "-c", '"$@"; code=$?; sleep 5; exit $code', "sh"]  # launchers kill the others once one has ended
    done = jobs.run([program, *more, "-n", 2, *lingering, *RANK], cwd=tmp_path, PYTHONPATH=str(jobs.ROOT), **other)
    assert done.returncode != 0
    started, used = ("Hydra's mpiexec", "Open MPI v") if launcher == "mpich" else ("Open MPI's mpirun", "MPICH Version")
    for rank in (0, 1):
        assert re.search(rf"{started}.* started rank {rank} of 2, but mpi4py uses {used}", done.stdout), done.stdout[-4000:]
    assert "Traceback" not in done.stdout


MEET = """
from espresso_ds.profiler.rendezvous import joined
with joined("gloo", 60) as ranks:
    print(f"{ranks.rank} {ranks.world_size} {ranks.hosts[0]} {ranks.local_rank}\\n", end="", flush=True)  # in one piece
"""


@pytest.mark.slow
def test_ranks_of_srun_meet_without_mpi(tmp_path):
    """Started by a stand-in for srun, which sets Slurm's variables; real processes, a real store and group."""
    script = tmp_path / "rank.py"
    script.write_text(MEET)
    srun = [sys.executable, jobs.TESTS / "slurm_stand_in.py", "--ntasks", 2, sys.executable, script]
    done = jobs.run(srun, SLURM_JOB_ID="77", STAND_IN_JOB=str(tmp_path), MASTER_PORT="29704", PYTHONPATH=str(jobs.ROOT))
    assert done.returncode == 0, done.stdout
    name = socket.gethostname()
    assert sorted(line for line in done.stdout.splitlines() if name in line) == [f"0 2 {name} 0", f"1 2 {name} 1"]


LISTS = "gpu[07-09,12],rack[0-1]n[1-2],n[8-11],a[098-101],login"


@pytest.mark.slow
def test_slurm_itself_starts_ranks_and_spells_out_lists(tmp_path):
    """Real Slurm on two emulated hosts: our srun command in an allocation, its variables, and scontrol against our own parser."""
    if not all(map(shutil.which, ("srun", "salloc", "slurmctld", "slurmd", "munged"))):
        pytest.skip("no Slurm here")
    (tmp_path / "rank.py").write_text(MEET)
    (tmp_path / "job.py").write_text(
        "import subprocess, sys\n"
        "from espresso_ds.profiler.mpi_launch import mpirun_command\n"
        "subprocess.run(mpirun_command(None, None, [sys.executable, 'rank.py']), check=True)\n"
    )
    hostfile = jobs.ROOT / "launch" / "hostfile"
    script = f"scontrol show hostnames '{LISTS}' && {sys.executable} {hostfile} write && exec {sys.executable} job.py"
    slurm = [jobs.TESTS / "scripts" / "with_slurm.sh", "salloc", "--nodes=2", "--ntasks-per-node=1", "sh", "-c", script]
    emulate = [sys.executable, jobs.ROOT / "launch" / "emulate", "--hosts", 2, "--rate", "none", "--"]
    done = jobs.run([*emulate, "sh", *slurm], cwd=tmp_path, PYTHONPATH=str(jobs.ROOT))
    if done.returncode == 3:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout[-4000:]
    said = done.stdout.splitlines()
    sys.path.insert(0, str(jobs.ROOT / "launch"))
    import hostlists

    expected = [*hostlists.expand_hostlist(LISTS), "host0 slots=1", "host1 slots=1"]
    start = said.index(expected[0])
    assert said[start : start + len(expected)] == expected
    assert {"0 2 host0 0", "1 2 host0 0"} <= set(said)


@pytest.mark.slow
def test_prepare_among_many_ranks_is_refused_by_each(tmp_path):
    (tmp_path / "ds.json").write_text("{}")
    command = [jobs.BIN / "espresso", "prepare", "--ds-config", "ds.json", "-o", "plan.json", "train.py"]
    env = jobs.environment(**OPENMPI, PYTHONPATH=str(jobs.ROOT))
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "rank 2 of 4, which Open MPI's mpirun started; run this command once" in done.stderr
    assert not (tmp_path / "plan.json").exists()
