#!/usr/bin/env bash
# Figure 10: online DPO, the chosen responses' negative log-likelihood added to the loss. The paper: it
# helps neither reward nor entropy. Without it: dpo-1 of table1.sh (run that first).
#   bash tables/figure10.sh [laptop|gpu|paper]
set -euo pipefail
cd "$(dirname "$0")/.."
source tables/scales.sh "$@"
name=${AT}figure10
for seed in $SEEDS; do
  echo "$name/nll-1/$seed train_dpo.py --sync-every 1 --nll-coef 1 --seed $seed $SHORT $DPO"
done | N=0 bash tables/run.sh
.venv/bin/python tables/report.py --runs "$TABLE1/dpo-1" "results/$name/nll-1" --smooth 10 $UNTIL \
  --panels reward entropy chosen_logp length --out "results/$name/curves.png" \
  --compare nll-1:dpo-1 --compare-metrics reward entropy length
