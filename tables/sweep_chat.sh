#!/usr/bin/env bash
# The learning rate and beta of each algorithm in chat at laptop scale, chosen on validation requests by the
# learned reward (all that a user sees who has no true one) with a training seed that no table uses:
#   bash tables/sweep_chat.sh   (an hour on 2 cores)
# DPO gets one pair for all values of the dial: the best mean over the dial's ends, s = 1 and inf.
set -euo pipefail
cd "$(dirname "$0")/.."
source tables/scales.sh laptop
{
  while read -r beta lr; do
    for s in 1 inf; do
      echo "sweep_chat/dpo-$s-beta$beta-lr$lr train_dpo.py --sync-every $s --seed 100 $LONG $CHAT chat=tiny" \
        "--beta $beta --lr $lr"
    done
  done <<<$'0.1 2e-4\n0.01 5e-5\n0.1 1e-4'
  for lr in 2e-4 4e-4; do
    echo "sweep_chat/grpo-lr$lr train_grpo.py --sync-every 1 --seed 100 $LONG $CHAT chat=tiny --lr $lr"
  done
} | DATA=tiny@validation N=1 CHAT=tiny@validation bash tables/run.sh
.venv/bin/python tables/report.py \
  --runs results/sweep_chat/{dpo-{1,inf}-beta{0.1-lr{1e-4,2e-4},0.01-lr5e-5},grpo-lr{2e-4,4e-4}} \
  --panels reward ${TRUTH:-} length policy_entropy --smooth 10 --out results/sweep_chat/curves.png \
  --chat-table results/sweep_chat/table.md --chat-step "$LAST"
