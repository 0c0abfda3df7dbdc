#!/usr/bin/env bash
# Table 3: online DPO on mathematics, on chat, on both in one run, and on mathematics after chat, each measured on
# both tasks. Not in the paper: both in one run at s = 10, and by GRPO. Chat alone is dpo-1 of table2.sh (run that
# first).
#   bash tables/table3.sh [laptop|gpu|paper]
set -euo pipefail
cd "$(dirname "$0")/.."
source tables/scales.sh "$@"
name=${AT}table3 out=results/${AT}table3
must_have "$out"
export CHAT=$REQUESTS
for seed in $SEEDS; do
  echo "$name/math/$seed train_dpo.py --sync-every 1 --seed $seed $SHORT --model $CHAT_MODEL $MATH_DPO"
  echo "$name/both/$seed train_dpo.py --sync-every 1 --seed $seed $SHORT $BOTH_DPO"
  echo "$name/both-10/$seed train_dpo.py --sync-every 10 --seed $seed $SHORT $BOTH_DPO"
  echo "$name/both-grpo/$seed train_grpo.py --sync-every 1 --seed $seed $SHORT $BOTH_GRPO"
  chat=runs/${AT}table2/dpo-1/$seed/export/$HALF
  echo "$name/chat-then-math/$seed train_dpo.py --sync-every 1 --seed $seed $SHORT --model $chat $MATH_DPO"
done | bash tables/run.sh
.venv/bin/python tables/report.py --names dpo-1=chat-only --smooth 10 \
  --runs results/${AT}table2/{seed,dpo-1} "$out/"{math,both,both-10,both-grpo,chat-then-math} \
  --panels math_reward chat_reward length entropy --out "$out/curves.png" \
  --chat-table "$out/table.md" --chat-step "$HALF" --paper table3 --compare {math,chat-only,both}:seed \
  both:{chat-only,math} both-10:both both-grpo:both chat-then-math:{chat-only,math}
