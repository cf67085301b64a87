#!/usr/bin/env bash
# Everything that data/ comes from, on two CPU cores: about six hours. Run it again to go on.
# bash experiments/cifar10_20_seeds/run.sh [a copy of CIFAR-10]
set -euo pipefail
export OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=1
dataset=${1:-uoft-cs/cifar10} out=outputs/cifar10_20_seeds

# train NAME FOLDER: a sweep, by two workers
train() {
    local sweep=(python sweep.py "experiments/cifar10_20_seeds/$1.yaml" --output "$2" --dataset "$dataset")
    "${sweep[@]}" &
    "${sweep[@]}"
    wait $!
}
train tune ${out}_tune
train rho ${out}_rho
for seeds in seeds equal_budgets more_seeds; do train $seeds $out; done
python eval_robustness.py --model $out/runs/*/last --data test="$dataset" --output ${out}_test
python -m experiments.cifar10_20_seeds.tables --collect outputs
