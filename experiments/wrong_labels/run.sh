#!/usr/bin/env bash
# Everything that data/ comes from, on two CPU cores: about five hours. Run it again to go on.
# bash experiments/wrong_labels/run.sh [a copy of CIFAR-10]
set -euo pipefail
export OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=1 ACCELERATE_MIXED_PRECISION=bf16
dataset=${1:-uoft-cs/cifar10}

# train NAME FOLDER: a sweep, by two workers
train() {
    local sweep=(python sweep.py "experiments/wrong_labels/$1.yaml" --output "outputs/$2" --dataset "$dataset")
    "${sweep[@]}" &
    "${sweep[@]}"
    wait $!
}
train rho wrong_labels
train methods wrong_labels
train controls wrong_labels_controls
python -m experiments.wrong_labels.tables --collect outputs
