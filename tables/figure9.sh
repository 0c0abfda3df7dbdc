#!/usr/bin/env bash
# Figure 9: length and correctness. The paper's claim: early in training shorter responses are more often
# right, and the run with a fixed reference, which collapses, exploits that. Drawn from table1 and figure2.
#   bash tables/figure9.sh [laptop|gpu|paper]
set -euo pipefail
cd "$(dirname "$0")/.."
source tables/scales.sh "$@"
.venv/bin/python tables/report.py --runs "results/${AT}table1/dpo-1" "results/${AT}figure2/fixed-reference" --smooth 10 \
  --panels right_length wrong_length chosen_length rejected_length --out "results/${AT}figure9/curves.png" \
  --compare fixed-reference:dpo-1 --compare-metrics right_length wrong_length chosen_length rejected_length
