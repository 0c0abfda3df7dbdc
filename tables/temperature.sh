#!/usr/bin/env bash
# Not in the paper: does it depend on the temperature of the answers whether the reward model is hacked? The
# checkpoints of table2.sh (run that first) answer the test requests as they are evaluated, at 0.6, and as they are
# trained, at 1: learned and true reward.
#   bash tables/temperature.sh [laptop|gpu|paper]
set -euo pipefail
cd "$(dirname "$0")/.."
source tables/scales.sh "$@"
name=${AT}temperature out=results/${AT}temperature
must_have "$out"
for sampling in "0.6 --top-p 0.9" "1 --top-p 1"; do
  at=at-${sampling%% *}
  {
    echo "$name/seed-$at evaluate.py --model $CHAT_MODEL"
    for row in dpo-inf dpo-1 grpo; do
      for seed in $SEEDS; do
        echo "$name/$row-$at/$seed evaluate.py --model" \
          "$(printf "runs/${AT}table2/$row/$seed/export/%s " $FOUR)"
      done
    done
  } | CHAT=$REQUESTS N=0 EVALUATE="${EVALUATE:-} --temperature $sampling" bash tables/run.sh
done
mapfile -t rows < <(have "$out" {dpo-inf,dpo-1,grpo}-at-{0.6,1})
.venv/bin/python tables/temperature.py --runs "$out/"seed-at-{0.6,1} "${rows[@]/#/$out/}" --out "$out/table.md"
