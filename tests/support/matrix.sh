#!/usr/bin/env bash
# Both gates of the suite with the oldest and the newest torch and Triton:
#
#     tests/support/matrix.sh oldest|newest|both
#
# Each pair has a virtual environment in out/matrix, which later runs reuse: 6 to 7 GB, where pip takes torch's CUDA
# build. The gates' logs lie beside it. Exit status 1 if a gate fails. PYTHON: the interpreter, else python3.
set -euo pipefail
cd "$(dirname "$0")/../.."

pins() {
    case $1 in
        oldest) echo torch==2.9.0 triton==3.5.0 numpy==2.2.6 ;; # the interpreter of Triton 3.6 and before: NumPy below 2.4
        newest) echo torch==2.14.1 triton==3.8.0 numpy==2.4.6 ;;
        *) echo "usage: $0 oldest|newest|both" >&2 && exit 2 ;;
    esac
}

install() { # NAME PIN...
    local venv=out/matrix/$1 pins="${*:2}"
    [[ "$(cat "$venv/pins" 2>/dev/null)" == "$pins" ]] && return
    "${PYTHON:-python3}" -m venv --clear "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${@:2}" \
        --requirement <(grep -vE '^(torch|triton|numpy|mypy|ruff)==' requirements.txt)
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
    echo "$pins" >"$venv/pins"
}

gate() { # NAME GATE MARKER TRITON_INTERPRET
    local log=out/matrix/$1-$2.log verdict=passed
    TRITON_INTERPRET=$4 "out/matrix/$1/bin/python" -m pytest -q -m "$3" >"$log" 2>&1 || verdict=FAILED
    echo "$1, $2: $verdict, $(tail -n 1 "$log")"
    [[ $verdict == passed ]]
}

names=${1:-}
[[ $names == both ]] && names="oldest newest"
failed=0
for name in ${names:-none}; do
    pinned=$(pins "$name") || exit
    read -ra pinned <<<"$pinned"
    echo "$name: ${pinned[*]}"
    install "$name" "${pinned[@]}"
    gate "$name" values "not codegen" 1 || failed=1
    gate "$name" codegen codegen 0 || failed=1
done
exit "$failed"
