#!/usr/bin/env bash
# The learning rate of each algorithm at laptop scale, chosen on validation problems with a seed that no table uses:
#   bash tables/sweep.sh        (40 minutes on 2 cores)
# DPO gets one for all values of the dial, as in the paper: the one with the best mean over s = 1, 10 and inf at step 100.
# The middle one goes on to step 200, as long as the tables' runs, to see whether it holds.
set -euo pipefail
cd "$(dirname "$0")/.."
for lr in 1e-4 5e-5 2e-4; do
  for s in 1 10 inf; do
    steps=$([ $lr = 1e-4 ] && echo 200 || echo 100)
    echo "sweep/dpo-$s-lr$lr train_dpo.py --sync-every $s --lr $lr --steps $steps --save-every 100 --seed 100"
  done
  echo "sweep/grpo-lr$lr train_grpo.py --sync-every 1 --lr $lr --steps 100 --seed 100"
done | DATA=tiny@validation N=4 bash tables/run.sh
.venv/bin/python report.py --smooth 10 --out results/sweep/curves.png --table results/sweep/table.md \
  --runs results/sweep/{dpo-inf,dpo-10,dpo-1,grpo}-lr{5e-5,1e-4,2e-4}
