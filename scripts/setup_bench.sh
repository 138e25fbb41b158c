#!/usr/bin/env bash
# Install the libraries of benchmarks/requirements.txt into .venv-bench, each line on its own: one
# that does not install is left out, and its reason is kept in .venv-bench/left_out.txt.
# Called by `make bench`; does nothing when .venv-bench is up to date. PYTHON=... as in setup.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
venv=.venv-bench
state=$venv/setup.state
wanted() { "$python" --version; cat benchmarks/requirements.txt scripts/setup_bench.sh | sha256sum; }

[ -f "$state" ] && [ "$(cat "$state")" = "$(wanted)" ] && exit 0
"$python" -m venv --clear "$venv"
grep -v '^#' benchmarks/requirements.txt >"$venv/lines.txt"
tr ' ' '\n' <"$venv/lines.txt" | grep -v simd >"$venv/constraints.txt"
while read -r line; do
    name=${line%%==*}
    echo "setup: installing $name into $venv"
    place=()
    [ "$name" = pillow-simd ] && place=(--no-deps --target "$venv/pillow-simd")
    # shellcheck disable=SC2086  # a line may name two packages that belong together
    if ! "$venv/bin/python" -m pip --disable-pip-version-check --no-input install -q \
        -c "$venv/constraints.txt" "${place[@]}" $line >"$venv/log.txt" 2>&1 </dev/null; then
        reason=$( (grep -i error "$venv/log.txt" || echo "pip failed") | tail -n 1)
        echo "setup: $name is left out: $reason" >&2
        echo "$name: $reason" >>"$venv/left_out.txt"
        cp "$venv/log.txt" "$venv/$name.log"
    fi
done <"$venv/lines.txt"
wanted >"$state"
echo "setup: .venv-bench is ready"
