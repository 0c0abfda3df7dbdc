#!/usr/bin/env bash
# What the paper says of stability: with a fixed reference and faster training length and reward collapse (its figure
# 2; figure2.sh is at the normal rate); a large Adam epsilon makes divergence rarer; GRPO normalised by the length of
# a response is less stable. Fast is four times the learning rate, at laptop size that of GRPO. Beside dpo-1 and grpo of
# table1.sh (run that first).
#   bash tables/stability.sh [laptop|gpu|paper]
set -euo pipefail
cd "$(dirname "$0")/.."
source tables/scales.sh "$@"
name=${AT}stability out=results/${AT}stability
must_have "$out"
for seed in $SEEDS; do
  fast="train_dpo.py --sync-every 1 --seed $seed $SHORT $DPO --lr $FAST"
  echo "$name/fast/$seed $fast"
  echo "$name/fast-fixed/$seed $fast --sync-ref-every inf --adam-eps 1e-8"
  echo "$name/fast-fixed-eps/$seed $fast --sync-ref-every inf --adam-eps 1e-4"
  echo "$name/grpo-sequence/$seed train_grpo.py --sync-every 1 --seed $seed $SHORT $GRPO --normalize sequence"
done | bash tables/run.sh
mapfile -t rows < <(have "$out" fast fast-fixed fast-fixed-eps grpo-sequence)
mapfile -t pairs < <(of_rows "dpo-1 grpo ${rows[*]}" fast:dpo-1 fast-fixed:{dpo-1,fast} fast-fixed-eps:fast-fixed \
  grpo-sequence:grpo grpo:fast)
.venv/bin/python tables/report.py --runs "results/${AT}table1/"{dpo-1,grpo} "${rows[@]/#/$out/}" --smooth 10 $UNTIL \
  --panels reward length entropy --out "$out/curves.png" --table "$out/table.md" --compare "${pairs[@]}" \
  --compare-metrics reward length entropy
