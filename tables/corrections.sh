#!/usr/bin/env bash
# Not in the paper, which runs GRPO on-policy only: which --correction helps GRPO on stale responses? On fresh
# ones: grpo of table1.sh (run that first). Until step 100 offline is the same run as s = 100.
#   bash tables/corrections.sh [laptop|gpu|paper]
set -euo pipefail
cd "$(dirname "$0")/.."
source tables/scales.sh "$@"
name=${AT}corrections out=results/${AT}corrections table1=results/${AT}table1
must_have "$out"
read -ra all <<<"$SEEDS"
three=("${all[@]:0:3}") # seeds: its runs are the dearest
for s in inf 10; do
  for how in none seq_tis dppo clip; do
    for seed in "${three[@]}"; do
      echo "$name/$s-$how/$seed train_grpo.py --sync-every $s --correction $how --seed $seed $SHORT $GRPO"
    done
  done
done | bash tables/run.sh
mapfile -t rows < <(have "$out" {inf,10}-{none,clip,seq_tis,dppo})
.venv/bin/python tables/report.py --runs "$table1/grpo" "${rows[@]/#/$out/}" $UNTIL --smooth 5 \
  --panels policy_entropy ess bound_frac kl_ref ratio_max staleness --out "$out/curves.png" \
  --table "$out/table.md" --compare "${rows[@]/%/:grpo}" \
  $(of_rows "${rows[*]}" {inf-{clip,seq_tis,dppo}:inf-none,10-{clip,seq_tis,dppo}:10-none})
