#!/usr/bin/env bash
# Not in the paper: what makes offline DPO lose? Three controls, each of which changes one thing. Beside them
# the rows of table1.sh (run that first).
#   bash tables/controls.sh [laptop|gpu|paper]
# ref-1: offline, but the reference follows the policy at every step, as online. ref-100: offline, but the reference is
# reset at step 100, as that of s = 100 is. nll: offline, with the likelihood of the chosen responses.
set -euo pipefail
cd "$(dirname "$0")/.."
source tables/scales.sh "$@"
name=${AT}controls out=results/${AT}controls table1=results/${AT}table1
must_have "$out"
{
  for seed in $SEEDS; do
    echo "$name/ref-1/$seed train_dpo.py --sync-every inf --sync-ref-every 1 --seed $seed $SHORT $DPO"
  done
  for seed in $SEEDS; do
    echo "$name/ref-100/$seed train_dpo.py --sync-every inf --sync-ref-every 100 --seed $seed $LONG $DPO"
  done
  for seed in $SEEDS; do
    echo "$name/nll/$seed train_dpo.py --sync-every inf --nll-coef 1 --seed $seed $SHORT $DPO"
  done
} | bash tables/run.sh
mapfile -t rows < <(have "$out" ref-1 nll)
.venv/bin/python tables/report.py --runs "$table1/dpo-inf" "${rows[@]/#/$out/}" "$table1/dpo-"{10,1} $UNTIL \
  --smooth 10 --panels policy_entropy kl_ref margin chosen_logp --out "$out/curves.png" \
  --table "$out/table.md" --compare "${rows[@]/%/:dpo-inf}" "${rows[@]/%/:dpo-1}"
for row in $(have "$out" ref-100); do
  .venv/bin/python tables/report.py --runs "$table1/dpo-inf" "$out/$row" "$table1/dpo-100" --smooth 10 \
    --panels policy_entropy kl_ref margin chosen_logp --out "$out/reset.png" \
    --table "$out/reset.md" --compare "$row:dpo-inf" "dpo-100:$row"
done
