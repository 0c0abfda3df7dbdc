#!/usr/bin/env bash
# Not in the paper, which trains Llama alone: Table 1 with a model of the Qwen family, at half its length and
# with its learning rates. Beside it, the same steps of table1.sh (run that first).
#   bash tables/families.sh [laptop|gpu|paper]
set -euo pipefail
cd "$(dirname "$0")/.."
source tables/scales.sh "$@"
name=${AT}families out=results/${AT}families
{
  echo "$name/qwen-seed evaluate.py --model $FAMILY"
  for seed in $SEEDS; do
    for s in inf 10 1; do
      echo "$name/qwen-dpo-$s/$seed train_dpo.py --sync-every $s --seed $seed $SHORT $DPO --model $FAMILY"
    done
    echo "$name/qwen-grpo/$seed train_grpo.py --sync-every 1 --seed $seed $SHORT $GRPO --model $FAMILY"
  done
} | bash tables/run.sh
mapfile -t rows < <(have "$out" qwen-{dpo-inf,dpo-10,dpo-1,grpo})
mapfile -t pairs < <(of_rows "${rows[*]}" qwen-{dpo-inf,dpo-10,grpo}:qwen-dpo-1)
.venv/bin/python tables/report.py --runs "results/${AT}table1/"{seed,dpo-inf,dpo-10,dpo-1,grpo} \
  "$out/qwen-seed" "${rows[@]/#/$out/}" --smooth 10 $UNTIL --panels reward policy_entropy length \
  --out "$out/curves.png" --table "$out/table.md" --compare {dpo-inf,dpo-10,grpo}:dpo-1 "${pairs[@]}"
