#!/usr/bin/env bash
# Train and measure the models of "Forgetting or flatness" in docs/results.md, on two CPU cores. Run it again to go on.
# Flags, such as --dataset FOLDER, are the sweep's.
set -euo pipefail
export OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=1

train() { ACCELERATE_MIXED_PRECISION=bf16 python sweep.py "$@"; }
for sweep in sweeps/cifar10_m.yaml sweeps/cifar10_random.yaml; do
    train $sweep "$@" &
    train $sweep "$@"
    wait $!
done

# measure NAME [flags]: what of it goes to outputs/cifar10_m_NAME; later flags hold.
# Without --, torchrun takes --m for an option of its own.
measure() {
    local name=$1 && shift
    torchrun --standalone --nproc_per_node 2 -- measure_forgetting.py --runs outputs/cifar10_m/runs/* --perturbations own sam \
        --micro-batches 4 --examples 5000 --hessian-examples 16 --output "outputs/cifar10_m_$name" "$@"
}
measure train --hessian-examples 256
measure test --hessian-examples 256 --epochs 30 --split test
measure common --epochs 30 --perturbations sam --rho 0.1 --m 128
measure perturbations --epochs 30 --perturbations obf random
vary() { measure "$@" --epochs 30 --runs outputs/cifar10_m/runs/seed=0,*; }
vary miller_madow --miller-madow
vary examples_2500 --examples 2500
vary examples_1000 --examples 1000
vary thresholds --thresholds 0.25 0.5 0.75
vary softmax --link softmax
vary same_thresholds --no-adjust-thresholds
python docs/cifar10_forgetting.py --collect outputs
