#!/usr/bin/env bash
# Table 5: GRPO with groups of 4, 8 and 12. Groups of 8 are grpo of table1.sh (run that first).
#   bash tables/table5.sh [laptop|gpu|paper]
set -euo pipefail
cd "$(dirname "$0")/.."
source tables/scales.sh "$@"
name=${AT}table5 out=results/${AT}table5
for seed in $SEEDS; do
  for size in 4 12; do
    flags="--sync-every 1 --samples-per-prompt $size --seed $seed $SHORT $GRPO"
    echo "$name/grpo-$size/$seed train_grpo.py $flags"
  done
done | bash tables/run.sh
.venv/bin/python tables/report.py --runs "$out/grpo-4" "$TABLE1/grpo" "$out/grpo-12" \
  --smooth 10 $UNTIL --panels reward entropy length pair_frac --out "$out/curves.png" \
  --table "$out/table.md" --paper table5 --compare {grpo-4,grpo-12}:grpo
