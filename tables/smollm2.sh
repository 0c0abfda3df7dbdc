#!/usr/bin/env bash
# A real model on a CPU: SmolLM2-135M-Instruct on sums of one-digit numbers, half an hour on two cores.
#   bash tables/smollm2.sh
# First make it: python tiny/smollm2.py --out models/smollm2 --problems models/one_digit.jsonl
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=2 # one run, both cores
echo "smollm2/dpo train_dpo.py --model models/smollm2 --data models/one_digit.jsonl --sync-every 5" \
  "--steps 40 --prompts-per-step 32 --max-new-tokens 40 --lr 2e-5 --dtype bfloat16" | N=0 bash tables/run.sh
.venv/bin/python tables/report.py --runs results/smollm2/dpo --out results/smollm2/curves.png
