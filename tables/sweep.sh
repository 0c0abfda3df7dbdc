#!/usr/bin/env bash
# The learning rate of each algorithm, chosen on validation problems with a training seed that no table uses:
#   bash tables/sweep.sh        (half an hour on 2 cores)
# DPO gets one for all values of the dial, as in the paper: the one with the best mean over s = 1, 10 and inf.
set -euo pipefail
cd "$(dirname "$0")/.."
COMMON="--steps 200 --save-every 100 --seed 100"
for lr in 1e-4 5e-5 2e-4; do
  for s in 1 10 inf; do
    echo "runs/sweep/dpo-s$s-lr$lr train_dpo.py --sync-every $s --lr $lr $COMMON"
  done
  echo "runs/sweep/grpo-lr$lr train_grpo.py --sync-every 1 --lr $lr $COMMON"
done | DATA=tiny@validation N=4 bash tables/run.sh
