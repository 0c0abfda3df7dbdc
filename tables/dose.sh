#!/usr/bin/env bash
# Not in the paper: how much does offline DPO lose, by the share of good answers that the seed model gives?
# Seed models by tiny/make.py; the lowest dose is tiny/llama, whose runs are those of table1.sh.
#   bash tables/dose.sh        (laptop only)
set -euo pipefail
cd "$(dirname "$0")/.."
source tables/scales.sh laptop
for good in 10 42 25; do
  [ -d "models/good-$good" ] || .venv/bin/python tiny/make.py --only good --good "0.$good" --out "models/good-$good"
done
for good in 10 42 25; do
  model=models/good-$good
  echo "dose/seed-$good evaluate.py --model $model"
  for s in inf 10; do
    for seed in $SEEDS; do
      echo "dose/good-$good-$s/$seed train_dpo.py --model $model --sync-every $s --seed $seed $SHORT $DPO"
    done
  done
done | WHEN=100 bash tables/run.sh
