#!/usr/bin/env bash
# Figure 3: next-token entropy and length of the rollouts over training. The paper's claim: entropy falls in every
# regime but offline, where rollouts come from the seed model and cannot show it; length stays. Drawn from table1.sh's
# runs, up to the steps that all have.
#   bash tables/figure3.sh [laptop|gpu|paper]
set -euo pipefail
cd "$(dirname "$0")/.."
source tables/scales.sh "$@"
table1=results/${AT}table1
mapfile -t rows < <(have "$table1" dpo-inf dpo-100 dpo-10 dpo-1 grpo)
mapfile -t pairs < <(of_rows "${rows[*]}" {dpo-100,dpo-10,dpo-1,grpo}:dpo-inf)
.venv/bin/python tables/report.py --runs "${rows[@]/#/$table1/}" --smooth 10 $UNTIL --panels entropy reward length \
  --compare "${pairs[@]}" --compare-metrics entropy length --out "results/${AT}figure3/curves.png"
