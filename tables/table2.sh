#!/usr/bin/env bash
# Table 2: chat, rewarded by a reward model. The seed model, DPO over the dial, and GRPO: learned reward, true
# reward (where it is known: tiny/chat.py), length, and the Elo of all rows against each other.
#   bash tables/table2.sh [laptop|gpu|paper]
set -euo pipefail
cd "$(dirname "$0")/.."
source tables/scales.sh "$@"
name=${AT}table2 out=results/${AT}table2
{
  echo "$name/seed evaluate.py --model $CHAT_MODEL"
  for seed in $SEEDS; do
    for s in inf 10 5 1; do
      echo "$name/dpo-$s/$seed train_dpo.py --sync-every $s --seed $seed $LONG $CHAT_DPO"
    done
    echo "$name/grpo/$seed train_grpo.py --sync-every 1 --seed $seed $LONG $CHAT_GRPO"
  done
} | CHAT=$REQUESTS bash tables/run.sh
.venv/bin/python tables/report.py --runs "$out/"{seed,dpo-inf,dpo-10,dpo-5,dpo-1,grpo} --smooth 10 \
  --panels reward ${TRUTH:-} length entropy --out "$out/curves.png" \
  --chat-table "$out/table.md" --chat-step "$LAST" --paper table2 \
  --compare {dpo-inf,dpo-10,dpo-5,grpo}:dpo-1 {dpo-inf,dpo-1,grpo}:seed
