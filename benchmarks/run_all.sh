#!/usr/bin/env bash
# Every target of this project that is a time, a memory or an accuracy: each figure beside its target. Nothing else should run
# on the machine meanwhile. About an hour and a half on two cores; PYTHON names the interpreter, TIMM a checkout of timm's repository.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

title() { printf '\n=== %s\n' "$*"; }

title "A step's time and memory"
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    PYTHON=$python bash benchmarks/gpu.sh || echo "a row of gpu.sh failed"
    for flags in "--amp bf16" "--amp bf16 --compile" "--amp fp16"; do "$python" benchmarks/step.py $flags; done
fi
"$python" benchmarks/step.py --device cpu --models vit_small_patch32_224 resnet50 --rounds 9
"$python" benchmarks/step.py --device cpu --models mlp --rounds 31

title "A CPU beside timm: training, evaluation, and training input"
if [ -n "${TIMM:-}" ]; then
    PYTHON=$python bash benchmarks/cpu.sh
else
    echo "training and evaluation are left out: TIMM must name a checkout of huggingface/pytorch-image-models"
    "$python" benchmarks/loader.py
    "$python" benchmarks/loader.py --size 4032 3024 --images 16 --batch-size 8
fi

title "Keeping freed memory"
"$python" benchmarks/allocator.py

title "Evaluation, beside timm's validation"
"$python" benchmarks/evaluation.py --rounds 9

title "Training on the digits"
"$python" benchmarks/methods.py

title "Experiment (a): 48 models, trained and measured"
start=$SECONDS
for worker in 1 2; do
    OMP_NUM_THREADS=1 "$python" sweep.py experiments/digits/m.yaml --output "$work/m" > "$work/worker$worker.txt" 2>&1 &
done
wait
OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=1 "$python" -m torch.distributed.run --standalone --nproc_per_node 2 \
    measure_forgetting.py --runs "$work"/m/runs/* --perturbations own sam --micro-batches 4 --hessian-examples 256 \
    --output "$work/forgetting" 2> "$work/measure.txt"
seconds=$((SECONDS - start))
echo "$(ls "$work/m/runs" | wc -l) models in $seconds s   target <= 1200 $([ $seconds -le 1200 ] && echo ok || echo MISSED)"
