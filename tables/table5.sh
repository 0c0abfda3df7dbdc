#!/usr/bin/env bash
# Table 5: GRPO with groups of 4, 8 and 12. Groups of 8 are grpo of table1.sh (run that first).
#   bash tables/table5.sh [laptop|gpu|paper]
set -euo pipefail
cd "$(dirname "$0")/.."
source tables/scales.sh "$@"
for seed in $SEEDS; do
  for size in 4 12; do
    echo "${AT}table5/grpo-$size/$seed train_grpo.py --sync-every 1 --samples-per-prompt $size --seed $seed $SHORT $GRPO"
  done
done | bash tables/run.sh
.venv/bin/python report.py --runs results/${AT}table5/grpo-4 results/${AT}table1/grpo results/${AT}table5/grpo-12 --smooth 10 \
  --panels reward entropy length pair_frac --out results/${AT}table5/curves.png --table results/${AT}table5/table.md --paper table5
