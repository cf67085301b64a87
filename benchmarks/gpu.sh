#!/usr/bin/env bash
# Every figure of this project that takes an NVIDIA GPU, each beside its target: one GPU, at most 8 minutes, no network.
# PYTHON names the interpreter; flags are those of gpu.py.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" benchmarks/gpu.py "$@"
