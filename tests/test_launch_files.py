"""What launch/ holds for schedulers: the Slurm script and the Kubernetes example, run with stand-ins for what is not here."""

import json
import os
import shlex
import subprocess
import sys

import pytest
import yaml
from jobs import BIN, ROOT, TESTS, run
from planner_cases import cluster_of, codecs_of

from espresso_ds import cli
from espresso_ds.core.profile import ModelTrace
from espresso_ds.profiler.mpi_launch import read_hostfile

LAUNCH = ROOT / "launch"


def script(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def job(tmp_path):
    """Runs launch/slurm.sbatch as Slurm would, in a job of two tasks on one node; variables are added to the job's."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "steps").mkdir()
    srun = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -ES {shlex.quote(str(TESTS / "slurm_stand_in.py"))} "$@"\n'
    script(tmp_path / "bin" / "srun", srun)
    (tmp_path / "ds.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 0}}))
    (tmp_path / "train.py").write_text("")

    def submit(*words, path=os.environ["PATH"], **variables):
        env = {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "2", "SLURM_TASKS_PER_NODE": "2"}
        env |= {"SLURM_JOB_NODELIST": "localhost", "STAND_IN_JOB": str(tmp_path / "steps"), "OMP_NUM_THREADS": "1", **variables}
        batch = ["env", f"PATH={tmp_path / 'bin'}{os.pathsep}{path}", "bash", LAUNCH / "slurm.sbatch"]
        return run([*batch, *words], cwd=tmp_path, timeout=200, **env)

    return submit


ESPRESSO = """#!/bin/sh
[ "$1" = --version ] && echo espresso 1 && exit
echo "$*" >>prepared
[ "$3" = bad.json ] && exit 1
echo plan >plan.json
"""
PYTHON = '#!/bin/sh\necho "rank $SLURM_PROCID of $SLURM_STEP_NUM_TASKS: $ESPRESSO_CONFIG $*"\n'


def test_a_slurm_job_prepares_once_for_its_kind_and_trains_each_time(job, tmp_path):
    script(tmp_path / "bin" / "espresso", ESPRESSO)
    script(tmp_path / "bin" / "python", PYTHON)
    words = ["ds.json", "train.py", "--lr", "0.1"]

    def prepared():
        return (tmp_path / "prepared").read_text().splitlines()

    first = job(*words, PREPARE="--density 0.1")
    assert first.returncode == 0, first.stdout
    assert prepared() == ["prepare --ds-config ds.json -o plan.json --density 0.1 train.py --lr 0.1"]
    expected = [f"rank {r} of 2: {tmp_path}/plan.json -m espresso_ds.commands.as_rank train.py --lr 0.1" for r in (0, 1)]
    assert sorted(first.stdout.splitlines()) == expected
    again = job(*words, PREPARE="--density 0.1", SLURM_JOB_ID="78", SLURM_JOB_NODELIST="elsewhere")
    assert "used again" in again.stdout and len(prepared()) == 1 and again.stdout.count("\nrank ") == 2
    for change in ({}, {"SLURM_JOB_PARTITION": "slow"}, {"SLURM_NTASKS": "1", "SLURM_TASKS_PER_NODE": "1"}):
        count = len(prepared())
        assert job(*words, **change).returncode == 0
        assert len(prepared()) == count + 1, change
    (tmp_path / "ds.json").write_text("{}")
    assert job(*words).returncode == 0 and len(prepared()) == 5
    (tmp_path / "bad.json").write_text("{}")
    failed = job("bad.json", "train.py")
    assert failed.returncode == 1 and failed.stdout == ""
    assert not (tmp_path / "plan.json.kind").exists(), "what a failed job left is not taken for a plan of its kind"


def test_the_slurm_script_says_how_it_is_used(job):
    assert job("ds.json").returncode == 2
    alone = job("ds.json", "train.py", SLURM_JOB_ID="")
    assert alone.returncode == 2 and "submit it: sbatch launch/slurm.sbatch ds.json train.py" in alone.stdout


@pytest.mark.slow
def test_a_slurm_job_traces_plans_and_trains_for_real(job, tmp_path):
    """Everything but Slurm and two of the profiles is real: the trace and the training are ranks of the stand-in's srun."""
    given = tmp_path / "given"
    given.mkdir()
    codecs_of(encode=2e-9, decode=1e-9, share=0.02).save(given / "compressors.json")
    cluster_of(world=2, node=2, alpha_s=1e-4, bytes_per_s=1e8).save(given / "cluster.json")
    prepare = "--cluster given/cluster.json --compressors given/compressors.json"
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    done = job("ds.json", TESTS / "scripts" / "tiny.py", "--steps", 20, path=path, PREPARE=prepare)
    assert done.returncode == 0, done.stdout[-4000:]
    assert done.stdout.count("plan active") == 1 and "trained 2 ranks; plan: True" in done.stdout
    trace = ModelTrace.load(tmp_path / "plan.profiles" / "trace.json")
    assert (trace.world_size, trace.ranks_per_node) == (2, 2)
    steps = [step.read_text() for step in sorted((tmp_path / "steps").iterdir())]
    assert len(steps) == 3 and all("espresso_ds.commands.as_rank" in step for step in steps[1:])


@pytest.fixture(scope="module")
def mpijob():
    claim, job = yaml.safe_load_all((LAUNCH / "kubernetes-mpijob.yaml").read_text())
    return claim, job


def containers(job):
    for role, replica in job["spec"]["mpiReplicaSpecs"].items():
        (container,) = replica["template"]["spec"]["containers"]
        yield role, replica, container


def test_the_mpijob_is_what_the_operator_takes(mpijob):
    claim, job = mpijob
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v2beta1", "MPIJob")
    known = {"slotsPerWorker", "runLauncherAsWorker", "runPolicy", "mpiReplicaSpecs", "sshAuthMountPath"}
    assert set(job["spec"]) <= known | {"launcherCreationPolicy", "mpiImplementation"}
    assert set(job["spec"]["runPolicy"]) <= {"cleanPodPolicy", "backoffLimit", "ttlSecondsAfterFinished", "suspend"}
    assert {role for role, _, _ in containers(job)} == {"Launcher", "Worker"}
    for _, replica, container in containers(job):
        volumes = {volume["name"] for volume in replica["template"]["spec"]["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert set(mounts.values()) == volumes and {"/plans", "/dev/shm"} == set(mounts)
        assert container["image"] == "registry.example.com/training:1" and container["securityContext"]["runAsUser"] == 1000
    claims = [
        v["persistentVolumeClaim"]["claimName"] for v in replica["template"]["spec"]["volumes"] if "persistentVolumeClaim" in v
    ]
    assert claims == [claim["metadata"]["name"]] and claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_mpijobs_launcher_prepares_once_and_trains(mpijob, tmp_path):
    """Its script, run with stand-ins for the two commands, and a hostfile as the operator would write it for this job."""
    _, job = mpijob
    workers = job["spec"]["mpiReplicaSpecs"]["Worker"]["replicas"]
    slots = job["spec"]["slotsPerWorker"]
    name = job["metadata"]["name"]
    hosts = tmp_path / "hostfile"
    hosts.write_text("".join(f"{name}-worker-{i}.{name}.default.svc slots={slots}\n" for i in range(workers)))
    assert sum(read_hostfile(hosts).values()) == workers * slots
    launcher = next(container for role, _, container in containers(job) if role == "Launcher")
    env = {each["name"]: each["value"] for each in launcher["env"]} | {
        "HOSTFILE": str(hosts),
        "PLAN": str(tmp_path / "plan.json"),
    }
    env["PATH"] = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    script(tmp_path / "espresso", '#!/bin/sh\necho "espresso $*"\ntouch "$PLAN"\n')
    script(tmp_path / "deepspeed", '#!/bin/sh\necho "deepspeed $*"\n')
    command = [*launcher["command"], *launcher["args"]]
    said = [subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True).stdout for _ in range(2)]
    trains = f"deepspeed --hostfile {hosts} --launcher openmpi --force_multi --espresso_config {env['PLAN']} /opt/train/train.py"
    assert said[0].startswith(f"espresso prepare --ds-config /opt/train/ds.json --mpi openmpi --hostfile {hosts}")
    assert said[1].startswith(trains) and said[0].endswith(said[1])
    words = said[0].splitlines()[0].split()[1:]
    parsed = cli.parser().parse_args(words)
    assert (parsed.mpi, parsed.script) == ("openmpi", ["/opt/train/train.py", "--epochs", "3"]), "the command line is ours"


@pytest.mark.parametrize("name", ["slurm.sbatch"])
def test_shell_scripts_parse(name):
    assert subprocess.run(["bash", "-n", LAUNCH / name], timeout=60).returncode == 0
    assert (LAUNCH / name).read_text().startswith("#!/usr/bin/env bash\n#SBATCH "), "sbatch stops reading at the first command"
