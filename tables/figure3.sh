#!/usr/bin/env bash
# Figure 3: next-token entropy and length of the rollouts over training. The paper's claim: entropy falls in every
# regime but offline, where rollouts come from the seed model and cannot show it; length stays. Drawn from table1.sh's
# runs.
#   bash tables/figure3.sh [laptop|gpu|paper]
set -euo pipefail
cd "$(dirname "$0")/.."
source tables/scales.sh "$@"
.venv/bin/python tables/report.py --runs "$TABLE1/"{dpo-inf,dpo-100,dpo-10,dpo-1,grpo} \
  --smooth 10 --panels entropy reward length --out "results/${AT}figure3/curves.png"
