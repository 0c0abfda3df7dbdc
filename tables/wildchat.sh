#!/usr/bin/env bash
# Chat on real inputs, on a CPU: SmolLM2-135M-Instruct, people's requests, and a small reward model trained on
# people's choices. Half an hour on two cores.
#   bash tables/wildchat.sh [WILDCHAT [PREFERENCES [HELD_OUT]]]
# Each is a file, or a name on the Hub. First make the model: python tiny/smollm2.py --out models/smollm2
set -euo pipefail
cd "$(dirname "$0")/.."
requests=${1:-allenai/WildChat-1M} preferences=${2:-Anthropic/hh-rlhf} held_out=${3:-$requests@test}
export OMP_NUM_THREADS=2 # one run, both cores
model=models/smollm2 reward=models/smollm2_reward out=results/wildchat
[ -n "${DRAW:-}" ] || [ -e $reward/config.json ] ||
  .venv/bin/python tiny/preferences.py --model $model --data "$preferences" --out $reward
echo "wildchat/dpo train_dpo.py --sync-every 5 --steps 30 --model $model --data chat=$requests" \
  "--reward-model $reward --prompts-per-step 8 --samples-per-prompt 8 --max-new-tokens 64 --lr 1e-5" \
  "--dtype bfloat16" | N=0 bash tables/run.sh
for which in seed:$model trained:runs/wildchat/dpo; do
  name=${which%%:*}
  [ -e "$out/$name.json" ] ||
    .venv/bin/python evaluate.py --model "${which#*:}" --data "chat=$held_out" --n 1 --reward-model $reward \
      --dtype bfloat16 --max-new-tokens 128 --answers "$out/$name.answers.jsonl" --out "$out/$name.json"
done
.venv/bin/python tables/report.py --runs $out/dpo --panels reward length entropy staleness \
  --out $out/curves.png
