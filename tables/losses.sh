#!/usr/bin/env bash
# Figures 6, 8 and 10 as the paper has them, semi-online and with accuracy: what it adds to DPO's loss. An entropy bonus
# (5e-4 is the largest that it tries), all pairs of a prompt without and with GRPO's loss, the chosen responses'
# likelihood. Beside dpo-10 of table1.sh (run that first).
#   bash tables/losses.sh [laptop|gpu|paper]
set -euo pipefail
cd "$(dirname "$0")/.."
source tables/scales.sh "$@"
name=${AT}losses out=results/${AT}losses
must_have "$out"
for seed in $SEEDS; do
  semi="train_dpo.py --sync-every 10 --seed $seed $SHORT $DPO"
  echo "$name/group-dpo-10/$seed $semi --pairing all"
  echo "$name/group-dpo-grpo-10/$seed $semi --pairing all --grpo-coef 0.01"
  echo "$name/nll-10/$seed $semi --nll-coef 1"
  for coef in 5e-4 1e-1; do
    echo "$name/entropy-$coef-10/$seed $semi --entropy-coef $coef"
  done
done | WHEN=$EARLY bash tables/run.sh
mapfile -t rows < <(have "$out" group-dpo-10 group-dpo-grpo-10 nll-10 entropy-{5e-4,1e-1}-10)
mapfile -t pairs < <(of_rows "dpo-10 ${rows[*]}" {group-dpo,nll,entropy-5e-4,entropy-1e-1}-10:dpo-10 \
  group-dpo-grpo-10:group-dpo-10)
.venv/bin/python tables/report.py --runs "results/${AT}table1/dpo-10" "${rows[@]/#/$out/}" --smooth 10 $UNTIL \
  --panels reward policy_entropy length --out "$out/curves.png" --table "$out/table.md" \
  --compare "${pairs[@]}" --compare-metrics reward entropy entropy/first policy_entropy length
