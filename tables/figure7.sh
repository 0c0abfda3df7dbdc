#!/usr/bin/env bash
# Figure 7: the same model trained on mathematics and on chat: entropy, and the length of its responses. The
# runs are table3.sh's and table2.sh's (run those first).
#   bash tables/figure7.sh [laptop|gpu|paper]
set -euo pipefail
cd "$(dirname "$0")/.."
source tables/scales.sh "$@"
.venv/bin/python tables/report.py --runs results/${AT}table3/{math,both} results/${AT}table2/dpo-1 \
  --names dpo-1=chat-only --smooth 10 --panels entropy length math_reward chat_reward \
  --compare {math:chat-only,both:math,both:chat-only} --compare-metrics entropy length \
  --out "results/${AT}figure7/curves.png"
