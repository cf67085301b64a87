#!/usr/bin/env bash
# Everything that data/ comes from, on two CPU cores: about five hours. Run it again to go on.
# bash experiments/wrong_labels/run.sh [a copy of CIFAR-10]
set -euo pipefail
export OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=1 ACCELERATE_MIXED_PRECISION=bf16
out=outputs/wrong_labels

for name in rho methods; do
    sweep=(python sweep.py "experiments/wrong_labels/$name.yaml" --output $out --dataset "${1:-uoft-cs/cifar10}")
    "${sweep[@]}" &
    "${sweep[@]}"
    wait $!
done
python -m experiments.wrong_labels.tables --collect outputs
