#!/usr/bin/env bash
# The dial at a glance: the paper's figure 1, a diagram; and DPO online, semi-online and offline over their
# first steps, drawn from the runs of table1.sh (run that first).
#   bash tables/dial.sh [laptop|gpu|paper]
set -euo pipefail
cd "$(dirname "$0")/.."
source tables/scales.sh "$@"
.venv/bin/python tables/figure1.py --out "results/${AT}dial/diagram.png"
.venv/bin/python tables/report.py --runs "results/${AT}table1/"{dpo-inf,dpo-10,dpo-1} $UNTIL \
  --panels reward entropy length staleness logp_gap --out "results/${AT}dial/curves.png"
