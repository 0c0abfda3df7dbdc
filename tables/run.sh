#!/usr/bin/env bash
# Train and evaluate runs: one a line on standard input, as NAME SCRIPT FLAGS. From the repository's root:
#
#   echo mine/first train_dpo.py --sync-every 10 | bash tables/run.sh
#
# A run is made in runs/NAME, every checkpoint that it exports is evaluated, and what is small of it (config, metrics,
# evaluations) is copied to results/NAME, from where report.py draws. A run that has its results is left alone, and one
# that was cut short is made anew: a script that was interrupted can be started again. The rest is in runs/NAME.log.
#
#   JOBS=2           runs side by side: two with a thread each use two cores better than one run with two threads
#   OMP_NUM_THREADS  threads of each (1)
#   RANKS            processes of each (1)
#   DATA, N          what to evaluate on (tiny@test), samples a problem (10; 0 for no evaluation)
set -euo pipefail
export PATH=$PWD/.venv/bin:$PATH OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [ "${1:-}" != --one ]; then
  exec xargs -P "${JOBS:-2}" -L 1 bash "$0" --one
fi

name=$2 run=runs/$2 # what xargs calls, a line at a time
shift 2
if [ -e "results/$name/metrics.jsonl" ]; then exit; fi
rm -rf "$run"
mkdir -p "$(dirname "$run")" "results/$name"
echo "$(date +%T) $name: $*"
exec 3>&1 >"$run.log" 2>&1
trap 'echo "$name: failed, see $run.log" >&3; exit 255' ERR # 255: xargs starts no more

torchrun --standalone --nproc-per-node "${RANKS:-1}" "$@" --run-dir "$run"
mkdir -p "$run/eval"
for checkpoint in "$run"/export/*; do
  [ "${N:-10}" != 0 ] || break
  step=$(basename "$checkpoint")
  python evaluate.py --model "$checkpoint" --data "${DATA:-tiny@test}" --n "${N:-10}" --out "$run/eval/$step.json"
done
cp -r "$run/eval" "$run/config.json" "results/$name/"
cp "$run/metrics.jsonl" "results/$name/" # last: it says that the results are whole
