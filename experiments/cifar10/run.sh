#!/usr/bin/env bash
# Everything that data/ comes from, on two CPU cores: about seven hours. Run it again to go on.
# bash experiments/cifar10/run.sh [a copy of CIFAR-10]
set -euo pipefail
export OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=1
dataset=${1:-uoft-cs/cifar10} out=outputs/cifar10

# train NAME [flags]: a sweep, by two workers. Later flags hold.
train() {
    local sweep=(python sweep.py "experiments/cifar10/$1.yaml" --output "$out/$1" --dataset "$dataset" "${@:2}")
    ACCELERATE_MIXED_PRECISION=bf16 "${sweep[@]}" &
    ACCELERATE_MIXED_PRECISION=bf16 "${sweep[@]}"
    wait $!
}

# evaluate NAME SWEEP DATA [flags]: the models of a sweep.
evaluate() {
    python eval_robustness.py --model "$out/$2"/runs/*/last --data "$3" --output "$out/$1" "${@:4}"
}

python -m experiments.cifar10.tables --folders outputs --dataset "$dataset"
train tune
train methods
train m
train m_base
ACCELERATE_MIXED_PRECISION=bf16 python sweep.py experiments/cifar10/time.yaml --output $out/time --dataset "$dataset"
train halves --dataset $out/images/first
train transfer_tune --script finetune_cifar --dataset $out/images/second
train transfer --script finetune_cifar --dataset $out/images/second

evaluate test methods test="$dataset"
evaluate corrupted methods subset=$out/images/subset --corrupt
evaluate transfer_test transfer test=$out/images/second/test
python -m experiments.cifar10.tables --collect outputs
