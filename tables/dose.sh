#!/usr/bin/env bash
# Not in the paper: what offline DPO loses, by the share of good answers that the seed model gives. Each seed
# model is tiny/llama with 300 steps more (tiny/make.py --only good); 4 % is the share that it has already.
#   bash tables/dose.sh        (laptop only)
set -euo pipefail
cd "$(dirname "$0")/.."
source tables/scales.sh laptop
must_have results/dose
for good in 04 42 10; do
  [ -n "${DRAW:-}" ] || [ -d "models/good-$good" ] ||
    .venv/bin/python tiny/make.py --only good --good "0.$good" --out "models/good-$good"
done
for good in 04 42 10; do
  model=models/good-$good
  echo "dose/seed-$good evaluate.py --model $model"
  for s in inf 10; do
    for seed in $SEEDS; do
      echo "dose/good-$good-$s/$seed train_dpo.py --model $model --sync-every $s --seed $seed $SHORT $DPO"
    done
  done
done | bash tables/run.sh
.venv/bin/python tables/dose.py --out results/dose/table.md
