#!/usr/bin/env bash
# Not in the paper, which runs GRPO on-policy only: GRPO on responses that are up to 9 steps old, without a
# correction, with PPO's clipped ratio, and with truncated importance sampling. Fresh ones: grpo of table1.sh.
#   bash tables/stale_grpo.sh [laptop|gpu|paper]
set -euo pipefail
cd "$(dirname "$0")/.."
source tables/scales.sh "$@"
name=${AT}stale_grpo out=results/${AT}stale_grpo
for seed in $SEEDS; do
  for how in tis none clip; do
    echo "$name/$how/$seed train_grpo.py --sync-every 10 --correction $how --seed $seed $SHORT $GRPO"
  done
done | bash tables/run.sh
.venv/bin/python tables/report.py --runs "$TABLE1/grpo" "$out/"{none,clip,tis} \
  --smooth 10 $UNTIL --panels reward entropy ratio_max bound_frac kl_ref \
  --out "$out/curves.png" --table "$out/table.md" --compare {none,clip,tis}:grpo
