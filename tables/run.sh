#!/usr/bin/env bash
# Train and evaluate runs: one a line on standard input, as DIRECTORY SCRIPT FLAGS. From the repository's root.
#
#   echo runs/a train_dpo.py --sync-every 10 | bash tables/run.sh
#
# Every export is evaluated into DIRECTORY/eval/STEP.json. A run that has its evaluations is left alone and one that was cut
# short is done again, so a script that was interrupted can be started again. What a run prints goes to DIRECTORY.log.
#
#   JOBS=2           runs side by side; with 1 thread each they share 2 cores better than one run with 2 threads uses them
#   OMP_NUM_THREADS  threads of each (default 1 on a CPU)
#   RANKS=1          processes of each
#   DATA=tiny@test   what to evaluate on
#   N=10             samples a problem
set -euo pipefail
export PATH=$PWD/.venv/bin:$PATH OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} RANKS=${RANKS:-1} DATA=${DATA:-tiny@test} N=${N:-10}

run() {
  local directory=$1
  shift
  if [ -e "$directory/done" ]; then return; fi
  echo "$(date +%T) $directory: $*"
  rm -rf "$directory"
  mkdir -p "$(dirname "$directory")"
  {
    torchrun --standalone --nproc-per-node "$RANKS" "$@" --run-dir "$directory"
    for checkpoint in "$directory"/export/*; do
      python evaluate.py --model "$checkpoint" --data "$DATA" --n "$N" --out "$directory/eval/$(basename "$checkpoint").json"
    done
  } >"$directory.log" 2>&1 || {
    echo "$directory: failed, see $directory.log" >&2
    return 255 # xargs starts nothing more
  }
  touch "$directory/done"
}
export -f run
xargs -P "${JOBS:-2}" -L 1 bash -c 'run "$@"' run
