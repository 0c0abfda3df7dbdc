#!/usr/bin/env bash
# Figure 6: an entropy bonus in online DPO. The paper's claim: it delays the collapse of entropy, and keeping it stable is
# hard. The coefficient 0 is dpo-1 of table1.sh (run that first); 5e-4 is the largest that the paper tries.
#   bash tables/figure6.sh [laptop|gpu|paper]
set -euo pipefail
cd "$(dirname "$0")/.."
source tables/scales.sh "$@"
for seed in $SEEDS; do
  for coef in 5e-4 1e-2 1e-1; do
    echo "${AT}figure6/entropy-$coef/$seed train_dpo.py --sync-every 1 --entropy-coef $coef --seed $seed $SHORT $DPO"
  done
done | N=0 bash tables/run.sh
.venv/bin/python report.py --runs results/${AT}table1/dpo-1 results/${AT}figure6/entropy-{5e-4,1e-2,1e-1} --smooth 10 \
  --panels entropy reward length --out results/${AT}figure6/curves.png
