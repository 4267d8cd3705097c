"""Every launcher brings the plan and the user's variables to emulated hosts with no shared file system."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from jobs import BIN, ROOT, TESTS, run, torchrun
from plans import plan_for, with_plan
from test_launch import DS_CONFIG, FACTS, tiny_model

from espresso_ds.core.errors import FileError, MismatchError
from espresso_ds.core.record import fingerprint
from espresso_ds.integrations import plan_source
from espresso_ds.integrations.plan_sharing import Told, giving_rank

SCRIPTS = TESTS / "scripts"
EMULATE = [sys.executable, ROOT / "launch" / "emulate", "--rate", "none"]
MPICH = Path(os.environ.get("ESPRESSO_TEST_MPICH", f"{sys.prefix}/mpich"))  # a place of its own: it has an mpirun, too
NOTE = """run-{rank} at 100%n, "x" and $HOME's `pwd`"""
STEPS = 4


def write_plan(path, padding=0):
    """A plan for two hosts; `padding` bytes of noise, which don't shrink, make it as large as one of many tensors."""
    config = {**DS_CONFIG, "padding": torch.randint(256, (padding // 2,), dtype=torch.uint8).numpy().tobytes().hex()}
    plan = plan_for(tiny_model(), FACTS, nodes=2, option="C.cpu AG.flat D.cpu", fuse=2)
    path.write_text(json.dumps(with_plan(config, plan, timeout_s=60)))
    return plan


def expected_weights():
    """What tiny.py comes to, in plain torch: all its ranks see the same data, so their mean is what one process has."""
    torch.manual_seed(0)
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
    return sum(p.double().sum().item() for p in model.parameters())


@pytest.fixture(scope="module")
def emulation():
    done = run([*EMULATE, "--", "true"])
    if done.returncode == 3:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout


def needs(program, package):
    if shutil.which(program, path=f"{BIN}:/usr/bin:/usr/sbin") is None:
        pytest.skip(f"{program} is not installed: {package}")


def with_mpich(command):
    if not (MPICH / "bin" / "mpirun").exists():
        pytest.skip(f"MPICH is not installed: pip install --no-deps --prefix {MPICH} mpich")
    return ["sh", "-c", 'export PATH="$0:$PATH"; exec "$@"', MPICH / "bin", *command]


def trained(command, plan_file, plan, hosts, emulated=2, **env):
    """Run tiny.py by `command` on emulated hosts, of which only host0 has the plan's directory, and check what ranks tell."""
    emulate = [*EMULATE, "--hosts", emulated, "--private", plan_file.parent, "--"]
    script = [SCRIPTS / "tiny.py", "--steps", STEPS, "--tell", plan_file]
    done = run([*emulate, "env", f"ESPRESSO_NOTE={NOTE}", *command, *script], cwd=ROOT, **env)
    told = sorted((json.loads(line) for line in re.findall(r"told (\{.*\})", done.stdout)), key=lambda one: one["rank"])
    assert [one["host"] for one in told] == hosts, done.stdout[-6000:]
    assert {one["seal"] for one in told} == {plan.seal}
    assert [one["file"] for one in told] == [host == "host0" for host in hosts], "no shared file system"
    assert {one["note"] for one in told} == {NOTE}
    assert [one["weights"] for one in told] == pytest.approx([expected_weights()] * 2, rel=1e-6)
    assert done.stdout.count("plan active") == 1
    assert done.returncode == 0, done.stdout[-6000:]


def deepspeed(launcher, plan_file, hostfile="{hostfile}", *flags):
    return ["deepspeed", "--launcher", launcher, "--hostfile", hostfile, *flags, "--espresso_config", plan_file]


@pytest.mark.slow
def test_openmpi_brings_a_plan_of_several_variables_from_a_login_node(emulation, tmp_path):
    plan = write_plan(tmp_path / "plan.json", padding=250_000)
    (tmp_path / "nodes").write_text("host1 slots=1\nhost2 slots=1\n")
    command = deepspeed("openmpi", tmp_path / "plan.json", tmp_path / "nodes")
    trained(command, tmp_path / "plan.json", plan, ["host1", "host2"], emulated=3)


@pytest.mark.slow
def test_mpich_brings_the_plan(emulation, tmp_path):
    plan = write_plan(tmp_path / "plan.json", padding=250_000)
    trained(with_mpich(deepspeed("mpich", tmp_path / "plan.json")), tmp_path / "plan.json", plan, ["host0", "host1"])


@pytest.mark.slow
def test_pdsh_brings_the_plan(emulation, tmp_path):
    needs("pdsh", "apt install pdsh")
    plan = write_plan(tmp_path / "plan.json", padding=90_000)
    trained(deepspeed("pdsh", tmp_path / "plan.json"), tmp_path / "plan.json", plan, ["host0", "host1"])


@pytest.mark.slow
def test_slurm_brings_the_plan(emulation, tmp_path):
    for program in ("srun", "slurmctld", "slurmd", "munged"):
        needs(program, "apt install slurmctld slurmd slurm-client munge")
    plan = write_plan(tmp_path / "plan.json", padding=250_000)
    command = deepspeed("slurm", tmp_path / "plan.json", "{hostfile}", "--launcher_args", "--mpi=pmi2 -N2")
    library = MPICH / "lib" / "libmpi.so.12"  # mpi4py finds ranks through it, and Slurm's PMI-2 serves it
    trained(
        with_mpich([SCRIPTS / "with_slurm.sh", *command]), tmp_path / "plan.json", plan, ["host0", "host1"], MPI4PY_LIBMPI=library
    )


@pytest.mark.slow
def test_plain_mpirun_needs_the_file_on_one_host_only(emulation, tmp_path):
    plan = write_plan(tmp_path / "plan.json")
    export = ["-x", f"ESPRESSO_CONFIG={tmp_path / 'plan.json'}", "-x", "ESPRESSO_NOTE"]
    command = ["mpirun", "--hostfile", "{hostfile}", "-n", 2, *export, sys.executable]
    trained(command, tmp_path / "plan.json", plan, ["host0", "host1"])


SHARED = {
    "the file is on one host": "rank 0: plan; rank 1: plan, sent by rank 0",
    "on the other host": "rank 0: plan, sent by rank 1; rank 1: plan",
    "on both": "rank 0: plan; rank 1: plan",
    "on none": "FileError: plan: no rank has this plan (*: no such file); copy the file to any one of these hosts, or launch",
    "on none, and sent without": "FileError: plan (hash *): no rank has this plan (*: no such file); copy the file to any one of",
    "they differ": "MismatchError: plan differs: rank 0 on * has one of hash *, rank 1 on * one of hash *",
    "one is stale, the launcher tells": "rank 0: plan; rank 1: plan, sent by rank 0",
    "one is torn": "FileError: rank 1: plan: this plan is torn or not JSON",
    "damaged on the way": "FileError: rank 1: ESPRESSO_PLAN_0: the plan was damaged on its way to this rank",
    "garbled on the way": "FileError: rank 1: ESPRESSO_PLAN_0: the plan was damaged on its way to this rank",
    "replaced on the way": "FileError: rank 1: plan: a plan of hash * reached this rank, not that of hash *",
}


@pytest.mark.slow
def test_ranks_share_a_plan_or_stop_alike(tmp_path):
    write_plan(tmp_path / "plan.json")
    (tmp_path / "other.json").write_text(json.dumps({**json.loads((tmp_path / "plan.json").read_text()), "steps_per_print": 7}))
    (tmp_path / "torn.json").write_text((tmp_path / "plan.json").read_text()[:900])
    done = run([*torchrun(2, 29685), SCRIPTS / "share.py", tmp_path])
    assert done.returncode == 0, done.stdout[-4000:]
    found = dict(re.findall(r"case (.*?): (.*)", done.stdout))
    assert list(found) == list(SHARED)
    for case, expected in SHARED.items():
        assert re.match(re.escape(expected).replace(r"\*", r"[\w.-]+"), found[case]), f"{case}: {found[case]}"


def test_who_gives_the_plan():
    has, lacks, in_config = Told("a", None, "1234"), Told("b", "no such file", ""), Told("c", None, "")
    assert giving_rank([has, has], "p", None) is None
    assert giving_rank([in_config, in_config], "p", None) is None, "plans in the scripts' configs"
    assert giving_rank([lacks, in_config, has, lacks], "p", None) == 2
    with pytest.raises(FileError, match=r"p: no rank has this plan \(b: no such file\)"):
        giving_rank([lacks, in_config], "p", None)
    with pytest.raises(MismatchError, match="rank 1 on a has one of hash 1234, rank 3 on d one of hash 5678"):
        giving_rank([lacks, has, has, Told("d", None, "5678")], "p", None)


@pytest.mark.parametrize(
    ("launcher", "padding", "parts"),
    [("pdsh", 90_000, 1), ("pdsh", 250_000, 0), ("openmpi", 250_000, 2), ("openmpi", 700_000, 6), ("slurm", 1_000_000, 0)],
)
def test_a_plan_travels_in_as_many_variables_as_the_launcher_has_room_for(launcher, padding, parts, tmp_path, monkeypatch):
    for name in ("ESPRESSO_CONFIG", "ESPRESSO_PLAN_HASH", *map("ESPRESSO_PLAN_{}".format, range(8))):
        monkeypatch.setenv(name, "of another launch")
    write_plan(tmp_path / "plan.json", padding)
    plan_source.export_plan(str(tmp_path / "plan.json"), launcher)
    names = [name for name in map("ESPRESSO_PLAN_{}".format, range(8)) if name in plan_source.os.environ]
    assert len(names) == parts
    assert all(len(plan_source.os.environ[name]) < 128 * 1024 - 30_000 for name in names), "Linux's limit, and room for others"
    (tmp_path / "plan.json").rename(tmp_path / "moved")
    found = plan_source.from_env()
    if parts == 0:
        assert found == plan_source.Absent("no such file")
    else:
        assert found.ds_config == json.loads((tmp_path / "moved").read_text())
        assert found.hash == plan_source.os.environ["ESPRESSO_PLAN_HASH"] == fingerprint(found.ds_config)
