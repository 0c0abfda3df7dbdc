#!/usr/bin/env bash
# Table 2: chat, rewarded by a reward model. The seed model, DPO over the dial, and GRPO: learned reward, true
# reward (where it is known: tiny/chat.py), length, and the Elo of all rows against each other.
# s = 100, whose first sync comes when the other rows end, takes twice their steps, and so does s = 10 beside it:
# long.md.
#   bash tables/table2.sh [laptop|gpu|paper]
set -euo pipefail
cd "$(dirname "$0")/.."
source tables/scales.sh "$@"
name=${AT}table2 out=results/${AT}table2
{
  echo "$name/seed evaluate.py --model $CHAT_MODEL"
  for seed in $SEEDS; do
    for s in 100 10; do
      echo "$name/dpo-$s/$seed train_dpo.py --sync-every $s --seed $seed $LONG $CHAT_DPO"
    done
    for s in inf 5 1; do
      echo "$name/dpo-$s/$seed train_dpo.py --sync-every $s --seed $seed $SHORT $CHAT_DPO"
    done
    echo "$name/grpo/$seed train_grpo.py --sync-every 1 --seed $seed $SHORT $CHAT_GRPO"
  done
} | CHAT=$REQUESTS bash tables/run.sh
.venv/bin/python tables/report.py --runs "$out/"{seed,dpo-inf,dpo-10,dpo-5,dpo-1,grpo} --smooth 10 $UNTIL \
  --panels reward ${TRUTH:-} length entropy --out "$out/curves.png" \
  --chat-table "$out/table.md" --chat-step "$HALF" --paper table2 \
  --compare {dpo-inf,dpo-10,dpo-5,grpo}:dpo-1 {dpo-inf,dpo-10,dpo-5,dpo-1,grpo}:seed
.venv/bin/python tables/report.py --runs "$out/"{seed,dpo-100,dpo-10} --smooth 10 \
  --panels reward ${TRUTH:-} length entropy --out "$out/long.png" --chat-table "$out/long.md" \
  --chat-step "$LAST" --compare dpo-100:dpo-10 dpo-{100,10}:seed
