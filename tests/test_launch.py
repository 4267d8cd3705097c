"""The plan reaches every worker, by every launcher and also without one; what is wrong with it is said before anything starts."""

import base64
import gzip
import json
import re
import shlex
import sys

import pytest
import torch
from jobs import BIN, TESTS, run, torchrun
from plans import plan_for, with_plan

SCRIPTS = TESTS / "scripts"
DS_CONFIG = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 0}, "steps_per_print": 1000000}
FACTS = {
    "device": "cpu",
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 1,
    "zero_stage": 0,
    "precision": "fp32",
    "communication_data_type": "float32",
}
pytestmark = pytest.mark.slow

PORT = 29651
ACTIVE = "plan active"


def tiny_model():
    return torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))


def write_plan(path, model=None, **arguments):
    plan = plan_for(model or tiny_model(), FACTS, option="C.cpu AG.flat D.cpu", fuse=2, **arguments)
    path.write_text(json.dumps(with_plan(DS_CONFIG, plan, timeout_s=60)))
    return path


@pytest.fixture
def plan(tmp_path):
    return write_plan(tmp_path / "plan.json")


@pytest.fixture
def plain(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(DS_CONFIG))
    return path


def check_trained(done, active=True):
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"trained 2 ranks; plan: " + str(active), done.stdout), done.stdout[-4000:]
    assert done.stdout.count(ACTIVE) == (1 if active else 0)


def test_deepspeed_sends_the_plan_itself_so_that_workers_need_no_file(plan, tmp_path):
    command = [BIN / "deepspeed", "--num_accelerators", 2, "--master_port", PORT, "--espresso_config", plan]
    check_trained(run([*command, SCRIPTS / "tiny.py", "--forget", plan], cwd=tmp_path))


def test_the_scripts_own_config_is_kept(plan, plain, tmp_path):
    command = [BIN / "deepspeed", "--num_accelerators", 2, "--master_port", PORT, f"--espresso_config={plan}"]
    check_trained(run([*command, SCRIPTS / "tiny.py", "--deepspeed_config", plain], cwd=tmp_path))


def test_openmpi_launcher(plan, tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=2\n")
    command = [BIN / "deepspeed", "--hostfile", hosts, "--launcher", "openmpi", "--force_multi", "--no_ssh_check"]
    command += ["--master_addr", "127.0.0.1", "--launcher_args=--oversubscribe --mca btl_tcp_if_include lo"]
    command += ["--espresso_config", plan]
    check_trained(run([*command, SCRIPTS / "tiny.py", "--forget", plan], cwd=tmp_path))


def test_launcher_run_as_a_module(plan, tmp_path):
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", 2, "--master_port", PORT]
    check_trained(run([*command, "--espresso_config", plan, SCRIPTS / "tiny.py"], cwd=tmp_path))


def test_torchrun_with_the_block_in_the_config(plan):
    check_trained(run([*torchrun(2, PORT), SCRIPTS / "tiny.py", "--deepspeed_config", plan]))


def test_mpirun_with_the_path_in_the_environment(plan, tmp_path):
    command = [BIN / "mpirun", "--host", "localhost:2", "-n", 2, sys.executable, SCRIPTS / "tiny.py"]
    check_trained(run(command, cwd=tmp_path, ESPRESSO_CONFIG=str(plan)))


def test_without_a_plan_nothing_is_attached(plain):
    check_trained(run([*torchrun(2, PORT), SCRIPTS / "tiny.py", "--deepspeed_config", plain]), active=False)


def test_the_plan_can_be_switched_off_loudly(plan):
    done = run([*torchrun(2, PORT), SCRIPTS / "tiny.py", "--deepspeed_config", plan], ESPRESSO_DISABLE="1")
    check_trained(done, active=False)
    assert "disabled by the user" in done.stdout


def test_hf_trainer(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    plan = write_plan(tmp_path / "plan.json", BertForSequenceClassification(config))
    written = json.loads(plan.read_text())
    written["train_micro_batch_size_per_gpu"] = written["gradient_clipping"] = "auto"
    plan.write_text(json.dumps(written))
    done = run([*torchrun(2, PORT), SCRIPTS / "trainer.py", plan, tmp_path / "out"])
    assert done.returncode == 0, done.stdout[-4000:]
    assert "trained 2 ranks; steps: 4" in done.stdout
    assert done.stdout.count(ACTIVE) == 1


def test_accelerate_launch(tmp_path):
    plan = write_plan(tmp_path / "plan.json")
    command = [BIN / "accelerate", "launch", "--use_deepspeed", "--deepspeed_config_file", plan, "--num_processes", 2]
    command += ["--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", PORT]
    done = run([*command, SCRIPTS / "accelerated.py"])
    assert done.returncode == 0, done.stdout[-4000:]
    assert "trained; plan: True" in done.stdout
    assert done.stdout.count(ACTIVE) == 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda text: text[: len(text) // 2], "is torn or not JSON"),
        (lambda text: text.replace('"unit"', '"unti": 1, "unit"', 1), "unknown key 'tensors.0.unti'; did you mean 'unit'?"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 7'), "this espresso_ds knows up to 1"),
        (lambda text: text.replace("AG.flat", "AR.flat"), "was edited after it was made"),
        (lambda text: json.dumps(DS_CONFIG), 'holds no "espresso" block'),
        (lambda text: "", "is empty"),
    ],
)
def test_a_bad_plan_is_one_line_from_the_launcher_and_stays_as_it_is(plan, fault, message):
    plan.write_text(fault(plan.read_text()))
    before = plan.read_text()
    done = run([BIN / "deepspeed", "--num_accelerators", 2, "--espresso_config", plan, SCRIPTS / "tiny.py"])
    assert done.returncode == 1
    complaint = [line for line in done.stdout.splitlines() if line.startswith("espresso: ")]
    assert len(complaint) == 1
    assert message in complaint[0]
    assert plan.read_text() == before


LAUNCHERS = {
    "pdsh": "PDSHRunner",
    "openmpi": "OpenMPIRunner",
    "mpich": "MPICHRunner",
    "impi": "IMPIRunner",
    "slurm": "SlurmRunner",
    "mvapich": "MVAPICHRunner",
}

BUILD_COMMANDS = """
import json, os, subprocess, sys
from deepspeed.launcher import multinode_runner, runner
class Stop(Exception): pass
def popen(command, env, **_): raise Stop(command, env)
told = {}
for name, cls in json.loads(sys.argv[3]).items():
    getattr(multinode_runner, cls).backend_exists = lambda self: True
    runner.subprocess.Popen = popen
    try:
        runner.main(["--hostfile", sys.argv[1], "--launcher", name, "--no_ssh_check", "--master_addr", "10.0.0.1",
                     "--espresso_config", sys.argv[2], "train.py"])
    except Stop as stop:
        told[name] = [str(word) for word in stop.args[0]], {k: v for k, v in stop.args[1].items() if "ESPRESSO" in k}
print("commands", json.dumps(told))
"""


def test_every_launcher_of_deepspeed_carries_the_plan(plan, tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=2\nb slots=2\n")
    (tmp_path / ".deepspeed_env").write_text("ESPRESSO_GUARD=0\n")
    note = "run-{rank}, $HOME's.json"
    done = run([sys.executable, "-c", BUILD_COMMANDS, hosts, plan, json.dumps(LAUNCHERS)], cwd=tmp_path, ESPRESSO_NOTE=note)
    assert done.returncode == 0, done.stdout[-4000:]
    commands = json.loads(re.search(r"commands (.*)", done.stdout)[1])
    assert set(commands) == set(LAUNCHERS)
    for name, (words, env) in commands.items():
        assert re.search(r"ESPRESSO_GUARD[= ]0([ ;]|$)", " ".join(words)), f"{name}: {words}"
        if name == "slurm":  # which splits values at commas, and brings the environment
            assert any(word.startswith("--export=ALL") for word in words) and "ESPRESSO_PLAN" not in " ".join(words)
            words = [f"{variable}={value}" for variable, value in env.items()]
        text = re.search(r"ESPRESSO_PLAN_0[= ]([\w-]+)", " ".join(words))
        assert text, f"{name}: {words}"
        sent = json.loads(gzip.decompress(base64.urlsafe_b64decode(text[1] + "=" * (-len(text[1]) % 4))))
        assert sent == json.loads(plan.read_text()), name
        carried = [f"ESPRESSO_NOTE={note}", note]  # one word or, with its name before it, two
        if name == "pdsh":
            carried = [f"export ESPRESSO_NOTE={shlex.quote(note)};"]
            assert carried[0] in next(word for word in words if word.startswith("export "))
        else:
            assert set(carried) & set(words), f"{name}: {words}"


def test_the_flag_is_in_the_launchers_help():
    done = run([BIN / "deepspeed", "--help"])
    assert "--espresso_config PLAN.JSON" in done.stdout
