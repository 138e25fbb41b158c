#!/usr/bin/env bash
# Install everything into .venv, this repository included; does nothing when .venv is up to date.
# Called by `make setup`.
#
#   PYTHON=python3.12 bash scripts/setup.sh     another interpreter, 3.11 or later
#
# System packages come through apt where that is permitted (root or password-free sudo); elsewhere
# one line prints the command to run. FFCV is built from source and linked with --as-needed:
# otherwise it would load every module of OpenCV that pkg-config names instead of the two it uses.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
venv=.venv
state=$venv/setup.state
log=$(mktemp)
trap 'rm -f "$log"' EXIT

fail() { echo "setup: $*" >&2; exit 1; }

# Runs a command quietly; shows the end of its output when it fails.
quietly() {
    "$@" >>"$log" 2>&1 && return
    tail -n 30 "$log" >&2
    fail "failed, for the reason above: $*"
}

check_python() {
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        fail "$python is not Python 3.11 or later; choose one: make setup PYTHON=/path/to/python3.11"
}

# What .venv depends on: the interpreter, the packages, this script, how the C library is compiled.
wanted_state() {
    "$python" --version
    cat requirements.txt pyproject.toml setup.py scripts/setup.sh | sha256sum
    echo "FAST_IMAGENET_PATHS=${FAST_IMAGENET_PATHS:-}"
}

# Names of the Debian packages that are missing.
missing_packages() {
    local version
    version=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    command -v pkg-config >/dev/null || echo pkg-config
    command -v g++ >/dev/null || echo g++
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo "$version-venv"
    "$python" -c 'import os, sysconfig as s, sys; sys.exit(not os.path.exists(
        os.path.join(s.get_paths()["include"], "Python.h")))' || echo "$version-dev"
    pkg-config --exists opencv4 2>/dev/null || echo libopencv-dev
    pkg-config --exists libturbojpeg 2>/dev/null || echo libturbojpeg0-dev
}

install_system_packages() {
    local packages as_root=()
    packages=$(missing_packages)
    [ -z "$packages" ] && return
    packages=$(echo $packages)
    if [ "$(id -u)" != 0 ]; then
        sudo -n true 2>/dev/null && as_root=(sudo -n) || packages_by_hand "$packages"
    fi
    command -v apt-get >/dev/null || packages_by_hand "$packages"
    echo "setup: installing with apt: $packages"
    export DEBIAN_FRONTEND=noninteractive
    quietly "${as_root[@]}" apt-get update -q
    quietly "${as_root[@]}" apt-get install -qy --no-install-recommends $packages
}

packages_by_hand() {
    fail "run first: sudo apt-get install -y $1   (without apt: conda and environment.yml)"
}

make_venv() {
    local found
    found=$("$venv/bin/python" --version 2>/dev/null || true)
    if [ "$found" != "$("$python" --version)" ]; then
        "$python" -m venv --clear "$venv" || fail "$python -m venv $venv failed"
    fi
}

install_python_packages() {
    local ffcv
    ffcv=$(grep '^ffcv==' requirements.txt)
    local pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input)
    echo "setup: installing Python packages into $venv (some gigabytes the first time)"
    grep -v '^ffcv==' requirements.txt >"$venv/others.txt"
    quietly "${pip[@]}" install -q -r "$venv/others.txt"
    if [ "$("$venv/bin/python" -m pip freeze 2>/dev/null | grep '^ffcv==')" != "$ffcv" ]; then
        echo "setup: building FFCV"
        # Not from pip's cache, where a wheel that was linked otherwise may lie; built by the pinned
        # setuptools.
        LDFLAGS="-Wl,--as-needed ${LDFLAGS:-}" quietly "${pip[@]}" install -q --no-deps \
            --no-build-isolation --no-cache-dir --no-binary ffcv "$ffcv"
    fi
    # As a path to this folder, so that the package and tools/ are found from any folder; compiles
    # the C library.
    quietly "${pip[@]}" install -q --no-deps --no-build-isolation --editable .
    quietly "${pip[@]}" check
    quietly "$venv/bin/python" -c 'import ffcv.loader, cv2, torch, torchvision'
}

# The import fails where the C library is missing or was compiled from other sources.
up_to_date() {
    [ -x "$venv/bin/python" ] && [ -f "$state" ] && [ "$(cat "$state")" = "$(wanted_state)" ] &&
        env -u FAST_IMAGENET_NATIVE "$venv/bin/python" -c 'import fast_imagenet.native' 2>/dev/null
}

check_python
up_to_date && exit 0
if command -v flock >/dev/null; then  # two `make` at once: the second waits, then is up to date
    exec 9<.
    flock 9
    up_to_date && exit 0
fi
install_system_packages
make_venv
install_python_packages
echo "setup: compiling the operations for this processor (a minute or two)"
quietly "$venv/bin/python" -m fast_imagenet.ops.compile
wanted_state >"$state"
echo "setup: ready"
