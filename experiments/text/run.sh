#!/usr/bin/env bash
# Everything that data/ comes from, on one CPU core; start it on other cores too. Again to go on.
# bash experiments/text/run.sh [folder of TREC] [folder of SST-5] [MiniLM, a folder or on the Hub]
set -euo pipefail
export OMP_NUM_THREADS=1
trec=${1:-trec} sst5=${2:-sst5}
model=${3:-sentence-transformers/all-MiniLM-L6-v2}

python -m experiments.text.run --trec "$trec" --sst5 "$sst5" --model "$model" --output outputs/text
python -m experiments.text.tables --collect outputs
