#!/usr/bin/env bash
# Not in the paper: a sync whenever the policy has drifted by 0.015 nats a token from the generator, beside the
# fixed dial at s = 10 of table1.sh (run that first). 0.015 is about the drift of s = 10 at the end of its
# windows, so the numbers of syncs are close. The reference is copied every 10 steps in both.
#   bash tables/adaptive.sh [laptop|gpu|paper]
set -euo pipefail
cd "$(dirname "$0")/.."
source tables/scales.sh "$@"
name=${AT}adaptive out=results/${AT}adaptive table1=results/${AT}table1
must_have "$out"
for seed in $SEEDS; do
  echo "$name/drift-0.015/$seed train_dpo.py --sync-every inf --sync-when 0.015 --ahead 1 --sync-ref-every 10" \
    "--seed $seed $SHORT $DPO"
done | bash tables/run.sh
.venv/bin/python tables/report.py --runs "$table1/dpo-10" "$out/drift-0.015" "$table1/dpo-1" $UNTIL \
  --panels staleness reward policy_entropy length --out "$out/curves.png" --table "$out/table.md" \
  --compare drift-0.015:dpo-10 drift-0.015:dpo-1
