#!/usr/bin/env bash
# The learning rate of each algorithm at laptop scale, chosen on validation problems after as many steps as
# Table 1's runs have, with a training seed that no table uses:
#   bash tables/sweep.sh        (an hour on 2 cores)
# DPO gets one for all values of the dial, as in the paper: the best mean over the dial's ends, s = 1 and inf.
set -euo pipefail
cd "$(dirname "$0")/.."
{
  for lr in 2.5e-5 5e-5 1e-4; do
    for s in inf 1; do
      echo "sweep/dpo-$s-lr$lr train_dpo.py --sync-every $s --lr $lr --steps 200 --save-every 100 --seed 100"
    done
  done
  for lr in 1e-4 5e-5 2e-4 4e-4; do
    echo "sweep/grpo-lr$lr train_grpo.py --sync-every 1 --lr $lr --steps 200 --save-every 100 --seed 100"
  done
} | DATA=tiny@validation N=4 bash tables/run.sh
.venv/bin/python tables/report.py --smooth 10 --out results/sweep/curves.png --table results/sweep/table.md \
  --runs results/sweep/dpo-{inf,1}-lr{2.5e-5,5e-5,1e-4} results/sweep/grpo-lr{5e-5,1e-4,2e-4,4e-4}
