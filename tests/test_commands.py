"""The `espresso` command, end to end on two local ranks: what it writes, what it says, and what it leaves when stopped."""

import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from jobs import BIN, TESTS, environment, run
from planner_cases import trace_of
from plans import plan_for, with_plan

from espresso_ds.cli import main
from espresso_ds.commands import prepare, trace
from espresso_ds.commands.job import JobError, run_job
from espresso_ds.core.plan import load_plan_file
from espresso_ds.core.profile import ModelTrace
from espresso_ds.integrations import boot

pytestmark = pytest.mark.slow
TINY = TESTS / "scripts" / "tiny.py"
DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 0},
    "steps_per_print": 1000000,
    "espresso": {"compressor": {"name": "topk", "density": 0.25}},
}
ESPRESSO = BIN / "espresso"
PORT = 29661


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A directory with ds.json and what `espresso prepare` made of it."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "ds.json").write_text(json.dumps(DS_CONFIG))
    command = [ESPRESSO, "prepare", "--ds-config", "ds.json", "--ranks", 2, "--master-port", PORT, "-o", "plan.json"]
    done = run([*command, TINY, "--steps", 20], cwd=folder, timeout=200)
    assert done.returncode == 0, done.stdout[-4000:]
    return folder, done.stdout


def test_prepare_writes_profiles_and_the_users_config_with_a_plan(prepared):
    folder, said = prepared
    config, block, plan = load_plan_file(folder / "plan.json")
    assert {key: value for key, value in config.items() if key != "espresso"} == {
        key: value for key, value in DS_CONFIG.items() if key != "espresso"
    }
    assert (block.compressor.name, block.compressor.density) == ("topk", 0.25)
    assert {tensor.name for tensor in plan.tensors} == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert {file.name for file in (folder / "plan.profiles").glob("*.json")} == {"trace.json", "cluster.json", "compressors.json"}
    trace = ModelTrace.load(folder / "plan.profiles" / "trace.json")
    assert (trace.world_size, trace.ranks_per_node, trace.steps) == (2, 2, 8)
    assert plan.predicted.compute_s == pytest.approx(trace.compute_s)
    shares = [float(share) for share in re.findall(r"@progress (\S+)", said)]
    assert shares == sorted(shares)
    assert {"trace", "cluster", "compressors"} <= set(re.findall(r"@progress \S+ (\w+):", said))
    assert not list(folder.glob(".espresso-*"))


def test_the_planned_run_trains(prepared):
    folder, _ = prepared
    command = [BIN / "deepspeed", "--num_accelerators", 2, "--master_port", PORT, "--espresso_config", "plan.json", TINY]
    done = run(command, cwd=folder)
    assert done.returncode == 0, done.stdout[-4000:]
    assert done.stdout.count("plan active") == 1


def test_explain_names_every_tensor_and_draws(prepared):
    folder, _ = prepared
    done = run([ESPRESSO, "explain", "plan.json", "--picture", "p.png"], cwd=folder, COLUMNS="160")
    assert done.returncode == 0, done.stdout[-4000:]
    assert all(name in done.stdout for name in ("0.weight", "2.bias", "DeepSpeed as it is"))
    assert (folder / "p.png").read_bytes().startswith(b"\x89PNG")
    wrong = run([ESPRESSO, "explain", "plan.json", "0.wieght"], cwd=folder)
    assert wrong.returncode == 1
    assert "did you mean '0.weight'?" in wrong.stdout


def test_given_profiles_are_not_measured_again(prepared):
    folder, _ = prepared
    files = [word for kind in ("trace", "cluster", "compressors") for word in (f"--{kind}", f"plan.profiles/{kind}.json")]
    done = run([ESPRESSO, "prepare", "--ds-config", "ds.json", *files, "-o", "again.json", TINY], cwd=folder)
    assert done.returncode == 0, done.stdout[-4000:]
    first, again = (load_plan_file(folder / name)[2] for name in ("plan.json", "again.json"))
    assert again == first
    asked = run([ESPRESSO, "plan", "--ds-config", "ds.json", *files, "--uncompressed", "-o", "overlap.json"], cwd=folder)
    assert "nothing compressed" in asked.stdout
    assert {tensor.option for tensor in load_plan_file(folder / "overlap.json")[2].tensors} == {"AR.flat"}


def test_a_profile_of_another_world_is_refused(prepared):
    folder, _ = prepared
    trace = json.loads((folder / "plan.profiles" / "trace.json").read_text())
    (folder / "four.json").write_text(json.dumps({**trace, "world_size": 4}))
    files = ["--trace", "four.json", "--cluster", "plan.profiles/cluster.json", "--compressors", "plan.profiles/compressors.json"]
    done = run([ESPRESSO, "plan", "--ds-config", "ds.json", *files, "-o", "never.json"], cwd=folder)
    assert done.returncode == 1
    assert "traced with 4 ranks" in done.stdout
    assert not (folder / "never.json").exists()


def test_an_edited_plan_is_refused_until_it_is_sealed(prepared):
    folder, _ = prepared
    edited = folder / "edited.json"
    plan = json.loads((folder / "plan.json").read_text())
    for tensor in plan["espresso"]["plan"]["tensors"]:
        tensor["option"] = "RS.flat AG.flat"
    edited.write_text(json.dumps(plan))
    refused = run([ESPRESSO, "explain", "edited.json"], cwd=folder)
    assert refused.returncode == 1
    assert "espresso seal" in refused.stdout
    assert run([ESPRESSO, "seal", "edited.json"], cwd=folder).returncode == 0
    assert load_plan_file(edited)[2].tensors[0].option == "RS.flat AG.flat"


def test_interrupted_prepare_leaves_nothing_half_written(tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(DS_CONFIG))
    command = [ESPRESSO, "prepare", "--ds-config", "ds.json", "--ranks", "2", "--master-port", str(PORT), "-o", "plan.json", TINY]
    child = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    time.sleep(3)  # the ranks are starting
    child.send_signal(signal.SIGINT)
    said, _ = child.communicate(timeout=60)
    assert child.returncode != 0
    assert "interrupted" in said
    assert not (tmp_path / "plan.json").exists()
    assert not list(tmp_path.glob(".espresso-*"))


def test_a_prepare_that_fails_leaves_the_plan_there_is_with_its_profiles(prepared, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "again"
    shutil.copytree(prepared[0], folder)
    before = {path: path.read_bytes() for path in (folder / "plan.profiles").iterdir()}
    monkeypatch.setattr(prepare, "profile_cluster", failing)
    monkeypatch.chdir(folder)
    given = [f"--{kind}=plan.profiles/{kind}.json" for kind in ("trace", "compressors")]
    with pytest.raises(SystemExit, match="a host is down"):
        main(["prepare", "--ds-config", "ds.json", "--ranks", "2", *given, "-o", "plan.json", "train.py"])
    assert {path: path.read_bytes() for path in (folder / "plan.profiles").iterdir()} == before
    assert (folder / "plan.unfinished" / "trace.json").exists() and "plan.unfinished" in capsys.readouterr().err
    assert run([ESPRESSO, "explain", "plan.json"], cwd=folder).returncode == 0


def failing(*args):
    raise JobError("a host is down")


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--compressor", "topkk"], "did you mean 'topk'"),
        (["--alternative", "efsignsgd:density=0.1"], "efsignsgd has no density"),
        (["--replicas", "none.json"], "no such cluster profile"),
        (["-o", "missing/plan.json"], "its directory does not exist"),
    ],
)
def test_what_prepare_cannot_do_is_said_before_anything_is_measured(tmp_path, monkeypatch, words, fault):
    (tmp_path / "ds.json").write_text(json.dumps(DS_CONFIG))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "trace_script", failing)
    with pytest.raises(SystemExit, match=fault):
        main(["prepare", "--ds-config", "ds.json", "--ranks", "2", *words, "train.py"])


def test_a_trace_stays_until_there_is_another(tmp_path):
    file = tmp_path / "trace.json"
    trace_of([(10, 0.5)]).save(file)
    before = file.read_bytes()
    command = [ESPRESSO, "trace", "--master-port", PORT, "-o", file]
    assert run([*command, "--ranks", 2, TINY, "--no-such-flag"], cwd=tmp_path).returncode == 1
    assert run([*command, TINY], cwd=tmp_path).returncode == 1  # nobody said where
    assert file.read_bytes() == before and sorted(tmp_path.iterdir()) == [file, tmp_path / "trace.log"]


def test_what_a_leader_leaves_behind_is_ended(tmp_path):
    leader = f"sleep 300 & echo $! > {tmp_path / 'pid'}; exit 1"
    with pytest.raises(JobError, match="stopped after 2 s"):
        run_job(["sh", "-c", leader], tmp_path / "log", lambda share, what: None, timeout_s=2.0)
    pid = int((tmp_path / "pid").read_text())
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_a_script_that_ends_too_early_is_said(tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(DS_CONFIG))
    command = [ESPRESSO, "trace", "--ds-config", "ds.json", "--ranks", 2, "--master-port", PORT, TINY, "--steps", 2]
    done = run(command, cwd=tmp_path)
    assert done.returncode == 1
    assert "ended without 11 optimizer steps" in done.stdout
    assert not (tmp_path / "trace.json").exists()


def test_a_failing_script_is_shown(tmp_path):
    done = run([ESPRESSO, "trace", "--ranks", 2, "--master-port", PORT, TINY, "--no-such-flag"], cwd=tmp_path)
    assert done.returncode == 1
    assert "unrecognized arguments: --no-such-flag" in done.stdout


def test_tracing_without_the_hook_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(boot, "hook_file_installed", lambda: False)
    with pytest.raises(SystemExit, match="install-hook"):
        main(["trace", "--ranks", "1", "-o", str(tmp_path / "trace.json"), "train.py"])
    assert not any(tmp_path.iterdir())


def test_a_script_that_fails_after_its_trace_was_written_has_a_trace(tmp_path, monkeypatch, capsys):
    def traced_and_aborted(command, log, report, env, timeout_s):
        trace_of([(10, 0.5)]).save(env["ESPRESSO_TRACE_OUT"])
        raise JobError("terminate called")

    monkeypatch.setattr(trace, "run_job", traced_and_aborted)
    monkeypatch.setattr(boot, "hook_file_installed", lambda: True)
    main(["trace", "--ranks", "1", "-o", str(tmp_path / "trace.json"), "train.py"])
    said = capsys.readouterr()
    assert "0.00M parameters" in said.out and "terminate called" in said.err


def test_trace_of_a_hugging_face_model(tmp_path):
    config = {"model_type": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 100, "n_positions": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\n")
    asked = ["--batch", 2, "--sequence", 16, "--steps", 3, "--hostfile", "hosts"]
    command = [ESPRESSO, "trace", "--hf-model", "config.json", *asked]
    done = run([*command, "-o", "hf.json"], cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-4000:]
    trace = ModelTrace.load(tmp_path / "hf.json")
    assert (trace.world_size, trace.ranks_per_node) == (4, 2)
    assert "transformer.h.1.attn.c_attn.weight" in {tensor.name for tensor in trace.tensors}
    ready = {tensor.name: tensor.ready_s for tensor in trace.tensors}
    assert ready["transformer.h.1.mlp.c_proj.weight"] < ready["transformer.h.0.attn.c_attn.weight"] <= trace.backward_s


def test_doctor_finds_hook_and_flag():
    done = run([ESPRESSO, "doctor"], COLUMNS="160")
    assert done.returncode == 0, done.stdout
    assert "deepspeed knows --espresso_config" in done.stdout


def test_where_to_run_must_be_said(tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(DS_CONFIG))
    done = run([ESPRESSO, "prepare", "--ds-config", "ds.json", TINY], cwd=tmp_path)
    assert done.returncode == 1
    assert "give --hostfile FILE, --ranks N or --launch COMMAND" in done.stdout


def test_a_plan_survives_the_commands_that_fail_on_it(tmp_path):
    import torch

    plan = plan_for(torch.nn.Linear(3, 2), {})
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(with_plan(DS_CONFIG, plan)).replace("0.weight", "1.weight") + " ")
    before = file.read_text()
    run([ESPRESSO, "explain", file, "nothing"])
    run([ESPRESSO, "prepare", "--ds-config", file, "--ranks", 2, "-o", file, "no_such_script.py"], timeout=60)
    assert file.read_text() == before
