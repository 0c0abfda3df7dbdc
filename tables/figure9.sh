#!/usr/bin/env bash
# Figure 9: length and correctness. The paper's claim: early in training shorter responses are more often
# right, and the run with a fixed reference, which collapses, exploits that. (b) Drawn from table1 and figure2. (a) The
# answers of that run's first checkpoint: it needs figure2's exports, which are not in git.
#   bash tables/figure9.sh [laptop|gpu|paper]
set -euo pipefail
cd "$(dirname "$0")/.."
source tables/scales.sh "$@"
name=${AT}figure9
for seed in $SEEDS; do
  first=$name/first/$seed
  echo "$first evaluate.py --model runs/${AT}figure2/fixed-reference/$seed/export/${FOUR%% *}" |
    EVALUATE="${EVALUATE:-} --answers runs/$first/eval/{}.answers.jsonl" bash tables/run.sh
done
.venv/bin/python tables/lengths.py --runs "results/$name/first" --out "results/$name/lengths.png"
.venv/bin/python tables/report.py --runs "results/${AT}table1/dpo-1" "results/${AT}figure2/fixed-reference" --smooth 10 \
  --panels right_length wrong_length chosen_length rejected_length --out "results/$name/curves.png" \
  --compare fixed-reference:dpo-1 --compare-metrics right_length wrong_length chosen_length rejected_length
