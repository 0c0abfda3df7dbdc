#!/usr/bin/env bash
# Not in the paper, which runs GRPO on-policy only: GRPO on stale responses, with each --correction. Fresh ones:
# grpo of table1.sh. Until step 100 s = 100 is the same run as offline, so its rows show both.
#   bash tables/stale_grpo.sh [laptop|gpu|paper]
set -euo pipefail
cd "$(dirname "$0")/.."
source tables/scales.sh "$@"
name=${AT}stale_grpo out=results/${AT}stale_grpo table1=results/${AT}table1
{
  for how in none seq_tis clip dppo; do
    for seed in ${SEEDS:0:5}; do # three of them
      echo "$name/100-$how/$seed train_grpo.py --sync-every 100 --correction $how --seed $seed $LONG $GRPO"
    done
  done
  for how in none seq_tis clip dppo; do
    for seed in ${SEEDS:0:5}; do
      echo "$name/10-$how/$seed train_grpo.py --sync-every 10 --correction $how --seed $seed $SHORT $GRPO"
    done
  done
} | WHEN=$EARLY bash tables/run.sh
.venv/bin/python tables/report.py --runs "$table1/grpo" "$out/"{100,10}-{none,clip,seq_tis,dppo} \
  --smooth 10 --panels reward entropy ess bound_frac kl_ref --out "$out/curves.png" --table "$out/table.md"
