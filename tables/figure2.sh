#!/usr/bin/env bash
# Figure 2: online DPO on mathematics with the reference fixed to the seed model. The paper's claim: response
# length collapses, and reward falls with it. With a synced reference: dpo-1 of table1.sh (run that first).
#   bash tables/figure2.sh [laptop|gpu|paper]
set -euo pipefail
cd "$(dirname "$0")/.."
source tables/scales.sh "$@"
name=${AT}figure2
for seed in $SEEDS; do
  echo "$name/fixed-reference/$seed train_dpo.py --sync-every 1 --sync-ref-every inf --seed $seed $LONG $DPO"
done | N=0 bash tables/run.sh
.venv/bin/python tables/report.py --runs "results/${AT}table1/dpo-1" "results/$name/fixed-reference" --smooth 10 \
  --panels reward length entropy --out "results/$name/curves.png" \
  --compare fixed-reference:dpo-1 --compare-metrics reward length entropy
