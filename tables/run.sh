#!/usr/bin/env bash
# Train and evaluate runs: one a line on standard input, as NAME SCRIPT FLAGS. From anywhere:
#
#   echo mine/first train_dpo.py --sync-every 10 | bash tables/run.sh
#
# A run is made in runs/NAME, every checkpoint that it exports is evaluated, and what is small of it (config,
# metrics, evaluations) is copied to results/NAME, from where report.py draws. A run that has its results is
# left alone: delete results/NAME to make it again. One that was cut short is made anew, so a script that was
# interrupted can be started again. What a run prints is in runs/NAME.log.
#
#   JOBS             runs side by side (2: with a thread each they use two cores better than one does)
#   OMP_NUM_THREADS  threads of each (1)
#   RANKS            processes of each (1)
#   DATA, N          problems to evaluate on (tiny@test), samples of each (10; 0 for no evaluation)
#   CHAT, REWARD_MODEL  requests to answer, too, once each (none), and what scores the answers
set -Eeuo pipefail # -E: the trap below holds in functions, too
cd "$(dirname "$0")/.."
export PATH=$PWD/.venv/bin:$PATH OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

evaluate() { # a checkpoint, and the files to write without their endings
  python evaluate.py --model "$1" --data "${DATA:-tiny@test}" --n "${N:-10}" --out "$2.json"
  [ -n "${CHAT:-}" ] || return 0
  python evaluate.py --model "$1" --data "chat=$CHAT" --reward-model "$REWARD_MODEL" --n 1 \
    --answers "$2.answers.jsonl" --out "$2.chat.json"
  [[ "$CHAT" != tiny@* ]] || python tiny/chat.py --truth "$2.answers.jsonl"
}

[ -z "${CHAT:-}" ] || : "${REWARD_MODEL:?run.sh: CHAT needs a REWARD_MODEL}"
if [ "${1:-}" = --evaluate ]; then # a checkpoint that was not trained here, unless it has been
  [ -e "$3.json" ] || evaluate "$2" "$3"
  exit
fi
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
if [ -e "$kept/command.txt" ]; then
  [ "$(cat "$kept/command.txt")" = "$command" ] || fail "$kept was made by another command; delete it"
  exit
fi
[ -z "$(find "$kept" -mindepth 2 -name command.txt 2>/dev/null)" ] || fail "$kept holds other runs"
mkdir -p "$(dirname "$run")"
exec 9>"$run.lock" # held as long as any process of the run lives
flock -n 9 || fail "is being made by another process"
rm -rf "$run" "$kept"
echo "$(date +%T) $name: $command"
exec >"$run.log" 2>&1
trap 'fail "failed, see $run.log"' ERR

# shellcheck disable=SC2086 # the command's words
torchrun --standalone --nproc-per-node "${RANKS:-1}" $command --run-dir "$run"
[[ "$command" != *chat=tiny* ]] || python tiny/chat.py --truth "$run"
mkdir -p "$run/eval"
for checkpoint in "$run"/export/*; do
  [ "${N:-10}" != 0 ] || break
  evaluate "$checkpoint" "$run/eval/$(basename "$checkpoint")"
done
mkdir -p "$kept"
cp -r "$run"/{config.json,metrics.jsonl,eval} "$kept/"
echo "$command" >"$kept/command.txt" # last: it says that the results are whole
