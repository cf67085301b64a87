#!/usr/bin/env bash
# Everything that data/ comes from, on two CPU cores: 25 minutes. Run it again to go on.
set -euo pipefail
export OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=1
out=outputs/digits

sweep=(python sweep.py experiments/digits/methods.yaml --output $out/methods)
"${sweep[@]}" &
"${sweep[@]}"
wait $!
python -m experiments.digits.tables --collect outputs
