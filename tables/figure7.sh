#!/usr/bin/env bash
# Figure 7: the same model trained on mathematics and on chat by online DPO, the reference fixed in both: entropy,
# and the length of its responses. Chat is dpo-1 of table2.sh, and mathematics with a reference that is synced is
# table3.sh's (run those first).
#   bash tables/figure7.sh [laptop|gpu|paper]
set -euo pipefail
cd "$(dirname "$0")/.."
source tables/scales.sh "$@"
name=${AT}figure7
must_have "results/$name"
for seed in $SEEDS; do
  echo "$name/math-fixed/$seed train_dpo.py --sync-every 1 --sync-ref-every inf --seed $seed $SHORT" \
    "--model $CHAT_MODEL $MATH_DPO"
done | N=0 bash tables/run.sh
.venv/bin/python tables/report.py --names dpo-1=chat-only --smooth 10 \
  --runs "results/$name/math-fixed" results/${AT}table3/math results/${AT}table2/dpo-1 \
  --panels entropy length math_reward chat_reward --compare math-fixed:chat-only math-fixed:math \
  --compare-metrics entropy entropy/first length --out "results/$name/curves.png"
