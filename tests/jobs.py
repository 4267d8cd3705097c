"""Starting several ranks in tests: a fixed port per slot, a deadline, and no leftovers in /dev/shm."""

import os
import signal
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
BIN = Path(sys.executable).parent


def environment(**extra) -> dict[str, str]:
    """The environment of a job: one thread per rank, the CPU, tests importable, no plan but the one that is asked for."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("ESPRESSO_")}
    path = f"{BIN}{os.pathsep}{env.get('PATH', '')}"
    return {
        **env,
        "PATH": path,
        "PYTHONPATH": f"{TESTS}{os.pathsep}{env.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        **extra,
    }


def run(command, *, timeout=150, cwd=None, **extra) -> subprocess.CompletedProcess:
    """Run a job to its end, output and errors together; the whole process group is killed at the deadline."""
    child = subprocess.Popen(
        [str(word) for word in command],
        env=environment(**extra),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        child.terminate()  # mpirun ends its ranks, which are not of its process group
        try:
            output, _ = child.communicate(timeout=15)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            output, _ = child.communicate()
        raise AssertionError(f"not done after {timeout} s: {command}\n{output[-4000:]}") from None
    finally:
        for leftover in Path("/dev/shm").glob("deepspeed_allreduce_buffer_*"):
            leftover.unlink(missing_ok=True)
    return subprocess.CompletedProcess(command, child.returncode, output)


def torchrun(ranks: int, port: int) -> list:
    """The start of a torchrun command for local ranks."""
    return [BIN / "torchrun", "--nproc-per-node", ranks, "--master-port", port]
