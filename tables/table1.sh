#!/usr/bin/env bash
# Table 1: accuracy on mathematics of the seed model, of DPO over the dial, and of GRPO; and what it costs.
#   bash tables/table1.sh [laptop|gpu|paper]        (laptop: five seeds, two hours and a half on 2 cores)
set -euo pipefail
cd "$(dirname "$0")/.."
source tables/scales.sh "$@"
name=${AT}table1 out=results/${AT}table1
{
  echo "$name/seed evaluate.py --model $MODEL"
  for s in inf 10 1 100 5; do # the ends of the gap first, for a machine that is lent
    for seed in $SEEDS; do
      echo "$name/dpo-$s/$seed train_dpo.py --sync-every $s --seed $seed $LONG $DPO"
    done
  done
  # Half the steps, but at the paper's size: it has levelled off by then, and its steps take twice the time.
  [ "$AT" = paper/ ] && steps=$LONG || steps=$SHORT
  for seed in $SEEDS; do
    echo "$name/grpo/$seed train_grpo.py --sync-every 1 --seed $seed $steps $GRPO"
  done
} | WHEN=$EARLY EVALUATE="${EVALUATE:-} --greedy True" bash tables/run.sh
mapfile -t rows < <(have "$out" dpo-inf dpo-100 dpo-10 dpo-5 dpo-1 grpo)
mapfile -t pairs < <(of_rows "${rows[*]}" dpo-inf:dpo-10 dpo-10:dpo-1 grpo:dpo-1 dpo-100:dpo-10 dpo-5:dpo-10)
.venv/bin/python tables/report.py --runs "$out/seed" "${rows[@]/#/$out/}" --smooth 10 \
  --panels reward entropy policy_entropy length staleness --out "$out/curves.png" \
  --table "$out/table.md" --paper table1 --compare "${pairs[@]}"
.venv/bin/python tables/costs.py --runs "${rows[@]/#/$out/}" --out "results/${AT}efficiency/costs.png" \
  --seconds "results/${AT}efficiency/seconds.json"
[ -n "$AT" ] || # the earlier model's runs, which some figures stand beside
  .venv/bin/python tables/report.py --runs results/earlier/{seed,dpo-inf,dpo-100,dpo-10,dpo-1,grpo} \
    --smooth 10 --panels reward entropy policy_entropy length staleness --out results/earlier/curves.png \
    --table results/earlier/table.md --compare dpo-{inf,100}:dpo-10 dpo-10:dpo-1 grpo:dpo-1
