#!/usr/bin/env bash
# Figure 6: an entropy bonus in online DPO. The paper's claim: keeping entropy stable is hard. 5e-4 is the largest
# bonus that the paper tries. Without one: dpo-1 of table1.sh (run that first).
#   bash tables/figure6.sh [laptop|gpu|paper]
set -euo pipefail
cd "$(dirname "$0")/.."
source tables/scales.sh "$@"
name=${AT}figure6
for seed in $SEEDS; do
  for coef in 5e-4 1e-2 1e-1; do
    echo "$name/entropy-$coef/$seed train_dpo.py --sync-every 1 --entropy-coef $coef --seed $seed $SHORT $DPO"
  done
done | N=0 bash tables/run.sh
.venv/bin/python tables/report.py --runs "$TABLE1/dpo-1" "results/$name/"entropy-{5e-4,1e-2,1e-1} \
  --smooth 10 $UNTIL --panels entropy reward length --out "results/$name/curves.png" \
  --compare entropy-{5e-4,1e-2,1e-1}:dpo-1 --compare-metrics entropy entropy/first reward length
