#!/usr/bin/env bash
# Train the models of this page and measure them, on two CPU cores: 3 hours and 1¼ hours. Run it again to go on.
# bash experiments/forgetting/run.sh [a copy of CIFAR-10]
set -euo pipefail
export OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=1
dataset=${1:-uoft-cs/cifar10} models=outputs/cifar10/m out=outputs/forgetting

# train SWEEP OUTPUT: by two workers
train() {
    local sweep=(python sweep.py "$1" --dataset "$dataset" --output "$2")
    ACCELERATE_MIXED_PRECISION=bf16 "${sweep[@]}" &
    ACCELERATE_MIXED_PRECISION=bf16 "${sweep[@]}"
    wait $!
}
train experiments/cifar10/m.yaml $models
train experiments/forgetting/random.yaml $out/random

# measure NAME [flags]: later flags hold. Without --, torchrun takes --m for an option of its own.
measure() {
    local name=$1 && shift
    torchrun --standalone --nproc_per_node 2 -- measure_forgetting.py --runs $models/runs/* \
        --perturbations own sam --micro-batches 4 --link sigmoid --examples 5000 --hessian-examples 16 \
        --output "$out/$name" "$@"
}
measure train --hessian-examples 256
measure test --hessian-examples 256 --epochs 30 --split test
measure common --epochs 30 --perturbations sam --rho 0.1 --m 128
measure perturbations --epochs 30 --perturbations obf random

# vary NAME [flags]: the models of seed 0, measured in another way.
vary() { measure "$@" --epochs 30 --runs $models/runs/seed=0,*; }
vary miller_madow --miller-madow
vary examples_2500 --examples 2500
vary examples_1000 --examples 1000
vary thresholds --thresholds 0.25 0.5 0.75
vary softmax --link softmax
vary same_thresholds --no-adjust-thresholds
python -m experiments.forgetting.tables --collect outputs
