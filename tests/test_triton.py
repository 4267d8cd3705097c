"""The Triton kernels: in Triton's interpreter against the torch code (`triton_cases.py`), and compiled (`triton_builds.py`).

Each in a process of its own: TRITON_INTERPRET must be set before triton is imported, and would be inherited by what other tests
start. No GPU is needed, and what only shows on one is not tested here.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: there are wheels of it for Linux on x86-64 only"
)


@pytest.mark.parametrize(("cases", "interpret"), [("triton_cases.py", "1"), ("triton_builds.py", "0")])
def test_kernels(cases, interpret, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--timeout=60", "-W", "ignore::RuntimeWarning", TESTS / cases],
        cwd=TESTS.parent,
        env=os.environ | {"TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-6000:]
