#!/usr/bin/env bash
# Figure 8: GroupDPO (all pairs of a prompt), and GroupDPO + 0.01 GRPO. The paper's claim: both behave like a single pair,
# which is dpo-1 of table1.sh (run that first).
#   bash tables/figure8.sh [laptop|gpu|paper]
set -euo pipefail
cd "$(dirname "$0")/.."
source tables/scales.sh "$@"
for seed in $SEEDS; do
  echo "${AT}figure8/group-dpo/$seed train_dpo.py --sync-every 1 --pairing all --seed $seed $SHORT $DPO"
  echo "${AT}figure8/group-dpo-grpo/$seed train_dpo.py --sync-every 1 --pairing all --grpo-coef 0.01 --seed $seed $SHORT $DPO"
done | N=0 bash tables/run.sh
.venv/bin/python report.py --runs results/${AT}table1/dpo-1 results/${AT}figure8/{group-dpo,group-dpo-grpo} --smooth 10 \
  --panels reward entropy length --out results/${AT}figure8/curves.png
