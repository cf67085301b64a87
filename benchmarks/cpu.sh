#!/usr/bin/env bash
# What a CPU must do beside timm as its users run it: each figure beside its target, with ok or MISSED. Nothing else should run
# on the machine meanwhile. About 40 minutes on two cores; PYTHON names the interpreter, TIMM a checkout of timm's repository.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
: "${TIMM:?must name a checkout of huggingface/pytorch-image-models}"

title() { printf '\n=== %s\n' "$*"; }

title "Training, beside timm's train.py: as it is, and tuned by glibc's variables"
ACCELERATE_USE_CPU=1 "$python" benchmarks/training.py --timm "$TIMM" --device cpu

title "Evaluation, beside timm's validate.py: as it is, and tuned"
"$python" benchmarks/allocator.py --timm "$TIMM"

title "Training input of photographs of 500 x 375, and of 12 megapixels, beside timm's loader"
"$python" benchmarks/loader.py
"$python" benchmarks/loader.py --size 4032 3024 --images 16 --batch-size 8
