#!/usr/bin/env bash
# Not in the paper, which runs GRPO on-policy only: GRPO on responses that are up to 9 steps old, without a correction, with
# PPO's clipped ratio, and with truncated importance sampling. Fresh responses are grpo of table1.sh (run that first).
#   bash tables/stale_grpo.sh [laptop|gpu|paper]
set -euo pipefail
cd "$(dirname "$0")/.."
source tables/scales.sh "$@"
for seed in $SEEDS; do
  for correction in tis none clip; do
    echo "${AT}stale_grpo/$correction/$seed train_grpo.py --sync-every 10 --correction $correction --seed $seed $SHORT $GRPO"
  done
done | bash tables/run.sh
.venv/bin/python report.py --runs results/${AT}table1/grpo results/${AT}stale_grpo/{none,clip,tis} --smooth 10 \
  --panels reward entropy ratio_max bound_frac kl_ref --out results/${AT}stale_grpo/curves.png --table results/${AT}stale_grpo/table.md
