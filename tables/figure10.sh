#!/usr/bin/env bash
# Figure 10: online DPO with the chosen responses' negative log-likelihood added to the loss. The paper's claim: it helps
# neither reward nor entropy. The coefficient 0 is dpo-1 of table1.sh (run that first).
#   bash tables/figure10.sh [laptop|gpu|paper]
set -euo pipefail
cd "$(dirname "$0")/.."
source tables/scales.sh "$@"
for seed in $SEEDS; do
  echo "${AT}figure10/nll-1/$seed train_dpo.py --sync-every 1 --nll-coef 1 --seed $seed $SHORT $DPO"
done | N=0 bash tables/run.sh
.venv/bin/python report.py --runs results/${AT}table1/dpo-1 results/${AT}figure10/nll-1 --smooth 10 \
  --panels reward entropy chosen_logp length --out results/${AT}figure10/curves.png
