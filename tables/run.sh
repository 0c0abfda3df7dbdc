#!/usr/bin/env bash
# Train and evaluate runs: one a line on standard input, as NAME SCRIPT FLAGS. From anywhere:
#
#   echo mine/first train_dpo.py --sync-every 10 | bash tables/run.sh
#
# NAME is TABLE/ROW or TABLE/ROW/SEED. A run is made in runs/NAME, the checkpoints that it exports are
# evaluated, and its config, metrics and evaluations go into the archive results/TABLE/runs.jsonl.gz
# (archive.py), from which report.py draws. The line NAME evaluate.py --model MODEL ... only measures: exports of
# a run as their steps, another model as step 0.
#
# A run whose results are in the archive is left alone. To make it again, remove them:
#
#   python tables/archive.py remove results/mine/first
#
# A run that was cut short is made anew, so a script that was interrupted can be started again. What a run
# prints is in runs/NAME.log.
#
#   DRAW             if set, make no runs: the tables' scripts then draw from results/ as it is (make figures)
#   JOBS             runs side by side (2: with a thread each they use two cores better than one does)
#   OMP_NUM_THREADS  threads of each (1)
#   RANKS            processes of each (1)
#   DATA, N          problems to evaluate on (tiny@test), samples of each (10; 0 for no problems)
#   WHEN             steps whose checkpoints are evaluated, as "25 50 100" (all that the run exports)
#   EVALUATE         more flags of evaluate.py (none)
#   CHAT, REWARD_MODEL  requests to answer, too, once each (none), and what scores the answers
set -Eeuo pipefail # -E: the trap below holds in functions, too
cd "$(dirname "$0")/.."
export PATH=$PWD/.venv/bin:$PATH OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

EVALUATE=${EVALUATE:-}
# shellcheck disable=SC2086 # EVALUATE's words
evaluate() { # a file without its ending, where {} is the last part of a checkpoint's path; checkpoints
  local out=$1
  shift
  [ "${N:-10}" = 0 ] ||
    python evaluate.py --model "$@" --data "${DATA:-tiny@test}" --n "${N:-10}" --out "$out.json" $EVALUATE
  [ -n "${CHAT:-}" ] || return 0
  python evaluate.py --model "$@" --data "chat=$CHAT" --reward-model "$REWARD_MODEL" --n 1 \
    --answers "$out.answers.jsonl" --out "$out.chat.json" $EVALUATE
  [[ "$CHAT" != tiny@* ]] || for model in "$@"; do
    python tiny/chat.py --truth "${out//\{\}/$(basename "$model")}.answers.jsonl"
  done
}

if [ -n "${DRAW:-}" ]; then
  cat >/dev/null # who writes the lines would fail if nobody read them
  exit
fi
[ -z "${CHAT:-}" ] || : "${REWARD_MODEL:?run.sh: CHAT needs a REWARD_MODEL}"
if [ "${1:-}" != --one ]; then
  exec xargs -P "${JOBS:-2}" -d '\n' -n 1 bash tables/run.sh --one
fi

read -r name command <<<"$2" # a line, from xargs
if [ -z "$name" ] || [ -z "$command" ]; then # of which rm would take all runs for one
  echo "run.sh: a line is NAME SCRIPT FLAGS, not '$2'" >&2
  exit 255
fi
run=runs/$name kept=results/$name
fail() { # 255: xargs starts no more
  echo "$name: $1" >&3
  exit 255
}
exec 3>&1
has=$(python tables/archive.py has "$kept" "$command" 2>&1) || fail "$has"
[ "$has" != yes ] || exit 0
mkdir -p "$(dirname "$run")"
exec 9>"$run.lock" # held as long as any process of the run lives
flock -n 9 || fail "is being made by another process"
rm -rf "$run"
echo "$(date +%T) $name: $command"
exec >"$run.log" 2>&1
trap 'fail "failed, see $run.log"' ERR

if [[ "$command" == "evaluate.py --model "* ]]; then
  mkdir -p "$run/eval"
  read -ra models <<<"${command#evaluate.py --model }"
  at=0
  [[ "$command" != */export/* ]] || at={}
  evaluate "$run/eval/$at" "${models[@]}"
else
  # shellcheck disable=SC2086 # the command's words
  torchrun --standalone --nproc-per-node "${RANKS:-1}" $command --run-dir "$run"
  [[ "$command" != *chat=tiny* ]] || python tiny/chat.py --truth "$run"
  mkdir -p "$run/eval"
  checkpoints=()
  for checkpoint in "$run"/export/*; do
    [[ -n "${WHEN:-}" && " $WHEN " != *" $(basename "$checkpoint") "* ]] || checkpoints+=("$checkpoint")
  done
  evaluate "$run/eval/{}" "${checkpoints[@]}"
fi
python tables/archive.py add "$kept" "$run" "$command" # last: only whole results are kept
