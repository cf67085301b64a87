#!/usr/bin/env bash
# Everything that data/ comes from, on two CPU cores: 35 minutes. Run it again to go on.
set -euo pipefail
export OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=1
out=outputs/digits

for name in methods obf m; do
    sweep=(python sweep.py experiments/digits/$name.yaml --output $out/$name)
    "${sweep[@]}" &
    "${sweep[@]}"
    wait $!
done
python measure_forgetting.py --runs $out/m/runs/* --perturbations own sam --micro-batches 4 --hessian-examples 256 \
    --output $out/forgetting
python -m experiments.digits.tables --collect outputs
