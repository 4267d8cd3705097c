"""Hostfiles of every form, made from allocations and from each other, and the check of the hosts that they name."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jobs import ROOT, run

from espresso_ds.core.errors import FileError
from espresso_ds.profiler.mpi_launch import read_hostfile
from espresso_ds.profiler.mpi_world import first_host

LAUNCH = ROOT / "launch"


def load(name):
    spec = importlib.util.spec_from_file_location(name, LAUNCH / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hostlists, hostcheck = load("hostlists"), load("hostcheck")


# Slurm's lists, written and expanded from the same parts; the expansion knows nothing of the text.
names = st.from_regex(r"[a-z][a-z0-9-]{0,4}[a-z]", fullmatch=True)


@st.composite
def brackets(draw):
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        width, first, more = draw(st.integers(1, 4)), draw(st.integers(0, 120)), draw(st.integers(0, 12))
        numbers = [str(first + i).zfill(width) for i in range(more + 1)]
        last = str(first + more) if draw(st.booleans()) else numbers[-1]  # Slurm takes the width from the first number
        parts.append((numbers[0] if not more else f"{numbers[0]}-{last}", numbers))
    return "[" + ",".join(text for text, _ in parts) + "]", [number for _, numbers in parts for number in numbers]


@st.composite
def items(draw):
    text, hosts = draw(names), None
    hosts = [text]
    for _ in range(draw(st.integers(0, 2))):
        bracket, numbers = draw(brackets())
        suffix = draw(st.sampled_from(["", "n", "-ib"]))
        text += bracket + suffix
        hosts = [host + number + suffix for host in hosts for number in numbers]
    return text, hosts


@given(st.lists(items(), min_size=1, max_size=4))
def test_slurm_lists_are_expanded_as_they_were_made(parts):
    text, expected = ",".join(text for text, _ in parts), [host for _, hosts in parts for host in hosts]
    assert hostlists.expand_hostlist(text) == expected
    assert first_host(text) == expected[0], "what the ranks take for the first host"


# As the manual pages of scontrol and of hostlists have them.
@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node[01-03,07]", ["node01", "node02", "node03", "node07"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("rack[0-1]node[1-2],login", ["rack0node1", "rack0node2", "rack1node1", "rack1node2", "login"]),
    ],
)
def test_slurm_lists_by_hand(text, hosts):
    assert hostlists.expand_hostlist(text) == hosts


@pytest.mark.parametrize("text", ["", "a,,b", "a[", "a[1", "a1]", "a[]", "a[3-1]", "a[x]", "a[1-]", "a[1-9999999]", "a[[1]]"])
def test_torn_lists_are_refused_with_their_text(text):
    with pytest.raises(hostlists.Fault) as error:
        hostlists.expand_hostlist(text)
    assert repr(text) in str(error.value)


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(1, 9)), min_size=1, max_size=6))
def test_counts_are_run_lengths(runs):
    text = ",".join(f"{count}(x{times})" if times > 1 else str(count) for count, times in runs)
    assert hostlists.expand_counts(text) == [count for count, times in runs for _ in range(times)]


SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-4]"}


@pytest.mark.parametrize(
    ("env", "slots"),
    [
        ({"SLURM_NTASKS": "7", "SLURM_TASKS_PER_NODE": "2(x3),1"}, [2, 2, 2, 1]),
        ({"SLURM_NTASKS_PER_NODE": "3"}, [3, 3, 3, 3]),
        ({"SLURM_TASKS_PER_NODE": "64(x4)"}, [1, 1, 1, 1]),  # CPUs: no tasks were asked for
        ({"SLURM_TASKS_PER_NODE": "64(x4)", "SLURM_GPUS_ON_NODE": "8"}, [8, 8, 8, 8]),
    ],
)
def test_slots_of_a_slurm_job(env, slots):
    assert hostlists.from_slurm({**SLURM, **env}) == dict(zip(("n1", "n2", "n3", "n4"), slots, strict=True))


def test_a_slurm_job_that_does_not_add_up():
    with pytest.raises(hostlists.Fault, match="4 hosts and the tasks of 3"):
        hostlists.from_slurm({**SLURM, "SLURM_NTASKS": "6", "SLURM_TASKS_PER_NODE": "2(x3)"})


def test_other_schedulers(tmp_path):
    nodes = tmp_path / "nodes"
    nodes.write_text("b\nb\na\n")
    absent = tmp_path / "none"
    assert hostlists.from_environment({"PBS_NODEFILE": str(nodes)}, absent)[0] == {"b": 2, "a": 1}
    assert hostlists.from_environment({"LSB_MCPU_HOSTS": "a 2 b 4 "}, absent)[0] == {"a": 2, "b": 4}
    with pytest.raises(hostlists.Fault, match="LSB_MCPU_HOSTS='a 2 b'"):
        hostlists.from_lsf("a 2 b")
    nodes.write_text("espresso-worker-0.espresso.default.svc slots=2\nespresso-worker-1.espresso.default.svc slots=2\n")
    found, where = hostlists.from_environment({}, nodes)
    assert list(found.values()) == [2, 2] and where == str(nodes)
    with pytest.raises(hostlists.Fault, match="no allocation of Slurm, PBS or LSF and no MPIJob"):
        hostlists.from_environment({}, absent)


@pytest.mark.parametrize(
    ("text", "slots"),
    [
        ("# ours\n\na slots=2\nb   slots=4 max_slots=8 # big\n", {"a": 2, "b": 4}),
        ("a:2\nuser@b:4 binding=none\n", {"a": 2, "b": 4}),
        ("a\nb\na\n", {"a": 2, "b": 1}),
        ("10.0.0.1 slots = 2\n", {"10.0.0.1": 2}),
    ],
)
def test_hostfiles_of_every_form_are_read(tmp_path, text, slots):
    path = tmp_path / "hosts"
    path.write_text(text)
    assert hostlists.from_file(path) == slots


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a slots=two\n", "slots=two"),
        ("a slots=0\n", "'a' has 0 slots"),
        ("a slots=1\na slots=1\n", "'a' stands there twice"),
        ("a\na slots=1\n", "'a' stands there twice"),
        ("a b c\n", "'a b c' is not of the form"),
        ("-oProxyCommand=x:1\n", "not of the form"),  # ssh would take it for an option
        ("\n", "names no host"),
    ],
)
def test_hostfiles_that_cannot_be_read(tmp_path, text, fault):
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(hostlists.Fault, match=fault):
        hostlists.from_file(path)


@given(st.dictionaries(names, st.integers(1, 99), min_size=1, max_size=5), st.sampled_from(sorted(hostlists.FORMS)))
def test_forms_are_read_back_and_deepspeeds_is_ours(tmp_path_factory, slots, form):
    path = tmp_path_factory.mktemp("form") / "hosts"
    path.write_text(hostlists.render(slots, form))
    assert hostlists.from_file(path) == slots
    if form == "deepspeed":
        assert read_hostfile(path) == slots
    elif form == "mpich":
        with pytest.raises(FileError):
            read_hostfile(path)


def hostfile(*words, **env):
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "PBS", "LSB"))}
    command = [sys.executable, "-ES", str(LAUNCH / "hostfile"), *map(str, words)]  # needs nothing that is installed
    return subprocess.run(command, env={**plain, **env}, capture_output=True, text=True, timeout=60)


def test_the_command_writes_and_refuses(tmp_path):
    env = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "4", "SLURM_TASKS_PER_NODE": "2(x2)", "SLURM_JOB_ID": "7"}
    done = hostfile("write", "-o", tmp_path / "hosts", **env)
    assert done.returncode == 0 and "2 hosts, 4 slots, from Slurm job 7" in done.stderr
    assert read_hostfile(tmp_path / "hosts") == {"n1": 2, "n2": 2}
    assert hostfile("write", tmp_path / "hosts", "--form", "mpich", "--slots", 1).stdout == "n1:1\nn2:1\n"
    wrong = hostfile("write", tmp_path / "none")
    assert wrong.returncode == 1 and "cannot read this hostfile" in wrong.stderr and "Traceback" not in wrong.stderr
    assert hostfile("write", "--slots", 0).returncode == 2


GOOD = {"name": "a", "address": "10.0.0.1", "python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8", "espresso-ds": "0.1.0"}
GOOD |= {"mpi4py": "4.1.2", "hook": "yes"}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"torch": "2.12.0"}, "c: torch is 2.12.0, others have 2.13.0"),
        ({"mpi4py": "missing"}, "c: mpi4py is missing, others have 4.1.2"),
        ({"hook": "missing"}, "c: the start-up hook is missing; run `espresso install-hook`"),
        ({"address": "127.0.1.1"}, "c: its name c resolves to 127.0.1.1, .*GLOO_SOCKET_IFNAME"),
        ({"name": "b"}, "b and c are one machine, b"),
        ({"ahead_s": -7.0}, "c: its clock is at least 7 s behind ours"),
        ({"fault": "no answer in 30 s"}, "c: no answer in 30 s"),
    ],
)
def test_what_differs_is_named_with_its_host(changes, fault):
    def answer(host, **more):
        told = {**GOOD, "name": host, **{key: value for key, value in more.items() if key in GOOD}}
        return hostcheck.Answer(told, more.get("ahead_s", 0.0), more.get("fault", ""))

    hosts = {"a": 1, "b": 1, "c": 1}
    assert hostcheck.faults(hosts, [answer("a"), answer("b"), answer("c")], 5.0) == []
    answers = [answer("a"), answer("b"), answer("c", **changes)]
    (found,) = hostcheck.faults(hosts, answers, 5.0)
    assert re.match(fault, found), found
    assert len({len(line.split()) for line in hostcheck.table(hosts, answers).splitlines()[:3]}) == 1


SSH = """#!/bin/sh
while [ "$1" = -o ]; do shift 2; done
host=$1
shift
echo Welcome # as login files do
case $host in
near) exec sh -c "$*" ;;
late) (echo "import time; real = time.time; time.time = lambda: real() + 60"; cat) | sh -c "$*" ;;
*) echo "ssh: Could not resolve hostname $host" >&2; exit 255 ;;
esac
"""


def test_hosts_are_asked_over_ssh(tmp_path):
    """Through a stand-in for ssh that knows two hosts, both this machine, and shifts the clock of one."""
    ssh = tmp_path / "ssh"
    ssh.write_text(SSH)
    ssh.chmod(0o755)
    (tmp_path / "hosts").write_text("near slots=1\nlate slots=1\ngone slots=1\n")
    done = hostfile("check", tmp_path / "hosts", "--ssh", ssh, "--python", sys.executable)
    assert done.returncode == 1, done.stdout + done.stderr
    head, near, late, gone, *faults = done.stdout.splitlines()
    assert head.split()[:5] == ["host", "slots", "name", "address", "python"]
    assert near.split()[4] == sys.version.split()[0] and near.endswith("same")
    assert float(late.split()[-2]) > 1
    assert gone.split() == ["gone", "1", "unreachable"]
    told = "\n".join(faults)
    assert "gone: ssh: Could not resolve hostname gone" in told and "late: its clock is at least" in told
    assert "near and late are one machine" in told and "3 hosts, " in told


@pytest.mark.slow
def test_the_check_reaches_emulated_hosts(tmp_path):
    emulate = [sys.executable, LAUNCH / "emulate", "--rate", "none", "--", LAUNCH / "hostfile", "check", "{hostfile}"]
    done = run(emulate, cwd=tmp_path)
    if done.returncode == 3:
        pytest.skip(done.stdout.strip())
    lines = done.stdout.splitlines()
    assert [line.split()[2:5] for line in lines[1:3]] == [
        ["host0", "10.77.0.1", sys.version.split()[0]],
        ["host1", "10.77.0.2", sys.version.split()[0]],
    ]
    assert all(line.endswith("same") for line in lines[1:3])
    wrong = [line for line in lines[3:-1] if "start-up hook" not in line]
    assert not wrong, done.stdout
