#!/usr/bin/env bash
# Remakes both locks with uv: the GPU lane first, whose pins then bind the CPU lane, so that the two differ only where
# a build differs. Usage: bash .ci/lock.sh   (needs uv on the PATH; installing from the locks needs only pip)
set -euo pipefail
cd "$(dirname "$0")/.."
compile() { # compile LANE [uv options]
    local lane=$1
    shift
    uv pip compile pyproject.toml --extra "$lane" --extra offline --extra demo --extra redis --group dev --universal --python-version 3.11 \
        --generate-hashes --no-emit-package torch --no-header --no-annotate --quiet "$@" -o ".ci/locks/$lane.txt"
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rm -f .ci/locks/gpu.txt .ci/locks/cpu.txt
compile gpu
pins() { grep -oE '^[A-Za-z0-9_.-]+==[^ ]+( ; [^\\]+)?' .ci/locks/gpu.txt; }
# A CPU torch needs none of the CUDA packages that the registry's own build names. (--override replaces the project's list.)
python3 -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["tool"]["uv"]["override-dependencies"], sep="\n")' \
    >"$work/overrides.txt"
pins | grep -E '^(nvidia|cuda|triton)' | sed -E "s/==.*/; sys_platform == 'never'/" >>"$work/overrides.txt"
pins | grep -vE '^(nvidia|cuda|triton)' >"$work/constraints.txt"
compile cpu --override "$work/overrides.txt" --constraint "$work/constraints.txt"
