#!/usr/bin/env bash
# Figure 8: GroupDPO (all pairs of a prompt), and GroupDPO + 0.01 GRPO. The paper's claim: both behave like a
# single pair, which is dpo-1 of table1.sh (run that first).
#   bash tables/figure8.sh [laptop|gpu|paper]
set -euo pipefail
cd "$(dirname "$0")/.."
source tables/scales.sh "$@"
name=${AT}figure8
for seed in $SEEDS; do
  group="train_dpo.py --sync-every 1 --pairing all --seed $seed $SHORT $DPO"
  echo "$name/group-dpo/$seed $group"
  echo "$name/group-dpo-grpo/$seed $group --grpo-coef 0.01"
done | N=0 bash tables/run.sh
.venv/bin/python tables/report.py --runs "$TABLE1/dpo-1" "results/$name/"{group-dpo,group-dpo-grpo} \
  --smooth 10 $UNTIL --panels reward entropy length --out "results/$name/curves.png" \
  --compare {group-dpo:dpo-1,group-dpo-grpo:group-dpo} --compare-metrics reward entropy length
