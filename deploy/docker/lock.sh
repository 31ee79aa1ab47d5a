#!/usr/bin/env bash
# Write the locked dependencies of the images anew: after a change of pyproject.toml, or to take newer releases.
# Needs uv (pip install uv); resolves for the images' Python and platform, whatever machine this runs on.
set -euo pipefail
cd "$(dirname "$0")"
lock() { # FILE, then what to resolve
    local file=$1
    shift
    uv pip compile --quiet --no-config --upgrade --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
        --generate-hashes --no-annotate --no-header --output-file "$file" "$@"
}
stores=(--extra s3 --extra gs --extra http --extra constrained --extra gguf)
lock requirements-cuda.txt ../../pyproject.toml "${stores[@]}" --extra gpu --extra quantized
# the CPU image has torch's CPU build, which comes from PyTorch's own index: see the Dockerfile
mapfile -t cuda < <(grep -oE '^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)' requirements-cuda.txt)
# the same releases as in the CUDA image
pins=$(mktemp)
trap 'rm -f "$pins"' EXIT
grep -oE '^[a-z0-9-]+==[^ ]+' requirements-cuda.txt >"$pins"
lock requirements-cpu.txt ../../pyproject.toml "${stores[@]}" --constraint "$pins" "${cuda[@]/#/--no-emit-package=}"
lock requirements-build.txt - <<<'hatchling>=1.27'
